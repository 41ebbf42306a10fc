"""Cross-entropy of a linear layer's logits without storing the logits."""

from dalle_kernels.cross_entropy.ops import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
