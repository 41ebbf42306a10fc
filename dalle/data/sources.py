"""Find the samples of a data set: in tar shards, or in a folder of images with captions beside them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dalle.data.images import DEFAULT_LIMITS, EXTENSIONS, ImageError, Limits, check_bytes
from dalle.errors import UserError

MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True)
class Span:
    """Bytes of a file: a whole image file, or one member of a tar."""

    path: str
    offset: int
    size: int

    def read(self, limits: Limits = DEFAULT_LIMITS) -> bytes:
        """The bytes; ImageError when there are too many or the file has become shorter."""
        check_bytes(self.size, limits)
        try:
            with Path(self.path).open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(f"unreadable: {error.strerror}") from None
        if len(content) < self.size:
            raise ImageError(f"corrupt or truncated: {len(content)} of {self.size} bytes")
        return content


@dataclass
class Found:
    """A sample, or with ``problem`` set the name of something that is none."""

    name: str
    image: Span | None = None
    text: Span | None = None
    json: Span | None = None
    problem: str | None = None

    def caption_and_metadata(self) -> tuple[str | None, dict]:
        """The caption (of the .txt, else "caption" or "text" of the .json; None without) and what the .json holds.

        Raises:
            ImageError: a file is too large or not what its name says.
        """
        metadata = {}
        if self.json is not None:
            try:
                metadata = json.loads(self.json.read(Limits(max_bytes=MAX_TEXT_BYTES)))
            except (ValueError, RecursionError):
                metadata = None
            if not isinstance(metadata, dict):
                raise ImageError("bad metadata: the .json does not hold a JSON object")
        if self.text is not None:
            caption = self.text.read(Limits(max_bytes=MAX_TEXT_BYTES)).decode("utf-8", errors="replace")
        else:
            caption = metadata.get("caption", metadata.get("text"))
        if not isinstance(caption, str):
            return None, metadata
        # JSON can hold half a surrogate pair, which is no text.
        return " ".join(caption.encode(errors="replace").decode().split()), metadata


def find_samples(path: str | Path, split: str) -> tuple[Iterator[Found], bool]:
    """The samples of one split, in a fixed order, and whether they come from loose files rather than from shards.

    ``path`` is a tar file; a folder of tar files, of which those named ``<split>-*.tar`` are taken, or all of them as
    "train" when none is named so; or a folder of images, of which the subfolder ``<split>`` is taken if there is one,
    or all as "train" when there is neither a subfolder ``train`` nor ``heldout``.

    Raises:
        UserError: there is nothing of the kind at ``path``.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".tar":
            raise UserError(
                f"{path} is not a data set: expected a folder of images, a folder of .tar shards, or a .tar shard"
            )
        return _samples_of_shards([path]), False
    if not path.is_dir():
        raise UserError(f"there is no data set at {path}: expected a folder of images or of .tar shards")
    shards = sorted(path.glob("*.tar"))
    if shards:
        chosen = [shard for shard in shards if shard.name.startswith(f"{split}-")]
        named = any(shard.name.startswith(("train-", "heldout-")) for shard in shards)
        if not chosen and (named or split != "train"):
            raise UserError(f"{path} holds no split {split!r}: expected shards named {split}-000000.tar and so on")
        return _samples_of_shards(chosen or shards), False
    if (path / split).is_dir():
        return _samples_of_folder(path / split), True
    if split != "train" or (path / "heldout").is_dir():
        raise UserError(f"{path} holds no split {split!r}: expected a subfolder of that name")
    return _samples_of_folder(path), True


def _printable(name: str) -> str:
    """A file's name, which may hold anything but a slash, as text that can be shown and hashed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _samples_of_folder(folder: Path) -> Iterator[Found]:
    unreadable: list[OSError] = []
    for parent, subfolders, names in os.walk(folder, onerror=unreadable.append):
        subfolders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if name.startswith(".") or path.suffix[1:].lower() not in EXTENSIONS:
                continue
            found = Found(_printable(path.relative_to(folder).as_posix()))
            try:
                if not path.is_file():
                    found.problem = "not a plain file" if path.exists() else "unreadable: the link leads nowhere"
                    yield found
                    continue
                found.image = Span(str(path), 0, path.stat().st_size)
                for kind, beside in (("text", path.with_suffix(".txt")), ("json", path.with_suffix(".json"))):
                    if beside.is_file():
                        setattr(found, kind, Span(str(beside), 0, beside.stat().st_size))
            except OSError as error:
                found.problem = f"unreadable: {error.strerror}"
            yield found
    for error in unreadable:
        yield Found(_printable(str(error.filename)), problem=f"unreadable: {error.strerror}")


@dataclass
class _Group:
    key: str = ""
    files: dict[str, Span] = field(default_factory=dict)

    def sample(self) -> Found | None:
        """The group as a sample; None when it has no image, so is none."""
        for extension in EXTENSIONS:
            if extension in self.files:
                name = f"{self.key}.{extension}"
                return Found(name, self.files[extension], self.files.get("txt"), self.files.get("json"))
        return None


def _samples_of_shards(shards: list[Path]) -> Iterator[Found]:
    for shard in shards:
        for found in _samples_of_shard(shard):
            found.name = _printable(f"{shard.name}:{found.name}" if found.name else shard.name)
            yield found


def _samples_of_shard(shard: Path) -> Iterator[Found]:
    """The samples of one shard; neighbours that share the path up to the first dot of the file's name are one sample.

    Nothing is unpacked, so a member's path is a name and no more; one that is absolute or climbs out is refused all the
    same, since it says that the shard was made to do harm.
    """
    group = _Group()
    end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                problem = _member_problem(member, path, end)
                if problem:
                    yield Found(member.name, problem=problem)
                if problem or not member.isreg():
                    continue
                stem, _, extension = path.name.partition(".")
                key = (path.parent / stem).as_posix()
                if key != group.key or extension.lower() in group.files:
                    sample, group = group.sample(), _Group(key)
                    if sample:
                        yield sample
                group.files[extension.lower()] = Span(str(shard), member.offset_data, member.size)
            complete = _ends_here(shard, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        complete = False
    sample = group.sample()
    if sample:
        yield sample
    if not complete:
        yield Found("", problem="corrupt or truncated: the shard ends in the middle, what came before it is used")


def _member_problem(member: tarfile.TarInfo, path: PurePosixPath, end: int) -> str | None:
    if path.is_absolute() or ".." in path.parts:
        return "unsafe name"
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "not a plain file"
    if member.size < 0 or member.offset_data + member.size > end:
        return "corrupt or truncated: the shard ends before the file does"
    return None


def _ends_here(shard: Path, offset: int) -> bool:
    """Whether the archive's end mark, a block of zeros, lies at ``offset``; tarfile takes garbage for an end too."""
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(512) == bytes(512)
