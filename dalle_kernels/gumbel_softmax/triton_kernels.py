"""Triton kernels of Gumbel-softmax and its KL; those of the product with the codebook are in ``triton_codebook``.

One pass where a row fits a program's registers, up to 16,384 columns that lie next to each other (8,192 backward):
every input is read once and the output written once. Longer rows, and rows whose columns lie apart (the codes along
dim 1 of NCHW), are taken in blocks of columns twice: first their maxima and sums, then the output, with the noise drawn
again.

Floor of the forward with KL, [8192, 8192] on an H200: 537 MB in float32 and 268 MB in 16 bits, 125 and 62 us at
4.3 TB/s. Arithmetic, an element: 10 instructions for a quarter of Philox, 4 for the uniform number, 28 for two
logarithms, 9 for the softmax with its sum and product, 6 for the KL, about 3 to load, convert and store: 60, of which
132 multiprocessors at 1.75 GHz issue 30e12 a second: 136 us (the machine code for sm_90 has 73, all told: 165 us). So
it is bound by arithmetic, in 16 bits by far. Two passes (NCHW) take about 115 instructions, 260 us. The backward reads
three tensors and writes one, 1.07 GB or 250 us in float32, 125 us in 16 bits, over about 25 instructions, 57 us; behind
a one-hot sample the noise comes on top.
Reached on an H200: forward with KL 244 us in float32 and 241 in bfloat16, with backward 523 and 399 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import configuration
from dalle_kernels.gumbel_softmax import reference
from dalle_kernels.gumbel_softmax.triton_codebook import gumbel_codebook, gumbel_codebook_backward
from dalle_kernels.gumbel_softmax.triton_tile import (
    NONE,
    View,
    add_posterior_gradient,
    add_to_posterior,
    carry,
    column_numbers,
    divergence,
    exponentials,
    first_largest,
    largest_of,
    load_tile,
    merged_choice,
    merged_posterior,
    merged_sum,
    noisy_scores,
    of_each,
    pairs_of,
    places,
    start,
    store_tile,
    sum_of,
    view_of,
)

__all__ = [
    "gumbel_codebook",
    "gumbel_codebook_backward",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "gumbel_softmax_kl",
    "gumbel_softmax_kl_backward",
]


@triton.jit
def _one_hot(column, chosen, total):
    """The hard sample; a row that holds NaN or +inf, or nothing but -inf, has a sum of NaN or 0 and is NaN."""
    return tl.where(column == of_each(chosen), 1.0, 0.0) + of_each(tl.div_rn(1.0, total) * 0.0)


@triton.jit
def _forward(logits, y, kl, seed, offset, tau, rows, inner, columns, logits_strides, y_strides, HARD: tl.constexpr,
             WITH_KL: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
             EVEN: tl.constexpr):  # fmt: skip
    """Of rows that fit a tile."""
    seed, scale, row, read, number = start(seed, offset, tau, rows, ROWS, AXIS)
    x = load_tile(logits, places(read, inner, logits_strides), 0, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
    if WITH_KL:
        none, zero = pairs_of(row, GROUPS, AXIS, NONE), pairs_of(row, GROUPS, AXIS, 0.0)
        largest, total, moment = add_to_posterior(x, none, zero, zero)
        _, total, moment = merged_posterior(largest, total, moment, AXIS)
        tl.store(kl + row, divergence(total, moment, columns), row < rows)
    scores = noisy_scores(x, seed, number, 0, GROUPS, AXIS)
    largest = tl.max(largest_of(scores), AXIS, keep_dims=True)
    sample = exponentials(scores, largest, scale)
    total = tl.sum(sum_of(sample), AXIS, keep_dims=True)
    if HARD:
        column = column_numbers(0, GROUPS, AXIS)
        sample = _one_hot(column, tl.min(first_largest(scores, largest, column), AXIS, keep_dims=True), total)
    else:
        sample *= of_each(tl.div_rn(1.0, total))
    store_tile(y, places(read, inner, y_strides), row < rows, 0, columns, y_strides[2], sample, GROUPS, AXIS)


@triton.jit
def _forward_by_blocks(logits, y, kl, seed, offset, tau, rows, inner, columns, logits_strides, y_strides,
                       HARD: tl.constexpr, WITH_KL: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr,
                       GROUPS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    seed, scale, row, read, number = start(seed, offset, tau, rows, ROWS, AXIS)
    place = places(read, inner, logits_strides)
    largest, total = pairs_of(row, GROUPS, AXIS, NONE), pairs_of(row, GROUPS, AXIS, 0.0)
    chosen = total.to(tl.int32)
    q_largest, q_total, q_moment = largest, total, total
    for first in range(0, columns, 4 * GROUPS):
        x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
        if WITH_KL:
            q_largest, q_total, q_moment = add_to_posterior(x, q_largest, q_total, q_moment)
        scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
        before = largest
        largest = tl.maximum(before, largest_of(scores))
        total = total * carry(before, largest, scale) + sum_of(exponentials(scores, largest, scale))
        if HARD:
            candidate = first_largest(scores, largest, column_numbers(first, GROUPS, AXIS))
            chosen = tl.where(largest > before, candidate, chosen)
    of_row = tl.max(largest, AXIS, keep_dims=True)
    total = merged_sum(total, largest, of_row, scale, AXIS)
    if WITH_KL:
        _, q_total, q_moment = merged_posterior(q_largest, q_total, q_moment, AXIS)
        tl.store(kl + row, divergence(q_total, q_moment, columns), row < rows)
    if HARD:
        chosen = merged_choice(chosen, largest, of_row, AXIS)
    place_y = places(read, inner, y_strides)
    for first in range(0, columns, 4 * GROUPS):
        if HARD:
            sample = _one_hot(column_numbers(first, GROUPS, AXIS), chosen, total)
        else:
            x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
            scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
            sample = exponentials(scores, of_row, scale) * of_each(tl.div_rn(1.0, total))
        store_tile(y, place_y, row < rows, first, columns, y_strides[2], sample, GROUPS, AXIS)


@triton.jit
def _backward(grad_y, grad_kl, logits, y, grad_logits, seed, offset, tau, rows, inner, columns, grad_y_strides,
              grad_kl_strides, logits_strides, y_strides, grad_logits_strides, HARD: tl.constexpr,
              WITH_KL: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
              EVEN: tl.constexpr):  # fmt: skip
    """Of rows that fit a tile. The soft sample is ``y``; where that is a one-hot it is drawn again."""
    seed, scale, row, read, number = start(seed, offset, tau, rows, ROWS, AXIS)
    grad = load_tile(
        grad_y, places(read, inner, grad_y_strides), 0, columns, grad_y_strides[2], 0.0, GROUPS, AXIS, EVEN
    )
    place = places(read, inner, logits_strides)
    if HARD or WITH_KL:
        x = load_tile(logits, place, 0, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
    if HARD:
        scores = noisy_scores(x, seed, number, 0, GROUPS, AXIS)
        sample = exponentials(scores, tl.max(largest_of(scores), AXIS, keep_dims=True), scale)
        sample *= of_each(tl.div_rn(1.0, tl.sum(sum_of(sample), AXIS, keep_dims=True)))
    else:
        sample = load_tile(y, places(read, inner, y_strides), 0, columns, y_strides[2], 0.0, GROUPS, AXIS, EVEN)
    dot = tl.sum(sum_of(grad * sample), AXIS, keep_dims=True)
    gradient = sample * (grad - of_each(dot)) * tl.div_rn(1.0, tl.load(tau))
    if WITH_KL:
        none, zero = pairs_of(row, GROUPS, AXIS, NONE), pairs_of(row, GROUPS, AXIS, 0.0)
        largest, total, moment = add_to_posterior(x, none, zero, zero)
        largest, total, moment = merged_posterior(largest, total, moment, AXIS)
        weight = tl.load(grad_kl + places(read, inner, grad_kl_strides))
        gradient = add_posterior_gradient(gradient, x, largest, total, moment, weight)
    place = places(read, inner, grad_logits_strides)
    store_tile(grad_logits, place, row < rows, 0, columns, grad_logits_strides[2], gradient, GROUPS, AXIS)


@triton.jit
def _backward_by_blocks(grad_y, grad_kl, logits, y, grad_logits, seed, offset, tau, rows, inner, columns,
                        grad_y_strides, grad_kl_strides, logits_strides, y_strides, grad_logits_strides,
                        HARD: tl.constexpr, WITH_KL: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr,
                        GROUPS: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    seed, scale, row, read, number = start(seed, offset, tau, rows, ROWS, AXIS)
    place, grad_place = places(read, inner, logits_strides), places(read, inner, grad_y_strides)
    y_place, out_place = places(read, inner, y_strides), places(read, inner, grad_logits_strides)
    largest, total = pairs_of(row, GROUPS, AXIS, NONE), pairs_of(row, GROUPS, AXIS, 0.0)
    dot, q_largest, q_total, q_moment = total, largest, total, total
    for first in range(0, columns, 4 * GROUPS):
        grad = load_tile(grad_y, grad_place, first, columns, grad_y_strides[2], 0.0, GROUPS, AXIS, EVEN)
        if HARD or WITH_KL:
            x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
        if HARD:
            scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
            before = largest
            largest = tl.maximum(before, largest_of(scores))
            shrink, e = carry(before, largest, scale), exponentials(scores, largest, scale)
            total, dot = total * shrink + sum_of(e), dot * shrink + sum_of(grad * e)
        else:
            sample = load_tile(y, y_place, first, columns, y_strides[2], 0.0, GROUPS, AXIS, EVEN)
            dot += sum_of(grad * sample)
        if WITH_KL:
            q_largest, q_total, q_moment = add_to_posterior(x, q_largest, q_total, q_moment)
    if HARD:
        of_row = tl.max(largest, AXIS, keep_dims=True)
        inverse = tl.div_rn(1.0, merged_sum(total, largest, of_row, scale, AXIS))
        dot = merged_sum(dot, largest, of_row, scale, AXIS) * inverse
    else:
        dot = tl.sum(dot, AXIS, keep_dims=True)
    if WITH_KL:
        q_largest, q_total, q_moment = merged_posterior(q_largest, q_total, q_moment, AXIS)
        weight = tl.load(grad_kl + places(read, inner, grad_kl_strides))
    inverse_tau = tl.div_rn(1.0, tl.load(tau))
    for first in range(0, columns, 4 * GROUPS):
        grad = load_tile(grad_y, grad_place, first, columns, grad_y_strides[2], 0.0, GROUPS, AXIS, EVEN)
        if HARD or WITH_KL:
            x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
        if HARD:
            scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
            sample = exponentials(scores, of_row, scale) * of_each(inverse)
        else:
            sample = load_tile(y, y_place, first, columns, y_strides[2], 0.0, GROUPS, AXIS, EVEN)
        gradient = sample * (grad - of_each(dot)) * inverse_tau
        if WITH_KL:
            gradient = add_posterior_gradient(gradient, x, q_largest, q_total, q_moment, weight)
        store_tile(grad_logits, out_place, row < rows, first, columns, grad_logits_strides[2], gradient, GROUPS, AXIS)


# Classes of shapes by the columns up to which a tile holds whole rows; the backward's has three tensors of them, and
# would spill registers beyond 8192.
_CLASSES = {
    "gumbel_softmax": {"short rows": 1024, "rows": 8192, "long rows": 16384},
    "gumbel_softmax_backward": {"short rows": 1024, "rows": 8192},
}


_LEAST_GROUPS = 8
_MOST_WARPS = 16


def cut(op: str, view: View) -> tuple[bool, int, int, int]:
    """Whether a tile holds whole rows, how many, of how many groups, and the warps that work on it."""
    device, columns = view.tensors[0].device, view.columns
    if view.axis == 1:
        for shape_class, most in _CLASSES[op].items():
            if columns <= most:
                chosen = configuration(op, shape_class, device)
                groups = triton.next_power_of_2(triton.cdiv(columns, 4))
                # A row has numbers of its own, for which very many short ones would leave no registers.
                rows = max(1, chosen["ELEMENTS"] // (4 * max(groups, _LEAST_GROUPS)))
                if view.aligned:
                    return True, rows, groups, chosen.num_warps
                # Each element takes the registers of an address too: half as many elements a thread.
                if rows > 1:
                    return True, rows // 2, groups, chosen.num_warps
                return True, 1, groups, min(2 * chosen.num_warps, _MOST_WARPS)
    chosen = configuration(op, "columns apart" if view.axis == 0 else "blocks of rows", device)
    return columns <= 4 * chosen["GROUPS"], chosen["ROWS"], chosen["GROUPS"], chosen.num_warps


def _launch(op: str, kernels, view: View, pointers: list[Tensor], strides, hard: bool, with_kl: bool) -> None:
    if view.rows == 0:
        return
    whole, rows, groups, warps = cut(op, view)
    even = view.columns % (4 * groups) == 0
    numbers = view.rows, view.inner, view.columns
    kernels[0 if whole else 1][(triton.cdiv(view.rows, rows),)](
        *pointers, *numbers, *strides, hard, with_kl, view.axis, rows, groups, even, num_warps=warps
    )


def _sample(logits, seed, offset, tau, hard, dim, with_kl: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(logits, memory_format=torch.contiguous_format)
    kl = logits.new_empty(reference.kl_shape(logits, dim) if with_kl else (), dtype=torch.float32)
    view = view_of(dim, [logits, y])
    pointers = [view.tensors[0], y, kl, seed, offset, tau]
    _launch("gumbel_softmax", (_forward, _forward_by_blocks), view, pointers, view.strides, hard, with_kl)
    return y, kl


def gumbel_softmax(logits: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, hard: bool, dim: int) -> Tensor:
    return _sample(logits, seed, offset, tau, hard, dim, with_kl=False)[0]


def gumbel_softmax_kl(
    logits: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, hard: bool, dim: int
) -> tuple[Tensor, Tensor]:
    return _sample(logits, seed, offset, tau, hard, dim, with_kl=True)


def gumbel_softmax_backward(
    grad_y: Tensor, logits: Tensor, y: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, hard: bool, dim: int
) -> Tensor:
    return gumbel_softmax_kl_backward(grad_y, None, logits, y, seed, offset, tau, hard, dim)


def gumbel_softmax_kl_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    logits: Tensor,
    y: Tensor,
    seed: Tensor,
    offset: Tensor,
    tau: Tensor,
    hard: bool,
    dim: int,
) -> Tensor:
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with_kl = grad_kl is not None
    view = view_of(dim, [logits, y, grad_y, grad_logits], [grad_kl] if with_kl else [])
    logits, y, grad_y, _, *grad_kl = view.tensors
    logits_strides, y_strides, grad_y_strides, out_strides, *grad_kl_strides = view.strides
    # Without a KL nothing reads its gradient, and any tensor and strides will do.
    pointers = [grad_y, *(grad_kl or [tau]), logits, y, grad_logits, seed, offset, tau]
    strides = grad_y_strides, *(grad_kl_strides or [out_strides]), logits_strides, y_strides, out_strides
    _launch("gumbel_softmax_backward", (_backward, _backward_by_blocks), view, pointers, strides, hard, with_kl)
    return grad_logits
