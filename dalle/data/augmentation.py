"""The paper's two augmentations, Listing 1 (dVAE) and Listing 2 (transformer), as functions of (seed, epoch, sample).

Nothing here keeps a state: what is drawn for a sample depends on the seed, the epoch and the sample's number alone, so
a run resumed in the middle, or split into other batches, sees the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dalle.errors import UserError

Kind = Literal["dvae", "dalle", "none"]


@dataclass(frozen=True)
class Window:
    """What to cut: the square of ``side`` pixels at (``top``, ``left``), resized to ``resized``, and of that the square
    of the target size at (``y``, ``x``), mirrored left to right with ``flip``."""

    top: int
    left: int
    side: int
    resized: int
    y: int
    x: int
    flip: bool


def draw_window(
    height: int, width: int, size: int, kind: Kind, seed: int = 0, epoch: int = 0, sample: int = 0
) -> Window:
    """Draw the window of one sample for target size R = ``size``; all draws are uniform over integers.

    With s = min(height, width), as the paper's listings have it:

    - "dvae": any square of side s; resized to a side in [min(s, round(9/8 R)), min(s, round(12/8 R))]; any crop; a flip
      half of the time.
    - "dalle": a square of side s with its offset in the middle quarter (3/8 .. 5/8) of the slack; resized to a side in
      [R, min(s, round(9/8 R))]; any crop; never a flip.
    - "none": the central square of side s, resized to R.

    An image no larger than R is resized to R, so that only flips remain; the listings do not foresee smaller ones.
    """
    if height < 1 or width < 1 or size < 1:
        raise UserError(f"expected image sides and a target size of at least 1, got {height} x {width} and {size}")
    side = min(height, width)
    slack_height, slack_width = height - side, width - side
    if kind == "none":
        return Window(slack_height // 2, slack_width // 2, side, size, 0, 0, False)
    # Philox is counter-based: the stream is a function of key and counter. The two listings get keys of their own.
    bits = np.random.Philox(key=[seed, 1 if kind == "dvae" else 2], counter=[0, 0, epoch, sample])

    def draw(low: int, high: int) -> int:
        """low <= result < high. Written out, since NumPy may change how its Generator turns bits into integers."""
        return low + (int(bits.random_raw()) * (high - low) >> 64)

    if kind == "dvae":
        top, left = draw(0, slack_height + 1), draw(0, slack_width + 1)
        smallest, largest = min(side, round(size * 9 / 8)), min(side, round(size * 12 / 8))
    elif kind == "dalle":
        top, left = (draw(3 * s // 8, max(3 * s // 8 + 1, 5 * s // 8)) for s in (slack_height, slack_width))
        smallest, largest = size, min(side, round(size * 9 / 8))
    else:
        raise UserError(f"expected the augmentation 'dvae', 'dalle' or 'none', got {kind!r}")
    resized = draw(max(smallest, size), max(largest, size) + 1)
    y, x = draw(0, resized - size + 1), draw(0, resized - size + 1)
    return Window(top, left, side, resized, y, x, kind == "dvae" and draw(0, 2) == 1)


def augment(
    images: torch.Tensor | Sequence[np.ndarray | torch.Tensor],
    size: int,
    kind: Kind,
    *,
    seed: int,
    epochs: int | Sequence[int],
    samples: Sequence[int],
) -> torch.Tensor:
    """Augment a batch: uint8 [B, 3, R, R] with R = ``size``.

    Args:
        images: uint8 [B, 3, H, W], or a sequence of B arrays or tensors [H, W, 3] of any sizes.
        kind: "dvae" (Listing 1), "dalle" (Listing 2), or "none" for the central square.
        seed: of the run, 0 .. 2**64 - 1.
        epochs: the epoch of each sample, or one for all.
        samples: the number of each sample in its data set.
    """
    if isinstance(epochs, int):
        epochs = [epochs] * len(samples)
    if not len(images) == len(samples) == len(epochs):
        raise UserError(
            f"expected as many samples and epochs as images, got {len(samples)}, {len(epochs)} and {len(images)}"
        )
    batched = isinstance(images, torch.Tensor)
    result = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for row, (image, epoch, sample) in enumerate(zip(images, epochs, samples, strict=True)):
        image = image if batched else torch.as_tensor(image).permute(2, 0, 1)
        result[row] = cut(image, draw_window(*image.shape[1:], size, kind, seed, epoch, sample), size)
    return result


def cut(image: torch.Tensor, window: Window, size: int) -> torch.Tensor:
    """The ``window`` of an image uint8 [3, H, W]: uint8 [3, size, size]. Resizing is by area, rounded to nearest."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"expected an image uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    square = image[:, window.top : window.top + window.side, window.left : window.left + window.side]
    if window.resized != window.side:
        # Resizing is linear and separable, so only the rows and columns that the crop keeps are computed.
        weights = _area_weights(window.side, window.resized)
        rows, columns = weights[window.y : window.y + size], weights[window.x : window.x + size]
        square = (rows @ square.float() @ columns.T).round_().clamp_(0, 255).to(torch.uint8)
    else:
        square = square[:, window.y : window.y + size, window.x : window.x + size]
    return square.flip(2) if window.flip else square


def _area_weights(source: int, target: int) -> torch.Tensor:
    """float32 [target, source]: row i is the share of each source pixel in the i-th of ``target`` equal intervals."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (source / target)
    pixels = torch.arange(source, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (overlap.clamp_(min=0) * (target / source)).float()


def resize_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """The central square of an image uint8 [3, H, W], resized by area: uint8 [3, size, size]."""
    return cut(image, draw_window(*image.shape[1:], size, "none"), size)
