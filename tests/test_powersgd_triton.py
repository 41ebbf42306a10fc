"""Triton's kernels of PowerSGD's elementwise steps give what the plain steps do: on a GPU, else by the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator

import powersgd_ranks as ranks
import pytest
import torch
from torch import nn

import dalle_kernels
from dalle_kernels import decode_fp169, encode_fp169
from dalle_kernels.powersgd import compression, steps
from dalle_kernels.powersgd.compression import Layout
from dalle_kernels.powersgd.shards import local_shards
from dalle_kernels.testing import poisoned_allocations

SIZES = {"tall": (70, 130), "fused": (24, 9), "wide": (13, 40), "line": (1, 9), "again": (70, 130), "large": (65, 200)}
RANK = 7


@pytest.fixture
def kernels(triton_device, monkeypatch):
    """The module; a small group's matrices are padded to each other's rows, as on any GPU."""
    triton_kernels = pytest.importorskip("dalle_kernels.powersgd.triton_kernels")
    monkeypatch.setitem(compression.MOST_PADDING, triton_device, 4)
    return triton_kernels


@pytest.fixture
def layout(triton_device, kernels) -> Layout:
    model = nn.ModuleDict({name: nn.Linear(*size, bias=name == "wide") for name, size in SIZES.items()})
    shards = local_shards(model.to(triton_device), None, {"fused.weight": 3}, {})
    return Layout(shards, RANK, torch.device(triton_device))


def draw(*shape: int, size: float = 1.0, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(layout: Layout, dtype: torch.dtype, apart: bool) -> list[torch.Tensor]:
    """One after the other in a tensor, in the order of the model, or each by itself."""
    sizes = [shard.shape.numel() for shard in layout.shards]
    parts = draw(sum(sizes)).to(layout.device, dtype).split(sizes)
    return [(part.clone() if apart else part).view(s.shape) for part, s in zip(parts, layout.shards)]


def same(got, expected) -> None:
    for mine, its in zip(got, expected, strict=True):
        assert mine.dtype == its.dtype and mine.shape == its.shape
        torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


def test_the_layout_has_stacks_of_one_rank(layout):
    assert [batch.m for batch in layout.batches] == [1, 3, 13, 65, 70]
    assert layout.together.shapes == ((1, 1, 1), (3, 3, 3), (1, 13, 7), (3, 70, 7))
    assert layout.together.numel > layout.P.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_accumulation(layout, kernels, dtype, apart):
    codes = encode_fp169(draw(layout.errors.numel, seed=1).to(layout.device))
    divisors = torch.tensor([3.0, 0.7, 2.0, 1.0, 5.0, 1e-38], device=layout.device)
    for value in (1.0, math.inf, -math.inf, math.nan):
        own = gradients(layout, dtype, apart)
        own[3][-1, -1] = own[1][0, 1] = value
        copies = [gradient.clone() for gradient in own]
        largest, expected = (torch.zeros(len(own), device=layout.device) for _ in range(2))
        with poisoned_allocations():
            errors, lost = kernels.accumulate(layout, own, codes, divisors, largest)
        same((errors, lost, largest), (*steps.accumulate(layout, copies, codes, divisors, expected), expected))
        assert lost.any() and not lost.all()  # what 1e-38 divides, and no other
        assert largest.isfinite().all() == (value == 1.0)


def test_encoding_marks_what_is_not_finite(layout, kernels):
    before = torch.zeros(layout.matrices, dtype=torch.int16, device=layout.device)
    before[2] = 5
    for factors in (layout.P, layout.Q):
        numbers = draw(factors.numel, size=9).to(layout.device)
        numbers[-1], numbers[0] = math.nan, math.inf
        room, other = (steps.Room.make(layout, 64) for _ in range(2))
        got, expected = (one.P if factors is layout.P else one.Q for one in (room, other))
        kernels.encode(layout, factors, numbers, before, 0.7, got)
        steps.encode(layout, factors, numbers, before, 0.7, expected)
        same((room.P, room.Q), (other.P, other.Q))
        assert len(got) % 64 == 0
        marks = got[factors.numel :][: layout.matrices]
        assert (marks != 0).tolist() == [i in (0, 2, layout.matrices - 1) for i in range(layout.matrices)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_addition(kernels, triton_device, count):
    codes = encode_fp169(draw(count, 5003, size=7).to(triton_device))
    with poisoned_allocations():
        got = decode_fp169(kernels.add(codes))
    torch.testing.assert_close(got, decode_fp169(steps.add(codes)), rtol=2**-8, atol=0)
    if count < 3:
        same([got], [decode_fp169(steps.add(codes))])


def test_stacks(layout, kernels):
    codes = encode_fp169(draw(layout.P.numel + layout.matrices).to(layout.device))
    with poisoned_allocations():
        got = kernels.stacked(layout, codes)
    same([got], [steps.stacked(layout, codes)])
    parts = layout.parts_of_stacks(layout.together.views(got))
    same(parts, layout.P.views(decode_fp169(codes[: layout.P.numel])))


@pytest.mark.parametrize("bad", [None, "mark", "gradient"])
def test_scaling_and_the_norm(layout, kernels, bad):
    codes = encode_fp169(draw(layout.Q.numel + layout.matrices).to(layout.device))
    codes[layout.Q.numel :] = 0
    largest = torch.ones(len(layout.shards), device=layout.device)
    if bad == "mark":
        codes[layout.Q.numel + 1] = 7
    if bad == "gradient":
        largest[2] = math.nan
    with poisoned_allocations():
        Q, square = kernels.scaled(layout, codes, largest, 0.3)
    expected, its = steps.scaled(layout, codes, largest, 0.3)
    same([Q], [expected])
    torch.testing.assert_close(square, its, rtol=1e-6, atol=0)
    assert square.isinf() == (bad is not None)


@pytest.mark.parametrize("machines", [1, 2, 3])
def test_feeding_back(layout, kernels, machines):
    errors, decompressed = (draw(layout.errors.numel, seed=seed).to(layout.device) for seed in (3, 4))
    lost = torch.zeros(layout.matrices, dtype=torch.int16, device=layout.device)
    lost[1] = 1
    with poisoned_allocations():
        got = kernels.feed_back(
            layout, errors, decompressed, torch.empty_like(errors, dtype=torch.int16), lost, machines
        )
    expected = steps.feed_back(layout, errors, decompressed, got, lost, machines)
    if machines < 3:
        same([got], [expected])
    # Where a product is not exact, it may be rounded by itself or not.
    torch.testing.assert_close(decode_fp169(got), decode_fp169(expected), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("square", [None, 2.0, math.inf])
def test_giving(layout, kernels, dtype, square):
    decompressed = draw(layout.errors.numel).to(layout.device)
    factors = None if square is None else draw(len(layout.shards), size=9).to(layout.device)
    square = torch.tensor(math.inf if square is None else square, device=layout.device)
    got, expected = gradients(layout, dtype, False), gradients(layout, dtype, True)
    kernels.give(layout, decompressed, got, factors, square)
    steps.give(layout, decompressed.clone(), expected, factors, square)
    same(got, expected)


def updates(device: str) -> Iterator[list[torch.Tensor]]:
    """Of gradients that change their places, one of which is not contiguous."""
    model = ranks.matrices().to(device)
    powersgd = ranks.PowerSGD(model, ranks.RANK, pieces=ranks.PIECES)
    for step in range(3):
        own = {name: gradient.to(device) for name, gradient in ranks.gradients(model, 0, step).items()}
        own["square.weight"] = own["square.weight"].mT
        given, _other = [own[shard.name] for shard in powersgd.shards], torch.empty(1000 * step, device=device)
        powersgd._reduce(powersgd.shards, given)
        yield [*(gradient.clone() for gradient in given), powersgd.gradient_norm()]


def test_the_hook_does_the_same_with_them(layout, kernels, triton_device, alone, monkeypatch):
    found = []
    for of in (kernels, steps):
        monkeypatch.setattr("dalle_kernels.powersgd.group.steps_on", lambda device, of=of: of)
        with dalle_kernels.use("native"):  # orthogonalization is not Triton's
            found.append(list(updates(triton_device)))
    for mine, its in zip(*found):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)
