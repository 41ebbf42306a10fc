"""The steps of PowerSGD for parameters whose gradients come together: a bucket of DDP, or a unit of FSDP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.powersgd.collectives import sum_factors
from dalle_kernels.powersgd.compression import Batch, largest_magnitudes
from dalle_kernels.powersgd.ops import orthogonalize
from dalle_kernels.powersgd.shards import LocalShard


@dataclass(frozen=True)
class Settings:
    """Of all groups of a model; :class:`~dalle_kernels.PowerSGD` tells what they are. ``rank`` is that of a shard."""

    rank: int
    machines: dist.ProcessGroup | None
    machine_count: int
    gradient_divisor: float
    p_divisor: float
    q_divisor: float
    eps: float
    keep_scale: bool


class Group:
    """Shards on one device whose gradients are summed by one pair of collectives for P, one for Q, one for the rest.

    ``square`` is what the last sums add to the square of the global norm, until that is asked for.
    """

    def __init__(self, shards: Sequence[LocalShard], settings: Settings, seed: int):
        self.shards, self.settings = shards, settings
        self.square: Tensor | None = None
        by_shape: dict[tuple[int, int], list[int]] = {}
        self.exempt = []
        for place, shard in enumerate(shards):
            if shard.matrices is None:
                self.exempt.append(place)
            elif 0 not in shard.matrices:
                by_shape.setdefault(shard.matrices[1:], []).append(place)
        self.places = list(by_shape.values())
        self.batches = [Batch([shards[place] for place in places], settings.rank, seed) for places in self.places]
        # The compressed shards batch by batch, and for each of their matrices whose it is.
        self.compressed = [place for places in self.places for place in places]
        owners = [i for i, place in enumerate(self.compressed) for _ in range(shards[place].matrices[0])]
        device = shards[0].parameter.device
        self._order, self._owners = (torch.tensor(numbers, device=device) for numbers in (self.compressed, owners))

    @torch.no_grad()
    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Replace this rank's gradients by what all machines' sum to (steps 2 to 12, save the norm's own sum)."""
        divisors = self._divisors(gradients[0].device)
        if self.exempt:
            exempt = torch.cat([(gradients[i].float() / divisors[i]).flatten() for i in self.exempt])
            pending = dist.all_reduce(exempt, group=self.settings.machines, async_op=True)
        self.square = divisors.new_zeros(())
        if self.batches:
            self._reduce_matrices(gradients, divisors)
        if self.exempt:
            pending.wait()
            self.square += exempt.square().sum()
            targets = [gradients[i] for i in self.exempt]
            parts = exempt.split([target.numel() for target in targets])
            if self.settings.keep_scale:
                scales = (divisors / self.settings.gradient_divisor).unbind()
                parts = [part * scales[i] for i, part in zip(self.exempt, parts)]
            torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets)])

    def _divisors(self, device: torch.device) -> Tensor:
        """What each shard's gradient is divided by, float32."""
        divisors = torch.full((len(self.shards),), self.settings.gradient_divisor, dtype=torch.float32, device=device)
        if any(shard.scale is not None for shard in self.shards):
            one = torch.ones((), device=device)
            divisors *= torch.stack([one if shard.scale is None else shard.scale.view(()) for shard in self.shards])
        return divisors

    def _reduce_matrices(self, gradients: Sequence[Tensor], divisors: Tensor) -> None:
        settings = self.settings
        errors, bad_gradient, kept = self._accumulate(gradients, divisors)
        P = [batch.project(error) for batch, error in zip(self.batches, errors)]
        P, finite = sum_factors(P, kept == 0, settings.p_divisor, settings.machines)
        P = [orthogonalize(p, settings.eps) for p in P]
        Q = [batch.project_back(error, p) for batch, error, p in zip(self.batches, errors, P)]
        Q, finite = sum_factors(Q, finite.logical_not(), settings.q_divisor, settings.machines)
        # Where a factor is nonfinite nothing is decompressed, and all of the buffer stays.
        scales = (finite.float() * settings.q_divisor).view(-1, 1, 1)
        counts = [len(q) for q in Q]
        Q = torch._foreach_mul(Q, scales.split(counts))
        returned = (divisors / settings.gradient_divisor).index_select(0, self._order).index_select(0, self._owners)
        parts_of_each = zip(self.batches, self.places, errors, P, Q, kept.split(counts), returned.split(counts))
        for batch, places, error, p, q, keep, scale in parts_of_each:
            decompressed = batch.decompress(p, q)
            batch.feed_back(error, decompressed, settings.machine_count, keep)
            if settings.keep_scale:
                decompressed *= scale.view(-1, 1, 1)
            own, parts = [gradients[i] for i in places], decompressed.split(batch.counts)
            torch._foreach_copy_(own, [part.view_as(gradient) for part, gradient in zip(parts, own)])
        self.square += torch.stack(torch._foreach_norm(Q)).square().sum()
        nonfinite = bad_gradient.any() | finite.logical_not().any()
        self.square.masked_fill_(nonfinite, torch.inf)
        if settings.keep_scale:
            for place in self.compressed:
                gradients[place].masked_fill_(nonfinite, torch.inf)

    def _accumulate(self, gradients: Sequence[Tensor], divisors: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Step 2: each batch's buffers in float32 with what is added; which gradients are nonfinite; what is kept.

        Where a quotient leaves float32's range the buffer is nonfinite, and will end as zeros: 0 (int16) for each of
        its matrices, 1 for those of others.
        """
        largest = largest_magnitudes([gradients[i] for i in self.compressed])
        finite = largest < torch.inf
        added = largest / divisors.index_select(0, self._order) < torch.inf
        skipped, of_shards = dict(zip(self.compressed, added.logical_not().unbind())), divisors.unbind()
        errors = [
            batch.accumulate(*([numbers[i] for i in places] for numbers in (gradients, skipped, of_shards)))
            for batch, places in zip(self.batches, self.places)
        ]
        kept = (added | finite.logical_not()).to(torch.int16).index_select(0, self._owners)
        return errors, finite.logical_not(), kept
