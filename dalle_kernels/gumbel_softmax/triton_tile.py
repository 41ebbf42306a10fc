"""What the Triton kernels of this family share: tiles of rows and columns, their noisy scores, their running softmax.

A tile holds four columns for each pair of a row and a *group*, since one Philox counter gives four numbers: its shape
is [rows, groups, 2, 2], or [groups, rows, 2, 2] where AXIS, the axis of the groups, is 0: then the rows lie next to
each other in memory and lanes run along them. The four columns of a pair are one thread's.

Running numbers, such as a maximum, are kept for each pair and merged over the groups at the end, so that no thread
waits for another in a loop. A number of a row has size 1 in place of the groups.

Maxima pass over NaN, sums do not: NaN, +inf and nothing but -inf each make the sum of a row NaN or 0, so that
everything divided by it is NaN, as it should be. Exponentials are of 2, with the factor log2(e) / tau in ``scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._strides import aligned, merged
from dalle_kernels.triton_philox import LN_2, LOG2_E, complement_uniform, log2_of_exponential, philox_words

NO_COLUMN = tl.constexpr(2**31 - 1)
NONE = tl.constexpr(-float("inf"))


@triton.jit
def along(COUNT: tl.constexpr, AXIS: tl.constexpr):
    """0 .. COUNT - 1 along one of two axes."""
    number = tl.arange(0, COUNT)
    return number[None, :] if AXIS == 1 else number[:, None]


@triton.jit
def row_numbers(first, rows, ROWS: tl.constexpr, AXIS: tl.constexpr):
    """The tile's rows, and again with the last row in place of those beyond it, which may be read."""
    row = first + along(ROWS, 1 - AXIS)
    return row, tl.minimum(row, rows - 1)


@triton.jit
def places(row, inner, strides):
    """Where rows begin, in elements: strides are those of row // inner, of row % inner and of the columns."""
    outer = row // inner
    return outer.to(tl.int64) * strides[0] + (row - outer * inner).to(tl.int64) * strides[1]


@triton.jit
def start(seed, offset, tau, rows, ROWS: tl.constexpr, AXIS: tl.constexpr):
    """Seed and scale, the program's rows, those of them that may be read, and the global numbers of these."""
    row, read = row_numbers(tl.program_id(0) * ROWS, rows, ROWS, AXIS)
    return tl.load(seed), tl.div_rn(LOG2_E, tl.load(tau)), row, read, tl.load(offset) + read


@triton.jit
def joined(x0, x1, x2, x3):
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def column_numbers(first, GROUPS: tl.constexpr, AXIS: tl.constexpr):
    """The columns of a tile; rows have size 1."""
    column = first + 4 * along(GROUPS, AXIS)
    return joined(column, column + 1, column + 2, column + 3)


@triton.jit
def _load_columns(tensor, place, column, columns, stride, other, EVEN: tl.constexpr):
    at = tensor + place + column.to(tl.int64) * stride
    if EVEN:
        return tl.load(at).to(tl.float32)
    return tl.load(at, column < columns, other=other).to(tl.float32)


@triton.jit
def load_tile(tensor, place, first, columns, stride, other, GROUPS: tl.constexpr, AXIS: tl.constexpr,
              EVEN: tl.constexpr):  # fmt: skip
    """A tile in float32, of rows that begin at ``place``, from column ``first`` on; beyond the last column, ``other``.

    EVEN: no tile of the call reaches beyond it.
    """
    if AXIS == 1:
        tile = _load_columns(tensor, place, first + along(4 * GROUPS, 1), columns, stride, other, EVEN)
        return tl.reshape(tile, [tile.shape[0], GROUPS, 2, 2])
    else:
        column = first + 4 * along(GROUPS, 0)
        return joined(
            _load_columns(tensor, place, column, columns, stride, other, EVEN),
            _load_columns(tensor, place, column + 1, columns, stride, other, EVEN),
            _load_columns(tensor, place, column + 2, columns, stride, other, EVEN),
            _load_columns(tensor, place, column + 3, columns, stride, other, EVEN),
        )


