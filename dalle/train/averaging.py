"""Iterate averaging: an exponential moving average of the parameters (paper 2.1 and B.2)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class IterateAverage:
    """Keeps ``average = decay * average + (1 - decay) * parameters`` in a float32 copy of ``model``, every ``every``
    updates.

    Early on the decay is lowered to ``(1 + n) / (10 + n)`` at the n-th averaging, so that a short run is not held back
    by its random start; the paper's long runs never notice.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1):
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        self.every = every

    @torch.no_grad()
    def observe(self, model: nn.Module, update: int) -> None:
        """Take in the parameters after update number ``update`` (from 1)."""
        if update % self.every:
            return
        count = update // self.every
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach().float() for p in model.parameters()], weight)
