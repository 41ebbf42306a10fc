"""What a run's log says of its numbers and its speed, gathered so that the device is never waited for.

A line holds, beside the averages of its updates (so the share of ``skipped_updates``, where a stage may skip them):

- ``gradient_exponents``: how the magnitudes of the last update's gradients spread, see :func:`exponent_shares`; each
  process counts what it holds, as the optimizer's step found it: multiplied by the resblocks' scales or else clipped;
- ``scales``: the resblocks' loss scales, where they have any;
- ``bytes_sent``: what the leading process sends in an update, where there are several;
- ``tokens_per_second`` of all processes, and ``share_of_peak``, the model's own operations (nothing counted twice) over
  what the devices can do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dalle.train.journal import Window
    from dalle.train.loop import Stage
    from dalle.train.team import Figures

LOWEST, HIGHEST = -64, 15
"""Exponents e of 2^e <= |x| < 2^(e + 1) that are told apart; 1-6-9 has -60 to 3, fp16 -24 to 15."""
_BUCKETS = HIGHEST - LOWEST + 3  # zeros before them, infinities and NaN after
_AT_ONCE = 1 << 22  # elements, which bounds the memory taken, and which float32 still counts one by one


def averages(window: Window) -> dict[str, float]:
    """The mean of each figure over the updates of a window."""
    return {name: sum(figures[name] for figures in window) / len(window) for name in window[0]}


@torch.no_grad()
def exponent_counts(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """How many elements of ``tensors`` have each binary exponent, int64 ``[82]`` on their device, never waiting for it.

    First zeros, then the exponents from :data:`LOWEST` (with all below) to :data:`HIGHEST` (with all above), then
    infinities and NaN. The tensors may be of any floating dtype; at least one is expected.
    """
    total = None
    for tensor in tensors:
        for chunk in tensor.detach().flatten().split(_AT_ONCE):
            counts = _counted(_buckets(chunk))
            total = counts if total is None else total + counts
    if total is None:
        raise ValueError("exponent_counts: expected at least one tensor, got none")
    return total


def _buckets(values: torch.Tensor) -> torch.Tensor:
    """The place of each value among :func:`exponent_counts`', int32."""
    magnitude = values.float().view(torch.int32) & 0x7FFFFFFF
    exponent = magnitude >> 23  # biased by 127; 0 also of what is below float32's normal numbers
    place = (exponent - 127).clamp_(LOWEST, HIGHEST).sub_(LOWEST - 1)
    return place.masked_fill_(magnitude == 0, 0).masked_fill_(exponent == 255, _BUCKETS - 1)


def _counted(places: torch.Tensor) -> torch.Tensor:
    if places.is_cuda:  # where bincount reads the largest place back, which makes the host wait
        return torch.histc(places.float(), _BUCKETS, 0, _BUCKETS - 1).long()
    return torch.bincount(places, minlength=_BUCKETS)


def exponent_shares(counts: Sequence[float]) -> dict[str, Any]:
    """For the log, of :func:`exponent_counts`: the shares of ``zeros`` and of ``nonfinite`` numbers, and ``shares`` of
    those with the exponents ``lowest``, ``lowest`` + 1, ..., up to the last that occurs."""
    zeros, *between, nonfinite = (float(f"{count / max(1, sum(counts)):.4g}") for count in counts)
    found = [index for index, share in enumerate(between) if share]
    first, last = (found[0], found[-1]) if found else (0, -1)
    return {"zeros": zeros, "nonfinite": nonfinite, "lowest": LOWEST + first, "shares": between[first : last + 1]}


def described(line: dict[str, Any]) -> dict[str, Any]:
    """For the log, of :meth:`Telemetry.line` with its tensors as lists."""
    return {**line, "gradient_exponents": exponent_shares(line["gradient_exponents"])}


def measured_peak(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of this device's matrix products, the best of a few; takes some tenths of a second.

    The matrices grow until their product takes long enough, so that a dtype which the device is slow in is soon done.
    """
    device, side = torch.device(device), 128
    while True:
        left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        best = min(_seconds(left, right) for _ in range(5))
        if best > 5e-3 or side == 8192:
            return 2 * side**3 / best
        side *= 2


def _main_dtype(parameters: Iterable[torch.Tensor]) -> torch.dtype:
    """The dtype of most numbers."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    left @ right
    _wait(left.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Telemetry:
    """What the lines of a run's log say beside averages.

    ``peak`` is the operations a second of each process's device, 0 to have it measured when it is first wanted.
    """

    def __init__(self, stage: Stage, peak: float = 0.0):
        self.stage = stage
        self.peak = peak
        self.bytes_sent: float | None = None
        self._exponents: torch.Tensor | None = None
        self._since = time.monotonic()
        self._updates = 0

    def update(self) -> AbstractContextManager[None]:
        """To be entered for each update."""
        self._updates += 1
        return self._count_bytes()

    @contextmanager
    def _count_bytes(self) -> Iterator[None]:
        # Every update sends the same, so the first is counted.
        if self.stage.team.size == 1 or self.bytes_sent is not None:
            yield
            return
        from dalle.train.collectives import CollectiveCounter  # what it imports takes torch seconds

        with CollectiveCounter() as counter:
            yield
        self.bytes_sent = counter.sent

    def observe(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take in gradients of the update that the next line is about, which will not be in ``shards`` by then."""
        counts = exponent_counts(gradients)
        self._exponents = counts if self._exponents is None else self._exponents + counts

    def line(self) -> Figures:
        """What a line says of the updates since the last one, after the last one's step: for :func:`described`, once
        its tensors have been read. All processes call this."""
        stage = self.stage
        self.observe([parameter.grad for parameter in stage.shards.parameters() if parameter.grad is not None])
        counts, self._exponents = self._exponents, None
        line: Figures = {"gradient_exponents": stage.team.total(counts)}
        if stage.scales is not None:
            line["scales"] = stage.scales.scales.clone()  # which change in place
        if self.bytes_sent is not None:
            line["bytes_sent"] = round(self.bytes_sent)
        return line | self._speed()

    def _measured_peak(self) -> float:
        # Where products in 16 bit are slow, as on a CPU, the model takes those of float32.
        dtypes = {torch.float32, _main_dtype(self.stage.shards.parameters())}
        return max(measured_peak(self.stage.team.device, dtype) for dtype in dtypes)

    def _speed(self) -> dict[str, float]:
        stage = self.stage
        rate = self._updates / max(time.monotonic() - self._since, 1e-9)
        speed = {}
        if stage.tokens_per_update:
            self.peak = self.peak or self._measured_peak()
            share = rate * stage.flops_per_update / (self.peak * stage.team.size)
            speed = {"tokens_per_second": rate * stage.tokens_per_update, "share_of_peak": share}
        self._updates, self._since = 0, time.monotonic()
        return speed
