"""Tensors of several processes in one folder, by torch.distributed.checkpoint: read by any number of them.

torch keeps the index of such a folder as a pickle: read none that a stranger made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from dalle.checkpoint import check_sha256
from dalle.errors import UserError
from dalle.files import sha256_of_file

INDEX = ".metadata"
"""What torch calls the file that the first process writes last."""


def write(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, str]:
    """Write, in every process of ``group``, its parts of ``tensors``: DTensors, or tensors that all have whole.

    Returns, when all parts are written and synced, the SHA-256 of each file; raises UserError in every process when
    that fails in one.
    """
    rank = 0 if group is None else dist.get_rank(group)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
        written = [*folder.glob(f"__{rank}_*.distcp"), *([folder / INDEX] if rank == 0 else [])]
        own = {path.name: sha256_of_file(path) for path in written}
    except (CheckpointException, OSError) as error:
        reason = _reason(error)
        raise UserError(f"cannot write {folder}: {reason}; nothing that was there before is lost") from error
    if group is None:
        return own
    of_all: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(of_all, own, group=group)
    return {name: digest for digests in of_all for name, digest in digests.items()}


def check(folder: Path, digests: dict[str, str]) -> None:
    """Raise UserError unless each of these files in ``folder`` has the SHA-256 that :func:`write` told: torch's own
    reading notices no flipped bit."""
    for name, digest in digests.items():
        check_sha256(folder / name, digest)


def read(
    folder: Path, empty: Callable[[str, torch.Size, torch.dtype], torch.Tensor], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Read this process's part of every tensor in ``folder`` whose name begins with ``prefix``.

    ``empty(name, shape, dtype)``, given the whole shape, makes the tensor to read into: of that shape, or a DTensor of
    it, whose part is returned. Raises UserError when the folder is damaged.
    """
    reader = dcp.FileSystemReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: empty(name, entry.size, entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(prefix)
        }
        # Each process reads by itself: where to find its part it can tell without the others.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, Exception) as error:  # torch raises anything for a damaged file
        raise UserError(
            f"{folder} is damaged ({_reason(error)}): remove its checkpoint to resume from the one before"
        ) from error
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def _reason(error: BaseException) -> str:
    """What went wrong in the first process in which it did, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = min(error.failures.items())[1][0]
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
