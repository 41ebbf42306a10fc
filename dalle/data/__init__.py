"""Image-text data: the emoji set, tar shards, folders of captioned images, and the paper's augmentations."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Filters": "dalle.data.filters",
    "ImageTextDataset": "dalle.data.dataset",
    "Limits": "dalle.data.images",
    "Skipped": "dalle.data.dataset",
    "augment": "dalle.data.augmentation",
    "load_arrays": "dalle.data.dataset",
    "open_dataset": "dalle.data.dataset",
    "resize_square": "dalle.data.augmentation",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded on first use: the processes that render pictures need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'dalle.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
