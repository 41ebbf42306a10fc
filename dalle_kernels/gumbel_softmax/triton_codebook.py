"""Triton kernels of the product of a soft Gumbel sample with the codebook: the sample is never stored.

A program owns a tile of rows and walks over blocks of columns: it draws their noise, takes exponentials relative to the
maximum so far and multiplies them by the block of the codebook, as flash attention does with its keys. The backward has
two kernels. In the first, rows own the gradient of the logits: the maximum, the sum and the gradient's dot product with
the sample in one walk, the gradient itself in a second. In the other, blocks of codes own the gradient of the codebook
and walk over all rows. Nothing is added by two programs to one place, so two runs give the same bits.

With a codebook of 16 bits the sample is rounded to that for the tensor cores; sums are float32. With float32 the
products are too.

Floor, [8192, 8192] times [8192, 128] on an H200: reading the logits takes 31 us in 16 bits; the noise and the softmax
cost the forward about 60 instructions an element, 136 us, and the product 17 GFLOP, 22 us in 16 bits and 300 us in
float32. The backward draws three times and takes four products: about 420 us in 16 bits. Reached
there: 360 us forward and 2.9 ms backward in 16 bits, 0.9 and 13 ms in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._strides import aligned
from dalle_kernels._triton_configurations import Configuration, configuration
from dalle_kernels.gumbel_softmax import reference
from dalle_kernels.gumbel_softmax.triton_tile import (
    NONE,
    View,
    add_posterior_gradient,
    add_to_posterior,
    carry,
    divergence,
    exponentials,
    filled,
    largest_of,
    load_tile,
    merged_posterior,
    merged_sum,
    noisy_scores,
    of_each,
    pairs_of,
    places,
    row_numbers,
    start,
    store_tile,
    sum_of,
    view_of,
)
from dalle_kernels.triton_philox import LOG2_E

_RUN = tl.constexpr(4)
"""Tiles of rows whose products are added in one chain: of 256 rows it may err three times as much as a BLAS."""


@triton.jit
def _flat(tile, AXIS: tl.constexpr):
    """[rows, columns] of a tile, or [columns, rows] with AXIS 0."""
    if AXIS == 1:
        return tl.reshape(tile, [tile.shape[0], 4 * tile.shape[1]])
    else:
        return tl.reshape(tl.permute(tile, (0, 2, 3, 1)), [4 * tile.shape[0], tile.shape[1]])


@triton.jit
def _tiled(flat, GROUPS: tl.constexpr, AXIS: tl.constexpr):
    """The inverse of :func:`_flat`."""
    if AXIS == 1:
        return tl.reshape(flat, [flat.shape[0], GROUPS, 2, 2])
    else:
        return tl.permute(tl.reshape(flat, [GROUPS, 2, 2, flat.shape[1]]), (0, 3, 1, 2))


@triton.jit
def _load_codes(codebook, first, columns, width_first, width, strides, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
                TRANSPOSED: tl.constexpr):  # fmt: skip
    """A block [columns, width] of the codebook, or [width, columns]; 0 beyond its ends."""
    column, place = first + tl.arange(0, COLUMNS), width_first + tl.arange(0, WIDTH)
    if TRANSPOSED:
        at = place.to(tl.int64)[:, None] * strides[1] + column.to(tl.int64)[None, :] * strides[0]
        return tl.load(codebook + at, (place < width)[:, None] & (column < columns)[None, :], other=0.0)
    else:
        at = column.to(tl.int64)[:, None] * strides[0] + place.to(tl.int64)[None, :] * strides[1]
        return tl.load(codebook + at, (column < columns)[:, None] & (place < width)[None, :], other=0.0)


@triton.jit
def _load_embedding(embedding, place, kept, width_first, width, stride, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    """[rows, width] of a tensor like the embedding, or [width, rows] with AXIS 0; 0 beyond its ends."""
    number = width_first + tl.arange(0, WIDTH)
    number = number[None, :] if AXIS == 1 else number[:, None]
    return tl.load(embedding + place + number.to(tl.int64) * stride, kept & (number < width), other=0.0)


@triton.jit
def _forward(logits, codebook, embedding, kl, seed, offset, tau, rows, inner, columns, width, logits_strides,
             embedding_strides, codebook_strides, AXIS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
             GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    seed, scale, row, read, number = start(seed, offset, tau, rows, ROWS, AXIS)
    width_first = tl.program_id(1) * WIDTH
    place = places(read, inner, logits_strides)
    q_largest, q_total = pairs_of(row, GROUPS, AXIS, NONE), pairs_of(row, GROUPS, AXIS, 0.0)
    q_moment = q_total
    largest, total = filled(row, NONE), filled(row, 0.0)
    sums = tl.zeros([ROWS, WIDTH] if AXIS == 1 else [WIDTH, ROWS], tl.float32)
    for first in range(0, columns, 4 * GROUPS):
        x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
        q_largest, q_total, q_moment = add_to_posterior(x, q_largest, q_total, q_moment)
        scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
        before = largest
        largest = tl.maximum(before, tl.max(largest_of(scores), AXIS, keep_dims=True))
        sample, shrink = exponentials(scores, largest, scale), carry(before, largest, scale)
        total = total * shrink + tl.sum(sum_of(sample), AXIS, keep_dims=True)
        sample = _flat(sample, AXIS).to(codebook.dtype.element_ty)
        codes = _load_codes(
            codebook, first, columns, width_first, width, codebook_strides, 4 * GROUPS, WIDTH, AXIS == 0
        )
        if AXIS == 1:
            sums = tl.dot(sample, codes, sums * shrink, input_precision="ieee")
        else:
            sums = tl.dot(codes, sample, sums * shrink, input_precision="ieee")
    if tl.program_id(1) == 0:
        _, of_row, moment = merged_posterior(q_largest, q_total, q_moment, AXIS)
        tl.store(kl + row, divergence(of_row, moment, columns), row < rows)
    at = width_first + tl.arange(0, WIDTH)
    at = at[None, :] if AXIS == 1 else at[:, None]
    values = (sums * tl.div_rn(1.0, total)).to(embedding.dtype.element_ty)
    place = places(read, inner, embedding_strides) + at.to(tl.int64) * embedding_strides[2]
    tl.store(embedding + place, values, (row < rows) & (at < width))


@triton.jit
def _grad_sample(grad_embedding, grad_place, row, rows, codebook, first, columns, width, grad_strides,
                 codebook_strides, GROUPS: tl.constexpr, WIDTH: tl.constexpr, AXIS: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    """The gradient of a tile of the sample, grad_embedding times the codes."""
    sums = tl.zeros([ROWS, 4 * GROUPS] if AXIS == 1 else [4 * GROUPS, ROWS], tl.float32)
    for width_first in range(0, width, WIDTH):
        grad = _load_embedding(grad_embedding, grad_place, row < rows, width_first, width, grad_strides[2], WIDTH, AXIS)
        codes = _load_codes(
            codebook, first, columns, width_first, width, codebook_strides, 4 * GROUPS, WIDTH, AXIS == 1
        )
        if AXIS == 1:
            sums = tl.dot(grad, codes, sums, input_precision="ieee")
        else:
            sums = tl.dot(codes, grad, sums, input_precision="ieee")
    return _tiled(sums, GROUPS, AXIS)


@triton.jit
def _backward_of_logits(grad_embedding, grad_kl, logits, codebook, grad_logits, row_largest, row_inverse, seed, offset,
                        tau, rows, inner, columns, width, grad_strides, grad_kl_strides, logits_strides,
                        grad_logits_strides, codebook_strides, AXIS: tl.constexpr, EVEN: tl.constexpr,
                        ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Also the maximum of each row's scores and the inverse of its sum, by which the sample is drawn again."""
    seed, scale, row, read, number = start(seed, offset, tau, rows, ROWS, AXIS)
    place, grad_place = places(read, inner, logits_strides), places(read, inner, grad_strides)
    largest, total = pairs_of(row, GROUPS, AXIS, NONE), pairs_of(row, GROUPS, AXIS, 0.0)
    dot, q_largest, q_total, q_moment = total, largest, total, total
    for first in range(0, columns, 4 * GROUPS):
        x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
        q_largest, q_total, q_moment = add_to_posterior(x, q_largest, q_total, q_moment)
        grad = _grad_sample(grad_embedding, grad_place, row, rows, codebook, first, columns, width, grad_strides,
                            codebook_strides, GROUPS, WIDTH, AXIS, ROWS)  # fmt: skip
        scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
        before = largest
        largest = tl.maximum(before, largest_of(scores))
        shrink, e = carry(before, largest, scale), exponentials(scores, largest, scale)
        total, dot = total * shrink + sum_of(e), dot * shrink + sum_of(grad * e)
    of_row = tl.max(largest, AXIS, keep_dims=True)
    inverse = tl.div_rn(1.0, merged_sum(total, largest, of_row, scale, AXIS))
    dot = merged_sum(dot, largest, of_row, scale, AXIS) * inverse
    tl.store(row_largest + row, of_row, row < rows)
    tl.store(row_inverse + row, inverse, row < rows)
    q_largest, q_total, q_moment = merged_posterior(q_largest, q_total, q_moment, AXIS)
    weight = tl.load(grad_kl + places(read, inner, grad_kl_strides)).to(tl.float32)
    inverse_tau = tl.div_rn(1.0, tl.load(tau))
    out_place = places(read, inner, grad_logits_strides)
    for first in range(0, columns, 4 * GROUPS):
        x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
        grad = _grad_sample(grad_embedding, grad_place, row, rows, codebook, first, columns, width, grad_strides,
                            codebook_strides, GROUPS, WIDTH, AXIS, ROWS)  # fmt: skip
        scores = noisy_scores(x, seed, number, first, GROUPS, AXIS)
        sample = exponentials(scores, of_row, scale) * of_each(inverse)
        gradient = sample * (grad - of_each(dot)) * inverse_tau
        gradient = add_posterior_gradient(gradient, x, q_largest, q_total, q_moment, weight)
        store_tile(grad_logits, out_place, row < rows, first, columns, grad_logits_strides[2], gradient, GROUPS, AXIS)


