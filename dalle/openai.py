"""The public ``dall_e`` release's dVAE, read from its pickles without running anything in them.

The release (openai/DALL-E) is two files, ``encoder.pkl`` and ``decoder.pkl``: whole modules written by ``torch.save``.
A pickle is a program that imports and calls what it names, so here the names of such a module stand for inert records,
every other name is refused, and the weights are then collected from the records. What the archive and the pickle claim
about sizes is held against the size of the file before anything is read or allocated.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dalle.config import DVAEConfig
from dalle.dvae import DVAE
from dalle.errors import UserError

_ALLOWED = frozenset(
    {
        ("dall_e.encoder", "Encoder"),
        ("dall_e.encoder", "EncoderBlock"),
        ("dall_e.decoder", "Decoder"),
        ("dall_e.decoder", "DecoderBlock"),
        ("dall_e.utils", "Conv2d"),
        ("torch.nn.modules.container", "Sequential"),
        ("torch.nn.modules.activation", "ReLU"),
        ("torch.nn.modules.linear", "Identity"),
        ("torch.nn.modules.pooling", "MaxPool2d"),
        ("torch.nn.modules.upsampling", "Upsample"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
        ("torch", "device"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("functools", "partial"),
    }
)
_MAX_PICKLE_BYTES = 4 * 2**20  # the release's are some tens of KiB
_MAX_FILE_BYTES = 4 * 2**30  # the release's are some 200 MiB
_MAX_PARAMETERS = 4096
_MAX_DEPTH = 16
_MAX_GROUPS = 8  # the release has 4; a group more doubles the width and halves the grid
_MAX_SIDE = 2**20
_IMAGE_SIZE = 256


class _Damaged(Exception):
    """The file is not what the release's form asks for; the message says where."""


def _printable(text: str) -> str:
    """``text``, which may hold names of a file's choosing, without control characters and of bounded length."""
    return ascii(text)[1:-1][:400]


class _Record:
    """What an allowed name stands for while unpickling: it keeps how it was called and the state it was given."""

    # On the class too, because a pickle can make an instance without calling __init__.
    arguments: tuple = ()
    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping(dict):
    """An OrderedDict of the pickle; like :class:`_Record`, it runs no code of the file's choosing."""


@dataclass(frozen=True)
class _Storage:
    key: str
    numel: int


