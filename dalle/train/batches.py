"""Batches of augmented images, each a function of (seed, update)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dalle.data import ImageTextDataset, augment
from dalle.train.sampling import EpochOrder


class ImageBatches:
    """Float images [B, 3, size, size] in [0, 1] of a data set, augmented as the paper's listing for ``kind`` says
    ("dvae", "dalle", or "none" for the central square)."""

    def __init__(self, images: ImageTextDataset, size: int, kind: str, seed: int):
        self.images = images
        self.size = size
        self.kind = kind
        self.seed = seed
        self.order = EpochOrder(len(images), seed)

    def update(self, update: int, batch_size: int) -> torch.Tensor:
        """The batch of one update."""
        return self.load(self.order.batch(update, batch_size))

    def load(self, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The images of ``(epoch, sample)`` pairs; the epoch decides the augmentation."""
        epochs, samples = zip(*pairs, strict=True)
        images = [self.images.image(sample) for sample in samples]
        pixels = augment(images, self.size, self.kind, seed=self.seed, epochs=epochs, samples=samples)
        return pixels.float() / 255

    def samples(self, samples: Iterable[int]) -> torch.Tensor:
        """The images of ``samples``, augmented as in epoch 0."""
        return self.load([(0, sample) for sample in samples])
