"""The checkpoints of a run folder: complete or absent, whatever happens while one is written.

A checkpoint is written from a copy and in a thread, while training goes on. A run of one process has its tensors in
``training.safetensors``. One of several writes them by torch.distributed.checkpoint, each process its shards, into a
hidden folder ``.update-XXXXXXXX.saving``, which the leader syncs and renames when all have written. Both kinds are read
by any number of processes.

Order, augmentation and dropout are functions of the seed and the update's number, which ``checkpoint.json`` keeps: so
the place in the data and the state of the random numbers need no more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dalle.checkpoint import FORMAT, check_sha256, read_tensors, to_safetensors
from dalle.errors import UserError
from dalle.files import atomic_write_folder, complete_folder, read_json, sha256, to_json
from dalle.train.team import ALONE, Alone

if TYPE_CHECKING:
    from dalle.train.journal import Window
    from dalle.train.loop import Stage

TENSORS, SHARDS, DESCRIPTION = "training.safetensors", "shards", "checkpoint.json"


def latest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    folders = sorted(Path(out).glob("checkpoints/update-*"))
    return folders[-1] if folders else None


class Checkpoints:
    """Writes the checkpoints of a run, of which the last ``keep`` are kept; to be entered while it trains."""

    def __init__(self, stage: Stage, out: Path, keep: int):
        self.stage = stage
        self.folder = out / "checkpoints"
        self.keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_exception: Any) -> None:
        if kind is None:
            self.wait()
        elif self.stage.team.size == 1:  # in a team the others, who may have failed, would have to write too
            with suppress(UserError):
                self.wait()

    def save(self, update: int, seconds: float, window: Window) -> None:
        """Write the state after ``update`` updates in the background, once the last one is written."""
        self.wait()
        stage = self.stage
        folder = self.folder / f"update-{update:08d}"
        description = {
            "format": FORMAT,
            "kind": "training",
            "update": update,
            "seconds": seconds,
            "window": list(window),
            "identity": stage.identity(),
            "state": stage.state(),
        }
        write = self._write_whole if stage.team.size == 1 else self._write_shards
        self._pending = self._thread.submit(write, folder, description, self._copies(), stage.extra_files())

    def _copies(self) -> dict[str, torch.Tensor]:
        tensors, team = _tensors(self.stage), self.stage.team
        if team.size == 1:
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        parameters = dict(self.stage.model.named_parameters())
        return {name: team.stored(parameters.get(_parameter_name(name)), tensor) for name, tensor in tensors.items()}

    def wait(self) -> None:
        """Until the last checkpoint is complete; UserError if it could not be written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write_whole(
        self, folder: Path, description: dict[str, Any], tensors: dict[str, torch.Tensor], files: dict[str, bytes]
    ) -> None:
        data = to_safetensors(tensors)
        description = {**description, "sha256": sha256(data)}
        atomic_write_folder(folder, {TENSORS: data, DESCRIPTION: to_json(description), **files})
        self._drop_old()

    def _write_shards(
        self, folder: Path, description: dict[str, Any], tensors: dict[str, torch.Tensor], files: dict[str, bytes]
    ) -> None:
        from dalle.train import shard_files  # torch takes long to import what that needs

        temporary = folder.with_name(f".{folder.name}.saving")
        description = {**description, "sha256": shard_files.write(temporary / SHARDS, tensors, self.stage.team.saving)}
        if self.stage.team.leads:
            complete_folder(temporary, folder, {DESCRIPTION: to_json(description), **files})
            self._drop_old()

    def _drop_old(self) -> None:
        for old in sorted(self.folder.glob("update-*"))[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


def clear_incomplete(out: Path) -> None:
    """Remove what processes that were killed left of the checkpoints that they wrote."""
    for folder in out.glob("checkpoints/.update-*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_description(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; UserError where it is missing or damaged."""
    description = read_json(folder / DESCRIPTION, "training checkpoint")
    if description.get("format") != FORMAT or description.get("kind") != "training":
        raise UserError(f"{folder / DESCRIPTION}: expected a training checkpoint in format {FORMAT}")
    if not {"identity", "state", "update", "seconds"} <= description.keys():
        raise UserError(f"{folder / DESCRIPTION} is damaged: expected what it says of the run")
    return description


def averaged_weights(folder: Path, description: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The averaged parameters in a checkpoint, whose ``description`` was read, by their names: whole, however many
    processes wrote them."""
    tensors = _read(folder, description.get("sha256"), ALONE, {}, "average.")
    return {name.removeprefix("average."): tensor for name, tensor in tensors.items()}


def load(stage: Stage, folder: Path) -> tuple[int, float, Window]:
    """Put the state of a checkpoint into ``stage``; returns its update, seconds and window.

    Raises UserError when it is damaged or of another run.
    """
    description = read_description(folder)
    identity = _with_later_settings(description["identity"], stage)
    _require_same(identity, json.loads(to_json(stage.identity())), folder)
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}, "error": {}}
    tensors = _read(folder, description.get("sha256"), stage.team, dict(stage.model.named_parameters()))
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    stage.shards.load_state_dict(groups["model"])
    stage.average.model.load_state_dict(groups["average"])
    parameters = dict(stage.shards.named_parameters())
    for name, tensor in groups["optimizer"].items():
        parameter, _, key = name.rpartition(".")
        stage.optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)
    stage.team.take_error_sums(groups["error"])
    stage.load_state(description["state"])
    return description["update"], description["seconds"], description.get("window", [])


def _tensors(stage: Stage) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in stage.shards.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in stage.average.model.state_dict().items()}
    for name, parameter in stage.shards.named_parameters():
        for key, value in stage.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return tensors | {f"error.{name}": total for name, total in stage.team.error_sums().items()}


def _parameter_name(name: str) -> str:
    """The parameter that a tensor of a checkpoint belongs to."""
    group, _, rest = name.partition(".")
    return rest.rpartition(".")[0] if group == "optimizer" else rest


def _read(
    folder: Path,
    digests: str | dict[str, str] | None,
    team: Alone,
    parameters: Mapping[str, torch.nn.Parameter],
    prefix: str = "",
) -> dict[str, torch.Tensor]:
    """This process's part of each tensor of a checkpoint whose name begins with ``prefix``; the checkpoint's files have
    the SHA-256 ``digests``."""

    def parameter(name: str) -> torch.nn.Parameter | None:
        return parameters.get(_parameter_name(name))

    path = folder / TENSORS
    if path.exists() or not (folder / SHARDS).exists():
        check_sha256(path, digests)
        tensors = read_tensors(path, "training checkpoint")
        return {name: team.part(parameter(name), tensor) for name, tensor in tensors.items() if name.startswith(prefix)}
    from dalle.train import shard_files

    shard_files.check(folder / SHARDS, dict(team.divide(sorted((digests or {}).items()))))
    return shard_files.read(folder / SHARDS, lambda name, *size: team.empty(parameter(name), *size), prefix)


def _with_later_settings(identity: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """A checkpoint's identity, with settings that it was made before at their defaults: what they were in effect."""
    defaults = asdict(type(stage.training)())
    return {**identity, "training": {**defaults, **identity.get("training", {})}}


def _require_same(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    if saved.get("stage") != current.get("stage"):
        raise UserError(
            f"cannot resume {folder}: it is of another stage, a run of {saved.get('stage')}, where this command trains "
            f"{current.get('stage')}; give that run's own command"
        )
    for section in saved.keys() | current.keys():
        old, new = saved.get(section), current.get(section)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            name = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))[0]
            section, old, new = f"{section}.{name}", old.get(name), new.get(name)
        raise UserError(f"cannot resume {folder}: its {section} is {old!r}, this command's is {new!r}; give the same")
