"""A step of AdamW16 against torch's fused AdamW in float32, on as many parameters: 14 bytes for each against 28."""

from __future__ import annotations

import pytest
import torch
from harness import OURS, Candidate, Case, Goal, by_triton

import dalle_kernels
from dalle_kernels import AdamW16

PARAMETERS = {"cpu": 1 << 25, "cuda": 1 << 28}
GOALS = {"cpu": 1.2, "cuda": 1.45}
FUSED = "torch, fused, float32"
SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.96), "weight_decay": 4.5e-2}


def parameters(count: int, dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    params = [
        torch.nn.Parameter(torch.randn(PARAMETERS[device] // count, device=device).to(dtype)) for _ in range(count)
    ]
    for param in params:
        param.grad = (torch.randn(param.shape, device=device) / 64).to(dtype)
    return params


def check(dtype: torch.dtype, device: str) -> None:
    """One step of the compiled kernel gives the reference's bits, on some of what is timed."""
    params = [torch.nn.Parameter(torch.randn(1 << 16, device=device).to(dtype)) for _ in range(4)]
    for param in params[:2]:
        param.grad = torch.randn(1 << 16, device=device).to(dtype)
    for param, like in zip(params[2:], params[:2], strict=True):
        param.data.copy_(like.data)
        param.grad = like.grad.clone()
    for provider, some in (("native" if device == "cpu" else "reference", params[:2]), ("reference", params[2:])):
        with dalle_kernels.use(provider):
            AdamW16(some, **SETTINGS).step()
    assert all(torch.equal(a, b) for a, b in zip(params[:2], params[2:], strict=True)), "the step differs"


@pytest.mark.parametrize("count", (1, 32), ids=lambda count: f"{count} tensors")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_step(side_by_side, device, dtype, count):
    fused = torch.optim.AdamW(parameters(count, torch.float32, device), fused=True, **SETTINGS)
    ours = AdamW16(parameters(count, dtype, device), **SETTINGS)
    half = 7 * PARAMETERS[device]
    source = torch.randint(0, 256, (half,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side_by_side(
        Case(
            family="adamw",
            work="step",
            dtype=dtype,
            settings={"parameters": PARAMETERS[device], "tensors": count},
            ours=Candidate(OURS, ours.step, note="14 bytes a parameter"),
            rivals=[
                Candidate(FUSED, fused.step, note="28 bytes a parameter"),
                Candidate("copy of 14 bytes a parameter", lambda: target.copy_(source), same_function=False),
                *by_triton(device, ours.step),
            ],
            check=lambda: check(dtype, device),
            goals=[Goal("speed", GOALS[device], FUSED)],
            bytes_moved=2 * half,
            memory=False,
            seconds=5,
        )
    )
