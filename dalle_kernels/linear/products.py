"""Matrix products on a CPU for the families that are made of them: by this family's kernel, or by torch's.

Both sum in float32 and round once. The kernel serves AVX2, where it has been measured; elsewhere torch's do.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dalle_kernels import _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PANEL_FLOATS = 1 << 19  # of a 16-bit operand that torch multiplies in float32


@cache
def is_compiled() -> bool:
    """Whether :func:`product` takes the compiled kernel."""
    return _native.unavailable("cpu") is None and _native.instruction_sets()[2] == "avx2"


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
    dtype = out.dtype if out is not None else dtype or a.dtype
    if is_compiled():
        if out is None:
            out = torch.empty((a.shape[0], b.shape[1]), dtype=dtype)
        wide = None if bias is None else bias.to(torch.float32).contiguous()
        _native.call("product", out.device, a, b, wide, out, accumulate)
        return out
    if a.dtype == b.dtype == dtype:
        if accumulate:
            return out.addmm_(a, b)
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias.to(dtype), a, b, out=out)
    sums = out if dtype == torch.float32 and out is not None else torch.empty(a.shape[0], b.shape[1])
    _add_widened(a, b, sums if accumulate else sums.zero_())
    if bias is not None:
        sums += bias
    return sums.to(dtype) if out is None else out.copy_(sums)


def _add_widened(a: Tensor, b: Tensor, sums: Tensor) -> None:
    """Adds torch's product, converting a panel of ``a`` at a time, or of ``b`` where only that is of 16 bits."""
    if a.dtype == torch.float32:
        steps = max(1, _PANEL_FLOATS // max(1, b.shape[1]))
        for part, other in zip(a.split(steps, 1), b.split(steps)):
            sums.addmm_(part, other.to(torch.float32))
    else:
        rows, wide = max(1, _PANEL_FLOATS // max(1, a.shape[1])), b.to(torch.float32)
        for part, to in zip(a.split(rows), sums.split(rows)):
            to.addmm_(part.to(torch.float32), wide)
