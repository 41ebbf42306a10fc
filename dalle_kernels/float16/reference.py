"""The 16-bit formats 1-6-9 and 0-6-10 in plain PyTorch: integer arithmetic on the bits of float32 or float64.

From the top bit down a code is: sign (1-6-9 only), 6 exponent bits, significand. Exponent code e means 2^(e - 60) and
every code is a normal number, save the all-zero one (sign aside), which is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EXPONENT_BITS = 6
EXPONENT_BIAS = 60


@dataclass(frozen=True)
class Format:
    """A 16-bit format; ``number`` is what csrc/float16/float16.h calls it."""

    name: str
    number: int
    has_sign: bool
    significand_bits: int

    @property
    def code_mask(self) -> int:
        """All bits of a code but the sign."""
        return (1 << (EXPONENT_BITS + self.significand_bits)) - 1

    @property
    def largest(self) -> float:
        return (2 - 2**-self.significand_bits) * 2.0**3

    @property
    def smallest(self) -> float:
        """The smallest number above 0: the code 1, since the code 0 is taken."""
        return (1 + 2**-self.significand_bits) * 2.0**-EXPONENT_BIAS


FP169 = Format("fp169", 0, has_sign=True, significand_bits=9)
FP0610 = Format("fp0610", 1, has_sign=False, significand_bits=10)


def encode(x: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int16, contiguous) of ``x`` and whether it holds an infinity or NaN (bool, no dimensions)."""
    if x.dtype == torch.float64:
        bits, significand, bias = x.view(torch.int64), 52, 1023
    else:
        bits, significand, bias = x.float().view(torch.int32), 23, 127
    infinity = (2 * bias + 1) << significand
    shift = significand - form.significand_bits
    rebias = (bias - EXPONENT_BIAS) << significand
    magnitude = bits & ((1 << (8 * bits.element_size() - 1)) - 1)
    negative = (bits < 0) & (magnitude <= infinity)

    # Half away from zero: add half a step to the magnitude, then truncate. NaN lies beyond the largest code and
    # saturates.
    saturated = magnitude.clamp(max=rebias + (form.code_mask << shift))
    codes = (saturated + (1 << (shift - 1)) - rebias) >> shift
    flushed = magnitude < rebias + (1 << shift)
    if form.has_sign:
        codes = torch.where(negative, codes - 0x8000, codes)
    else:
        flushed |= negative
        codes = torch.where(codes >= 0x8000, codes - 0x10000, codes)
    codes = torch.where(flushed, 0, codes).to(torch.int16)
    return codes.contiguous(), (magnitude >= infinity).any()


def decode(codes: torch.Tensor, dtype: torch.dtype, form: Format) -> torch.Tensor:
    """The codes' values in ``dtype`` (contiguous), rounded to nearest even where it cannot hold them."""
    bits = codes.to(torch.int32)
    magnitude = bits & form.code_mask
    shift = 23 - form.significand_bits
    value = ((magnitude << shift) + ((127 - EXPONENT_BIAS) << 23)).view(torch.float32)
    value = torch.where(magnitude == 0, 0.0, value)
    if form.has_sign:
        value = torch.where(bits < 0, -value, value)
    return value.to(dtype).contiguous()