@triton.jit
def _backward_of_codebook(grad_embedding, logits, grad_codebook, row_largest, row_inverse, seed, offset, tau, rows,
                          inner, columns, width, grad_strides, logits_strides, grad_codebook_strides,
                          AXIS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
                          WIDTH: tl.constexpr):  # fmt: skip
    first, width_first = tl.program_id(0) * 4 * GROUPS, tl.program_id(1) * WIDTH
    seed_value, first_row, scale = tl.load(seed), tl.load(offset), tl.div_rn(LOG2_E, tl.load(tau))
    sums = tl.zeros([4 * GROUPS, WIDTH], tl.float32)
    # Sums of sums: one chain of additions over all rows would err several times as much as a BLAS.
    for run in range(0, rows, _RUN * ROWS):
        part = tl.zeros([4 * GROUPS, WIDTH], tl.float32)
        for start_row in range(run, tl.minimum(run + _RUN * ROWS, rows), ROWS):
            row, read = row_numbers(start_row, rows, ROWS, AXIS)
            place = places(read, inner, logits_strides)
            x = load_tile(logits, place, first, columns, logits_strides[2], NONE, GROUPS, AXIS, EVEN)
            scores = noisy_scores(x, seed_value, first_row + read, first, GROUPS, AXIS)
            sample = exponentials(scores, tl.load(row_largest + read), scale) * of_each(tl.load(row_inverse + read))
            sample = _flat(sample, AXIS).to(grad_embedding.dtype.element_ty)
            grad = _load_embedding(
                grad_embedding, places(read, inner, grad_strides), row < rows, width_first, width, grad_strides[2],
                WIDTH, AXIS,
            )  # fmt: skip
            if AXIS == 1:
                part = tl.dot(tl.trans(sample), grad, part, input_precision="ieee")
            else:
                part = tl.dot(sample, tl.trans(grad), part, input_precision="ieee")
        sums += part
    column, at = first + tl.arange(0, 4 * GROUPS), width_first + tl.arange(0, WIDTH)
    place = (
        column.to(tl.int64)[:, None] * grad_codebook_strides[0] + at.to(tl.int64)[None, :] * grad_codebook_strides[1]
    )
    kept = (column < columns)[:, None] & (at < width)[None, :]
    tl.store(grad_codebook + place, sums.to(grad_codebook.dtype.element_ty), kept)


