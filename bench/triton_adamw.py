"""Calls of Triton's kernels of family adamw: many matrices and a few gains in one step."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.adamw import triton_kernels

SIZES = [1 << 22] * 16 + [3968] * 16
CANDIDATES = [
    Configuration({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
]


def step(dtype, moment, device, rounding_seed=None):
    params, grads = ([torch.randn(size, device=device).to(dtype) for size in SIZES] for _ in range(2))
    moments = [[torch.zeros(size, dtype=moment, device=device) for size in SIZES] for _ in range(2)]
    steps = [torch.zeros((), device=device) for _ in SIZES]
    settings = (1e-3, 0.9, 0.96, 1e-8, 4.5e-2, 5.0)
    scale, found = torch.ones((), device=device), torch.zeros((), dtype=torch.bool, device=device)
    return partial(
        triton_kernels.adamw16_step,
        params,
        grads,
        *moments,
        steps,
        *settings,
        scale,
        found,
        rounding_seed,
        list(range(len(SIZES))),
    )


CASES = [
    Case(
        "adamw16_step bfloat16, coded moments",
        partial(step, torch.bfloat16, torch.int16),
        {("adamw16_step", "any"): {DEFAULT: CANDIDATES}},
        bytes_moved=14 * sum(SIZES),
    ),
    Case("adamw16_step float16, coded moments", partial(step, torch.float16, torch.int16)),
    Case(
        "adamw16_step bfloat16, coded moments, stochastic rounding",
        partial(step, torch.bfloat16, torch.int16, rounding_seed=1),
    ),
    Case(
        "adamw16_step float16, coded moments, stochastic rounding",
        partial(step, torch.float16, torch.int16, rounding_seed=1),
    ),
    Case("adamw16_step float32, coded moments", partial(step, torch.float32, torch.int16)),
    Case("adamw16_step float32, float32 moments", partial(step, torch.float32, torch.float32)),
]