@triton.jit
def _store_columns(tensor, place, kept, column, columns, stride, values):
    tl.store(tensor + place + column.to(tl.int64) * stride, values, kept & (column < columns))


@triton.jit
def store_tile(tensor, place, kept, first, columns, stride, tile, GROUPS: tl.constexpr, AXIS: tl.constexpr):
    """Store the rows that ``kept`` says, rounded to the tensor's dtype."""
    values = tile.to(tensor.dtype.element_ty)
    if AXIS == 1:
        values = tl.reshape(values, [tile.shape[0], 4 * GROUPS])
        _store_columns(tensor, place, kept, first + along(4 * GROUPS, 1), columns, stride, values)
    else:
        column = first + 4 * along(GROUPS, 0)
        even, odd = tl.split(values)
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        _store_columns(tensor, place, kept, column, columns, stride, x0)
        _store_columns(tensor, place, kept, column + 1, columns, stride, x1)
        _store_columns(tensor, place, kept, column + 2, columns, stride, x2)
        _store_columns(tensor, place, kept, column + 3, columns, stride, x3)


@triton.jit
def noisy_scores(logits, seed, row, first, GROUPS: tl.constexpr, AXIS: tl.constexpr):
    """``logits + gumbel`` of a tile, less a constant; ``row`` are global row numbers, the call's offset included."""
    x0, x1, x2, x3 = philox_words(seed, row, first // 4 + along(GROUPS, AXIS))
    return logits - log2_of_exponential(complement_uniform(joined(x0, x1, x2, x3))) * LN_2


@triton.jit
def of_each(number):
    """A number of each pair or row, against a tile."""
    return number[:, :, None, None]


@triton.jit
def largest_of(tile):
    return tl.max(tl.max(tile, 3), 2)


@triton.jit
def sum_of(tile):
    return tl.sum(tl.sum(tile, 3), 2)


@triton.jit
def filled(like, value):
    """``value`` in float32, in the shape of ``like``."""
    return tl.zeros_like(like).to(tl.float32) + value


@triton.jit
def pairs_of(row, GROUPS: tl.constexpr, AXIS: tl.constexpr, value):
    """``value`` for each pair, in float32."""
    return filled(row + along(GROUPS, AXIS), value)


@triton.jit
def _reference(largest):
    """What is subtracted before exponentials are taken: 0 while there is nothing but -inf."""
    return tl.where(largest == NONE, 0.0, largest)


@triton.jit
def carry(before, after, scale):
    """By what sums relative to a former maximum shrink."""
    return tl.where(before == NONE, 0.0, tl.exp2((before - _reference(after)) * scale))


@triton.jit
def exponentials(values, largest, scale):
    return tl.exp2((values - of_each(_reference(largest))) * scale)


@triton.jit
def first_largest(scores, largest, column):
    """The first of a pair's columns whose score is the largest."""
    return tl.min(tl.min(tl.where(scores == of_each(largest), column, NO_COLUMN), 3), 2)


@triton.jit
def merged_sum(total, largest, of_row, scale, AXIS: tl.constexpr):
    """A row's sum, relative to its maximum ``of_row``."""
    return tl.sum(total * carry(largest, of_row, scale), AXIS, keep_dims=True)


@triton.jit
def merged_choice(chosen, largest, of_row, AXIS: tl.constexpr):
    return tl.min(tl.where(largest == of_row, chosen, NO_COLUMN), AXIS, keep_dims=True)


@triton.jit
def log_ratios(logits, largest):
    """log2 of the posterior but for a constant of the row; bounded below where it is 0, so that 0·log 0 is 0."""
    return tl.maximum((logits - of_each(_reference(largest))) * LOG2_E, -1000.0)


@triton.jit
def add_to_posterior(logits, largest, total, moment):
    """The running maximum, sum of exponentials and sum of exponentials times their logarithms, with a tile more."""
    after = tl.maximum(largest, largest_of(logits))
    e = exponentials(logits, after, LOG2_E)
    step = (_reference(largest) - _reference(after)) * LOG2_E
    shrink = carry(largest, after, LOG2_E)
    moment = shrink * (moment + total * step) + sum_of(e * log_ratios(logits, after))
    return after, shrink * total + sum_of(e), moment


@triton.jit
def merged_posterior(largest, total, moment, AXIS: tl.constexpr):
    of_row = tl.max(largest, AXIS, keep_dims=True)
    step = (_reference(largest) - _reference(of_row)) * LOG2_E
    shrink = carry(largest, of_row, LOG2_E)
    moment = tl.sum(shrink * (moment + total * step), AXIS, keep_dims=True)
    return of_row, tl.sum(shrink * total, AXIS, keep_dims=True), moment


@triton.jit
def divergence(total, moment, columns):
    """The KL to the uniform prior in nats; of total / columns, since that is near 1 where the KL is near 0."""
    kl = (tl.div_rn(moment, total) - tl.log2(tl.div_rn(total, tl.cast(columns, tl.float32)))) * LN_2
    return tl.where(kl < 0, 0.0, kl)


@triton.jit
def add_posterior_gradient(gradient, x, largest, total, moment, grad_kl):
    """The KL's gradient, grad_kl·q·(ln q - sum q ln q), is added."""
    q = exponentials(x, largest, LOG2_E) * of_each(tl.div_rn(grad_kl, total) * LN_2)
    return gradient + q * (log_ratios(x, largest) - of_each(tl.div_rn(moment, total)))


@dataclass(frozen=True)
class View:
    """How the kernels see the tensors of a call: rows, in one or two dimensions, of columns.

    ``strides`` has, for each tensor, those of the outer and the inner dimension of the rows and of the columns.
    """

    rows: int
    inner: int
    columns: int
    tensors: list[Tensor]
    strides: list[tuple[int, int, int]]

    @property
    def axis(self) -> int:
        """The tiles' axis of the columns: the last where those of the first tensor lie next to each other."""
        outer, inner, column = self.strides[0]
        return 0 if column != 1 and 1 in (outer, inner) else 1

    @property
    def aligned(self) -> bool:
        """Whether lanes move several neighbours at once in every tensor."""
        neighbours = self.axis == 0 or all(column in (0, 1) for _, _, column in self.strides)
        return neighbours and self.columns % 16 == 0 and aligned(*self.strides)


def view_of(dim: int, with_columns: list[Tensor], without: list[Tensor] = ()) -> View:
    """``with_columns`` have the columns along ``dim``, ``without`` have no such dimension. Where their rows do not
    merge into two dimensions all are made contiguous, and then they do."""
    axis = dim % with_columns[0].dim()
    sizes = list(with_columns[0].shape)
    columns = sizes.pop(axis)
    tensors = [*with_columns, *without]
    if 0 in sizes:  # strides of empty tensors need not merge
        return View(0, 1, columns, tensors, [(0, 0, 0)] * len(tensors))
    strides = [list(tensor.stride()) for tensor in tensors]
    column_strides = [stride.pop(axis) for stride in strides[: len(with_columns)]] + [0] * len(without)
    kept, steps = merged(sizes, *strides)
    if len(kept) > 2:
        whole = [tensor.contiguous() for tensor in tensors]
        return view_of(dim, whole[: len(with_columns)], whole[len(with_columns) :])
    outer, inner = (*kept, 1, 1)[:2]
    rows_strides = [(*step, 0, 0)[:2] for step in steps]
    places = [(*step, column) for step, column in zip(rows_strides, column_strides)]
    return View(outer * inner, inner, columns, tensors, places)
