"""Captioned images by number, whatever they are stored in."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dalle.data.augmentation import resize_square
from dalle.data.filters import Filters
from dalle.data.images import DEFAULT_LIMITS, ImageError, Limits, decode_image, image_size
from dalle.data.shards import FORMAT, read_manifest
from dalle.data.sources import Found, Span, find_samples
from dalle.errors import UserError

NAMED_IN_SUMMARY = 3
KEPT_BYTES = 512 * 2**20


class Skipped(NamedTuple):
    """A sample that is not used, and why: a category, and after a colon its details."""

    name: str
    reason: str


class NothingUsable(UserError):
    """A data set has no usable sample; ``skipped`` says what is wrong with each."""

    def __init__(self, message: str, skipped: list[Skipped]):
        super().__init__(message, skipped)  # both, so that it can be pickled
        self.skipped = skipped

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Sample:
    """A usable sample: where its image lies, its caption, and what its .json holds."""

    name: str
    image: Span
    caption: str
    metadata: dict


class ImageTextDataset:
    """Captioned images: ``len(dataset)``, and ``dataset[i]`` as (uint8 array [H, W, 3] RGB, caption, metadata).

    The order is fixed: shards and their members in order, or files sorted by path. Images that were decoded when the
    set was opened are kept, up to ``KEPT_BYTES``; the others are read when asked for.

    Attributes:
        samples: the usable samples.
        skipped: those that are not, each with its reason.
        fingerprint: a hash of names, captions and image bytes: two data sets are the same exactly when these agree.
    """

    def __init__(
        self,
        samples: list[Sample],
        skipped: list[Skipped],
        fingerprint: str,
        limits: Limits,
        kept: dict[int, np.ndarray],
    ):
        self.samples = samples
        self.skipped = skipped
        self.fingerprint = fingerprint
        self.limits = limits
        self._kept = kept

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str, dict]:
        """One sample.

        Raises:
            UserError: the image has become unreadable, or was not checked when the data set was opened.
        """
        sample = self.samples[index]
        return self.image(index), sample.caption, sample.metadata

    def image(self, index: int) -> np.ndarray:
        """The image of one sample, uint8 [H, W, 3]; raises as ``dataset[index]`` does."""
        sample = self.samples[index]
        kept = self._kept.get(index % len(self))
        if kept is not None:
            return kept.copy()
        try:
            return decode_image(sample.image.read(self.limits), self.limits)
        except ImageError as error:
            raise UserError(
                f"cannot read the image {sample.name} ({error}): mend or remove it and start again"
            ) from None

    @property
    def captions(self) -> list[str]:
        """The captions of all samples, in order."""
        return [sample.caption for sample in self.samples]

    def summary(self) -> str:
        """One line: how many images there are, how many were skipped, why, and the first few by name."""
        text = f"{len(self):,} images"
        if not self.skipped:
            return f"{text}, none skipped"
        names = defaultdict(list)
        for name, reason in self.skipped:
            names[reason.split(":")[0]].append(name)
        parts = []
        for category, named in sorted(names.items(), key=lambda item: (-len(item[1]), item[0])):
            more = ", ..." if len(named) > NAMED_IN_SUMMARY else ""
            parts.append(f"{len(named):,} {category} ({', '.join(named[:NAMED_IN_SUMMARY])}{more})")
        return f"{text}; skipped {len(self.skipped):,}: {'; '.join(parts)}"


def open_dataset(
    path: str | Path,
    split: str = "train",
    *,
    captions: bool = True,
    filters: Filters | bool | None = None,
    limits: Limits = DEFAULT_LIMITS,
    verify: bool = True,
    progress: bool = False,
) -> ImageTextDataset:
    """Open a folder of images, a folder of tar shards or one shard; ``sources.find_samples`` says how splits are found.

    Every file is read once here. What cannot be used is skipped, and named in ``.skipped``: a corrupt, truncated or
    oversized image, one without a caption, one that a filter drops.

    Args:
        split: "train" or "heldout", or whatever the shards or subfolders are named.
        captions: whether an image needs a caption; stage 1 does without.
        filters: the paper's filters (appendix C); by default they apply to loose files and not to shards, which are
            taken to be chosen already. True, False or your own thresholds decide otherwise.
        limits: bounds of file length and pixel count, checked before decoding.
        verify: decode every image now, so that none fails later; without it only headers are checked.

    Raises:
        UserError: there is no such data set or split, or a shard of the manifest is missing.
        NothingUsable: no usable sample is left; a UserError.
    """
    _require_all_shards(Path(path))
    samples, skipped, digest = [], [], hashlib.sha256()
    kept, room = {}, KEPT_BYTES
    found_samples, are_loose_files = find_samples(path, split)
    if filters is None:
        filters = are_loose_files
    chosen = Filters() if filters is True else filters or None
    if progress:
        from tqdm import tqdm

        found_samples = tqdm(found_samples, desc=f"opening {split} images", unit="image", dynamic_ncols=True)
    for found in found_samples:
        try:
            sample, content, pixels = _usable(found, captions, chosen, limits, verify)
        except ImageError as error:
            skipped.append(Skipped(found.name, str(error)))
            continue
        if pixels is not None and pixels.nbytes <= room:
            kept[len(samples)] = pixels
            room -= pixels.nbytes
        samples.append(sample)
        for part in (sample.name.encode(), sample.caption.encode(), content):
            digest.update(hashlib.sha256(part).digest())
    dataset = ImageTextDataset(samples, skipped, digest.hexdigest(), limits, kept)
    if not samples:
        raise NothingUsable(f"{path} holds no usable captioned image in split {split!r}: {dataset.summary()}", skipped)
    return dataset


def _usable(
    found: Found, captions: bool, filters: Filters | None, limits: Limits, verify: bool
) -> tuple[Sample, bytes, np.ndarray | None]:
    """The sample, the bytes of its image and, verified, its pixels; ImageError with the reason why it is not used."""
    if found.problem:
        raise ImageError(found.problem)
    caption, metadata = found.caption_and_metadata()
    if captions and not caption:
        raise ImageError("no caption")
    problem = filters.caption_problem(caption) if filters and captions else None
    if problem:
        raise ImageError(problem)
    content = found.image.read(limits)
    pixels = decode_image(content, limits) if verify else None
    size = image_size(content, limits) if pixels is None else pixels.shape[:2]
    problem = filters.shape_problem(*size) if filters else None
    if problem:
        raise ImageError(problem)
    return Sample(found.name, found.image, caption or "", metadata), content, pixels


def _require_all_shards(path: Path) -> None:
    manifest = read_manifest(path) if path.is_dir() else None
    if not manifest or manifest.get("format") != FORMAT:  # Another program's manifest.json says nothing about shards.
        return
    try:
        names = [shard["file"] for split in manifest.get("splits", {}).values() for shard in split["shards"]]
        absent = [name for name in names if not (path / name).is_file()]
    except (AttributeError, KeyError, TypeError, ValueError, OSError):
        raise UserError(f"the manifest in {path} is damaged: make or copy the data set again") from None
    if absent:
        raise UserError(f"{path} lacks the shard {absent[0]} of its manifest: make or copy the data set again")


def load_arrays(
    path: str | Path, split: str = "train", image_size: int = 64, **options: Any
) -> tuple[torch.Tensor, list[str], str]:
    """A small set whole: images uint8 [N, 3, S, S], captions, and the one-line summary.

    Each image is cut to its central square and resized (area) to ``image_size``. ``options`` are those of
    :func:`open_dataset`, and the errors too.
    """
    dataset = open_dataset(path, split, **options)
    images = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8)
    for index in range(len(dataset)):
        images[index] = resize_square(torch.from_numpy(dataset.image(index)).permute(2, 0, 1), image_size)
    return images, dataset.captions, dataset.summary()
