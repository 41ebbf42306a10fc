"""Philox4x32-10, the counter-based generator behind every random number of the kernels (Salmon et al. 2011, Random123).

A random number is a pure function of (seed, offset, row, column), so a sample does not depend on threads, on how a
batch is split or on the provider that draws it. This module is plain PyTorch on any device and **defines** the noise;
native and Triton kernels match it bit for bit up to and including :func:`complement_uniform`:

1. A tensor is seen as rows of ``columns`` elements: the columns run along the op's ``dim``, the rows enumerate the
   other dimensions in order. Row ``r`` of a call has the global row ``g = offset + r``, taken modulo 2^64. A batch that
   is split gives the same noise when each part passes as offset the number of rows before it.
2. key = (low, high) 32-bit words of the 64-bit seed.
   counter = (column // 4, low word of g, high word of g, use). The last word numbers the use: :data:`GUMBEL`, or
   :data:`ROUNDING`, by which ``AdamW16`` rounds parameters up or down.
3. ``bits`` of a column is output word ``column % 4``.
4. u = (bits + 0.5)·2^-32. Its complement is what is kept in float32, since a large Gumbel value needs 1 - u to a small
   relative error: ``v = fp32(2^32 - 1 - bits)·2^-32 + 2^-33``, the conversion and the sum each rounded to nearest even
   (the product is exact, so a fused multiply-add gives the same bits), then at most 1 - 2^-24. Hence 2^-33 <= v < 1.
5. gumbel = -log(-log1p(-v)), in float32 (float64 for float64 logits). It lies in [-2.82, 22.88]: never infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
GUMBEL, ROUNDING = 0, 1
WORDS = 4
"""Random words per counter: columns 4c .. 4c+3 share counter c."""


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of broadcastable int64 tensors that hold 32-bit words, 0 .. 2^32 - 1; gives four such words.

    Products wrap modulo 2^64 in int64, which keeps every bit of a 32×32-bit product. Only words that are multiplied
    next are cut to 32 bits; the two that are merely XORed later may carry a product's high bits for a round.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0 = ((product1 >> 32) ^ x1).bitwise_xor_(key0).bitwise_and_(_WORD)
        x2 = ((product0 >> 32) ^ x3).bitwise_xor_(key1).bitwise_and_(_WORD)
        x1, x3 = product1, product0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return x0, x1 & _WORD, x2, x3 & _WORD


def random_bits(seed: Tensor, rows: Tensor, columns: int, use: int = GUMBEL) -> tuple[Tensor, ...]:
    """The four words of each counter c, for columns 4c .. 4c+3: int64 ``[outer, ceil(columns / 4), inner]`` each.

    ``seed`` is an int64 scalar tensor, ``rows`` int64 ``[outer, 1, inner]`` global row numbers (offset included).
    """
    groups = torch.arange(-(-columns // WORDS), device=rows.device).view(1, -1, 1)
    counter = (groups, rows & _WORD, (rows >> 32) & _WORD, torch.full_like(groups, use))
    return philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))


def complement_uniform(seed: Tensor, rows: Tensor, columns: int) -> Tensor:
    """v = 1 - u of the module's definition: float32 ``[outer, columns, inner]``, 2^-33 <= v <= 1 - 2^-24."""
    words = random_bits(seed, rows, columns)
    outer, _, inner = rows.shape
    uniform = torch.empty(outer, words[0].shape[1], WORDS, inner, dtype=torch.float32, device=rows.device)
    for index, word in enumerate(words):
        uniform[:, :, index, :] = word.bitwise_xor_(_WORD)  # the complement 2^32 - 1 - bits
    uniform.mul_(2.0**-32).add_(2.0**-33).clamp_(max=1 - 2.0**-24)
    return uniform.view(outer, -1, inner)[:, :columns]


def gumbel_noise(seed: Tensor, rows: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel draws ``[outer, columns, inner]`` in ``dtype`` (float32 or float64); arguments as above."""
    uniform = complement_uniform(seed, rows, columns).to(dtype)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def new_seed(device: torch.device, generator: torch.Generator | None = None, out: Tensor | None = None) -> Tensor:
    """Draw an int64 scalar seed on ``device`` from ``generator`` or the device's own, without waiting for it.

    Into ``out`` where one is given; the number is the same.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"expected a generator on the logits' device {device}, got one on {generator.device}; "
            f"make it with torch.Generator({device.type!r})"
        )
    if out is not None:
        return out.random_(2**63 - 1, generator=generator)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
