"""Kernels of DALL-E's two-stage system as PyTorch ops (arXiv 2102.12092), compiled where possible.

Every op has a plain PyTorch reference and, where this machine has it, a compiled provider; a call takes the fastest
that can serve it. :func:`use` forces one, :func:`explain` and ``python -m dalle_kernels`` tell which one runs and why.
"""

from __future__ import annotations

from dalle_kernels import philox
from dalle_kernels._dispatch import Explanation, ProviderError, explain, ops, use
from dalle_kernels._native import NativeError
from dalle_kernels._version import __version__
from dalle_kernels.adamw.optimizer import AdamW16
from dalle_kernels.attention.cache import KVCache
from dalle_kernels.attention.decode import decode_attention
from dalle_kernels.attention.modules import SparseSelfAttention
from dalle_kernels.attention.ops import sparse_attention
from dalle_kernels.attention.pattern import AttentionPattern
from dalle_kernels.cross_entropy.ops import linear_cross_entropy
from dalle_kernels.float16.ops import (
    decode_fp0610,
    decode_fp169,
    encode_fp0610,
    encode_fp0610_checked,
    encode_fp169,
    encode_fp169_checked,
)
from dalle_kernels.grad_scale.modules import ScaledResBlock, scaled_resblock
from dalle_kernels.grad_scale.ops import filter_cast_unscale, scale_cast_filter
from dalle_kernels.grad_scale.scales import GradScales, squared_norms

# The function gumbel_softmax takes the place of the folder of that name as an attribute of this package; import from
# the folder by `from dalle_kernels.gumbel_softmax.ops import ...`, which goes by sys.modules.
from dalle_kernels.gumbel_softmax.ops import gumbel_codebook, gumbel_softmax, gumbel_softmax_kl

# The functions linear and mlp, like gumbel_softmax, take the places of their folders.
from dalle_kernels.linear.ops import Linear, linear
from dalle_kernels.logit_laplace.ops import logit_laplace_loss, map_pixels, unmap_pixels
from dalle_kernels.mlp.ops import mlp
from dalle_kernels.powersgd.hooks import PowerSGD
from dalle_kernels.powersgd.ops import orthogonalize
from dalle_kernels.powersgd.shards import shard_longer_axis
from dalle_kernels.transformer.ops import decode_layers
from dalle_kernels.transformer.reference import LayerWeights

__all__ = [
    "AdamW16",
    "AttentionPattern",
    "Explanation",
    "GradScales",
    "KVCache",
    "LayerWeights",
    "Linear",
    "NativeError",
    "PowerSGD",
    "ProviderError",
    "ScaledResBlock",
    "SparseSelfAttention",
    "__version__",
    "decode_attention",
    "decode_fp0610",
    "decode_fp169",
    "decode_layers",
    "encode_fp0610",
    "encode_fp0610_checked",
    "encode_fp169",
    "encode_fp169_checked",
    "explain",
    "filter_cast_unscale",
    "gumbel_codebook",
    "gumbel_softmax",
    "gumbel_softmax_kl",
    "linear",
    "linear_cross_entropy",
    "logit_laplace_loss",
    "map_pixels",
    "mlp",
    "ops",
    "orthogonalize",
    "philox",
    "scale_cast_filter",
    "scaled_resblock",
    "shard_longer_axis",
    "sparse_attention",
    "squared_norms",
    "unmap_pixels",
    "use",
]
