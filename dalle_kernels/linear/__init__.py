"""A linear layer for few rows, as in the steps of generation (see README.md beside this file)."""

from dalle_kernels.linear.ops import Linear, linear

__all__ = ["Linear", "linear"]
