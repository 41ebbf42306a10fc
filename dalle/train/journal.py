"""What a run learns of its updates: figures for the log, the losses for the step size, whether to go on.

On a GPU the host reads an update's figures when it has begun the next ``LAG`` ones: so it never waits for what it has
just begun, and the GPU never for the host. Until then an update whose loss or gradient is not finite is held back on
the device (:func:`hold_back`). All processes of a team read the same update at the same time, and so decide alike.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from dalle.errors import UserError
from dalle.train.telemetry import averages, described
from dalle.train.transit import Underway

if TYPE_CHECKING:
    from dalle.train.loop import Stage
    from dalle.train.team import Figures

LAG = 2
"""Of a GPU; a CPU has no queue."""

Window = list[dict[str, float]]
"""The figures of the updates since the last line of the log, which averages them."""


def lag_on(device: torch.device | str) -> int:
    """How many updates the reading of figures falls behind."""
    return LAG if torch.device(device).type == "cuda" else 0


@torch.no_grad()
def hold_back(optimizer: torch.optim.Optimizer, loss: torch.Tensor, norm: torch.Tensor) -> None:
    """Let the step, and all after it, change nothing where the loss or the gradients' norm is not finite.

    Parameters that are not finite must not reach a checkpoint and push out the good ones. The optimizer, torch's fused
    one or AdamW16, looks at ``found_inf`` on the device.
    """
    spoiled = (loss.isfinite() & norm.isfinite()).logical_not().float()
    found = getattr(optimizer, "found_inf", None)
    optimizer.found_inf = spoiled if found is None else torch.maximum(found.float(), spoiled)


class Journal:
    """Reads the figures of a run's updates in order and writes the lines of its log.

    ``window`` holds the figures that were read since the last line, ``interrupted`` is whether they say to stop.
    """

    def __init__(self, stage: Stage, out: Path, window: Window, bar: tqdm):
        self.stage = stage
        self.out = out
        self.window = window
        self.interrupted = False
        self._bar = bar
        self._lag = lag_on(stage.team.device)
        self._unread: deque[tuple[int, Underway, Underway | None]] = deque()

    def add(self, update: int, figures: Figures, line: Figures | None = None) -> None:
        """Take in the figures of an update and, where a line of the log is due, what it says beside averages.

        Raises UserError when the loss or the gradients' norm of an update that is read now is not finite.
        """
        self._unread.append((update, Underway(figures), None if line is None else Underway(line)))
        self._read_all_but(self._lag)

    def catch_up(self) -> None:
        """Read all, however long that takes; UserError as in :meth:`add`."""
        self._read_all_but(0)

    def write(self, entry: dict[str, Any]) -> None:
        """Write a line of the log, in the leader."""
        if self.stage.team.leads:
            _append(self.out / "log.jsonl", entry)

    def _read_all_but(self, count: int) -> None:
        while len(self._unread) > count:
            self._read(*self._unread.popleft())

    def _read(self, update: int, sent: Underway, line: Underway | None) -> None:
        figures = sent.read()
        self.interrupted |= figures.pop("interrupted") > 0
        self._require_finite({"loss": figures["loss"], "gradient norm": figures["gradient_norm"]}, update)
        self.stage.observe(figures["loss"])
        self.window.append(figures)
        if line is not None:
            entry = {"update": update, **averages(self.window), **described(line.read())}
            self.window.clear()
            self.write(entry)
            self._bar.set_postfix(loss=f"{entry['loss']:.4f}")

    def _require_finite(self, figures: dict[str, float], update: int) -> None:
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} became {value} in update {update}: the checkpoints in {self.out / 'checkpoints'} are "
                    "older and sound; start anew with a lower learning rate"
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
