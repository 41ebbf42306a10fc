"""The steps of PowerSGD for parameters whose gradients come together: a bucket of DDP, or a unit of FSDP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.powersgd.collectives import sum_factors
from dalle_kernels.powersgd.compression import Batch
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
        places: dict[tuple[int, int], list[int]] = {}
        self.exempt = []
        for place, shard in enumerate(shards):
            if shard.matrices is None:
                self.exempt.append(place)
            elif 0 not in shard.matrices:
                places.setdefault(shard.matrices[1:], []).append(place)
        self.places = list(places.values())
        self.batches = [Batch([shards[place] for place in batch], settings.rank, seed) for batch in self.places]
        device = shards[0].parameter.device
        self.indices = [torch.tensor(batch, device=device) for batch in self.places]

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
        of_batches = [[gradients[i] for i in places] for places in self.places]
        accumulated = [
            batch.accumulate(own, divisors.index_select(0, index))
            for batch, own, index in zip(self.batches, of_batches, self.indices)
        ]
        errors, bad_gradients, bad_errors = zip(*accumulated)
        bad = torch.cat([batch.of_matrices(found) for batch, found in zip(self.batches, bad_errors)])
        P = [batch.project(error) for batch, error in zip(self.batches, errors)]
        P, finite = sum_factors(P, bad, settings.p_divisor, settings.machines)
        P = [orthogonalize(p, settings.eps) for p in P]
        Q = [batch.project_back(error, p) for batch, error, p in zip(self.batches, errors, P)]
        Q, finite = sum_factors(Q, finite.logical_not(), settings.q_divisor, settings.machines)
        counts = [len(q) for q in Q]
        scales = divisors / settings.gradient_divisor
        of_each = zip(self.batches, self.indices, errors, of_batches, P, Q, finite.split(counts))
        for batch, index, error, own, p, q, known in of_each:
            # Where a factor is nonfinite nothing is decompressed, and all of the buffer stays.
            q.mul_(known.view(-1, 1, 1).float().mul_(settings.q_divisor))
            decompressed = batch.decompress(p, q)
            batch.feed_back(error, decompressed, settings.machine_count)
            if settings.keep_scale:
                decompressed *= batch.of_matrices(scales.index_select(0, index)).view(-1, 1, 1)
            parts = decompressed.split(batch.counts)
            torch._foreach_copy_(own, [part.view_as(gradient) for part, gradient in zip(parts, own)])
            self.square += q.square().sum()
        nonfinite = torch.cat([*bad_gradients, finite.logical_not()]).any()
        self.square.masked_fill_(nonfinite, torch.inf)
        if settings.keep_scale:
            for gradient in chain.from_iterable(of_batches):
                gradient.masked_fill_(nonfinite, torch.inf)
