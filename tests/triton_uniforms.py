"""A kernel that stores the uniform numbers behind the Gumbel noise, for tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels.gumbel_softmax.triton_tile import along, joined, store_tile
from dalle_kernels.triton_philox import complement_uniform, philox_words


@triton.jit
def _store_uniforms(seed, offset, v, rows, columns, AXIS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    row = along(ROWS, 1 - AXIS)
    x0, x1, x2, x3 = philox_words(tl.load(seed), tl.load(offset) + row, along(GROUPS, AXIS))
    uniform = complement_uniform(joined(x0, x1, x2, x3))
    store_tile(v, row.to(tl.int64) * columns, row < rows, 0, columns, 1, uniform, GROUPS, AXIS)


def uniforms(seed: Tensor, offset: Tensor, rows: int, columns: int, axis: int) -> Tensor:
    """``[rows, columns]``, drawn in tiles of either orientation."""
    v = torch.full((rows, columns), torch.nan, device=seed.device)
    groups = triton.next_power_of_2(triton.cdiv(columns, 4))
    _store_uniforms[(1,)](seed, offset, v, rows, columns, axis, triton.next_power_of_2(rows), groups)
    return v
