"""Decode steps through a whole stack of transformer layers (see README.md beside this file)."""

from dalle_kernels.transformer.ops import decode_layers
from dalle_kernels.transformer.reference import LayerWeights

__all__ = ["LayerWeights", "decode_layers"]
