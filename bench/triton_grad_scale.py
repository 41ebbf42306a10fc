"""Calls of Triton's kernels of family grad_scale: the gradients of a resblock, tensors of many sizes."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.grad_scale import triton_kernels

SIZES = (1 << 24, 1 << 22, 1 << 22, 3968 * 3, 3968, 1024)
CANDIDATES = [
    Configuration({"BLOCK": block}, num_warps=warps)
    for block in (2048, 4096, 8192)
    for warps in (4, 8)
    if block < 8192 or warps == 8
]


def inputs(dtype, device):
    return [torch.randn(size, device=device).to(dtype) for size in SIZES], torch.full((), 8.0, device=device)


def scale(dtype, to, device):
    return partial(triton_kernels.scale_cast_filter, *inputs(dtype, device), to)


def unscale(dtype, device):
    return partial(triton_kernels.filter_cast_unscale, *inputs(dtype, device))


CASES = [
    Case(
        "scale_cast_filter float32 float16",
        partial(scale, torch.float32, torch.float16),
        {("grad_scale", "any"): {DEFAULT: CANDIDATES}},
        bytes_moved=6 * sum(SIZES),
    ),
    Case("scale_cast_filter float32 bfloat16", partial(scale, torch.float32, torch.bfloat16)),
    Case("filter_cast_unscale float16", partial(unscale, torch.float16)),
    Case("filter_cast_unscale bfloat16", partial(unscale, torch.bfloat16)),
]
