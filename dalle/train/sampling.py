"""Randomness that is a function of (seed, update): a resumed run draws what the uninterrupted one would have."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str, device: str = "cpu") -> torch.Generator:
    """A generator on ``device`` seeded by ``derived_seed(*parts)``."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))


class EpochOrder:
    """An endless stream of sample numbers: each epoch is a fresh permutation of ``size`` samples, keyed by (seed,
    epoch).
    """

    def __init__(self, size: int, seed: int):
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, update: int, batch_size: int) -> list[tuple[int, int]]:
        """The ``(epoch, sample)`` pairs of one update; batches run on across epochs, so none is short."""
        return [self._sample(update * batch_size + offset) for offset in range(batch_size)]

    def _sample(self, position: int) -> tuple[int, int]:
        epoch = position // self.size
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist()
        return epoch, self._order[position % self.size]
