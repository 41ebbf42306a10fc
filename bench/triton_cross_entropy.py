"""Calls of Triton's kernels of family cross_entropy, 8192 or 1024 rows of 3968 against 16384 classes.

In 16 bits the gradients of the logits of 8192 rows are kept in panels, those of 1024 as a whole.
"""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.cross_entropy import triton_kernels

ROWS, FEW_ROWS, WIDTH, CLASSES = 8192, 1024, 3968, 16384
CANDIDATES = [Configuration({"BLOCK": block}, num_warps=warps) for block in (2048, 4096, 8192) for warps in (4, 8, 16)]


def _tensors(rows, dtype, with_bias, device):
    hidden, weight = (torch.randn(size, WIDTH, device=device).to(dtype) for size in (rows, CLASSES))
    target = torch.empty(rows, dtype=torch.int64, device=device).random_(0, CLASSES)
    return hidden, weight / WIDTH**0.5, target, weight[:, 0].clone() if with_bias else None


def losses(dtype, with_bias, device):
    return partial(triton_kernels.linear_cross_entropy, *_tensors(ROWS, dtype, with_bias, device), -100)


def with_gradient(dtype, with_bias, device, rows=ROWS):
    mask = [True, True, with_bias]
    call = triton_kernels.linear_cross_entropy_with_gradient
    return partial(call, *_tensors(rows, dtype, with_bias, device), -100, "mean", mask)


def with_gradient_of_few(dtype, with_bias, device):
    return with_gradient(dtype, with_bias, device, FEW_ROWS)


def scaled_gradient(dtype, _, device):
    gradient = torch.randn(CLASSES, WIDTH, device=device).to(dtype)
    return partial(triton_kernels.linear_cross_entropy_scaled_gradient, gradient, torch.ones((), device=device))


CASES = [
    Case(
        f"{job.__name__} {str(dtype).removeprefix('torch.')}{' bias' if with_bias else ''}",
        partial(job, dtype, with_bias),
        {(f"cross_entropy_{op}", "any"): {DEFAULT: CANDIDATES} for op in ops}
        if dtype == torch.bfloat16 and not with_bias
        else {},
        operations=products * 2 * rows * WIDTH * CLASSES,
    )
    for job, rows, products, ops in (
        (losses, ROWS, 1, ("losses",)),
        (with_gradient, ROWS, 3, ("losses_and_gradients", "gradients")),
        (with_gradient_of_few, FEW_ROWS, 3, ()),
        (scaled_gradient, ROWS, 0, ("scaled_gradient",)),
    )
    for dtype, with_bias in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True))
]
