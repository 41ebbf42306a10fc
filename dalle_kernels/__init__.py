"""Kernels of DALL-E's two-stage system as PyTorch ops (arXiv 2102.12092), compiled where possible.

Every op has a plain PyTorch reference and, where this machine has it, a compiled provider; a call takes the fastest
that can serve it. :func:`use` forces one, :func:`explain` and ``python -m dalle_kernels`` tell which one runs and why.
"""

from __future__ import annotations

from dalle_kernels._dispatch import Explanation, ProviderError, explain, ops, use
from dalle_kernels._native import NativeError
from dalle_kernels._version import __version__
from dalle_kernels.float16.ops import (
    decode_fp0610,
    decode_fp169,
    encode_fp0610,
    encode_fp0610_checked,
    encode_fp169,
    encode_fp169_checked,
)

__all__ = [
    "Explanation",
    "NativeError",
    "ProviderError",
    "__version__",
    "decode_fp0610",
    "decode_fp169",
    "encode_fp0610",
    "encode_fp0610_checked",
    "encode_fp169",
    "encode_fp169_checked",
    "explain",
    "ops",
    "use",
]
