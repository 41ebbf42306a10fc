"""A model folder of a training's checkpoint: what a run writes at its end, of a run that has not come to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dalle.checkpoint import check_sha256, dalle_files, dvae_files, dvae_sha256, load_weights
from dalle.config import DALLEConfig, DVAEConfig
from dalle.errors import UserError
from dalle.train.checkpoints import DESCRIPTION, averaged_weights, latest_checkpoint, read_description
from dalle.train.settings import STORED_DTYPES

if TYPE_CHECKING:
    from dalle.dvae import DVAE
    from dalle.transformer import DALLE

TOKENIZER = "tokenizer.json"


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint folder ``path``, or the last one of the run folder ``path``."""
    folder = Path(path)
    found = folder if (folder / DESCRIPTION).exists() else latest_checkpoint(folder)
    if found is None:
        raise UserError(f"expected a run folder with a checkpoint, or a checkpoint, got {folder}")
    return found


def model_files(checkpoint: Path, dvae_folder: str | Path | None = None) -> dict[str, bytes]:
    """The files of the model folder that the averaged parameters in ``checkpoint`` make, of one process or of many.

    Stage 2 needs ``dvae_folder``, the model folder of the dVAE that it is trained with. Raises UserError when something
    is missing, damaged, or does not belong together.
    """
    description = read_description(checkpoint)
    identity = description["identity"]
    try:
        dtype = STORED_DTYPES[identity["training"]["stored_dtype"]]
        note = {"training": identity["training"], "data": identity["data"]}
        note |= {"updates": description["update"], "seconds": round(description["seconds"])}
        stage, settings = identity["stage"], identity["config"]
    except (KeyError, TypeError):
        raise UserError(f"{checkpoint / DESCRIPTION} is damaged: expected what it says of the run") from None
    if stage != "dvae":
        _require_parts(checkpoint, identity, dvae_folder)
    weights = averaged_weights(checkpoint, description)
    if stage == "dvae":
        return dvae_files(_dvae(checkpoint, settings, weights), dtype, note)
    from dalle.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint / TOKENIZER)
    return dalle_files(_dalle(checkpoint, settings, weights), tokenizer, dvae_folder, dtype, note)


def _dvae(checkpoint: Path, settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> DVAE:
    from dalle.dvae import DVAE

    config = DVAEConfig.from_dict(settings, str(checkpoint / DESCRIPTION))
    return load_weights(lambda: DVAE(config), weights, checkpoint)


def _dalle(checkpoint: Path, settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> DALLE:
    from dalle.transformer import DALLE

    config = DALLEConfig.from_dict(settings, str(checkpoint / DESCRIPTION))
    return load_weights(lambda: DALLE(config), weights, checkpoint)


def _require_parts(checkpoint: Path, identity: dict[str, Any], dvae_folder: str | Path | None) -> None:
    """Raise UserError unless the dVAE and the tokenizer are those of the run."""
    if dvae_folder is None:
        raise UserError("a transformer is kept with its dVAE: expected --dvae, the model folder that its run was given")
    if dvae_sha256(dvae_folder) != identity.get("dvae_sha256"):
        raise UserError(f"wrong dVAE for this transformer: {checkpoint} is of a run with another than {dvae_folder}")
    check_sha256(checkpoint / TOKENIZER, identity.get("tokenizer_sha256"))
