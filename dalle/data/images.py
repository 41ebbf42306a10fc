"""Decode images that nobody vouches for: sizes are bounded before anything is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}


class ImageError(Exception):
    """An image cannot be used; the message is the reason, a category and after a colon its details."""


@dataclass(frozen=True)
class Limits:
    """The largest file, in bytes, and the largest picture, in pixels, that are decoded."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64 * 2**20


DEFAULT_LIMITS = Limits()


def decode_image(content: bytes, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Pixels of a PNG, JPEG or WebP file: uint8 [H, W, 3], RGB, on white where it is transparent, upright.

    Raises:
        ImageError: the file or the picture is larger than ``limits``, or it is corrupt or truncated.
    """
    with _opened(content, limits) as image:
        return np.array(_flattened(ImageOps.exif_transpose(image)))


def image_size(content: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Height and width as the header gives them, without decoding the picture; raises as :func:`decode_image` does."""
    with _opened(content, limits) as image:
        return image.height, image.width


@contextmanager
def _opened(content: bytes, limits: Limits) -> Iterator[Image.Image]:
    """The image of a file whose header is within bounds; every failure inside the block becomes an ImageError."""
    check_bytes(len(content), limits)
    try:
        with warnings.catch_warnings():
            # Our own bound comes next, whatever Pillow thinks of the size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=tuple(set(EXTENSIONS.values())))
        if image.width * image.height > limits.max_pixels:
            raise ImageError(f"too many pixels: {image.width} x {image.height}, at most {limits.max_pixels}")
        yield image
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"too many pixels: at most {limits.max_pixels}") from None
    except Exception as error:
        # A decoder fed with garbage fails in ways that no list of exception types covers.
        raise _corrupt(error) from None


def check_bytes(size: int, limits: Limits) -> None:
    """Refuse a file by its length alone, before it is read."""
    if size > limits.max_bytes:
        raise ImageError(f"file too large: {size} bytes, at most {limits.max_bytes}")


def _corrupt(error: Exception) -> ImageError:
    # Pillow's own words hold the address of a buffer, which differs from run to run.
    detail = "not a PNG, JPEG or WebP file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return ImageError(f"corrupt or truncated: {detail or type(error).__name__}")


def _flattened(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
