"""The steps of PowerSGD for parameters whose gradients come together: a bucket of DDP, or a unit of FSDP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels import _triton
from dalle_kernels._dispatch import forced_provider
from dalle_kernels.float16.ops import decode_fp169
from dalle_kernels.powersgd import steps
from dalle_kernels.powersgd.collectives import all_reduce_codes
from dalle_kernels.powersgd.compression import Layout, fixed_gaussian
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
    keep_gradients: bool


@cache
def _triton_steps() -> ModuleType | None:
    if _triton.unavailable("cuda") is not None:
        return None
    from dalle_kernels.powersgd import triton_kernels

    return triton_kernels


def steps_on(device: torch.device) -> ModuleType:
    """The elementwise steps for tensors of ``device``: on a GPU by Triton's kernels where they can serve."""
    fast = _triton_steps() if device.type == "cuda" and forced_provider() in (None, "triton") else None
    return fast or steps


@dataclass(frozen=True)
class Sums:
    """What all machines' gradients sum to, as factors: each batch's P, float32, and the codes of Q and of its marks.

    ``largest``, ``factors`` and ``square`` are as in steps.py.
    """

    P: Sequence[Tensor]
    codes: Tensor
    largest: Tensor
    factors: Tensor | None
    square: Tensor


class Group:
    """Shards on one device whose gradients are summed by one pair of collectives for P, one for Q, one for the rest.

    Their error buffers are parts of one tensor of codes from here on. ``square`` is what the last sums add to the
    square of the global norm, until that is asked for; ``sums`` are those of the matrices where gradients are not kept.
    """

    def __init__(self, shards: Sequence[LocalShard], settings: Settings, seed: int):
        self.shards, self.settings = shards, settings
        self.square: Tensor | None = None
        self.sums: Sums | None = None
        self.exempt = [place for place, shard in enumerate(shards) if shard.matrices is None]
        device = shards[0].parameter.device
        self.layout = Layout(shards, settings.rank, device)
        self._alike = torch.full((len(shards),), settings.gradient_divisor, dtype=torch.float32, device=device)
        if self.layout.batches:
            drawn = [fixed_gaussian(s, batch.rank, seed) for batch in self.layout.batches for s in batch.shards]
            self._fixed = torch.cat([codes.flatten() for codes in drawn])
            self._keep(torch.cat([shard.errors.flatten() for shard in self.layout.shards]))

    def _keep(self, errors: Tensor) -> None:
        self._errors = errors
        shards = self.layout.shards
        for shard, part in zip(shards, errors.split([shard.shape.numel() for shard in shards])):
            shard.errors = part.view(shard.matrices)

    @torch.no_grad()
    def reduce(self, gradients: Sequence[Tensor]) -> None:
        """Replace this rank's gradients by what all machines' sum to (steps 2 to 12, save the norm's own sum)."""
        if self.exempt:
            divisors = self._divisors(self.exempt)
            exempt = self._quotients(gradients, divisors)
            pending = dist.all_reduce(exempt, group=self.settings.machines, async_op=True)
        self.square = self._reduce_matrices(gradients) if self.layout.batches else self._alike.new_zeros(())
        if self.exempt:
            pending.wait()
            self.square += exempt.square().sum()
            targets = [gradients[i] for i in self.exempt]
            parts = exempt.split([target.numel() for target in targets])
            if self.settings.keep_scale:
                parts = [part * scale for part, scale in zip(parts, divisors / self.settings.gradient_divisor)]
            torch._foreach_copy_(targets, [part.view_as(target) for part, target in zip(parts, targets)])

    def _divisors(self, places: Sequence[int]) -> Tensor:
        """What the gradients of these shards are divided by, float32."""
        scales = [self.shards[place].scale for place in places]
        if all(scale is None for scale in scales):
            return self._alike[: len(scales)]
        one = torch.ones((), device=self._alike.device)
        return self.settings.gradient_divisor * torch.stack([one if s is None else s.view(()) for s in scales])

    def _quotients(self, gradients: Sequence[Tensor], divisors: Tensor) -> Tensor:
        """The exempt gradients over their divisors, one after the other in float32."""
        own = [gradients[place] for place in self.exempt]
        if all(self.shards[place].scale is None for place in self.exempt):
            return torch.cat([gradient.flatten() for gradient in own]).float().div_(self.settings.gradient_divisor)
        return torch.cat([(gradient.float() / divisor).flatten() for gradient, divisor in zip(own, divisors)])

    def _reduce_matrices(self, gradients: Sequence[Tensor]) -> Tensor:
        """Returns the square of the sums' norm, infinite where something was nonfinite."""
        settings, layout, of = self.settings, self.layout, steps_on(self._errors.device)
        machines = settings.machines, settings.machine_count
        given = [gradients[place] for place in layout.places]
        own = [gradient.contiguous() for gradient in given]
        divisors, room = self._divisors(layout.places), steps.Room.make(layout, settings.machine_count)
        errors, lost = of.accumulate(layout, own, self._errors, divisors, room.largest)
        by_batch = layout.errors.views(errors)

        P = errors.new_empty(layout.P.numel)
        fixed = decode_fp169(self._fixed)
        for batch, *parts in zip(layout.batches, by_batch, layout.Q.views(fixed), layout.P.views(P)):
            batch.project(*parts)
        of.encode(layout, layout.P, P, lost, settings.p_divisor, room.P)
        all_reduce_codes(room.P, of.add, *machines)
        stacks = layout.together.views(of.stacked(layout, room.P))
        P = layout.parts_of_stacks([orthogonalize(stack, settings.eps) for stack in stacks])

        Q = fixed  # which has Q's size and is done with
        for batch, *parts in zip(layout.batches, by_batch, P, layout.Q.views(Q)):
            batch.project_back(*parts)
        of.encode(layout, layout.Q, Q, room.P[layout.P.numel :][: layout.matrices], settings.q_divisor, room.Q)
        all_reduce_codes(room.Q, of.add, *machines)
        factors = divisors / settings.gradient_divisor if settings.keep_scale else None
        # Where a factor is nonfinite nothing is decompressed, and all of the buffer stays.
        Q, square = of.scaled(layout, room.Q, room.largest, settings.q_divisor)
        decompressed = self._decompress(P, Q, errors.new_empty(len(errors)))
        self._keep(of.feed_back(layout, errors, decompressed, self._errors, lost, settings.machine_count))
        if (own[0] if settings.keep_gradients else layout.shards[0].parameter).dtype == torch.float16:
            steps.bound(layout, decompressed, factors, square)
        if not settings.keep_gradients:
            self.sums = Sums(P, room.Q.clone(), room.largest.clone(), factors, square)
            return square
        of.give(layout, decompressed, own, factors, square)
        for gradient, copy in zip(given, own):
            if copy is not gradient:
                gradient.copy_(copy)
        return square

    def _decompress(self, P: Sequence[Tensor], Q: Tensor, out: Tensor) -> Tensor:
        for batch, *parts in zip(self.layout.batches, P, self.layout.Q.views(Q), self.layout.errors.views(out)):
            batch.decompress(*parts)
        return out

    @torch.no_grad()
    def decompressed(self) -> list[tuple[LocalShard, Tensor]]:
        """The compressed shards, each with the gradient that :attr:`sums` has of it."""
        layout, sums = self.layout, self.sums
        of = steps_on(sums.codes.device)
        Q, _ = of.scaled(layout, sums.codes, sums.largest, self.settings.q_divisor)
        decompressed = self._decompress(sums.P, Q, Q.new_empty(layout.errors.numel))
        flat = decompressed.new_empty(len(decompressed), dtype=layout.shards[0].parameter.dtype)
        parts = flat.split([shard.shape.numel() for shard in layout.shards])
        gradients = [part.view(shard.shape) for part, shard in zip(parts, layout.shards)]
        of.give(layout, decompressed, gradients, sums.factors, sums.square)
        return list(zip(layout.shards, gradients))
