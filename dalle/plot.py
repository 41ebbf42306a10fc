"""Draw a training's log: a panel for each kind of figure that it holds."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dalle.errors import UserError
from dalle.pictures import figure_png, is_number, new_figure, read_log, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = list[dict[str, Any]]

COLOURS = {"loss": "#212529", "text_loss": "#1971c2", "image_loss": "#e8590c"}
LINE = "#1971c2"
MOST_COLUMNS = 400
"""Of the heat map: what a picture can show."""

# Name in the log, title, unit. What is not here and is a number gets a panel of its own name.
NUMBERS = {
    "learning_rate": ("Learning rate", ""),
    "gradient_norm": ("Gradient norm", ""),
    "tokens_per_second": ("Speed", "tokens/s"),
    "share_of_peak": ("Share of the devices' peak", "%"),
    "skipped_updates": ("Skipped updates", "%"),
    "bytes_sent": ("Sent by a process in an update", "B"),
    "kl_per_token": ("KL to the uniform prior", "nats a token"),
    "kl_weight": ("Weight of the KL", ""),
}
LOGARITHMIC = ("gradient_norm",)
PREFIXED = ("tokens/s", "B")
"""Units that go by k, M, G."""
FP16_LEAST = -24


class Panel(NamedTuple):
    """What ``draw(axes)`` draws; ``wide``: across the whole picture."""

    draw: Callable[[Axes], None]
    wide: bool = False


def plot_log(log: str | os.PathLike) -> bytes:
    """A PNG of a training's JSON-lines log, or of that of a run folder.

    Panels, of what it holds: the losses by modality, the learning rate, the norm of the gradients, the resblocks' loss
    scales (a line a resblock, as the paper's Figure 12), the exponents of the gradients over time, speed, skipped
    updates, bytes sent, and whatever else is a number. Raises UserError where it is missing, empty or damaged.
    """
    path = Path(log)
    path = path / "log.jsonl" if path.is_dir() else path
    records = _require_records(path)
    panels = _panels(records)
    if not panels:
        raise UserError(f"expected figures beside the updates' numbers in {path}, found none")
    rows = _rows(panels)
    figure = new_figure(11, 0.5 + 2.7 * len(rows))
    figure.suptitle(_title(path, records), fontsize=12, fontweight="bold")
    grid = figure.add_gridspec(len(rows), 2)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            axes = figure.add_subplot(grid[number, :] if panel.wide else grid[number, column])
            panel.draw(axes)
            axes.set_xlim(0, records[-1]["update"])
            axes.set_xlabel("update")
    return figure_png(figure)


def _require_records(path: Path) -> Records:
    records = read_log(path)
    if records:
        return sorted(records, key=lambda record: record["update"])
    what = "a damaged one: none of its lines is a JSON object with an update" if path.stat().st_size else "an empty one"
    raise UserError(f"expected the log of a training at {path}, got {what}")


def _title(path: Path, records: Records) -> str:
    title = f"{path.absolute().parent.name}, {records[-1]['update']:,} updates"
    seconds = [record["seconds"] for record in records if is_number(record.get("seconds"))]
    return f"{title} in {datetime.timedelta(seconds=round(max(seconds)))}" if seconds else title


def _rows(panels: Iterable[Panel]) -> list[list[Panel]]:
    """Wide panels in rows of their own, the others two by two."""
    rows: list[list[Panel]] = []
    for panel in panels:
        if panel.wide or not rows or rows[-1][0].wide or len(rows[-1]) == 2:
            rows.append([])
        rows[-1].append(panel)
    return rows


def _panels(records: Records) -> list[Panel]:
    names = list(dict.fromkeys(name for record in records for name, value in record.items() if is_number(value)))
    losses = [name for name in names if name.endswith("loss")]
    others = [name for name in names if name not in (*losses, "update", "seconds")]
    panels = [Panel(lambda axes: _draw_losses(axes, records, losses), wide=True)] if losses else []
    scales = [record for record in records if _are_numbers(record.get("scales"))]
    if scales:
        panels.append(Panel(lambda axes: _draw_scales(axes, scales), wide=True))
    spread = [record for record in records if _is_spread(record.get("gradient_exponents"))]
    if spread:
        panels.append(Panel(lambda axes: _draw_exponents(axes, spread), wide=True))
    known = [name for name in NUMBERS if name in others]
    for name in (*known, *(name for name in others if name not in NUMBERS)):
        panels.append(Panel(lambda axes, name=name: _draw_number(axes, records, name)))
    return panels


def _points(records: Records, name: str) -> tuple[list[float], list[float]]:
    """Updates and the figures called ``name``."""
    points = [(record["update"], record[name]) for record in records if is_number(record.get(name))]
    updates, values = zip(*points)
    return list(updates), list(values)


def _draw_losses(axes: Axes, records: Records, names: Sequence[str]) -> None:
    for name in names:
        trained = name.removeprefix("held_out_")
        style = "-" if name == trained else "o--"
        label = name.replace("_", " ")
        axes.plot(*_points(records, name), style, color=COLOURS.get(trained), markersize=3, linewidth=1.3, label=label)
    axes.set_title("Loss")
    axes.set_ylabel("nats")
    axes.legend(frameon=False)
    tidy(axes)


def _draw_number(axes: Axes, records: Records, name: str) -> None:
    from matplotlib.ticker import EngFormatter

    title, unit = NUMBERS.get(name, (name.replace("_", " ").capitalize(), ""))
    updates, values = _points(records, name)
    values = [100 * value if unit == "%" else value for value in values]
    axes.plot(updates, values, color=LINE, marker="o" if len(values) == 1 else "", linewidth=1.2)
    if name in LOGARITHMIC and max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif min(values) >= 0:
        axes.set_ylim(0, None if max(values) else 1)
    if unit in PREFIXED:
        axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_title(title)
    axes.set_ylabel(unit)
    tidy(axes)


def _draw_scales(axes: Axes, records: Records) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    count = len(records[-1]["scales"])
    records = [record for record in records if len(record["scales"]) == count]
    updates = [record["update"] for record in records]
    scales = np.array([record["scales"] for record in records])
    colours = ScalarMappable(Normalize(1, max(2, count)), "viridis")
    for block in range(count):
        axes.plot(updates, scales[:, block], color=colours.to_rgba(block + 1), linewidth=1.0, alpha=0.85)
    axes.set_yscale("log", base=2)
    # Whole octaves, or a short run's axis had one tick or none.
    lowest, highest = np.floor(np.log2(scales.min())), np.ceil(np.log2(scales.max()))
    axes.set_ylim(2 ** (lowest - 0.1), 2 ** (max(highest, lowest + 1) + 0.1))
    axes.set_title("Loss scales of the resblocks")
    axes.figure.colorbar(colours, ax=axes, label="resblock", pad=0.01)
    tidy(axes)


def _draw_exponents(axes: Axes, records: Records) -> None:
    from matplotlib.colors import LogNorm

    spreads = [record["gradient_exponents"] for record in records]
    lowest, shares = _grid(spreads)
    updates = np.array([record["update"] for record in records], dtype=float)
    step = math.ceil(len(updates) / MOST_COLUMNS)
    shares = np.stack([shares[start : start + step].mean(0) for start in range(0, len(shares), step)])
    first = updates[0] - (updates[1] - updates[0] if len(updates) > 1 else 1)
    edges = np.array([first, *updates[step - 1 : -1 : step], updates[-1]])
    exponents = np.arange(lowest, lowest + shares.shape[1] + 1)
    mesh = axes.pcolormesh(edges, exponents, 100 * shares.T, norm=LogNorm(1e-3, 100), cmap="magma_r")
    if exponents[0] < FP16_LEAST < exponents[-1]:
        _mark_fp16(axes)
    rest = ", ".join(f"{spreads[-1][name]:.1%} {name}" for name in ("zeros", "nonfinite"))
    axes.set_title(f"Exponents of the gradients (beside them, at last {rest})")
    axes.set_ylabel("exponent of 2")
    axes.figure.colorbar(mesh, ax=axes, label="% of the numbers", pad=0.01)


def _mark_fp16(axes: Axes) -> None:
    axes.axhline(FP16_LEAST, color=COLOURS["loss"], linestyle=":", linewidth=1)
    axes.annotate(
        "fp16's least number",
        (1, FP16_LEAST),
        (-6, 4),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        fontsize=8,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
    )


def _grid(spreads: Sequence[dict[str, Any]]) -> tuple[int, np.ndarray]:
    """The least exponent, and the shares of it and the following in each line, [lines, exponents]."""
    lowest = min(spread["lowest"] for spread in spreads)
    highest = max(spread["lowest"] + len(spread["shares"]) for spread in spreads)
    shares = np.zeros((len(spreads), max(1, highest - lowest)))
    for line, spread in zip(shares, spreads):
        start = spread["lowest"] - lowest
        line[start : start + len(spread["shares"])] = spread["shares"]
    return lowest, shares


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(map(is_number, values))


def _is_spread(value: object) -> bool:
    """Whether a value of a log is what ``dalle.train.telemetry.exponent_shares`` gives, of numbers not all zero."""
    return (
        isinstance(value, dict)
        and type(value.get("lowest")) is int
        and _are_numbers(value.get("shares"))
        and is_number(value.get("zeros"))
        and is_number(value.get("nonfinite"))
    )
