"""Resblocks in float16 without a loss scale against one for each, and how these move (the paper's Figure 12).

The run is one replica as it is among 1,024: its loss is divided by the batch of all of them. With no scale many
gradients of the resblocks then underflow, almost half of them in the warm-up. Scales of their own, which start at
1,024 x 2^13, hold them all; they grow until their block's gradients overflow, and part. For that to be seen within
minutes the paper's rule is applied 15 times an update: growth by 2^(15/1000), and one division in 9 updates.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dalle.figures.runs import Runs, finish, smooth
from dalle.pictures import new_figure
from dalle.train.dalle import DALLEStage

UPDATES = 800
REPLICAS = 1024
SPEED = 15
ONE, EACH = "no loss scale", "one a resblock"
MODEL = {"dim": 32, "heads": 2, "head_dim": 16, "layers": 4}
TRAINING = {"batch_size": 4, "learning_rate": 3e-3, "precision": "float16", "optimizer": "adamw16"}


def draw(data: Path, out: Path, updates: int, cache: Path) -> None:
    """Train with either and draw the losses, the share of gradients that vanished, and the scales."""
    figure = new_figure(12, 4)
    runs = Runs(data, cache, **MODEL)
    lost_of_one, lost_of_each = [], []
    one = runs.log(lambda stage: _watch(_unscaled(stage), lost_of_one), updates=updates, **TRAINING)
    each = runs.log(lambda stage: _watch(_fast(stage), lost_of_each), updates=updates, **TRAINING)

    losses, lost, scales = figure.subplots(1, 3)
    for log, label in ((one, ONE), (each, EACH)):
        losses.plot([line["update"] for line in log], smooth([line["loss"] for line in log]), label=label)
    losses.set_ylabel("loss, mean of 40 updates")
    for shares, label in ((lost_of_one, ONE), (lost_of_each, EACH)):
        lost.plot(range(1, len(shares) + 1), smooth(shares), label=label)
        print(f"{label}: at most {max(shares):.1%} of the matrices' gradients are 0 in an update")
    lost.set_ylabel("zeros among the matrices' gradients")
    lost.set_ylim(0, 1)
    for number in range(2 * MODEL["layers"]):
        kind = "MLP" if number % 2 else "attention"
        values = [REPLICAS * line["scales"][number] for line in each]
        scales.plot([line["update"] for line in each], values, label=f"{number + 1}: {kind}", linewidth=1)
    scales.set_yscale("log", base=2)
    scales.set_ylabel("loss scale of each resblock")
    for axes in (losses, lost, scales):
        axes.legend(frameon=False, fontsize="small")
    finish(figure, out)


def _unscaled(stage: DALLEStage) -> DALLEStage:
    """One scale for all and for good: 1 for a loss that is divided by the batch of all replicas, which this one's is
    not; so divide its gradients instead, which gives the same bits."""
    stage.scales.scales.fill_(1 / REPLICAS)
    stage.scales.update = lambda nonfinite: None
    return stage


def _fast(stage: DALLEStage) -> DALLEStage:
    update = stage.scales.update

    def repeated(nonfinite: torch.Tensor) -> None:
        for _ in range(SPEED):
            update(nonfinite)

    stage.scales.update = repeated
    return stage


def _watch(stage: DALLEStage, shares: list[float]) -> None:
    """Note before each step which share of the gradients of the resblocks' matrices is 0."""
    matrices = [p for block in stage.model.resblocks() for p in block.parameters() if p.dim() > 1]
    prepare_step = stage.prepare_step

    def watched(norm: torch.Tensor):
        zeros = sum(int((p.grad == 0).sum()) for p in matrices)
        shares.append(zeros / sum(p.numel() for p in matrices))
        return prepare_step(norm)

    stage.prepare_step = watched
