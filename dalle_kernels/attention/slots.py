"""Where a cache keeps the image keys that a pattern can still see."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .pattern import AttentionPattern, cached_pattern


class Slots(NamedTuple):
    """The slots that the query of an image token sees, once its own key is there: a run, or a list of them.

    ``own_slot`` is the token's own, and ``own`` its place among the ``count`` that it sees. ``listed`` is int32
    ``[count]``, or None for the run that begins at ``first``.
    """

    own_slot: int
    own: int
    count: int
    first: int = 0
    listed: torch.Tensor | None = None


def slot_count(pattern: AttentionPattern) -> int:
    """How many image keys a cache must hold at once."""
    height, width = pattern.grid
    reach = pattern.kernel_size // 2
    furthest = {
        "row": width,
        "axial_row": width - 1,
        "conv": reach * width + reach,
        "conv_corner": (pattern.kernel_size - 1) * (width + 1),
    }
    return min(height * width, furthest.get(pattern.kind, height * width) + 1)


@lru_cache(maxsize=64)
def slot_table(device: torch.device, *pattern) -> list[Slots]:
    """The slots of each image token, for a pattern by an operator's plain arguments, which are hashed the soonest.

    They are a ring in raster order, except that the keys of a column lie side by side. Only the two convolutional kinds
    have holes and need a list; the others see a run (a softmax does not mind the order within it).
    """
    pattern = cached_pattern(*pattern)
    height, width = pattern.grid
    tokens, count = height * width, slot_count(pattern)
    if pattern.kind == "column":
        firsts = range(0, tokens, height)
        return [Slots(first + row, row, row + 1, first) for row in range(height) for first in firsts]
    if pattern.kind == "axial_row":
        return [Slots(n % width, n % width, n % width + 1) for n in range(tokens)]
    if pattern.kind not in ("conv", "conv_corner"):
        return [Slots(n % count, n % count, min(n + 1, count)) for n in range(tokens)]
    image = AttentionPattern(pattern.kind, 0, pattern.grid, pattern.kernel_size)
    with torch.inference_mode(False):
        visible = image.mask().nonzero()
        listed = (visible[:, 1] % count).int().to(device).split(visible[:, 0].bincount().tolist())
        # Ascending, so that a token's own key is the last that it sees.
        return [Slots(n % count, len(slots) - 1, len(slots), listed=slots) for n, slots in enumerate(listed)]


@lru_cache(maxsize=64)
def slot_tensors(device: torch.device, *pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`slot_table` for a token that only the device knows.

    The slot of each image token's own key, int64 ``[tokens]``, and which slots it sees, bool ``[tokens, slots]``.
    """
    table = slot_table(torch.device("cpu"), *pattern)
    seen = torch.zeros(len(table), slot_count(cached_pattern(*pattern)), dtype=torch.bool)
    for row, slots in zip(seen, table):
        row[slice(slots.first, slots.first + slots.count) if slots.listed is None else slots.listed] = True
    own = torch.tensor([slots.own_slot for slots in table])
    with torch.inference_mode(False):
        return own.to(device), seen.to(device)


def visible_keys(position: int, device: torch.device, *pattern) -> tuple[int, Slots, int]:
    """What the token at ``position`` sees: how many text keys, the image's slots, and which key of all is its own."""
    text_len = pattern[1]
    if position < text_len:
        return position + 1, Slots(0, 0, 0), position
    slots = slot_table(device, *pattern)[position - text_len]
    return text_len, slots, text_len + slots.own
