"""Calls of Triton's kernels of family logit_laplace: 64 pictures, mu and ln b halves of one decoder's output."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.logit_laplace import triton_kernels

SHAPE = (64, 3, 256, 256)
COUNT = torch.Size(SHAPE).numel()
CANDIDATES = [
    Configuration({"BLOCK": block}, num_warps=warps)
    for block in (512, 1024, 2048)
    for warps in (4, 8)
    if block >= 128 * warps
]


def _tensors(dtype, device):
    x = (0.1 + 0.8 * torch.rand(SHAPE, device=device)).to(dtype)
    output = torch.randn(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], device=device).to(dtype)
    return x, *output.chunk(2, dim=1)


def forward(dtype, reduction, device):
    return partial(triton_kernels.logit_laplace_loss, *_tensors(dtype, device), reduction)


def backward(dtype, reduction, device):
    grad = torch.randn(() if reduction != "none" else SHAPE, device=device)
    return partial(triton_kernels.logit_laplace_loss_backward, grad, *_tensors(dtype, device), reduction)


def _bytes(job, dtype, reduction) -> int:
    each = 4 if reduction == "none" else 0
    return COUNT * (each + dtype.itemsize * (3 if job is forward else 5))


CASES = [
    Case(
        f"{job.__name__} {str(dtype).removeprefix('torch.')} {reduction}",
        partial(job, dtype, reduction),
        {row: {DEFAULT: CANDIDATES}} if row and dtype == torch.float32 else {},
        bytes_moved=_bytes(job, dtype, reduction),
    )
    for job, reduction, row in (
        (forward, "mean", ("logit_laplace_loss", "reduced")),
        (forward, "none", ("logit_laplace_loss", "each")),
        (backward, "mean", ("logit_laplace_loss_backward", "each")),
        (backward, "none", None),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
