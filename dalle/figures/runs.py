"""What the figures share: a small transformer on the shipped model's tokens, trained for a short while, and its log."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.checkpoint import shipped
from dalle.config import DALLEConfig
from dalle.data import open_dataset
from dalle.files import atomic_write
from dalle.pictures import figure_png, read_log, tidy
from dalle.tokenizer import Tokenizer
from dalle.train.dalle import DALLEStage, DALLETraining
from dalle.train.loop import RunSettings, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Runs:
    """Trains stage 2 of ``config``, changes to the "emoji" preset, on ``data``; image tokens are encoded once."""

    def __init__(self, data: Path, cache: Path, **config: Any):
        self.config = dataclasses.replace(DALLEConfig.preset("emoji"), **config)
        self.images = open_dataset(data, "train", captions=True)
        self.cache = cache
        self.shipped = shipped()
        self.tokenizer = Tokenizer.load(self.shipped / "tokenizer.json")

    def log(self, change: Callable[[DALLEStage], None] = lambda stage: None, **training: Any) -> list[dict[str, Any]]:
        """The log of a run with these settings of ``DALLETraining``, a line an update, of a stage that ``change`` saw
        first."""
        settings = DALLETraining(**{"schedule": "cosine", "warm_up_fraction": 0.02, **training})
        stage = DALLEStage(self.config, settings, self.images, self.shipped, self.cache, tokenizer=self.tokenizer)
        change(stage)
        with tempfile.TemporaryDirectory() as out:
            run(stage, out, RunSettings(log_every=1, picture_every=0, checkpoint_every=settings.updates))
            return read_log(Path(out) / "log.jsonl")


def finish(figure: Figure, out: Path) -> None:
    """Write the figure, its axes with a grid and no frame, over updates where nothing else is said."""
    for axes in figure.axes:
        axes.set_xlabel(axes.get_xlabel() or "update")
        tidy(axes)
    atomic_write(out, figure_png(figure))


def smooth(values: list[float], over: int = 40) -> list[float]:
    """The mean of each value and as many before it as there are, up to ``over``."""
    return [sum(values[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(values))]
