"""The training loop both stages share: log, pictures, averaging, checkpoints, interruption and exact resumption.

A run lives in one folder: ``log.jsonl`` (a JSON object a line), ``pictures/`` (with matplotlib the loss curve too),
``checkpoints/update-XXXXXXXX/`` (the last few) and at the end ``model/``, the model folder to sample from.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dalle.checkpoint import FORMAT, check_sha256, read_tensors, to_safetensors
from dalle.errors import UserError
from dalle.files import atomic_write, atomic_write_folder, read_json, sha256, to_json
from dalle.pictures import loss_curve, read_log
from dalle.train.averaging import IterateAverage

Window = list[dict[str, torch.Tensor | float]]
"""The figures of the updates since the last line of the log, which averages them."""


@dataclass(frozen=True)
class RunSettings:
    """How a run is driven. None of these changes the numbers, so a resumed run may choose anew.

    ``log_every``, ``picture_every`` and ``checkpoint_every`` count updates; 0 pictures means none.
    """

    log_every: int = 20
    picture_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "picture_every" else 1
            if not isinstance(value, int) or value < least:
                raise UserError(f"{field.name}: expected a whole number of at least {least}, got {value!r}")


class Stage(ABC):
    """What the loop needs to know of a stage. ``updates`` is the run's length."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: IterateAverage
    updates: int
    clip_norm: float = math.inf

    @abstractmethod
    def loss(self, update: int) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """The scalar loss of one update, all its randomness derived from ``update``, and what to log beside it."""

    @abstractmethod
    def learning_rate(self, update: int) -> float:
        """The step size of one update."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that determines the run's numbers (configs, settings, data): must be equal on resumption."""

    @abstractmethod
    def draw_pictures(self, update: int, folder: Path) -> dict[str, float]:
        """Write pictures of the averaged model's work, named by ``update``; returns held-out figures to log."""

    @abstractmethod
    def model_files(self, updates: int, seconds: float) -> dict[str, bytes]:
        """The files of the model folder that the averaged parameters make."""

    def observe(self, loss: float) -> None:  # noqa: B027 (optional)
        """Learn the loss of an update (the plateau rule does)."""

    def extra_files(self) -> dict[str, bytes]:
        """Further files of a checkpoint (the tokenizer)."""
        return {}

    def state(self) -> dict[str, Any]:
        """Small JSON state beside the tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 (optional)
        """Take back what :meth:`state` gave."""


def run(stage: Stage, out: str | Path, settings: RunSettings, resume: bool = False) -> Path:
    """Train ``stage`` to its last update in the run folder ``out`` and return its model folder.

    Ctrl-C finishes the update, writes a checkpoint and raises KeyboardInterrupt; ``resume=True`` goes on from the last
    checkpoint to the same numbers, bit for bit on a CPU with the same thread count. Raises UserError when the folder
    already holds a run and ``resume`` is false, when the run to resume was another one, or when the loss is no longer
    finite.
    """
    out = Path(out)
    update, seconds, window = _start(stage, out, resume)
    bar = tqdm(total=stage.updates, initial=update, unit="update", dynamic_ncols=True, smoothing=0.05)
    started = time.monotonic() - seconds
    with bar, _interruptible() as interrupted:
        while update < stage.updates:
            window.append(_one_update(stage, update, out))
            update += 1
            bar.update()
            last = update == stage.updates
            if update % settings.log_every == 0 or last:
                entry = {"update": update, **_averages(window), "seconds": round(time.monotonic() - started, 3)}
                window.clear()
                _append(out / "log.jsonl", entry)
                bar.set_postfix(loss=f"{entry['loss']:.4f}")
            if settings.picture_every and (update % settings.picture_every == 0 or last):
                figures = stage.draw_pictures(update, out / "pictures")
                if figures:
                    _append(out / "log.jsonl", {"update": update, **figures})
                _draw_loss(out)
            if update % settings.checkpoint_every == 0 or last or interrupted():
                _save(stage, out, update, time.monotonic() - started, window, settings.keep_checkpoints)
            if interrupted():
                tqdm.write(f"interrupted after update {update}; the same command with --resume goes on from there")
                raise KeyboardInterrupt
    model = out / "model"
    atomic_write_folder(model, stage.model_files(update, time.monotonic() - started))
    return model


def _one_update(stage: Stage, update: int, out: Path) -> dict[str, torch.Tensor | float]:
    rate = stage.learning_rate(update)
    for group in stage.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
    stage.model.train()
    stage.optimizer.zero_grad(set_to_none=True)
    loss, figures = stage.loss(update)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(stage.model.parameters(), stage.clip_norm)
    loss = loss.detach()
    # Before the step: parameters that are not finite must not reach a checkpoint and push out the good ones.
    _require_finite({"loss": float(loss), "gradient norm": float(norm)}, update + 1, out)
    stage.optimizer.step()
    stage.average.observe(stage.model, update + 1)
    stage.observe(float(loss))
    return {"loss": loss, "learning_rate": rate, "gradient_norm": norm, **figures}


def _averages(window: Window) -> dict[str, float]:
    return {name: sum(float(figures[name]) for figures in window) / len(window) for name in window[0]}


def _require_finite(figures: dict[str, float], update: int, out: Path) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise UserError(
                f"the {name} became {value} in update {update}: the checkpoints in {out / 'checkpoints'} are older and "
                "sound; start anew with a lower learning rate"
            )


def _append(path: Path, entry: dict[str, Any]) -> None:
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in entry.items()}
    try:
        with open(path, "a") as file:
            file.write(json.dumps(rounded) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; the last checkpoint is safe, resume when mended"
        ) from error


def require_startable(out: str | Path, resume: bool) -> None:
    """Raise UserError when ``out`` holds a run and ``resume`` is false, or holds none and it is true."""
    checkpoint = latest_checkpoint(out)
    if checkpoint and not resume:
        raise UserError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    if resume and not checkpoint:
        raise UserError(f"nothing to resume: {Path(out) / 'checkpoints'} holds no complete checkpoint")


def _start(stage: Stage, out: Path, resume: bool) -> tuple[int, float, Window]:
    require_startable(out, resume)
    checkpoint = latest_checkpoint(out)
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        (out / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {out}: {error.strerror}") from None
    if not checkpoint:
        (out / "log.jsonl").unlink(missing_ok=True)
        return 0, 0.0, []
    progress = _load(stage, checkpoint)
    _cut_log(out / "log.jsonl", progress[0])
    return progress


def latest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    folders = sorted(Path(out).glob("checkpoints/update-*"))
    return folders[-1] if folders else None


def _cut_log(path: Path, update: int) -> None:
    # Lines after the checkpoint belong to updates that will be made again; a crash may have cut the last one short.
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["update"] <= update]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _draw_loss(out: Path) -> None:
    if importlib.util.find_spec("matplotlib"):
        atomic_write(out / "pictures" / "loss.png", loss_curve(out / "log.jsonl"))


def _tensors(stage: Stage) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in stage.model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in stage.average.model.state_dict().items()}
    for name, parameter in stage.model.named_parameters():
        for key, value in stage.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return tensors


def _save(stage: Stage, out: Path, update: int, seconds: float, window: Window, keep: int) -> None:
    data = to_safetensors(_tensors(stage))
    description = {
        "format": FORMAT,
        "kind": "training",
        "update": update,
        "seconds": seconds,
        "window": [{name: float(value) for name, value in figures.items()} for figures in window],
        "identity": stage.identity(),
        "state": stage.state(),
        "sha256": sha256(data),
    }
    files = {"training.safetensors": data, "checkpoint.json": to_json(description), **stage.extra_files()}
    folder = out / "checkpoints" / f"update-{update:08d}"
    atomic_write_folder(folder, files)
    for old in sorted(folder.parent.glob("update-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _load(stage: Stage, folder: Path) -> tuple[int, float, Window]:
    description = read_json(folder / "checkpoint.json", "training checkpoint")
    if description.get("format") != FORMAT or description.get("kind") != "training":
        raise UserError(f"{folder / 'checkpoint.json'}: expected a training checkpoint in format {FORMAT}")
    if not {"identity", "state", "update", "seconds"} <= description.keys():
        raise UserError(f"{folder / 'checkpoint.json'} is damaged: expected what it says of the run")
    _require_same(description["identity"], json.loads(to_json(stage.identity())), folder)
    path = folder / "training.safetensors"
    check_sha256(path, description.get("sha256"))
    tensors = read_tensors(path, "training checkpoint")
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    stage.model.load_state_dict(groups["model"])
    stage.average.model.load_state_dict(groups["average"])
    parameters = dict(stage.model.named_parameters())
    for name, tensor in groups["optimizer"].items():
        parameter, _, key = name.rpartition(".")
        stage.optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)
    stage.load_state(description["state"])
    return description["update"], description["seconds"], description.get("window", [])


def _require_same(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    for section in saved.keys() | current.keys():
        old, new = saved.get(section), current.get(section)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            name = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))[0]
            section, old, new = f"{section}.{name}", old.get(name), new.get(name)
        raise UserError(f"cannot resume {folder}: its {section} is {old!r}, this command's is {new!r}; give the same")


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Ctrl-C sets a flag that the loop reads between updates; a second one interrupts at once."""
    flag = []

    def handler(_signal: int, _frame: Any) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)

    try:
        previous = signal.signal(signal.SIGINT, handler)
    except ValueError:  # Not in the main thread: whoever runs us there handles signals.
        yield lambda: False
        return
    try:
        yield lambda: bool(flag)
    finally:
        signal.signal(signal.SIGINT, previous)
