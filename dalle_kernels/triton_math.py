"""Exponential and logarithm for Triton's kernels whose results are as exact as these, for every float.

They are those of csrc/common/vector_math.h, worst relative errors included. Triton's own exponential multiplies by
log2(e) in one rounding, and the special function unit after it errs by two units in the last place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential(x):
    """e^x to 1.4·2^-24: inf from 88.7228394 on, 0 below -87.3365402, where it would be subnormal, NaN for NaN."""
    # Adding 1.5·2^23 rounds to a whole number and leaves it in the low bits, from where it shifts into the exponent.
    shifted = tl.fma(x, 1.44269504, 12582912.0)
    whole = shifted - 12582912.0
    # ln 2 in two parts, the first with so few bits that its products with whole numbers are exact.
    f = tl.fma(whole, -0.693359375, x)
    f = tl.fma(whole, 2.12194440e-4, f)
    y = tl.fma(f, 1.38145965e-3, 8.36871751e-3)
    y = tl.fma(y, f, 4.16683890e-2)
    y = tl.fma(y, f, 0.166665211)
    y = tl.fma(y, f, 0.49999994)
    y = tl.fma(y, f * f, f) + 1.0
    bits = y.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    y = tl.where(x < -87.3365402, 0.0, bits.to(tl.float32, bitcast=True))
    return tl.where(x < 88.7228394, y, x * float("inf"))


@triton.jit
def natural_log(x):
    """ln x to 1.4·2^-24: -inf for 0 of either sign, NaN below, inf for inf, NaN for NaN."""
    small = x < 1.17549435e-38
    bits = tl.where(small, x * 8388608.0, x).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of x = 2^k m, m in [sqrt(1/2), sqrt(2)]
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    whole = exponent.to(tl.float32) + tl.where(small, -23.0, 0.0)
    y = tl.fma(f, -7.63442963e-2, 0.127615496)
    y = tl.fma(y, f, -0.131601945)
    y = tl.fma(y, f, 0.142017618)
    y = tl.fma(y, f, -0.16623357)
    y = tl.fma(y, f, 0.200012267)
    y = tl.fma(y, f, -0.250008225)
    y = tl.fma(y, f, 0.333333313)
    square = f * f
    y = tl.fma(square, -0.5, tl.fma(y, f * square, whole * -2.12194440e-4))
    y = tl.fma(whole, 0.693359375, f + y)
    outside = tl.where(x == 0, -float("inf"), tl.where(x < 0, float("nan"), x))
    return tl.where((x > 0) & (x < float("inf")), y, outside)
