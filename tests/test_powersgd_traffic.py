"""What PowerSGD sends, counted in the collectives of one GPU of a job that is not there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_kernels import PowerSGD

MACHINES, GPUS = 128, 8


@pytest.fixture
def machines():
    """A world of the GPUs that hold the same shard, of which this is one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend "fake" known

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=MACHINES)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("dim", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_compression_rate_of_a_resblock_pair_is_the_papers(machines, monkeypatch, dim, rank, percent):
    """Of what one of 8 GPUs sends: queries, keys and values as three matrices, projection, and an MLP's two."""
    sent = []
    send = dist.all_to_all_single
    monkeypatch.setattr(
        dist, "all_to_all_single", lambda out, own, **k: sent.append(own.numel()) or send(out, own, **k)
    )
    shapes = {"qkv": (3 * dim // GPUS, dim), "proj": (dim // GPUS, dim), "up": (4 * dim // GPUS, dim)}
    shapes["down"] = (dim, 4 * dim // GPUS)
    with FakeTensorMode():
        model = nn.ModuleDict({name: nn.Linear(*reversed(shape), bias=False) for name, shape in shapes.items()})
        powersgd = PowerSGD(model, rank // GPUS, pieces={"qkv.weight": 3})
        powersgd._reduce(powersgd.shards, [torch.empty_like(parameter) for parameter in model.parameters()])
    gradient_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    # A code beside each of the six matrices' P and Q, and what makes the machines' parts equal.
    factor_bytes = (
        2
        * rank
        // GPUS
        * sum(rows + columns for rows, columns in [(dim // GPUS, dim)] * 4 + [(4 * dim // GPUS, dim)] * 2)
    )
    assert len(sent) == 2 and 0 <= sum(sent) - factor_bytes - 2 * 2 * 6 < 2 * 2 * MACHINES
    assert 1 - factor_bytes / gradient_bytes == pytest.approx(1 - 5 * rank / (8 * dim), abs=1e-12)
    assert round(100 * (1 - sum(sent) / gradient_bytes)) == percent
