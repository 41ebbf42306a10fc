"""The training loop both stages share: log, pictures, averaging, checkpoints, interruption and exact resumption.

A run lives in one folder: ``log.jsonl`` (a JSON object a line), ``pictures/`` (with matplotlib the loss curve too),
``checkpoints/update-XXXXXXXX/`` (the last few) and at the end ``model/``, the model folder to sample from.
"""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dalle.errors import UserError
from dalle.files import atomic_write, atomic_write_folder
from dalle.pictures import loss_curve, read_log
from dalle.train.averaging import IterateAverage
from dalle.train.checkpoints import Checkpoints, clear_incomplete, latest_checkpoint, load
from dalle.train.journal import Journal, Window, hold_back
from dalle.train.team import ALONE, Alone, Compression, Figures
from dalle.train.telemetry import Telemetry
from dalle_kernels import GradScales

STARTED = ".started"
"""In the run folder: torchrun's start of the processes was allowed to use the folder, so its restarts are too."""


@dataclass(frozen=True)
class RunSettings:
    """How a run is driven. None of these changes the numbers, so a resumed run may choose anew.

    ``log_every``, ``picture_every`` and ``checkpoint_every`` count updates; 0 pictures means none. ``peak_tflops`` is
    what each device can do, of which the log gives the share that is used; 0: measured.
    """

    log_every: int = 20
    picture_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        for name in ("log_every", "picture_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            least = 0 if name == "picture_every" else 1
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if not 0 <= self.peak_tflops < math.inf:
            raise UserError(f"peak_tflops: expected a number of at least 0, got {self.peak_tflops!r}")

    def due(self, update: int, updates: int) -> tuple[bool, bool, bool]:
        """Whether a line of the log, a picture and a checkpoint follow an update of ``updates``."""
        logging, drawing, saving = (
            every > 0 and (update % every == 0 or update == updates)
            for every in (self.log_every, self.picture_every, self.checkpoint_every)
        )
        return logging, drawing, saving


class Stage(ABC):
    """What the loop needs to know of a stage. ``updates`` is the run's length. For the log, ``scales`` are the loss
    scales of the resblocks, and an update takes ``tokens_per_update`` tokens and ``flops_per_update`` operations.

    The model runs in a team of processes; ``shards`` is this process's part of its parameters, which the optimizer and
    the average are made of. A team of one has it all: there both are the same module.
    """

    team: Alone = ALONE
    training: Any
    """The settings, of a dataclass in which each has a default."""
    model: nn.Module
    shards: nn.Module
    optimizer: torch.optim.Optimizer
    average: IterateAverage
    updates: int
    clip_norm: float = math.inf
    scales: GradScales | None = None
    tokens_per_update: int = 0
    flops_per_update: int = 0

    def place(
        self, model: nn.Module, compression: Compression | None = None, scales: torch.Tensor | None = None
    ) -> None:
        """Put ``model`` onto the team's devices, to be trained there, as :meth:`Alone.shard` says."""
        self.model = self.team.shard(model, compression, scales)
        self.shards = self.team.shards(self.model)

    @abstractmethod
    def loss(self, update: int) -> tuple[torch.Tensor, Figures]:
        """The scalar loss of this process's share of one update, all its randomness derived from ``update``, and what
        to log beside it."""

    @abstractmethod
    def learning_rate(self, update: int) -> float:
        """The step size of one update."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that determines the run's numbers (configs, settings, data): must be equal on resumption."""

    @abstractmethod
    def draw_pictures(self, update: int, folder: Path) -> dict[str, float]:
        """Write pictures of the averaged model's work, named by ``update``; returns held-out figures to log.

        Every process of a team calls this, its leader writes; so too with :meth:`model_files`, empty in the others.
        """

    @abstractmethod
    def model_files(self, updates: int, seconds: float) -> dict[str, bytes]:
        """The files of the model folder that the averaged parameters make."""

    def prepare_step(self) -> tuple[torch.Tensor, Figures]:
        """Between the backward and the step: clip the gradients, whose norm is that over all parameters, to
        ``clip_norm``. Returns the norm to log, and what else."""
        return self.team.clip(self.shards, self.clip_norm), {}

    def observe(self, loss: float) -> None:  # noqa: B027 (optional)
        """Learn the loss of an update (the plateau rule does), sooner or later, in order."""

    def awaits_losses(self, updates: int) -> bool:
        """Whether the step size after this many updates follows from the losses of all of them."""
        return False

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

    Ctrl-C, or SIGTERM to a process alone, finishes the updates that have begun, writes a checkpoint and raises
    KeyboardInterrupt; ``resume=True`` goes on from the last checkpoint to the same numbers, bit for bit on a CPU with
    the same thread count. Raises UserError when the folder already holds a run and ``resume`` is false, when the run to
    resume was another one, or when the loss is no longer finite.
    """
    out = Path(out)
    team = stage.team
    update, seconds, window = _start(stage, out, resume)
    checkpoints = Checkpoints(stage, out, settings.keep_checkpoints)
    bar = tqdm(
        total=stage.updates, initial=update, unit="update", dynamic_ncols=True, smoothing=0.05, disable=not team.leads
    )
    started = time.monotonic() - seconds
    telemetry = Telemetry(stage, settings.peak_tflops * 1e12)
    journal = Journal(stage, out, window, bar)
    with bar, _interruptible(team.size == 1) as interrupted, checkpoints:
        while update < stage.updates:
            logging, drawing, saving = settings.due(update + 1, stage.updates)
            with telemetry.update():
                figures = _one_update(stage, update, interrupted, telemetry.observe if logging else None)
            update += 1
            bar.update()
            seconds = time.monotonic() - started
            journal.add(update, figures, {**telemetry.line(), "seconds": round(seconds, 3)} if logging else None)
            if drawing or saving or stage.awaits_losses(update):
                journal.catch_up()
            if drawing:
                _draw(stage, out, update, journal)
            if saving or journal.interrupted:
                journal.catch_up()
                checkpoints.save(update, time.monotonic() - started, journal.window)
            if journal.interrupted:
                checkpoints.wait()
                if team.leads:
                    tqdm.write(f"interrupted after update {update}; the same command with --resume goes on from there")
                raise KeyboardInterrupt
    files = stage.model_files(update, time.monotonic() - started)
    if team.leads:
        atomic_write_folder(out / "model", files)
    return out / "model"


def _one_update(
    stage: Stage,
    update: int,
    interrupted: Callable[[], bool],
    observe: Callable[[Sequence[torch.Tensor]], None] | None = None,
) -> Figures:
    """Begin an update; its figures are on the device, which may still be at it."""
    rate = stage.learning_rate(update)
    for group in stage.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
    stage.model.train()
    stage.optimizer.zero_grad(set_to_none=True)
    loss, figures = stage.loss(update)
    loss.backward()
    # Whether to stop is among the figures so that all processes of a team stop after the same update.
    figures = {"loss": loss.detach(), "interrupted": float(interrupted()), **figures}
    figures = stage.team.combine(stage.model, stage.shards, figures)
    norm, skipping = stage.prepare_step()
    hold_back(stage.optimizer, figures["loss"], norm)
    stage.team.step(stage.optimizer, observe)
    stage.average.observe(stage.shards, update + 1)
    return {"loss": figures.pop("loss"), "learning_rate": rate, "gradient_norm": norm, **figures, **skipping}


def _draw(stage: Stage, out: Path, update: int, journal: Journal) -> None:
    figures = stage.team.after_leader(stage.draw_pictures(update, out / "pictures"))
    if figures:
        journal.write({"update": update, **figures})
    if stage.team.leads:
        _draw_loss(out)


def require_startable(out: str | Path, resume: bool, team: Alone = ALONE) -> None:
    """Raise UserError when ``out`` holds a run and ``resume`` is false, or holds none and it is true."""
    started = Path(out) / STARTED
    if team.resumes and started.exists():  # from whatever the start that failed has left
        return
    try:
        if team.leads:
            started.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the run folder {out}: {error.strerror}") from None
    checkpoint = latest_checkpoint(out)
    if checkpoint and not resume:
        raise UserError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    if resume and not checkpoint:
        raise UserError(f"nothing to resume: {Path(out) / 'checkpoints'} holds no complete checkpoint")


def _start(stage: Stage, out: Path, resume: bool) -> tuple[int, float, Window]:
    require_startable(out, resume, stage.team)
    checkpoint = stage.team.from_leader(lambda: _prepare_folder(out, stage.team.size > 1))
    if checkpoint is None:
        return 0, 0.0, []
    progress = load(stage, checkpoint)
    if stage.team.leads:
        _cut_log(out / "log.jsonl", progress[0])
    return progress


def _prepare_folder(out: Path, restartable: bool) -> Path | None:
    """Make the run folder ready to write to; returns the checkpoint to go on from."""
    checkpoint = latest_checkpoint(out)
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        (out / "checkpoints").mkdir(exist_ok=True)
        if restartable:
            (out / STARTED).touch()
    except OSError as error:
        raise UserError(f"cannot make the run folder {out}: {error.strerror}") from None
    clear_incomplete(out)
    if not checkpoint:
        (out / "log.jsonl").unlink(missing_ok=True)
    return checkpoint


def _cut_log(path: Path, update: int) -> None:
    # Lines after the checkpoint belong to updates that will be made again; a crash may have cut the last one short.
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["update"] <= update]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _draw_loss(out: Path) -> None:
    if importlib.util.find_spec("matplotlib"):
        atomic_write(out / "pictures" / "loss.png", loss_curve(out / "log.jsonl"))


@contextmanager
def _interruptible(alone: bool) -> Iterator[Any]:
    """Ctrl-C sets a flag that the loop reads between updates; a second one interrupts at once.

    So does SIGTERM, by which clusters and ``kill`` end a process, where it is ``alone``: torchrun ends by it those that
    wait for one which has died.
    """
    signals = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    flag = []

    def handler(_signal: int, _frame: Any) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)

    try:
        previous = {number: signal.signal(number, handler) for number in signals}
    except ValueError:  # Not in the main thread: whoever runs us there handles signals.
        yield lambda: False
        return
    try:
        yield lambda: bool(flag)
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
