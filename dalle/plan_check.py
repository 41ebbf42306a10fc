"""Check a plan against the truth: step the real model under a fake process group and count its collectives.

The model is built and stepped with fake tensors, which have shapes and no values, as one of all ranks of the job: FSDP
and the hooks start the collectives that they would on the real machines, and nothing is computed or sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from dalle.errors import UserError
from dalle.plan import GPU, MACHINE, WORLD, Job, plan_traffic
from dalle.train.collectives import Collective, CollectiveCounter
from dalle.train.sharding import average_replicated, compress, mesh_of, replicated, shard, squares_of_matrices
from dalle.train.team import Compression
from dalle.transformer import DALLE

Watch = TypeVar("Watch", bound=AbstractContextManager)


class Compared(NamedTuple):
    """Calls and bytes an update of the collectives of one kind in one group, as planned and as counted."""

    kind: str
    group: str
    planned: tuple[int, int]
    counted: tuple[int, int]


def compare(job: Job) -> list[Compared]:
    """Step the job's model and set the plan's collectives beside those that it started."""
    names = _group_names(job)
    planned = _totals((item.kind, names[_ranks(job, item.group)], item.calls, item.bytes) for item in plan_traffic(job))
    counted = _totals(
        (item.kind, names[item.ranks], 1, item.bytes) for item in count_collectives(job) if len(item.ranks) > 1
    )
    return [
        Compared(*key, planned.get(key, (0, 0)), counted.get(key, (0, 0)))
        for key in sorted(planned.keys() | counted.keys())
    ]


def _ranks(job: Job, group: str) -> tuple[int, ...]:
    """Of rank 0's group of that name."""
    return tuple(range(0, job.machines * job.gpus, job.gpus) if group == MACHINE else range(job.group_size(group)))


def _group_names(job: Job) -> dict[tuple[int, ...], str]:
    """The name of each of rank 0's groups; where two have the same ranks, one name."""
    return {_ranks(job, group): group for group in (WORLD, MACHINE, GPU)}


def _totals(items: Iterable[tuple[str, str, int, int]]) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes of each (kind, group)."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for *key, calls, count in items:
        before = totals.get(tuple(key), (0, 0))
        totals[tuple(key)] = before[0] + calls, before[1] + count
    return totals


def count_collectives(job: Job) -> list[Collective]:
    """The collectives of one update of rank 0, in order; raises UserError where this process has a process group."""
    return step(job, lambda _model: CollectiveCounter()).collectives


def step(job: Job, watch: Callable[[DALLE], Watch]) -> Watch:
    """One forward and backward of the job's model, as rank 0, under the context manager ``watch(model)``; returns that.

    Raises UserError where this process has a process group.
    """
    config = dataclasses.replace(job.config, checkpoint_activations=job.checkpoint)
    half = None if job.bytes.working == 4 else torch.float16
    is_autocast = half is not None and job.bytes.stored == 4
    with _fake_mesh(job) as mesh, FakeTensorMode():
        model = _Model(config)
        scales = None
        if half is not None and not is_autocast:
            scales = torch.ones(2 * config.layers)
            model.set_precision(half, scales)
        shard(model, mesh, half, compressed=bool(job.rank))
        powersgd = compress(model, mesh, Compression(job.rank), scales) if job.rank else None
        text = torch.zeros(job.images_per_gpu, config.text_len, dtype=torch.int64)
        image = torch.zeros(job.images_per_gpu, config.image_len, dtype=torch.int64)
        with watch(model) as watcher:
            with torch.autocast("cpu", half, enabled=is_autocast):
                loss = model(text, image).loss
            loss.backward()
            average_replicated(replicated(model))
            if powersgd is not None and scales is not None:
                squares_of_matrices(model, powersgd)
            elif powersgd is not None:
                powersgd.gradient_norm()
    return watcher


class _Model(DALLE):
    def _check(self, *_tokens) -> None:
        """Fake tokens have no values to be checked."""


@contextmanager
def _fake_mesh(job: Job) -> Iterator[DeviceMesh]:
    # Imported here, for the module makes the backend "fake" known to torch.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("expected no process group: checking a plan makes a fake one of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.machines * job.gpus)
    try:
        yield mesh_of(job.machines, job.gpus)
    finally:
        dist.destroy_process_group()