@dataclass(frozen=True)
class _TensorRecord:
    """A float32 tensor that the file describes: a view of a storage that nobody has read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


# The interpreter's C unpickler allocates up to whatever memo index a pickle names, so that a few bytes can ask for
# gigabytes; the Python one keeps its memo in a dict.
class _RestrictedUnpickler(pickle._Unpickler):
    """Unpickles into inert records, of classes made for this load alone: nothing that a file sets on one outlives it.

    ``storages`` gives the size in bytes of every storage that the archive holds.
    """

    def __init__(self, data: bytes, path: Path, storages: Mapping[str, int]):
        super().__init__(io.BytesIO(data))
        self._path = path
        self._storages = storages
        self.classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> type:
        if module == "__builtin__":  # the name in pickles of protocol 2, which torch.save writes
            module = "builtins"
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"{self._path} names {_printable(f'{module}.{name}')}, which no file of the public dall_e release "
                "does: it was refused and nothing was run; get the file anew from where it was published"
            )
        if (module, name) not in self.classes:
            base = _Mapping if name == "OrderedDict" else _Record
            self.classes[module, name] = type(name, (base,), {"__module__": module})
        return self.classes[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", kind, str(key), str(), int(numel)) if kind is self.classes.get(("torch", "FloatStorage")):
                if self._storages.get(key) != 4 * numel:
                    raise _Damaged(f"a storage {key} of {numel} values in a record of {self._storages.get(key)} bytes")
                return _Storage(key, numel)
        raise _Damaged("a storage that is not of float32")


def load_openai_dvae(encoder: str | Path, decoder: str | Path) -> DVAE:
    """The :class:`dalle.dvae.DVAE` of the public release's ``encoder.pkl`` and ``decoder.pkl``: float32, eval mode.

    Depth and widths are read off the weights; ``config.image_size`` is the paper's 256. Nothing in the files is run.
    Raises :class:`dalle.errors.UserError` for a file that is missing, truncated, of another form, names anything
    that such a module does not need, or whose weights do not fit each other.
    """
    encoder, decoder = Path(encoder), Path(decoder)
    with _Module(encoder, "Encoder") as encoder_module, _Module(decoder, "Decoder") as decoder_module:
        config = _infer_config(encoder_module, decoder_module)
        with torch.device("meta"):
            dvae = DVAE(config)
        # All names and shapes are checked before the first weight is read: claims alone allocate nothing.
        encoder_module.check(dvae.encoder)
        decoder_module.check(dvae.decoder)
        dvae.encoder.load_state_dict(encoder_module.read(), strict=True, assign=True)
        dvae.decoder.load_state_dict(decoder_module.read(), strict=True, assign=True)
    return dvae.eval()


class _Module:
    """One file of the release, opened: the parameters that it describes, and the means to read them."""

    def __init__(self, path: Path, kind: str):
        self.path = path
        try:
            self._archive, self._prefix = _open_archive(path)
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror or error}; expected the release's {kind.lower()}"
            ) from None
        try:
            self.parameters = self._unpickle(kind)
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> _Module:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._archive.close()

    def fail(self, reason: str) -> NoReturn:
        raise UserError(
            f"{self.path} is damaged or not a file of the public dall_e release: it has {_printable(reason)}"
        ) from None

    def _unpickle(self, kind: str) -> dict[str, _TensorRecord]:
        # A hostile pickle can raise anything while it is read; whatever it is, it means the same to the user.
        try:
            if (
                f"{self._prefix}/byteorder" in self._archive.namelist()
                and self._read_record("byteorder", 8) != b"little"
            ):
                raise _Damaged("big-endian weights")
            pickled = self._read_record("data.pkl", _MAX_PICKLE_BYTES)
            folder = f"{self._prefix}/data/"
            storages = {
                record.filename.removeprefix(folder): record.file_size
                for record in self._archive.infolist()
                if record.filename.startswith(folder)
            }
            unpickler = _RestrictedUnpickler(pickled, self.path, storages)
            root = unpickler.load()
            if type(root) is not unpickler.classes.get((f"dall_e.{kind.lower()}", kind)):
                found = type(root).__name__
                raise UserError(f"{self.path} holds a {found}, expected the {kind} of the public dall_e release")
            return dict(_parameters(root, unpickler.classes))
        except UserError:
            raise
        except _Damaged as error:
            self.fail(str(error))
        except Exception as error:
            self.fail(f"a pickle that cannot be read ({type(error).__name__})")

    def _read_record(self, name: str, limit: int) -> bytes:
        if f"{self._prefix}/{name}" not in self._archive.namelist():
            raise _Damaged(f"no record {name}")
        record = self._archive.getinfo(f"{self._prefix}/{name}")
        if record.file_size > limit:
            raise _Damaged(f"a record {name} of {record.file_size} bytes where at most {limit} belong")
        try:
            return self._archive.read(record)
        except Exception:  # a damaged archive can make zipfile raise half a dozen kinds
            raise _Damaged(f"no intact record {name}") from None

    def check(self, module: torch.nn.Module) -> None:
        """Raise UserError unless the parameters have the names and shapes of ``module``."""
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        found = {name: record.size for name, record in self.parameters.items()}
        if different := sorted(set(expected.items()) ^ set(found.items())):
            name = different[0][0]
            self.fail(f"{name} as {found.get(name, 'absent')} where {expected.get(name, 'nothing')} is expected")

    def read(self) -> dict[str, Tensor]:
        """The weights by name, contiguous."""
        try:
            return {name: self._read_tensor(record) for name, record in self.parameters.items()}
        except _Damaged as error:
            self.fail(str(error))

    def _read_tensor(self, record: _TensorRecord) -> Tensor:
        data = self._read_record(f"data/{record.storage.key}", 4 * record.storage.numel)
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        tensor = values.as_strided(record.size, record.stride, record.offset).clone(
            memory_format=torch.contiguous_format
        )
        if not tensor.isfinite().all():
            raise _Damaged(f"weights that are not finite in the record data/{record.storage.key}")
        return tensor


def _open_archive(path: Path) -> tuple[zipfile.ZipFile, str]:
    """The zip archive of a ``torch.save`` and the name of its only top folder, its claims checked against the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"\x80\x02":
        raise UserError(
            f"{path} is in the form that torch.save had before version 1.6, or a bare pickle; expected its zip form: "
            "if you trust the file, load it with torch and dall_e and save it again"
        )
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception:  # BadZipFile, and what else a damaged directory makes zipfile raise
        raise UserError(
            f"{path} is truncated or not a file of the public dall_e release: expected the zip archive of a torch.save"
        ) from None
    try:
        _check_archive(archive, path, size)
    except UserError:
        archive.close()
        raise
    prefix = next(name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
    return archive, prefix


def _check_archive(archive: zipfile.ZipFile, path: Path, size: int) -> None:
    records = archive.infolist()
    if not any(record.filename.endswith("/data.pkl") for record in records):
        raise UserError(f"{path} is not a file of the public dall_e release: its zip archive holds no data.pkl")
    if any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size for record in records
    ):
        raise UserError(f"{path} has compressed records, which torch.save never writes; get the file anew")
    claimed = sum(record.file_size for record in records)
    if claimed > size or size > _MAX_FILE_BYTES:
        raise UserError(
            f"{path} claims records of {claimed} bytes in a file of {size}; expected no more than the file holds, and "
            f"a file of at most {_MAX_FILE_BYTES} bytes"
        )


