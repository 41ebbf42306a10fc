"""Philox4x32-10 and the Gumbel noise for Triton's kernels, as ``dalle_kernels.philox`` defines them.

The uniform numbers are the definition's bit for bit. Of the two logarithms after them the outer one and the inner one
below v = 1/2 are polynomials, since Triton's own are calls with a branch an element and cost three times as much. From
v = 1/2 on the inner one is the special function unit's, whose documented error of two units in the last place is lost
there: it reaches the draw as an absolute error of 2^-22 where the draw is at most 0.37.

Cost an element, in instructions: 10 for a quarter of Philox (a 32x32-bit product gives both words), 4 for the uniform
number, 13 and 15 for the logarithms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dalle_kernels import _triton, philox

GUMBEL, ROUNDING = tl.constexpr(philox.GUMBEL), tl.constexpr(philox.ROUNDING)
_INTERPRETED = tl.constexpr(_triton.interprets())

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def philox_words(seed, rows, groups, USE: tl.constexpr = GUMBEL):
    """The four words (uint32) of each counter, for columns 4·group .. 4·group + 3.

    ``seed`` is an int64 scalar; ``rows``, int64 global row numbers, and ``groups``, int32, broadcast together. What
    depends on one of them alone is computed before they are. ``USE`` is one of ``dalle_kernels.philox``.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    x0, x1, x2 = groups.to(tl.uint32), rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    x3 = tl.zeros_like(x2) + USE
    for _ in tl.static_range(10):
        product0 = x0.to(tl.uint64) * 0xD2511F53
        product1 = x2.to(tl.uint64) * 0xCD9E8D57
        x0 = (product1 >> 32).to(tl.uint32) ^ x1 ^ key0
        x2 = (product0 >> 32).to(tl.uint32) ^ x3 ^ key1
        x1, x3 = product1.to(tl.uint32), product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def complement_uniform(words):
    """v = 1 - u in float32, 2^-33 <= v <= 1 - 2^-24."""
    return tl.minimum((words ^ 0xFFFFFFFF).to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)


@triton.jit
def _approximate_log2(x):
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log2(x):
    """The binary logarithm of positive normal numbers, to 1.2·2^-24 between 1/2 and 2 and one unit beyond."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # of x = 2^k m, m in [sqrt(1/2), sqrt(2)]
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    y = f * 0.1254105120897293 - 0.2103026956319809
    y = y * f + 0.21737982332706451
    y = y * f - 0.238519549369812
    y = y * f + 0.28765663504600525
    y = y * f - 0.3607212007045746
    y = y * f + 0.48092252016067505
    y = y * f - 0.7213471531867981
    y = y * f + 1.442694902420044
    return y * f + exponent.to(tl.float32) * 2.0**-23


@triton.jit
def log2_of_exponential(v):
    """log2 of -log2(1 - v), an exponential variable: the Gumbel noise is -ln 2 times that, plus a constant.

    The constant, -ln ln 2, is the same for every column: neither a softmax nor a largest score depends on it.
    """
    y = v * 2.0790040493011475 - 2.4463894367218018
    y = y * v + 1.814312219619751
    y = y * v - 0.293593168258667
    y = y * v + 0.3889569342136383
    y = y * v + 0.35029521584510803
    y = y * v + 0.4814281165599823
    y = y * v + 0.7213371992111206
    y = y * v + 1.4426950216293335
    return _log2(tl.where(v < 0.5, y * v, -_approximate_log2(1.0 - v)))
