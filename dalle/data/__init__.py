"""Image-text data: the emoji set, tar shards, folders of captioned images, and the paper's augmentations."""

from __future__ import annotations

from dalle.lazy import lazy_attributes

_HOMES = {
    "Filters": "dalle.data.filters",
    "ImageTextDataset": "dalle.data.dataset",
    "Limits": "dalle.data.images",
    "NothingUsable": "dalle.data.dataset",
    "Skipped": "dalle.data.dataset",
    "augment": "dalle.data.augmentation",
    "load_arrays": "dalle.data.dataset",
    "open_dataset": "dalle.data.dataset",
    "resize_square": "dalle.data.augmentation",
}

__all__ = sorted(_HOMES)

# The processes that render pictures need no torch.
__getattr__ = lazy_attributes(__name__, _HOMES)
