"""Write WebDataset-style tar shards: the files of one sample share a key and differ in their extension."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dalle.errors import UserError
from dalle.files import write_synced

MANIFEST = "manifest.json"
FORMAT = "dalle-image-text-shards"
FORMAT_VERSION = 1
SAMPLES_PER_SHARD = 1000
MAX_MANIFEST_BYTES = 16 * 2**20


@dataclass(frozen=True)
class EncodedSample:
    """One sample as it lies in a shard: ``<key>.<extension>`` holds ``image``, ``<key>.json`` holds ``metadata``."""

    key: str
    image: bytes
    extension: str
    metadata: dict


def write_shards(
    folder: str | Path, split: str, samples: Iterable[EncodedSample], samples_per_shard: int = SAMPLES_PER_SHARD
) -> list[dict]:
    """Write ``<split>-000000.tar``, ... into ``folder`` and describe each as the manifest does.

    The bytes depend on the samples and their order only: every member carries the same owner, mode and time.
    """
    descriptions = []
    batch: list[EncodedSample] = []

    def flush() -> None:
        path = Path(folder) / f"{split}-{len(descriptions):06d}.tar"
        content = _shard(batch)
        write_synced(path, content)
        descriptions.append(
            {
                "file": path.name,
                "samples": len(batch),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        batch.clear()

    for sample in samples:
        batch.append(sample)
        if len(batch) == samples_per_shard:
            flush()
    if batch:
        flush()
    return descriptions


def _shard(samples: list[EncodedSample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            text = json.dumps(sample.metadata, ensure_ascii=False, sort_keys=True).encode()
            for extension, content in ((sample.extension, sample.image), ("json", text)):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_manifest(folder: str | Path, manifest: dict) -> dict:
    """Write ``manifest.json``: ``manifest`` with the name and version of the format put first. Returns it all."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    write_synced(Path(folder) / MANIFEST, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return content


def read_manifest(folder: str | Path) -> dict | None:
    """The manifest of a folder of shards, or None where there is none.

    Raises:
        UserError: it is unreadable, or of a newer format than this code knows.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_bytes()[:MAX_MANIFEST_BYTES])
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable manifest ({error})") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not a manifest: expected a JSON object")
    if manifest.get("format") == FORMAT and manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} has format version {manifest.get('format_version')}, expected {FORMAT_VERSION}")
    return manifest
