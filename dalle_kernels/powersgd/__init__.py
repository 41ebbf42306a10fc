"""PowerSGD's linear algebra (paper App. E; see README.md beside this file)."""

from dalle_kernels.powersgd.ops import orthogonalize

__all__ = ["orthogonalize"]
