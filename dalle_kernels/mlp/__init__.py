"""A transformer's MLP, two linear layers with GELU between them, for training."""

from dalle_kernels.mlp.ops import mlp

__all__ = ["mlp"]