def _parameters(root: _Record, classes: dict[tuple[str, str], type]) -> Iterator[tuple[str, _TensorRecord]]:
    """The parameters of the module ``root`` under their dotted names, each checked to lie within its storage."""
    count = 0
    stack: list[tuple[str, Any, int]] = [("", root, 0)]
    while stack:
        prefix, module, depth = stack.pop()
        state = module.state if isinstance(module, _Record) else None
        if depth > _MAX_DEPTH or not isinstance(state, dict):
            raise _Damaged(f"no module where {prefix or 'the whole'} belongs")
        for name, parameter in _named(state, "_parameters"):
            count += 1
            if parameter is not None:
                yield prefix + name, _parameter(parameter, classes)
        if any(True for _ in _named(state, "_buffers")):
            raise _Damaged(f"buffers in {prefix or 'the whole'}, which the release has nowhere")
        for name, child in _named(state, "_modules"):
            count += 1
            stack.append((f"{prefix}{name}.", child, depth + 1))
        if count > _MAX_PARAMETERS:
            raise _Damaged(f"more than {_MAX_PARAMETERS} modules and parameters")


def _named(state: dict, field: str) -> list[tuple[str, Any]]:
    entries = state.get(field)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise _Damaged(f"a module without {field}")
    return list(entries.items())


def _parameter(record: Any, classes: dict[tuple[str, str], type]) -> _TensorRecord:
    def arguments(value: Any, function: str) -> tuple:
        made = classes.get(("torch._utils", function))
        if made is None or type(value) is not made or not isinstance(value.arguments, tuple):
            raise _Damaged("a parameter that is not a plain tensor")
        return value.arguments

    match arguments(record, "_rebuild_parameter"):
        case (data, _, _):
            pass
        case _:
            raise _Damaged("a parameter that is not a plain tensor")
    match arguments(data, "_rebuild_tensor_v2"):
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
            return _checked_tensor(_TensorRecord(storage, offset, size, stride))
    raise _Damaged("a parameter that is not a plain tensor")


def _checked_tensor(record: _TensorRecord) -> _TensorRecord:
    numbers = (record.storage.numel, record.offset, *record.size, *record.stride)
    if not all(type(number) is int and 0 <= number < 2**40 for number in numbers) or len(record.size) > 8:
        raise _Damaged("a tensor with impossible sizes")
    if len(record.size) != len(record.stride) or math.prod(record.size) > record.storage.numel or 0 in record.size:
        raise _Damaged("a tensor that does not fit its storage")
    last = record.offset + sum((size - 1) * stride for size, stride in zip(record.size, record.stride, strict=True))
    if last >= record.storage.numel:
        raise _Damaged("a tensor that reaches beyond its storage")
    return record


def _infer_config(encoder: _Module, decoder: _Module) -> DVAEConfig:
    """Depth and widths as the shapes of the end layers and the numbering of the blocks tell them."""
    shapes = {}
    for module, name in ((encoder, "input"), (encoder, "output.conv"), (decoder, "input")):
        record = module.parameters.get(f"blocks.{name}.w")
        if record is None or len(record.size) != 4 or max(record.size) > _MAX_SIDE:
            module.fail(f"no plausible convolution blocks.{name}")
        shapes[module.path, name] = record.size
    matches = (re.match(r"blocks\.(group_\d+)\.(block_\d+)\.", name) for name in encoder.parameters)
    blocks = {match.groups() for match in matches if match}
    groups = len({group for group, _ in blocks})
    if not 1 <= groups <= _MAX_GROUPS or len(blocks) % groups:
        encoder.fail(f"{len(blocks)} blocks in {groups} groups, where as many belong to each of 1 to {_MAX_GROUPS}")
    n_hid = shapes[encoder.path, "input"][0]
    if n_hid % 4:
        encoder.fail(f"a width of {n_hid} where a multiple of 4 belongs")
    return DVAEConfig(
        image_size=_IMAGE_SIZE,
        vocab_size=shapes[encoder.path, "output.conv"][0],
        n_hid=n_hid,
        n_init=shapes[decoder.path, "input"][0],
        group_count=groups,
        n_blk_per_group=len(blocks) // groups,
    )
