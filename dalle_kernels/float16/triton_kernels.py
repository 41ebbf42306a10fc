"""Triton kernels of the 16-bit formats; they give the reference's bits.

Floor: bytes. Encoding reads an element and writes 2 bytes, decoding the reverse; about ten integer operations an
element are far below that. Encoding is one launch after the flag's fill; whoever meets an infinity or NaN stores the
flag, all of them the same value. The device function :func:`encoded` and :func:`decoded` serve AdamW16 as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import configuration
from dalle_kernels.float16.reference import Format
from dalle_kernels.triton_elements import first_of_block, is_wide, layout, places

_BIAS = tl.constexpr(60)  # EXPONENT_BIAS of the formats


@triton.jit
def encoded(bits, SIGNIFICAND: tl.constexpr, FRACTION: tl.constexpr, IEEE_BIAS: tl.constexpr):
    """Codes (int16) of float32 (FRACTION 23, IEEE_BIAS 127) or float64 (52, 1023) numbers, and which are not finite.

    SIGNIFICAND is 9 for 1-6-9, which has a sign, and 10 for 0-6-10. Half away from zero is "add half a step to the
    magnitude, then truncate"; NaN lies beyond the largest code and saturates.
    """
    REBIAS: tl.constexpr = (IEEE_BIAS - _BIAS) << FRACTION
    SHIFT: tl.constexpr = FRACTION - SIGNIFICAND
    INFINITY: tl.constexpr = (2 * IEEE_BIAS + 1) << FRACTION
    magnitude = bits & (((2 * IEEE_BIAS + 2) << FRACTION) - 1)
    negative = (bits < 0) & (magnitude <= INFINITY)
    saturated = tl.minimum(magnitude, REBIAS + (((64 << SIGNIFICAND) - 1) << SHIFT))
    codes = (saturated + ((1 << (SHIFT - 1)) - REBIAS)) >> SHIFT
    flushed = magnitude < REBIAS + (1 << SHIFT)
    if SIGNIFICAND == 9:
        codes = tl.where(negative, codes | 0x8000, codes)
    else:
        flushed = flushed | negative
    return tl.where(flushed, 0, codes).to(tl.int16), magnitude >= INFINITY


@triton.jit
def decoded(codes, SIGNIFICAND: tl.constexpr):
    """The values (float32) of int16 codes; SIGNIFICAND as in :func:`encoded`."""
    bits = codes.to(tl.int32)
    magnitude = bits & ((64 << SIGNIFICAND) - 1)
    value = tl.where(magnitude == 0, 0, (magnitude << (23 - SIGNIFICAND)) + ((127 - _BIAS) << 23))
    if SIGNIFICAND == 9:
        value = value | ((bits & 0x8000) << 16)
    return value.to(tl.float32, bitcast=True)


@triton.jit
def _block(count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The numbers of this program's elements, and whether all of them exist: such a block takes no mask."""
    first = first_of_block(BLOCK, WIDE)
    return first + tl.arange(0, BLOCK), first + BLOCK <= count


@triton.jit
def _encode_block(x, codes, nonfinite, index, mask, sizes, strides, SIGNIFICAND: tl.constexpr, DENSE: tl.constexpr):
    values = tl.load(x + (index if DENSE else places(index, sizes, strides)), mask)
    if x.dtype.element_ty == tl.float64:
        code, found = encoded(values.to(tl.int64, bitcast=True), SIGNIFICAND, 52, 1023)
    else:
        code, found = encoded(values.to(tl.float32).to(tl.int32, bitcast=True), SIGNIFICAND, 23, 127)
    if mask is not None:
        found = found & mask
    tl.store(codes + index, code, mask)
    tl.store(nonfinite, True, tl.max(found.to(tl.int32), 0) != 0)


@triton.jit
def _encode(x, codes, nonfinite, count, sizes, strides, SIGNIFICAND: tl.constexpr, DENSE: tl.constexpr,
            WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    index, whole = _block(count, BLOCK, WIDE)
    if whole:
        _encode_block(x, codes, nonfinite, index, None, sizes, strides, SIGNIFICAND, DENSE)
    else:
        _encode_block(x, codes, nonfinite, index, index < count, sizes, strides, SIGNIFICAND, DENSE)


@triton.jit
def _decode_block(codes, output, index, mask, sizes, strides, SIGNIFICAND: tl.constexpr, DENSE: tl.constexpr):
    values = decoded(tl.load(codes + (index if DENSE else places(index, sizes, strides)), mask), SIGNIFICAND)
    tl.store(output + index, values.to(output.dtype.element_ty), mask)


@triton.jit
def _decode(codes, output, count, sizes, strides, SIGNIFICAND: tl.constexpr, DENSE: tl.constexpr,
            WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    index, whole = _block(count, BLOCK, WIDE)
    if whole:
        _decode_block(codes, output, index, None, sizes, strides, SIGNIFICAND, DENSE)
    else:
        _decode_block(codes, output, index, index < count, sizes, strides, SIGNIFICAND, DENSE)


def _launch(op: str, kernel, form: Format, tensors: tuple[Tensor, ...]) -> None:
    """Run ``kernel`` on its tensors, of which the first is read in place whatever its strides."""
    count = tensors[0].numel()
    if count == 0:
        return
    sizes, strides = layout(tensors[0])
    dense = sizes == (count,) and strides == (1,)
    chosen = configuration(op, "dense" if dense else "strided", tensors[0].device)
    kernel[(triton.cdiv(count, chosen["BLOCK"]),)](
        *tensors, count, sizes, strides, form.significand_bits, dense, is_wide(count, chosen["BLOCK"]), **chosen.options
    )


def encode(form: Format, x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.int16, memory_format=torch.contiguous_format)
    nonfinite = torch.zeros((), dtype=torch.bool, device=x.device)
    _launch("encode", _encode, form, (x, codes, nonfinite))
    return codes, nonfinite


def decode(form: Format, codes: Tensor, dtype: torch.dtype) -> Tensor:
    output = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    _launch("decode", _decode, form, (codes, output))
    return output
