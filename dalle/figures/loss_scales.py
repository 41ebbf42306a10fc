"""Resblocks in float16 under one dynamic loss scale against one for each, and how these move (the paper's Figure 12).

The run is one replica as it is among 1,024: its loss is divided by the batch of all of them. The model is narrow and as
deep as the paper's. The scale for all follows the rule of torch's GradScaler: 2^16, doubled after 2,000 updates without
an overflow, halved after one. In the warm-up, when gradients are smallest, those of the later attention resblocks
underflow under it. Scales of their own start at 1,024 x 2^13 by the paper's rule, which holds them; they grow until
their block's gradients overflow, and part. For that to be seen within minutes both rules are sped up 40 times: the one
doubles after 50 updates, the others grow by 2^(40/1000) an update and are divided once in 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dalle.figures.runs import Runs, finish, smooth
from dalle.pictures import new_figure
from dalle.train.dalle import DALLEStage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UPDATES = 300
REPLICAS = 1024
SPEED = 40
ONE, EACH = "one dynamic scale", "one a resblock"
WARM_UP = 50
"""Updates, in which gradients are smallest."""
LATE = 20
"""The last resblocks, half of them attention's."""
MODEL = {"dim": 16, "heads": 1, "head_dim": 16, "layers": 64}
TRAINING = {"batch_size": 4, "learning_rate": 3e-3, "precision": "float16", "optimizer": "adamw16"}

Shares = list[list[float]]
"""The share of zeros among the gradients of each resblock's matrices, attention's and the MLP's in turn, by update."""


def draw(data: Path, out: Path, updates: int, cache: Path) -> None:
    """Train with either and draw the losses, the share of gradients that vanished, and the scales."""
    figure = new_figure(12, 8)
    runs = Runs(data, cache, **MODEL)
    zeros: dict[str, Shares] = {ONE: [], EACH: []}
    changes = {ONE: _dynamic, EACH: _fast}
    logs = {
        name: runs.log(lambda stage, name=name: _watch(changes[name](stage), zeros[name]), updates=updates, **TRAINING)
        for name in zeros
    }
    (losses, over_updates), (over_resblocks, scales) = figure.subplots(2, 2)
    for name, log in logs.items():
        losses.plot([line["update"] for line in log], smooth([line["loss"] for line in log]), label=name)
    losses.set_ylabel("loss, mean of 40 updates")
    _draw_zeros(over_updates, over_resblocks, zeros)
    values = [[REPLICAS * scale for scale in line["scales"]] for line in logs[EACH]]
    _draw_scales(scales, values, [REPLICAS * line["scales"][0] for line in logs[ONE]])
    for axes in figure.axes:
        axes.legend(frameon=False, fontsize="small")
    finish(figure, out)


def _draw_zeros(over_updates: Axes, over_resblocks: Axes, zeros: dict[str, Shares]) -> None:
    for name, shares in zeros.items():
        late = [sum(row[-LATE::2]) / len(row[-LATE::2]) for row in shares]
        by_resblock = [sum(column) / len(column) for column in zip(*shares[:WARM_UP], strict=True)]
        over_updates.plot(range(1, len(late) + 1), late, label=name, linewidth=1)
        over_resblocks.plot(range(1, len(by_resblock) + 1, 2), by_resblock[::2], label=name, linewidth=1)
        print(f"{name}: at most {max(late):.1%} of the late attention's gradients are 0 in an update")
    over_updates.set_ylabel(f"zeros, last {LATE // 2} attention resblocks")
    over_resblocks.set_ylabel(f"zeros, first {WARM_UP} updates")
    over_resblocks.set_xlabel("resblock of attention")


def _draw_scales(axes: Axes, values: list[list[float]], one: list[float]) -> None:
    from matplotlib import colormaps

    updates, count = range(1, len(values) + 1), len(values[0])
    for number, scales in enumerate(zip(*values, strict=True)):
        label = f"{EACH}: {number + 1}" if number in (0, count // 2, count - 1) else None
        axes.plot(updates, scales, color=colormaps["viridis"](number / count), label=label, linewidth=0.7)
    axes.plot(updates, one, color="black", label=ONE, linewidth=1.5)
    axes.set_yscale("log", base=2)
    axes.set_ylabel("loss scales")


def _dynamic(stage: DALLEStage) -> DALLEStage:
    """One scale for all, as ``torch.amp.GradScaler`` moves it."""
    scales, since = stage.scales.scales, 0
    # Scales are for a loss that is divided by the batch of all replicas, which this one's is not; so divide them.
    scales.fill_(2.0**16 / REPLICAS)

    def update(nonfinite: torch.Tensor) -> None:
        nonlocal since
        overflowed = bool(nonfinite.any())
        since = 0 if overflowed else since + 1
        if overflowed or since == round(2000 / SPEED):
            scales.mul_(0.5 if overflowed else 2.0)
            since = 0

    stage.scales.update = update
    return stage


def _fast(stage: DALLEStage) -> DALLEStage:
    update = stage.scales.update

    def repeated(nonfinite: torch.Tensor) -> None:
        for _ in range(SPEED):
            update(nonfinite)

    stage.scales.update = repeated
    return stage


def _watch(stage: DALLEStage, shares: Shares) -> None:
    """Note before each step which share of the gradients of each resblock's matrices is 0."""
    resblocks = [[p for p in block.parameters() if p.dim() > 1] for block in stage.model.resblocks()]
    prepare_step = stage.prepare_step

    def watched():
        zeros = [sum(int((p.grad == 0).sum()) for p in matrices) for matrices in resblocks]
        counts = [sum(p.numel() for p in matrices) for matrices in resblocks]
        shares.append([zero / count for zero, count in zip(zeros, counts, strict=True)])
        return prepare_step()

    stage.prepare_step = watched
