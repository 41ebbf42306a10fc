"""The processes of a training run: one, or as many as torchrun started. What a run does differently for their number
is all here and in :mod:`dalle.train.torchrun`; nothing else knows of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from dalle.errors import UserError

Item = TypeVar("Item")
Figures = dict[str, "torch.Tensor | float"]


@dataclass(frozen=True)
class Compression:
    """How PowerSGD sums the gradients of the resblocks' matrices between machines (paper App. E).

    ``rank`` is the total of a matrix; its factors P and Q are divided by constants before they are summed in 1-6-9.
    """

    rank: int
    p_divisor: float = 1.0
    q_divisor: float = 1.0


class Alone:
    """A run of one process: nothing to shard, share or agree on.

    ``leads`` is true in the one process of a team that shows progress, writes the log, pictures and model, and reads
    what all need. ``shards`` below is a module with the model's parameter names that holds this process's part of each
    parameter: what the optimizer and the iterate average see. Alone it is the model itself.
    """

    leads = True
    size = 1
    device = "cpu"
    gpu = 0
    """Which part of the model this process holds, of as many as a machine has GPUs."""
    resumes = False
    """Whether this is a second start of a run that failed, which goes on from its last checkpoint."""

    def __init__(self, device: str = "cpu"):
        self.device = device

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_exception: Any) -> None:
        pass

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A model for :meth:`shard`, whose parameters are there in the leader alone."""
        return make()

    def shard(
        self, model: nn.Module, compression: Compression | None = None, scales: torch.Tensor | None = None
    ) -> nn.Module:
        """Put ``model`` onto the team's devices. With ``compression`` PowerSGD sums its gradients between machines,
        those of each resblock multiplied by one of ``scales``."""
        return model.to(self.device)

    def shards(self, model: nn.Module) -> nn.Module:
        """This process's part of a model that :meth:`shard` returned."""
        return model

    def require_fitting(self, batch_size: int, compression_rank: int = 0) -> None:
        """Raise UserError unless a batch can be shared out evenly and there is something to compress."""
        if compression_rank:
            raise UserError(
                f"compression_rank: expected 0 for one process, which sends nothing, got {compression_rank}; leave it "
                "out, or start several by torchrun"
            )

    def share(self, batch: Sequence[Item]) -> Sequence[Item]:
        """This process's part of the batch of an update."""
        return batch

    def divide(self, work: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what some process is to do, if there is any for it."""
        return work

    def combine(self, model: nn.Module, shards: nn.Module, figures: Figures) -> Figures:
        """After the backward: the gradients of the whole batch into ``shards``, save those that :meth:`step` makes.

        Returns the mean of ``figures``, which is the same in every process, so that all decide alike.
        """
        return figures

    def clip(self, shards: nn.Module, clip_norm: float) -> torch.Tensor:
        """Clip the gradients in ``shards`` to ``clip_norm``, and those to come; returns their norm over all parameters,
        the same in every process."""
        norm = nn.utils.get_total_norm([p.grad for p in shards.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(shards.parameters(), clip_norm, norm)
        return norm

    def step(
        self, optimizer: torch.optim.Optimizer, observe: Callable[[Sequence[torch.Tensor]], None] | None = None
    ) -> None:
        """The optimizer's step for all parameters. ``observe`` is told of gradients that are not in ``shards``."""
        optimizer.step()

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of the processes' ``counts``, in every process."""
        return counts

    def add_squares(self, sharded: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Sums of squares over all parameters, of those over this process's shards and over what every process holds
        whole; the same in every process."""
        return sharded + whole

    def compressed_squares(self) -> torch.Tensor | None:
        """The squared norm of each resblock's gradients that are not in ``shards``, unscaled, over all parameters;
        None where there are none."""
        return None

    def whole(self, model: nn.Module, shards: nn.Module, build: Callable[[], nn.Module]) -> nn.Module | None:
        """The model, in eval mode and on the CPU, whose parameters ``shards``, on the CPU too, holds this team's parts
        of; None but in the leader.

        ``build`` makes a model of its shape. All processes must call this.
        """
        return shards

    def error_sums(self) -> dict[str, torch.Tensor]:
        """This process's part of the sum over machines of PowerSGD's error buffers, by the parameters' names.

        All processes must call this, and :meth:`take_error_sums`.
        """
        return {}

    def take_error_sums(self, sums: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`error_sums` gave, on any number of machines."""

    def empty(self, parameter: nn.Parameter | None, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Memory for this process's part of what is shaped like ``parameter``, on the CPU; a DTensor where it is not
        all. ``shape`` is the whole; another one than the parameter's is not divided."""
        return torch.empty(shape, dtype=dtype)

    def part(self, parameter: nn.Parameter | None, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole ``tensor`` shaped like ``parameter``."""
        return tensor

    def from_leader(self, make: Callable[[], Item]) -> Item:
        """What ``make`` returns in the leader, in every process."""
        return make()

    def after_leader(self, done: Item) -> Item:
        """``done``, once the leader has come as far: the others wait for it, however long it takes."""
        return done

    def leader_first(self, make: Callable[[], Item]) -> Item:
        """What ``make`` returns, called in the leader before the others: it leaves files that they find."""
        return make()


ALONE = Alone()


def join(machines: int | None, device: str) -> Alone:
    """The team of the processes that torchrun started, this one among them, or this process alone.

    ``machines`` is how many machines they are spread over, each with as many GPUs; None: as torchrun says.
    """
    if _under_torchrun():
        from dalle.train.torchrun import Team  # torch takes seconds to import what that needs

        return Team(machines, device)
    if machines not in (None, 1):
        raise UserError(f"--machines {machines}: expected several processes, started by torchrun, got one")
    return Alone(device)


def alone(device: str) -> Alone:
    """This process alone; UserError under torchrun."""
    if _under_torchrun() and os.environ["WORLD_SIZE"] != "1":
        raise UserError(f"expected one process for this job, got {os.environ['WORLD_SIZE']}; start it without torchrun")
    return Alone(device)


def _under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()
