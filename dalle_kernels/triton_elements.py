"""What Triton's elementwise kernels share: a program's block of elements, and where these lie in strided tensors."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._strides import merged


@triton.jit
def first_of_block(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The number of the program's first element; WIDE: numbers may exceed 32 bits."""
    program = tl.program_id(0)
    return (program.to(tl.int64) if WIDE else program) * BLOCK


@triton.jit
def places(index, sizes, strides):
    """Where elements number ``index``, in the order of the shape, lie: a layout's sizes and one tensor's strides.

    An index beyond the last element lies anywhere, and takes a mask.
    """
    place = tl.zeros_like(index).to(tl.int64)
    rest = index
    for d in tl.static_range(len(sizes) - 1):
        place += (rest % sizes[d]).to(tl.int64) * strides[d]
        rest = rest // sizes[d]
    return place + rest.to(tl.int64) * strides[len(sizes) - 1]


def layout(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Their common sizes and each one's strides, innermost first, in as few dimensions as possible, at least one."""
    sizes, strides = merged(tensors[0].shape, *(tensor.stride() for tensor in tensors))
    if not sizes:
        return [(1,)] + [(0,)] * len(tensors)
    return [tuple(reversed(numbers)) for numbers in (sizes, *strides)]


def is_wide(count: int, block: int) -> bool:
    """Whether a block's numbers may exceed 32 bits."""
    return count >= 2**31 - block