def _blocks(op: str, view: View, codebook: Tensor, *halved: str) -> tuple[Configuration, dict[str, int]]:
    """The table's blocks, ``halved`` where lanes cannot move several neighbours at once; no wider than the codebook
    is, but for what a matrix product needs at least."""
    kind = "float32" if codebook.dtype == torch.float32 else "16 bits"
    odd = not (view.aligned and aligned(codebook.stride()))
    chosen = configuration(op, kind, codebook.device, halved=halved if odd else ())
    width = max(16, min(chosen["WIDTH"], triton.next_power_of_2(codebook.shape[1])))
    return chosen, {**chosen.options, "WIDTH": width}


def _numbers(view: View, codebook: Tensor) -> tuple[int, ...]:
    return view.rows, view.inner, view.columns, codebook.shape[1]


def gumbel_codebook(
    logits: Tensor, codebook: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    embedding = codebook.new_empty(reference.embedding_shape(logits, codebook, dim))
    kl = logits.new_empty(reference.kl_shape(logits, dim), dtype=torch.float32)
    view = view_of(dim, [logits, embedding])
    if view.rows == 0:
        return embedding, kl
    chosen, options = _blocks("gumbel_codebook", view, codebook, "GROUPS")
    grid = triton.cdiv(view.rows, chosen["ROWS"]), max(1, triton.cdiv(codebook.shape[1], options["WIDTH"]))
    _forward[grid](
        view.tensors[0], codebook, embedding, kl, seed, offset, tau, *_numbers(view, codebook), *view.strides,
        codebook.stride(), view.axis, view.columns % (4 * chosen["GROUPS"]) == 0, **options,
    )  # fmt: skip
    return embedding, kl


def gumbel_codebook_backward(
    grad_embedding: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    offset: Tensor,
    tau: Tensor,
    dim: int,
) -> tuple[Tensor, Tensor]:
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_codebook = torch.empty_like(codebook)
    view = view_of(dim, [logits, grad_embedding, grad_logits], [grad_kl])
    if view.rows == 0:
        return grad_logits, grad_codebook.zero_()
    logits, grad_embedding, _, grad_kl = view.tensors
    logits_strides, grad_strides, grad_logits_strides, grad_kl_strides = view.strides
    row_largest, row_inverse = logits.new_empty(2, view.rows, dtype=torch.float32).unbind()
    numbers = _numbers(view, codebook)
    chosen, options = _blocks("gumbel_codebook_backward_of_logits", view, codebook, "GROUPS", "WIDTH")
    _backward_of_logits[(triton.cdiv(view.rows, chosen["ROWS"]),)](
        grad_embedding, grad_kl, logits, codebook, grad_logits, row_largest, row_inverse, seed, offset, tau, *numbers,
        grad_strides, grad_kl_strides, logits_strides, grad_logits_strides, codebook.stride(), view.axis,
        view.columns % (4 * chosen["GROUPS"]) == 0, **options,
    )  # fmt: skip
    chosen, options = _blocks("gumbel_codebook_backward_of_codebook", view, codebook, "WIDTH")
    grid = triton.cdiv(view.columns, 4 * chosen["GROUPS"]), triton.cdiv(codebook.shape[1], options["WIDTH"])
    if grid[1] > 0:
        _backward_of_codebook[grid](
            grad_embedding, logits, grad_codebook, row_largest, row_inverse, seed, offset, tau, *numbers, grad_strides,
            logits_strides, grad_codebook.stride(), view.axis, view.columns % (4 * chosen["GROUPS"]) == 0, **options,
        )  # fmt: skip
    return grad_logits, grad_codebook
