"""What a group's matrices are, where they lie in flat tensors, and the products of PowerSGD's steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dalle_kernels import philox
from dalle_kernels.float16.ops import encode_fp169
from dalle_kernels.powersgd.shards import LocalShard

_ROWS_OF_A_PARAMETER = 2**32

MOST_PADDING = {"cuda": 4}
"""By device type, how many times its own rows a matrix may get by padding with zeros, so that it is orthogonalized with
taller ones: on a GPU a small decomposition takes as long as some of them. 1 where there is none."""


def fixed_gaussian(shard: LocalShard, rank: int, seed: int) -> Tensor:
    """The codes of a shard's Q of step 3: standard normal numbers [matrices, n, rank], n the larger of the sizes.

    They are a function of the seed, the parameter's place, the matrix, row and column alone: every rank draws the same.
    """
    count, *sizes = shard.matrices
    first = shard.index * _ROWS_OF_A_PARAMETER
    codes = _gaussian_rows(first, count * max(sizes), rank, seed, shard.parameter.device)
    return codes.view(count, max(sizes), rank)


# An operator, so that a plan's fake tensors go through one instead of the two hundred of Philox.
@torch.library.custom_op("dalle_kernels::gaussian_rows", mutates_args=())
def _gaussian_rows(first: int, count: int, rank: int, seed: int, device: torch.device) -> Tensor:
    rows = torch.arange(first, first + count, device=device).view(-1, 1, 1)
    uniform = philox.complement_uniform(torch.tensor(seed, device=device), rows, rank)
    return encode_fp169(torch.special.ndtri(uniform.double()))


@_gaussian_rows.register_fake
def _(first: int, count: int, rank: int, seed: int, device: torch.device) -> Tensor:
    return torch.empty(count, 1, rank, dtype=torch.int16, device=device)


class Batch:
    """Shards whose matrices have equal sizes: each product of all of them is one call.

    A matrix has ``rows`` and ``columns``; the smaller of them is the paper's m, the larger one n.
    """

    def __init__(self, shards: Sequence[LocalShard], rank: int):
        _, rows, columns = shards[0].matrices
        self.shards = shards
        self.is_tall = rows > columns
        self.m, self.n = sorted((rows, columns))
        self.rank = min(rank, self.m)
        count = sum(shard.matrices[0] for shard in shards)
        self.errors, self.P, self.Q = (count, rows, columns), (count, self.m, self.rank), (count, self.n, self.rank)

    def project(self, errors: Tensor, fixed: Tensor, out: Tensor) -> None:
        """Step 3: P = E Q for the fixed Q, [matrices, m, rank]."""
        torch.bmm(self._wide(errors), fixed, out=out)

    def project_back(self, errors: Tensor, P: Tensor, out: Tensor) -> None:
        """Step 6: Q = E' P, [matrices, n, rank]."""
        torch.bmm(self._wide(errors).mT, P, out=out)

    def decompress(self, P: Tensor, Q: Tensor, out: Tensor) -> None:
        """Step 11: P Q' as the gradient's matrices [matrices, rows, columns]."""
        torch.bmm(*((Q, P.mT) if self.is_tall else (P, Q.mT)), out=out)

    def _wide(self, errors: Tensor) -> Tensor:
        return errors.mT if self.is_tall else errors


@dataclass(frozen=True, eq=False)
class Flat:
    """How one array of every matrix lies in a flat tensor: ``shapes`` [matrices, rows, columns], batch after batch."""

    shapes: tuple[tuple[int, int, int], ...]

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @cached_property
    def numel(self) -> int:
        return sum(self.sizes)

    @cached_property
    def counts(self) -> list[int]:
        """The numbers of each matrix."""
        return [rows * columns for matrices, rows, columns in self.shapes for _ in range(matrices)]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each batch's array, of a tensor of :attr:`numel` numbers."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes)]


class Layout:
    """The compressed shards of a group: their batches, and how their matrices' arrays lie.

    ``errors``, ``P`` and ``Q`` tell of E, P and Q. ``together`` are the stacks in which P is orthogonalized, in the
    order of the batches: one for batches of one rank, whose matrices are padded with zero rows, which Q then has too.
    ``owners`` is for each matrix the number of its shard, ``places`` for each shard its place among the group's.
    ``tables`` is for what launches need to know of all that on the device.
    """

    def __init__(self, shards: Sequence[LocalShard], rank: int, device: torch.device):
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place, shard in enumerate(shards):
            if shard.matrices is not None and 0 not in shard.matrices:
                by_shape.setdefault(shard.matrices[1:], []).append(place)
        # Batches of one rank one after the other, those of few rows first.
        ordered = sorted(by_shape.values(), key=lambda places: min(shards[places[0]].matrices[1:]))
        self.device = device
        self.places = [place for places in ordered for place in places]
        self.shards = [shards[place] for place in self.places]
        self.batches = [Batch([shards[place] for place in places], rank) for places in ordered]
        self.owners = [i for i, shard in enumerate(self.shards) for _ in range(shard.matrices[0])]
        self.errors, self.P, self.Q = (
            Flat(tuple(getattr(batch, kind) for batch in self.batches)) for kind in ("errors", "P", "Q")
        )
        stacks = list(self._stacks(MOST_PADDING.get(device.type, 1)))
        self.together = Flat(tuple(stack for stack, _ in stacks))
        self.batches_together = [batches for _, batches in stacks]
        self.owners_on_device = torch.tensor(self.owners, device=device)
        self.tables: dict = {}

    @property
    def matrices(self) -> int:
        return len(self.owners)

    def _stacks(self, most_padding: int) -> Iterator[tuple[tuple[int, int, int], int]]:
        """The shape of each stack of P, and how many batches it takes."""
        taken: list[Batch] = []
        for batch, following in zip(self.batches, [*self.batches[1:], None]):
            taken.append(batch)
            first = taken[0]
            if following is None or following.rank != first.rank or following.m > most_padding * first.m:
                yield (sum(one.P[0] for one in taken), batch.m, batch.rank), len(taken)
                taken = []

    def parts_of_stacks(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Each batch's part [matrices, m, rank] of the stacks, as a view."""
        parts, batches = [], iter(self.batches)
        for stack, count in zip(stacks, self.batches_together):
            own = [next(batches) for _ in range(count)]
            parts += [part[:, : one.m] for part, one in zip(stack.split([one.P[0] for one in own]), own)]
        return parts
