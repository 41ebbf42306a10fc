"""Every public function and module has a step that repeats, and that asks no tensor for its value."""

from __future__ import annotations

import pytest
import torch
from fuzz import flat
from public_calls import NOISY, OTHERWISE, STEPS
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_kernels


def test_every_public_name_has_a_step():
    names = {name for name in dalle_kernels.__all__ if not name.startswith("_")}
    assert names == set(STEPS) | OTHERWISE and not set(STEPS) & OTHERWISE


@pytest.mark.parametrize("name", STEPS)
def test_steps_repeat(name):
    """What tests on a GPU compare must not hang on what made it."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        step = STEPS[name]("cpu")
        results.append([step(), step()])
    assert all(map(torch.equal, *map(flat, results)))
    assert (name in NOISY) <= (not torch.equal(results[0][0][0], results[0][1][0]))


@pytest.mark.parametrize("name", STEPS)
def test_no_step_asks_a_tensor_for_its_value(name):
    """On a GPU the host would wait for it. A fake tensor has none, and raises."""
    with FakeTensorMode():
        assert STEPS[name]("cpu")()
