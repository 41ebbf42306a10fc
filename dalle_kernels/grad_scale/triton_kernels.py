"""Triton kernels of the casts around a resblock: one launch for many tensors; they give the reference's bits.

Floor: bytes. Each element is read and written once, 2 and 4 bytes or 4 and 2; a multiplication or division, a cast and
a comparison an element are far below that. The flag is filled by a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import configuration
from dalle_kernels._triton_tables import DTYPES, address, located, table
from dalle_kernels.grad_scale.reference import compute_dtype


@triton.jit
def _filtered(values):
    """The values with 0 for what is not finite, and which those are."""
    finite = tl.abs(values.to(tl.float32)) < float("inf")
    return tl.where(finite, values, 0.0), finite == 0


@triton.jit
def _cast_block(input, output, index, mask, factor, nonfinite, UNSCALE: tl.constexpr):
    values = tl.load(input + index, mask)
    if UNSCALE:
        values, found = _filtered(values)
        values = tl.div_rn(values.to(tl.float32), factor)
    else:
        values, found = _filtered((values.to(tl.float32) * factor).to(output.dtype.element_ty))
    if mask is not None:
        found = found & mask
    tl.store(output + index, values, mask)
    # Whoever meets one stores the same value.
    tl.store(nonfinite, True, tl.max(found.to(tl.int32), 0) != 0)


@triton.jit(do_not_specialize=["tensors"])
def _cast(numbers, owners, tensors, scale, nonfinite, INPUT: tl.constexpr, OUTPUT: tl.constexpr,
          UNSCALE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tensor, first, count = located(numbers, owners, tensors, BLOCK)
    input = address(numbers, tensors, tensor, 0, INPUT, ALIGNED) + first
    output = address(numbers, tensors, tensor, 1, OUTPUT, ALIGNED) + first
    index = tl.arange(0, BLOCK)
    factor = tl.load(scale)
    if first + BLOCK <= count:
        _cast_block(input, output, index, None, factor, nonfinite, UNSCALE)
    else:
        _cast_block(input, output, index, index < count - first, factor, nonfinite, UNSCALE)


def _run(tensors: list[Tensor], outputs: list[Tensor], scale: Tensor, unscale: bool) -> tuple[list[Tensor], Tensor]:
    nonfinite = torch.zeros((), dtype=torch.bool, device=scale.device)
    if any(tensor.numel() for tensor in tensors):
        chosen = configuration("grad_scale", "any", scale.device)
        found = table((tensors, outputs), chosen["BLOCK"])
        _cast[(found.blocks,)](
            found.numbers, found.owners, found.tensors, scale, nonfinite, DTYPES[tensors[0].dtype],
            DTYPES[outputs[0].dtype], unscale, found.aligned, **chosen.options,
        )  # fmt: skip
    return outputs, nonfinite


def scale_cast_filter(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    return _run(tensors, [torch.empty_like(tensor, dtype=dtype) for tensor in tensors], scale, unscale=False)


def filter_cast_unscale(tensors: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    outputs = [torch.empty_like(tensor, dtype=compute_dtype(tensor)) for tensor in tensors]
    return _run(tensors, outputs, scale, unscale=True)
