"""Iterate averaging beside the training: the same numbers as in step with it, and nothing is waited for too long."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from dalle.train.averaging import IterateAverage


def model_of(dtypes=(torch.float32, torch.float16), device="cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(7, 5).to(device, dtype) for dtype in dtypes)


@torch.no_grad()
def move(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.9).add_(0.1)


def averages_in_step(model: nn.Module, decay: float, every: int, updates: int) -> list[torch.Tensor]:
    averages = [parameter.detach().float().cpu().clone() for parameter in model.parameters()]
    for update in range(1, updates + 1):
        move(model)
        if update % every == 0:
            count = update // every
            weight = 1 - min(decay, (1 + count) / (10 + count))
            torch._foreach_lerp_(averages, [p.detach().float().cpu() for p in model.parameters()], weight)
    return averages


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("every", [1, 3])
def test_the_same_bits_as_in_step_with_the_training(every, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    expected = averages_in_step(model_of(device=device), 0.9, every, 31)
    model = model_of(device=device)
    average = IterateAverage(model, 0.9, every)
    for update in range(1, 32):
        move(model)
        average.observe(model, update)
    for got, wanted in zip(average.model.parameters(), expected, strict=True):
        assert got.dtype == torch.float32 and not got.requires_grad and torch.equal(got, wanted)


@pytest.fixture
def held_lerp(monkeypatch):
    """An event without which no averaging goes on."""
    gate, lerp = threading.Event(), torch._foreach_lerp_

    def held(*arguments):
        assert gate.wait(timeout=60)
        lerp(*arguments)

    monkeypatch.setattr(torch, "_foreach_lerp_", held)
    yield gate
    gate.set()


def test_a_step_does_not_wait_and_changes_nothing_that_is_being_averaged(held_lerp):
    model = model_of()
    start = [p.detach().float() for p in model.parameters()]
    average = IterateAverage(model, decay=0.0)
    move(model)
    observed = [p.detach().float().clone() for p in model.parameters()]
    average.observe(model, 1)  # returns, though no averaging can go on
    move(model)
    assert not any(torch.equal(own, new) for own, new in zip(start, observed, strict=True))
    held_lerp.set()
    assert all(torch.equal(own, new) for own, new in zip(average.model.parameters(), observed, strict=True))


def test_a_failure_beside_the_training_is_raised_once_in_it(monkeypatch):
    def fail(*_arguments):
        raise MemoryError("no room for the average")

    model = model_of()
    average = IterateAverage(model, 0.9)
    monkeypatch.setattr(torch, "_foreach_lerp_", fail)
    average.observe(model, 1)
    with pytest.raises(MemoryError, match="no room"):
        average.observe(model, 2)
    assert average.model is average.model
