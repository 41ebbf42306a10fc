"""Scale, cast and filter, each way, against torch eager and compiled: one pass over memory against several."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import OURS, Candidate, Case, Goal, by_triton, compiled
from torch import Tensor

import dalle_kernels
from dalle_kernels import filter_cast_unscale, scale_cast_filter

ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
TENSORS = 16
EAGER = "torch, eager"


def plain_scale(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """As a user writes it."""
    cast = [(x * scale).to(dtype) for x in tensors]
    finite = [x.isfinite() for x in cast]
    found = torch.stack([~f.all() for f in finite]).any()
    return [torch.where(f, x, 0) for f, x in zip(finite, cast)], found


def plain_unscale(tensors: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    finite = [x.isfinite() for x in tensors]
    found = torch.stack([~f.all() for f in finite]).any()
    return [torch.where(f, x, 0).float() / scale for f, x in zip(finite, tensors)], found


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("work", ("scale, cast, filter", "filter, cast, unscale"))
def test_grad_scale(side_by_side, device, work, dtype):
    scale = torch.tensor(1.37 * 2**13, device=device)
    tensors = [torch.randn(ELEMENTS[device] // TENSORS, device=device) for _ in range(TENSORS)]
    if work == "scale, cast, filter":
        ours, plain, args = scale_cast_filter, plain_scale, (tensors, scale, dtype)
    else:
        ours, plain, args = filter_cast_unscale, plain_unscale, ([x.to(dtype) for x in tensors], scale)

    def check() -> None:
        poisoned = [x.clone() for x in args[0]]
        poisoned[0][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        poisoned[-1][-1] = torch.finfo(poisoned[-1].dtype).max  # which the scale makes infinite
        for inputs in (args[0], poisoned):
            got, found = ours(inputs, *args[1:])
            expected, wanted = plain(inputs, *args[1:])
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and torch.equal(found, wanted)
        assert device != "cpu" or dalle_kernels.explain(ours.__name__, *args).runs == "native"

    half = ELEMENTS[device] * 6 // 2
    source = torch.randint(0, 256, (half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side_by_side(
        Case(
            family="grad_scale",
            work=work,
            dtype=dtype,
            settings={"elements": ELEMENTS[device], "tensors": TENSORS},
            ours=Candidate(OURS, partial(ours, *args)),
            rivals=[
                Candidate(EAGER, partial(plain, *args)),
                compiled("torch, compiled", plain, lambda function: function(*args)),
                Candidate("copy of as many bytes", lambda: target.copy_(source), same_function=False),
                *by_triton(device, partial(ours, *args)),
            ],
            check=check,
            goals=[Goal("speed", 3, EAGER)] if device == "cuda" else [],
            bytes_moved=2 * half,
            seconds=5,
        )
    )
