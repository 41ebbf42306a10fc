"""AdamW with 16-bit moments, and with 16-bit resblocks too, against AdamW in float32: the losses of the same run."""

from __future__ import annotations

from pathlib import Path

from dalle.figures.runs import Runs, finish, smooth
from dalle.pictures import new_figure

UPDATES = 250
MODEL = {"dim": 64, "heads": 2, "head_dim": 32, "layers": 4}
RUNS = {
    "torch's AdamW, float32": {},
    "AdamW16, float32 resblocks": {"optimizer": "adamw16"},
    "AdamW16, float16 resblocks": {"optimizer": "adamw16", "precision": "float16"},
}


def draw(data: Path, out: Path, updates: int, cache: Path) -> None:
    """Train the same model thrice, on the same batches, and draw the losses and their distances from float32."""
    figure = new_figure(10, 4)
    runs = Runs(data, cache, **MODEL)
    logs = {
        name: [line["loss"] for line in runs.log(updates=updates, batch_size=16, learning_rate=2e-3, **settings)]
        for name, settings in RUNS.items()
    }
    losses, distances = figure.subplots(1, 2)
    exact = next(iter(logs.values()))
    for name, log in logs.items():
        numbers = range(1, len(log) + 1)
        losses.plot(numbers, smooth(log), label=name, linewidth=1)
        distances.plot(numbers, smooth([own - other for own, other in zip(log, exact, strict=True)]), label=name)
        print(f"{name}: mean loss of the last 40 updates {smooth(log)[-1]:.4f}")
    losses.set_ylabel("loss, mean of 40 updates")
    distances.set_ylabel("difference to the first")
    losses.legend(frameon=False, fontsize="small")
    finish(figure, out)
