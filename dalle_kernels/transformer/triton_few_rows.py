"""Matrix products of few rows, with what stands around them in a layer."""

from __future__ import annotations

import triton
import triton.language as tl

from dalle_kernels.triton_dependent import await_last_kernel


@triton.jit
def _statistics(x, row, rows, inputs, epsilon, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each row's mean and reciprocal standard deviation, block by block by Chan's formula."""
    mean, squares = tl.zeros([BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, inputs, BLOCK):
        column = first + tl.arange(0, BLOCK)
        real = (column < inputs)[None, :]
        mask = real & (row < rows)[:, None]
        values = tl.load(x + row[:, None] * inputs + column[None, :], mask, other=0.0).to(tl.float32)
        number = tl.minimum(inputs - first, BLOCK).to(tl.float32)
        part = tl.sum(values, 1) / number
        away = tl.where(real, values - part[:, None], 0.0)
        apart, total = part - mean, first + number
        mean += apart * (number / total)
        squares += tl.sum(away * away, 1) + apart * apart * (first * number / total)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, tl.cast(inputs, tl.float32)) + epsilon))


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(x, weight, bias, norm_weight, norm_bias, residual, out, rows, inputs, outputs, epsilon,
                    NORM: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
                    EVEN: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                    BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr):  # fmt: skip
    """A program makes a block of outputs of all rows.

    The inputs are cut into PARTS, whose products run side by side in the warps. EVEN: no block reaches beyond the end.
    """
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    await_last_kernel(DEPENDENT)
    row = tl.arange(0, BLOCK_ROWS)
    if NORM:
        mean, factor = _statistics(x, row, rows, inputs, epsilon, BLOCK_ROWS, 512)
    part, lane = tl.arange(0, PARTS)[:, None], tl.arange(0, BLOCK_INPUTS)[None, :]
    weights = weight + output.to(tl.int64)[None, :, None] * inputs
    hidden = x + row[None, :, None] * inputs
    in_weights, in_rows = (output < outputs)[None, :, None], (row < rows)[None, :, None]
    sums = tl.zeros([PARTS, BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for first in range(0, inputs, PARTS * BLOCK_INPUTS):
        column = first + part * BLOCK_INPUTS + lane
        if EVEN:
            left = tl.load(weights + column[:, None, :], eviction_policy="evict_first")
            right = tl.load(hidden + column[:, None, :], in_rows, other=0.0)
        else:
            real = (column < inputs)[:, None, :]
            left = tl.load(weights + column[:, None, :], in_weights & real, other=0.0, eviction_policy="evict_first")
            right = tl.load(hidden + column[:, None, :], in_rows & real, other=0.0)
        if NORM:
            scale = tl.load(norm_weight + column, column < inputs, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + column, column < inputs, other=0.0).to(tl.float32)
            right = (right.to(tl.float32) - mean[None, :, None]) * factor[None, :, None]
            right = tl.fma(right, scale[:, None, :], shift[:, None, :] + tl.zeros_like(right)).to(left.dtype)
        sums = tl.dot(left, tl.permute(right, (0, 2, 1)), sums, input_precision="ieee")
    result = tl.sum(sums, 0) + tl.load(bias + output, output < outputs, other=0.0).to(tl.float32)[:, None]
    if GELU:
        result = 0.5 * result * (1 + tl.erf(result * 0.7071067811865476))
    places = row.to(tl.int64)[None, :] * outputs + output[:, None]
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        result += tl.load(residual + places, mask, other=0.0).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty), mask)
