"""Triton kernels of what PowerSGD does to each number: one launch for all matrices of a group. steps.py has the rules.

Floor: bytes. A step reads and writes each number once, beside a few operations. With small shards the host's launches
take longer, hence one for all matrices; the tables that tell of these are written once a group. Whoever meets a number
that is not finite stores its matrix's mark, all of them the same value. Sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import Configuration, configuration
from dalle_kernels._triton_tables import located
from dalle_kernels.float16.triton_kernels import decoded, encoded
from dalle_kernels.powersgd.compression import Flat, Layout

_ONE = tl.constexpr(60 << 9)  # the code of 1


@dataclass(frozen=True)
class Pieces:
    """Matrices as a launch cuts them into blocks of a fixed size.

    ``numbers``: int64 rows of ``count`` each: the matrices' elements, first blocks, then places, where in some flat
    tensor each begins, then others. ``owners``: int32, the matrix of each block. ``aligned``: places are multiples of
    16. ``options``: those of the launch.
    """

    numbers: Tensor
    owners: Tensor
    count: int
    aligned: bool
    options: dict[str, int]

    @property
    def blocks(self) -> int:
        return self.owners.numel()


def _chosen(layout: Layout) -> Configuration:
    return configuration("powersgd", "any", layout.device)


def _pieces(layout: Layout, counts: Sequence[int], *places: Sequence[int], others=()) -> Pieces:
    chosen, device = _chosen(layout), layout.device
    blocks = [triton.cdiv(count, chosen["BLOCK"]) for count in counts]
    numbers = torch.tensor([counts, _starts(blocks), *places, *others], dtype=torch.int64, device=device)
    owners = torch.arange(len(counts), dtype=torch.int32, device=device)
    owners = owners.repeat_interleave(torch.tensor(blocks, device=device), output_size=sum(blocks))
    aligned = all(place % 16 == 0 for row in places for place in row)
    return Pieces(numbers, owners, len(counts), aligned, chosen.options)


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *running_sums(counts)][:-1]


def _pieces_of(layout: Layout, flat: Flat) -> Pieces:
    """Places: in the flat tensor. Others: of which gradient the matrix is."""
    key = flat, _chosen(layout)
    if key not in layout.tables:
        layout.tables[key] = _pieces(layout, flat.counts, _starts(flat.counts), others=[layout.owners])
    return layout.tables[key]


def _pieces_of_gradients(layout: Layout, gradients: Sequence[Tensor]) -> Pieces:
    """Places: in the buffers; in the gradients, counted from the first one's address. Others: of which gradient.

    Gradients of a bucket or unit keep their distances, wherever it lies; the table of other ones is written anew.
    """
    first, size = gradients[0].data_ptr(), gradients[0].element_size()
    distances = [(gradient.data_ptr() - first) // size for gradient in gradients]
    key = "gradients", _chosen(layout)
    known, pieces = layout.tables.get(key, (None, None))
    if distances != known:
        counts = layout.errors.counts
        places, ends = [], list(distances)
        for owner, count in zip(layout.owners, counts):
            places.append(ends[owner])
            ends[owner] += count
        pieces = _pieces(layout, counts, _starts(counts), places, others=[layout.owners])
        layout.tables[key] = distances, pieces
    return pieces


@triton.jit
def _place(numbers, matrices, matrix, ROW: tl.constexpr, ALIGNED: tl.constexpr):
    place = tl.load(numbers + (2 + ROW) * matrices + matrix)
    return tl.multiple_of(place, 16) if ALIGNED else place


@triton.jit
def _encoded(values):
    code, _ = encoded(values.to(tl.int32, bitcast=True), 9, 23, 127)
    return code


@triton.jit
def _largest_block(gradients, index, mask, largest):
    values = tl.load(gradients + index, mask, other=0) if mask is not None else tl.load(gradients + index)
    # As integers magnitudes have their order, and NaN comes last.
    magnitudes = values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest, tl.max(magnitudes, 0), sem="relaxed")


@triton.jit(do_not_specialize=["matrices"])
def _largest(numbers, owners, matrices, gradients, largest, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    gradients += _place(numbers, matrices, matrix, 1, ALIGNED) + first
    largest += tl.load(numbers + 4 * matrices + matrix)
    index = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        _largest_block(gradients, index, None, largest)
    else:
        _largest_block(gradients, index, index < count - first, largest)


@triton.jit
def _accumulate_block(gradients, codes, errors, index, mask, added, divisor):
    gradient = tl.load(gradients + index, mask).to(tl.float32)
    error = decoded(tl.load(codes + index, mask), 9) + tl.where(added, tl.div_rn(gradient, divisor), 0.0)
    tl.store(errors + index, error, mask)


@triton.jit(do_not_specialize=["matrices"])
def _accumulate(numbers, owners, matrices, gradients, codes, largest, divisors, errors, lost,
                ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    place = _place(numbers, matrices, matrix, 0, ALIGNED) + first
    gradients += _place(numbers, matrices, matrix, 1, ALIGNED) + first
    owner = tl.load(numbers + 4 * matrices + matrix)
    magnitude, divisor = tl.load(largest + owner), tl.load(divisors + owner)
    added = tl.div_rn(magnitude, divisor) < float("inf")
    tl.store(lost + matrix, ((magnitude < float("inf")) & (added == 0)).to(tl.int16))  # each block the same
    index = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        _accumulate_block(gradients, codes + place, errors + place, index, None, added, divisor)
    else:
        _accumulate_block(gradients, codes + place, errors + place, index, index < count - first, added, divisor)


@triton.jit
def _encode_block(values, codes, index, mask, mark, marked, divisor):
    numbers = tl.load(values + index, mask, other=0) if mask is not None else tl.load(values + index)
    tl.store(codes + index, _encoded(tl.div_rn(numbers, divisor)), mask)
    found = (tl.abs(numbers) < float("inf")) == 0
    tl.store(mark, _ONE, marked | (tl.max(found.to(tl.int32), 0) != 0))


@triton.jit(do_not_specialize=["matrices", "divisor"])
def _encode(numbers, owners, matrices, values, before, codes, marks, divisor,
            ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    place = _place(numbers, matrices, matrix, 0, ALIGNED) + first
    marked = tl.load(before + matrix) != 0
    index = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        _encode_block(values + place, codes + place, index, None, marks + matrix, marked, divisor)
    else:
        mask = index < count - first
        _encode_block(values + place, codes + place, index, mask, marks + matrix, marked, divisor)


@triton.jit
def _add_block(codes, sums, index, mask, ranks, count):
    total = tl.zeros(index.shape, tl.float32)
    for rank in range(ranks):
        total += decoded(tl.load(codes + rank * count + index, mask), 9)
    tl.store(sums + index, _encoded(total), mask)


@triton.jit(do_not_specialize=["ranks", "count"])  # a count of 1 would be a constant, which has no .to
def _add(codes, sums, ranks, count, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    count = count.to(tl.int64)
    if first + BLOCK <= count:
        _add_block(codes, sums, index, None, ranks, count)
    else:
        _add_block(codes, sums, index, index < count, ranks, count)


@triton.jit(do_not_specialize=["matrices"])
def _stacked(numbers, owners, matrices, codes, stacks, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    stacks += _place(numbers, matrices, matrix, 0, ALIGNED) + first
    codes += _place(numbers, matrices, matrix, 1, ALIGNED) + first
    index = tl.arange(0, BLOCK)
    own = tl.load(numbers + 4 * matrices + matrix) - first  # beyond them the rows are zeros
    tl.store(stacks + index, decoded(tl.load(codes + index, index < own, other=0), 9), index < count - first)


@triton.jit
def _scaled_block(codes, Q, index, mask, factor):
    code = tl.load(codes + index, mask, other=0) if mask is not None else tl.load(codes + index)
    values = decoded(code, 9) * factor
    tl.store(Q + index, values, mask)
    return tl.sum(values * values, 0)


@triton.jit(do_not_specialize=["matrices", "factor"])
def _scaled(numbers, owners, matrices, codes, marks, largest, Q, squares, factor,
            ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    place = _place(numbers, matrices, matrix, 0, ALIGNED) + first
    magnitude = tl.load(largest + tl.load(numbers + 3 * matrices + matrix))
    finite = tl.load(marks + matrix) == 0
    factor = tl.where(finite, factor, 0.0)
    index = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        square = _scaled_block(codes + place, Q + place, index, None, factor)
    else:
        square = _scaled_block(codes + place, Q + place, index, index < count - first, factor)
    tl.store(squares + tl.program_id(0), tl.where(finite & (magnitude < float("inf")), square, float("inf")))


@triton.jit
def _feed_back_block(errors, decompressed, codes, index, mask, part, lost):
    left = tl.load(errors + index, mask) - part * tl.load(decompressed + index, mask)
    tl.store(codes + index, tl.where(lost, 0, _encoded(left)).to(tl.int16), mask)


@triton.jit(do_not_specialize=["matrices", "part"])
def _feed_back(numbers, owners, matrices, errors, decompressed, codes, lost, part,
               ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    place = _place(numbers, matrices, matrix, 0, ALIGNED) + first
    is_lost = tl.load(lost + matrix) != 0
    index = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        _feed_back_block(errors + place, decompressed + place, codes + place, index, None, part, is_lost)
    else:
        mask = index < count - first
        _feed_back_block(errors + place, decompressed + place, codes + place, index, mask, part, is_lost)


@triton.jit
def _give_block(decompressed, gradients, index, mask, factor, infinite):
    values = tl.where(infinite, float("inf"), tl.load(decompressed + index, mask) * factor)
    tl.store(gradients + index, values, mask)


@triton.jit(do_not_specialize=["matrices"])
def _give(numbers, owners, matrices, decompressed, gradients, factors, square, SCALED: tl.constexpr,
          ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    matrix, first, count = located(numbers, owners, matrices, BLOCK)
    decompressed += _place(numbers, matrices, matrix, 0, ALIGNED) + first
    gradients += _place(numbers, matrices, matrix, 1, ALIGNED) + first
    factor, infinite = 1.0, False
    if SCALED:
        factor = tl.load(factors + tl.load(numbers + 4 * matrices + matrix))
        infinite = tl.load(square) == float("inf")
    index = tl.arange(0, BLOCK)
    if first + BLOCK <= count:
        _give_block(decompressed, gradients, index, None, factor, infinite)
    else:
        _give_block(decompressed, gradients, index, index < count - first, factor, infinite)


def _run(kernel, pieces: Pieces, *arguments, **constants) -> None:
    kernel[(pieces.blocks,)](
        pieces.numbers, pieces.owners, pieces.count, *arguments, ALIGNED=pieces.aligned, **constants, **pieces.options
    )


def accumulate(
    layout: Layout, gradients: Sequence[Tensor], codes: Tensor, divisors: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor]:
    pieces = _pieces_of_gradients(layout, gradients)
    _run(_largest, pieces, gradients[0], largest.view(torch.int32))
    errors = torch.empty_like(codes, dtype=torch.float32)
    lost = codes.new_empty(layout.matrices)
    _run(_accumulate, pieces, gradients[0], codes, largest, divisors, errors, lost)
    return errors, lost


def encode(layout: Layout, factors: Flat, numbers: Tensor, before: Tensor, divisor: float, codes: Tensor) -> None:
    _run(_encode, _pieces_of(layout, factors), numbers, before, codes, codes[len(numbers) :], divisor)


def add(codes: Tensor) -> Tensor:
    ranks, count = codes.shape
    sums = codes.new_empty(count)
    chosen = configuration("powersgd", "any", codes.device)
    _add[(triton.cdiv(count, chosen["BLOCK"]),)](codes, sums, ranks, count, **chosen.options)
    return sums


def stacked(layout: Layout, codes: Tensor) -> Tensor:
    key = "stacks", _chosen(layout)
    if key not in layout.tables:
        counts, own = layout.together.counts, layout.P.counts
        layout.tables[key] = _pieces(layout, counts, _starts(counts), _starts(own), others=[own])
    stacks = torch.empty(layout.together.numel, device=codes.device)
    _run(_stacked, layout.tables[key], codes, stacks)
    return stacks


def scaled(layout: Layout, codes: Tensor, largest: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    pieces = _pieces_of(layout, layout.Q)
    Q, squares = (torch.empty(size, device=codes.device) for size in (layout.Q.numel, pieces.blocks))
    _run(_scaled, pieces, codes, codes[layout.Q.numel :], largest, Q, squares, factor)
    return Q, squares.sum()


def feed_back(
    layout: Layout, errors: Tensor, decompressed: Tensor, codes: Tensor, lost: Tensor, machines: int
) -> Tensor:
    _run(_feed_back, _pieces_of(layout, layout.errors), errors, decompressed, codes, lost, 1 / machines)
    return codes


def give(
    layout: Layout, decompressed: Tensor, gradients: Sequence[Tensor], factors: Tensor | None, square: Tensor
) -> None:
    pieces, is_scaled = _pieces_of_gradients(layout, gradients), factors is not None
    _run(_give, pieces, decompressed, gradients[0], factors if is_scaled else square, square, SCALED=is_scaled)
