"""What a training's log says: exponents counted one by one, averages, bytes that were sent, speed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dalle.train.collectives import CollectiveCounter, sent_bytes
from dalle.train.team import Alone
from dalle.train.telemetry import (
    HIGHEST,
    LOWEST,
    Telemetry,
    averages,
    described,
    exponent_counts,
    exponent_shares,
    measured_peak,
)
from dalle.train.transit import Underway
from dalle_kernels import GradScales


def place(value: float) -> int:
    """Where a value is to be counted, by Python's own arithmetic."""
    if not math.isfinite(value):
        return HIGHEST - LOWEST + 2
    if value == 0:
        return 0
    return min(max(math.frexp(value)[1] - 1, LOWEST), HIGHEST) - LOWEST + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_exponents_are_counted_one_by_one(dtype):
    draw = torch.Generator().manual_seed(3)
    wide = torch.randn(37, 21, generator=draw) * torch.exp2(torch.randint(-80, 25, (37, 21), generator=draw).float())
    edges = [0.0, -0.0, 1.0, -1.0, 2.0, 1.9990234375, 0.5, 1e-45, 65504.0, math.inf, -math.inf, math.nan]
    tensors = [
        wide.to(dtype).t(),
        torch.tensor(edges, dtype=dtype),
        torch.zeros(0, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    expected = [0] * (HIGHEST - LOWEST + 3)
    for tensor in tensors:
        for value in tensor.flatten().float().tolist():
            expected[place(value)] += 1
    counts = exponent_counts(tensors)
    assert counts.dtype == torch.int64 and counts.tolist() == expected


def test_many_equal_exponents_are_counted_exactly(monkeypatch):
    monkeypatch.setattr("dalle.train.telemetry._AT_ONCE", 1000)
    counts = exponent_counts([torch.full((12_345,), 0.75), torch.full((17,), -3.0)])
    assert counts[place(0.75)] == 12_345 and counts[place(3.0)] == 17 and counts.sum() == 12_362


def test_nothing_to_count_is_refused():
    with pytest.raises(ValueError, match="at least one tensor"):
        exponent_counts([])


def test_shares_leave_out_what_does_not_occur():
    counts = exponent_counts([torch.tensor([0.0, 0.25, 0.25, 1.0, math.nan])]).tolist()
    expected = {"zeros": 0.2, "nonfinite": 0.2, "lowest": -2, "shares": [0.4, 0.0, 0.2]}
    assert exponent_shares(counts) == expected
    assert exponent_shares(exponent_counts([torch.zeros(3)]).tolist())["shares"] == []


def test_averages():
    window = [{"loss": 1.0, "rate": 0.5}, {"loss": 2.0, "rate": 1.5}]
    assert averages(window) == {"loss": 1.5, "rate": 1.0}
    assert list(averages([{"b": 1.0, "a": 2.0}])) == ["b", "a"]


def test_peak_is_measured():
    assert 1e8 < measured_peak("cpu") < 1e15


# torch 2.13 deprecates the names that torch before it has.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def test_collectives_are_counted_by_kind(four_ranks):
    pair = dist.new_group([1, 3])
    with CollectiveCounter() as counter:
        dist.all_reduce(torch.zeros(6))
        dist.all_gather_into_tensor(torch.zeros(8, dtype=torch.int16), torch.zeros(4, dtype=torch.int16), group=pair)
        dist.reduce_scatter_tensor(torch.zeros(3), torch.zeros(12))
        dist.all_to_all_single(torch.zeros(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8))
        dist.all_gather([torch.zeros(2) for _ in range(4)], torch.zeros(2))
        dist.broadcast(torch.zeros(5), src=0)
        dist.barrier()
    everyone = (0, 1, 2, 3)
    assert counter.collectives == [
        ("all_reduce", everyone, torch.float32, 24),
        ("all_gather", (1, 3), torch.int16, 16),
        ("reduce_scatter", everyone, torch.float32, 48),
        ("all_to_all", everyone, torch.uint8, 8),
        ("all_gather", everyone, torch.float32, 32),
        ("broadcast", everyone, torch.float32, 20),
    ]
    assert counter.sent == 36 + 8 + 36 + 6 + 24 + 15


def test_functional_collectives_are_counted(four_ranks):
    from torch.distributed._functional_collectives import all_gather_tensor, all_reduce, reduce_scatter_tensor

    with CollectiveCounter() as counter:
        made = [
            all_reduce(torch.zeros(6), "sum", dist.group.WORLD),
            all_gather_tensor(torch.zeros(2), 0, dist.group.WORLD),
            reduce_scatter_tensor(torch.zeros(8), "sum", 0, dist.group.WORLD),
        ]
        for tensor in made:
            tensor.wait()
    counted = [(item.kind, item.bytes) for item in counter.collectives]
    assert counted == [("all_reduce", 24), ("all_gather", 32), ("reduce_scatter", 32)]


def test_collectives_of_a_backward_are_counted(four_ranks):
    class Reduced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            dist.all_reduce(grad)
            return grad

    with CollectiveCounter() as counter:
        Reduced.apply(torch.zeros(5, requires_grad=True)).sum().backward()
    assert [item.bytes for item in counter.collectives] == [20]


@pytest.mark.parametrize(("kind", "sent"), [("all_reduce", 150), ("all_gather", 75), ("all_to_all", 75)])
def test_bytes_sent_of_a_hundred_among_four(kind, sent):
    assert sent_bytes(kind, 100, 4) == sent and sent_bytes(kind, 100, 1) == 0


def said(telemetry):
    return described(Underway(telemetry.line()).read())


class FourRanks(Alone):
    size = 4

    def total(self, counts):
        dist.all_reduce(counts)
        return counts


def stage(team=None, **settings):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 0.5)
    defaults = {"team": team or Alone(), "scales": None, "tokens_per_update": 0, "flops_per_update": 0}
    return SimpleNamespace(shards=model, **{**defaults, **settings})


def test_a_line_of_one_process():
    job = stage(scales=GradScales(2))
    telemetry = Telemetry(job)
    with telemetry.update():
        job.shards(torch.ones(4, 3)).sum().backward()
    exponents = {"zeros": 0.0, "nonfinite": 0.0, "lowest": 2, "shares": [1.0]}
    assert said(telemetry) == {"gradient_exponents": exponents, "scales": [2.0**13] * 2}


def test_speed_is_of_the_updates_since_the_last_line(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 6.0, 6.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    job = stage(tokens_per_update=100, flops_per_update=1e9)
    job.shards(torch.ones(4, 3)).sum().backward()
    telemetry = Telemetry(job, peak=1e10)
    for updates, tokens, share in ((4, 200, 0.2), (2, 50, 0.05)):
        for _ in range(updates):
            with telemetry.update():
                pass
        line = said(telemetry)
        assert line["tokens_per_second"] == tokens and line["share_of_peak"] == pytest.approx(share)


@pytest.mark.parametrize(("half_rate", "best"), [(4e12, 4e12), (1e10, 1e12)])
def test_the_peak_is_the_best_of_float32_and_the_dtype_of_most_parameters(half_rate, best, monkeypatch):
    rates = {torch.float32: 1e12, torch.bfloat16: half_rate}
    monkeypatch.setattr("dalle.train.telemetry.measured_peak", lambda device, dtype: rates.pop(dtype))
    job = stage(tokens_per_update=1, flops_per_update=1)
    job.shards.weight.data = job.shards.weight.data.bfloat16()
    job.shards.bias.grad = torch.ones(2)
    telemetry = Telemetry(job)
    said(telemetry)
    said(telemetry)  # does not measure again
    assert telemetry.peak == best and not rates


def test_bytes_are_counted_in_the_first_update(four_ranks):
    job = stage(FourRanks())
    telemetry = Telemetry(job)
    for updates in range(2):
        with telemetry.update():
            job.shards(torch.ones(4, 3)).sum().backward()
            for _ in range(1 + updates):
                dist.all_reduce(job.shards.weight.grad)
        assert said(telemetry)["bytes_sent"] == 6 * 4 * 2 * 3 // 4
