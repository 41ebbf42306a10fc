"""Model folders: what sampling needs, in files that describe and check themselves.

- ``dvae.json``, ``dvae.safetensors``: the stage-1 model, its config, and the SHA-256 of its weights file;
- ``dalle.json``, ``dalle.safetensors``, ``tokenizer.json``: the stage-2 model, absent after stage 1 alone.
  ``dalle.json`` also holds the SHA-256 of the dVAE that made its image tokens and of its tokenizer, checked on loading.

Weights may be stored in 16 bit; they are loaded as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch
import torch

from dalle.config import DALLEConfig, DVAEConfig
from dalle.errors import UserError
from dalle.files import atomic_write_folder, read_json, sha256, sha256_of_file, to_json

if TYPE_CHECKING:
    from dalle.dvae import DVAE
    from dalle.tokenizer import Tokenizer
    from dalle.transformer import DALLE

Model = TypeVar("Model", bound=torch.nn.Module)

FORMAT = 1
_SHIPPED = Path(__file__).parent / "checkpoints"


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file; a missing, truncated or foreign one is a UserError."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no {what}: {path.name} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); fetch or train it again") from None


def to_safetensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> bytes:
    """Serialize tensors, in ``dtype`` where they are floating and one is given; what its range cannot hold stays as it
    is."""

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().to("cpu")
        narrow = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        return (narrow if torch.equal(narrow.isfinite(), tensor.isfinite()) else tensor).contiguous()

    return safetensors.torch.save({name: stored(tensor) for name, tensor in tensors.items()})


def load_weights(build: Callable[[], Model], weights: dict[str, torch.Tensor], path: Path) -> Model:
    """The model that ``build`` makes, with ``weights`` in float32, in eval mode; UserError, which names ``path``, where
    they do not fit it."""
    # First without storage: a config alone, whatever sizes it claims, allocates nothing.
    with torch.device("meta"):
        model = build()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise UserError(
            f"{path} does not fit its config: {name} is expected as {expected.get(name, 'absent')}, "
            f"got {found.get(name, 'absent')}"
        )
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def _description(path: Path, kind: str) -> dict[str, Any]:
    description = read_json(path, f"{kind} model")
    if description.get("format") != FORMAT or description.get("kind") != kind or "config" not in description:
        raise UserError(
            f"{path}: expected the description of a {kind} model in format {FORMAT}, "
            f"got kind {description.get('kind')!r} in format {description.get('format')!r}"
        )
    if not isinstance(description["config"], dict) or not isinstance(description.get("sha256"), str):
        raise UserError(f"{path} is damaged: expected a config and the SHA-256 of the weights")
    return description


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise UserError unless the file's SHA-256 is the ``expected`` one."""
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; its folder is incomplete") from None
    if found != expected:
        raise UserError(
            f"{path} is truncated or was changed: its SHA-256 differs from the recorded one; restore the file"
        )


def dvae_files(dvae: DVAE, dtype: torch.dtype = torch.float32, note: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The files of a model folder that hold a dVAE; ``note`` is free-form (data, training time, credits)."""
    weights = to_safetensors(dvae.state_dict(), dtype)
    description = {"format": FORMAT, "kind": "dvae", "config": dvae.config.to_dict(), "sha256": sha256(weights)}
    return {"dvae.json": to_json({**description, "note": note or {}}), "dvae.safetensors": weights}


def save_dvae(
    folder: str | Path, dvae: DVAE, dtype: torch.dtype = torch.float32, note: dict[str, Any] | None = None
) -> None:
    """Write a dVAE as a model folder."""
    atomic_write_folder(folder, dvae_files(dvae, dtype, note))


def dvae_sha256(folder: str | Path) -> str:
    """The SHA-256 of a model folder's dVAE weights: the identity that a transformer is bound to."""
    return _description(Path(folder) / "dvae.json", "dvae")["sha256"]


def load_dvae(folder: str | Path) -> DVAE:
    """Read the dVAE of a model folder, in float32 and eval mode.

    Raises UserError when the folder, its description or its weights are missing, truncated or do not fit each other.
    """
    from dalle.dvae import DVAE

    folder = _existing(folder)
    description = _description(folder / "dvae.json", "dvae")
    path = folder / "dvae.safetensors"
    check_sha256(path, description.get("sha256"))
    config = DVAEConfig.from_dict(description["config"], str(folder / "dvae.json"))
    return load_weights(lambda: DVAE(config), read_tensors(path, "dVAE weights"), path)


def dalle_files(
    model: DALLE,
    tokenizer: Tokenizer,
    dvae_folder: str | Path,
    dtype: torch.dtype = torch.float32,
    note: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of a model folder that hold a transformer, its tokenizer, and a copy of the dVAE of ``dvae_folder``."""
    dvae_folder = Path(dvae_folder)
    check_sha256(dvae_folder / "dvae.safetensors", dvae_sha256(dvae_folder))
    weights = to_safetensors(model.state_dict(), dtype)
    tokenizer_json = tokenizer.to_json().encode()
    description = {
        "format": FORMAT,
        "kind": "dalle",
        "config": model.config.to_dict(),
        "sha256": sha256(weights),
        "dvae_sha256": dvae_sha256(dvae_folder),
        "tokenizer_sha256": sha256(tokenizer_json),
        "note": note or {},
    }
    return {
        "dalle.json": to_json(description),
        "dalle.safetensors": weights,
        "tokenizer.json": tokenizer_json,
        **{name: (dvae_folder / name).read_bytes() for name in ("dvae.json", "dvae.safetensors")},
    }


def load_dalle(folder: str | Path) -> tuple[DALLE, Tokenizer]:
    """Read the transformer and the tokenizer of a model folder, in float32 and eval mode.

    Raises UserError when a file is missing, truncated or changed, or the folder's dVAE is not the transformer's own.
    """
    from dalle.tokenizer import Tokenizer
    from dalle.transformer import DALLE

    folder = _existing(folder)
    description = _description(folder / "dalle.json", "dalle")
    if (folder / "dvae.json").exists():
        check_dvae(folder, folder)
    path = folder / "dalle.safetensors"
    check_sha256(path, description.get("sha256"))
    check_sha256(folder / "tokenizer.json", description.get("tokenizer_sha256"))
    config = DALLEConfig.from_dict(description["config"], str(folder / "dalle.json"))
    model = load_weights(lambda: DALLE(config), read_tensors(path, "transformer weights"), path)
    return model, Tokenizer.load(folder / "tokenizer.json")


def check_dvae(dalle_folder: str | Path, dvae_folder: str | Path) -> None:
    """Raise UserError unless ``dvae_folder`` holds the very dVAE that made the transformer's image tokens."""
    expected = _description(Path(dalle_folder) / "dalle.json", "dalle").get("dvae_sha256")
    found = dvae_sha256(dvae_folder)
    if found != expected:
        raise UserError(
            f"wrong dVAE for this transformer: {dalle_folder} was trained on tokens of the dVAE {str(expected)[:12]}, "
            f"{dvae_folder} holds {found[:12]}; give the dVAE that it was trained with"
        )


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: expected a folder with dvae.json or dalle.json in it")
    return folder


def shipped(name: str = "emoji") -> Path:
    """The folder of a model that comes with the package."""
    folder = _SHIPPED / name
    if not folder.is_dir():
        names = sorted(path.name for path in _SHIPPED.iterdir() if path.is_dir()) if _SHIPPED.is_dir() else []
        known = f"expected one of {', '.join(names)}" if names else "this copy of the package comes without any"
        raise UserError(f"no shipped checkpoint named {name!r}: {known}; or train one, see dalle train --help")
    return folder
