"""Schedules as plain functions of the update's number, and the paper's plateau rule, whose state is a few floats."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


def cosine(start: float, end: float, updates: int, update: int) -> float:
    """From ``start`` at update 0 to ``end`` at ``updates`` along half a cosine, then constant (paper 2.1)."""
    if update >= updates:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * update / updates)) / 2


def warm_up(peak: float, updates: int, update: int) -> float:
    """Linear from ``peak / updates`` at update 0 to ``peak``, then constant (paper B.2)."""
    return peak * min(1.0, (update + 1) / max(1, updates))


@dataclass
class PlateauHalving:
    """Halve the step size each time the training loss stops falling (paper B.2: five times in the run).

    The loss is averaged over windows of ``window`` updates; a window that does not improve the best average by
    ``threshold`` (relative) halves the factor, at most ``most`` times.
    """

    window: int
    threshold: float = 0.002
    most: int = 5
    halvings: int = 0
    best: float = math.inf
    total: float = 0.0
    count: int = 0

    @property
    def factor(self) -> float:
        return 0.5**self.halvings

    def observe(self, loss: float) -> None:
        self.total += loss
        self.count += 1
        if self.count < self.window:
            return
        average = self.total / self.count
        self.total, self.count = 0.0, 0
        if average < self.best * (1 - self.threshold):
            self.best = average
        elif self.halvings < self.most:
            self.halvings += 1

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
