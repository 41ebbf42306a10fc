"""Matrix products on a CPU for the families that are made of them: by this family's kernel, or by torch's.

Both sum in float32 and round once. torch's serve the portable build, and operands and results of one dtype on AVX-512,
where torch has products for every dtype and ours have not been measured beside them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dalle_kernels import _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def is_compiled(alike: bool) -> bool:
    """Whether :func:`product` takes the compiled kernel, for tensors ``alike`` in dtype or for others."""
    if _native.unavailable("cpu") is not None:
        return False
    instruction_set = _native.instruction_sets()[2]
    return instruction_set == "avx2" or (not alike and instruction_set != "portable")


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """``a @ b + bias`` of CPU tensors in :data:`DTYPES`, without a gradient.

    Args:
        a: ``[rows, depth]``, any strides.
        b: ``[depth, columns]``, any strides.
        bias: ``[columns]``, or None.
        dtype: of the result, by default a's.
        out: ``[rows, columns]``, which takes the result. Its columns lie side by side.
        accumulate: adds the product to ``out``, which is float32 then. Without a bias.
    """
    if out is None:
        out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype or a.dtype)
    alike = a.dtype == b.dtype == out.dtype
    if is_compiled(alike):
        wide = None if bias is None else bias.to(torch.float32).contiguous()
        _native.call("product", out.device, a, b, wide, out, accumulate)
        return out
    if not alike:
        a, b = a.to(torch.float32), b.to(torch.float32)
    if accumulate:
        return out.addmm_(a, b)
    result = torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)
    return out.copy_(result)
