"""The shapes of the two models, with presets from ``tiny`` to the paper's ``12b``, and TOML config files."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dalle.errors import UserError

_Config = TypeVar("_Config")


def from_mapping(cls: type[_Config], values: dict[str, Any], where: str) -> _Config:
    """Build the dataclass ``cls`` from ``values``; an unknown or missing name is a UserError that names ``where``."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown setting {', '.join(unknown)}; expected some of {', '.join(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML config file; a missing or malformed one is a UserError."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the config file {path} is not valid TOML: {error}") from None


# No model has more; a config that a stranger made must not make us build without end.
_MOST = {"layers": 1024, "group_count": 16, "n_blk_per_group": 64}


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value, most = getattr(config, name), _MOST.get(name, 2**20)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(
                f"{type(config).__name__}.{name}: expected a positive whole number of at most {most}, got {value!r}"
            )


def _preset(presets: dict[str, _Config], name: str, what: str) -> _Config:
    if name not in presets:
        raise UserError(f"unknown {what} preset {name!r}; expected one of {', '.join(presets)}")
    return presets[name]


@dataclass(frozen=True)
class DVAEConfig:
    """The discrete VAE of stage 1 (paper 2.1, A.1). The defaults are the public release's.

    ``group_count`` groups of ``n_blk_per_group`` resblocks, of widths 1, 2, 4, ... times ``n_hid``, with a 2x2 pooling
    between groups: the image shrinks by ``factor = 2**(group_count - 1)`` a side. ``n_init`` is the width of the
    decoder's input, ``vocab_size`` the number of codes, ``image_size`` the side of the square training images in
    pixels.
    """

    image_size: int = 256
    vocab_size: int = 8192
    n_hid: int = 256
    n_init: int = 128
    group_count: int = 4
    n_blk_per_group: int = 2

    def __post_init__(self) -> None:
        _require_positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.n_hid % 4:
            raise UserError(
                f"DVAEConfig.n_hid: expected a multiple of 4 (blocks use a quarter of it), got {self.n_hid}"
            )
        if self.image_size % self.factor:
            raise UserError(
                f"DVAEConfig.image_size: expected a multiple of the downsampling factor {self.factor}, "
                f"got {self.image_size}"
            )

    @property
    def factor(self) -> int:
        """Pixels a token covers along one side."""
        return 2 ** (self.group_count - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a training image."""
        side = self.image_size // self.factor
        return side, side

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "DVAEConfig") -> DVAEConfig:
        return from_mapping(cls, values, where)

    @classmethod
    def preset(cls, name: str) -> DVAEConfig:
        """A named size: ``tiny`` for tests, ``emoji`` for a laptop, ..., ``12b`` the public release's."""
        return _preset(_DVAE_PRESETS, name, "dVAE")


@dataclass(frozen=True)
class DALLEConfig:
    """The transformer of stage 2 (paper 2.2, B.1). The defaults are the paper's 12-billion-parameter model.

    The stream holds a start token, ``text_len`` text tokens and the raster-ordered ``grid`` of image tokens.
    ``kernel_size`` is the side of the convolutional mask of the last layer. ``checkpoint_activations`` recomputes each
    resblock in the backward.
    """

    text_len: int = 256
    text_vocab_size: int = 16384
    grid: tuple[int, int] = (32, 32)
    image_vocab_size: int = 8192
    dim: int = 3968
    heads: int = 62
    head_dim: int = 64
    layers: int = 64
    kernel_size: int = 11
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.grid, (list, tuple)):
            raise UserError(f"DALLEConfig.grid: expected two whole numbers (rows, columns), got {self.grid!r}")
        object.__setattr__(self, "grid", tuple(self.grid))
        numbers = (
            "text_len",
            "text_vocab_size",
            "image_vocab_size",
            "dim",
            "heads",
            "head_dim",
            "layers",
            "kernel_size",
        )
        _require_positive(self, *numbers)
        if len(self.grid) != 2 or not all(type(side) is int and 0 < side <= 2**10 for side in self.grid):
            raise UserError(
                f"DALLEConfig.grid: expected two whole numbers (rows, columns) from 1 to {2**10}, got {self.grid}"
            )
        if self.kernel_size % 2 == 0:
            raise UserError(f"DALLEConfig.kernel_size: expected an odd number, got {self.kernel_size}")

    @property
    def image_len(self) -> int:
        """Number of image tokens."""
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "DALLEConfig") -> DALLEConfig:
        return from_mapping(cls, values, where)

    @classmethod
    def preset(cls, name: str) -> DALLEConfig:
        """A named size: ``tiny`` for tests, ``emoji`` for a laptop, ``small`` (0.1 B) to ``12b`` (the paper's)."""
        return _preset(_DALLE_PRESETS, name, "transformer")


_DVAE_PRESETS = {
    "tiny": DVAEConfig(image_size=16, vocab_size=64, n_hid=8, n_init=8, group_count=3, n_blk_per_group=1),
    "emoji": DVAEConfig(image_size=64, vocab_size=1024, n_hid=32, n_init=64, group_count=4, n_blk_per_group=1),
    "small": DVAEConfig(image_size=128, vocab_size=4096, n_hid=64, n_init=128),
    "medium": DVAEConfig(image_size=256, n_hid=128),
    "large": DVAEConfig(),
    "12b": DVAEConfig(),
}

_DALLE_PRESETS = {
    "tiny": DALLEConfig(
        text_len=8, text_vocab_size=300, grid=(4, 4), image_vocab_size=64, dim=32, heads=2, head_dim=16, layers=4,
        kernel_size=3,
    ),
    "emoji": DALLEConfig(
        text_len=16, text_vocab_size=2048, grid=(8, 8), image_vocab_size=1024, dim=256, heads=4, head_dim=64, layers=6,
        kernel_size=5,
    ),
    "small": DALLEConfig(grid=(16, 16), image_vocab_size=4096, dim=768, heads=12, layers=12),
    "medium": DALLEConfig(dim=1024, heads=16, layers=24),
    "large": DALLEConfig(dim=1920, heads=30, layers=24),
    "12b": DALLEConfig(),
}  # fmt: skip
