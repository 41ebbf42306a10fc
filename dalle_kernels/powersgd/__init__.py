"""PowerSGD: gradients summed between machines at low rank (paper 2.5 and App. E; see README.md beside this file)."""

from dalle_kernels.powersgd.hooks import PowerSGD
from dalle_kernels.powersgd.ops import orthogonalize
from dalle_kernels.powersgd.shards import shard_longer_axis

__all__ = ["PowerSGD", "orthogonalize", "shard_longer_axis"]
