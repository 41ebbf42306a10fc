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
    """One step of each kernel that is timed gives the reference's bits, on tensors like those that are timed."""
    drawn = [torch.randn(2, 1 << 16, device=device).to(dtype) for _ in range(2)]
    results = {}
    for provider in ("reference", "native", *(["triton"] if device == "cuda" else [])):
        params = [torch.nn.Parameter(values.clone()) for values, _ in drawn]
        for param, (_, gradient) in zip(params, drawn, strict=True):
            param.grad = gradient.clone()
        with dalle_kernels.use(provider):
            AdamW16(params, **SETTINGS).step()
        results[provider] = torch.stack([param.detach() for param in params])
    expected = results.pop("reference")
    for provider, found in results.items():
        assert torch.equal(found, expected), f"the step of {provider} differs"


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
