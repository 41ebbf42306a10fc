"""Calls of Triton's kernels of family float16: 2^24 numbers, as in bench_float16.py."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.float16 import triton_kernels
from dalle_kernels.float16.reference import FP0610, FP169

COUNT = 1 << 24
CANDIDATES = [
    Configuration({"BLOCK": block}, num_warps=warps)
    for block in (1024, 2048, 4096, 8192)
    for warps in (4, 8)
    if 4 <= block // (32 * warps) <= 32
]


def encode(form, dtype, step, device):
    x = torch.randn(COUNT * step, device=device).to(dtype)[::step]
    return partial(triton_kernels.encode, form, x)


def decode(form, dtype, step, device):
    codes = torch.empty(COUNT * step, dtype=torch.int16, device=device).random_(-(2**15), 2**15)[::step]
    return partial(triton_kernels.decode, form, codes, dtype)


CASES = [
    Case(
        f"{job.__name__} {form.name} {str(dtype).removeprefix('torch.')} {layout}",
        partial(job, form, dtype, 2 if layout == "strided" else 1),
        {(job.__name__, layout): {DEFAULT: CANDIDATES}} if (form, dtype) == (FP169, torch.bfloat16) else {},
        bytes_moved=COUNT * (2 + dtype.itemsize),
    )
    for job in (encode, decode)
    for form, dtype, layout in (
        (FP169, torch.float32, "dense"),
        (FP169, torch.bfloat16, "dense"),
        (FP169, torch.bfloat16, "strided"),
        (FP0610, torch.float32, "dense"),
        (FP0610, torch.float64, "dense"),
    )
]
