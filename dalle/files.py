"""Files that outlive a crash: written under a temporary name, synced, then renamed. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dalle.errors import UserError


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _failure_is_a_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; nothing that was there before is lost") from error


def _temporary(path: Path, extension: str) -> Path:
    # "." and ".." are names of other folders: nothing can be renamed to them.
    if path.name in ("", ".."):
        raise UserError(f"cannot write {path}: expected a path that ends in a name")
    return path.with_name(f".{path.name}.{os.getpid()}.{extension}")


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash or a full disk leaves either the old file or the new one, never a
    part.

    A failure (no space, no permission, no such folder) is a UserError; it or an interruption removes the temporary
    file. A symbolic link stays one, and its file is written; a device or a pipe is written to as it is.
    """
    path = Path(path)
    _temporary(path, "tmp")  # refuses a path without a name, which that of its file may have
    with _failure_is_a_user_error(path):
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        path = Path(os.path.realpath(path))
        temporary = _temporary(path, "tmp")
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def require_replaceable(folder: str | Path, names: Iterable[str]) -> None:
    """Raise UserError unless ``folder`` is absent, empty, or holds nothing beside files called ``names``."""
    folder = Path(folder)
    try:
        others = sorted({entry.name for entry in folder.iterdir()} - set(names))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write the folder {folder}: {error.strerror}") from None
    if others:
        raise UserError(f"{folder} already holds {others[0]}, which would be lost: choose another folder or empty it")


def atomic_write_folder(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder of ``files`` (name to content) that appears under its name only when it is complete and
    synced.

    An older folder of the same files is replaced; one that holds anything else is refused. A failure is a UserError; it
    or an interruption removes the temporary folder.
    """
    folder = Path(folder)
    temporary = _temporary(folder, "tmp")
    require_replaceable(folder, files)
    with _failure_is_a_user_error(folder):
        temporary.mkdir(parents=True)
    complete_folder(temporary, folder, files)


def complete_folder(temporary: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    """Add ``files`` to the folder ``temporary`` beside ``folder``, sync it and give it the name ``folder``.

    What is in subfolders must have been synced. An older folder of the name is replaced; a failure is a UserError, and
    it or an interruption removes the temporary folder.
    """
    previous = _temporary(folder, "old")
    with _failure_is_a_user_error(folder):
        try:
            for name, data in files.items():
                write_synced(temporary / name, data)
            for written in (*(path for path in temporary.iterdir() if path.is_dir()), temporary):
                _sync_folder(written)
            if folder.exists():
                os.replace(folder, previous)
            os.replace(temporary, folder)
        except BaseException:
            if previous.exists() and not folder.exists():
                os.replace(previous, folder)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)


def to_json(value: Any) -> bytes:
    """Readable JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; a missing or broken file is a UserError that says ``what`` was expected there."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no {what}: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: expected the JSON of a {what}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected the JSON of a {what}")
    return value


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read as a stream: weights may be larger than the memory left."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    """The SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
