"""Calls of Triton's kernels of family gumbel_softmax: 8192 rows of 8192 codes, as in bench_gumbel_softmax.py."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import Configuration
from dalle_kernels.gumbel_softmax import reference, triton_kernels

LAST, FIRST = ((8192, 8192), -1), ((8, 8192, 32, 32), 1)
SHORT, LONG, LONGER = ((16384, 512), -1), ((8192, 16384), -1), ((1024, 40000), -1)
WIDTH = 128
IN_ROWS = [Configuration({"ELEMENTS": 8192}, num_warps=warps) for warps in (4, 8, 16)]
APART = [
    Configuration({"ROWS": rows, "GROUPS": groups}, num_warps=warps)
    for rows in (16, 32, 64)
    for groups in (8, 16, 32)
    for warps in (4, 8)
]


def _scalars(device):
    return (
        torch.full((), 0x5EED, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.full((), 0.5, device=device),
    )


def forward(layout, dtype, hard, device):
    shape, dim = layout
    logits = torch.randn(shape, device=device).to(dtype)
    return partial(triton_kernels.gumbel_softmax_kl, logits, *_scalars(device), hard, dim)


def backward(layout, dtype, hard, device):
    shape, dim = layout
    logits, y, grad_y = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    grad_kl = torch.randn(reference.kl_shape(logits, dim), device=device)
    return partial(triton_kernels.gumbel_softmax_kl_backward, grad_y, grad_kl, logits, y, *_scalars(device), hard, dim)


def _codebook(layout, dtype, device):
    shape, dim = layout
    return torch.randn(shape, device=device).to(dtype), torch.randn(shape[dim], WIDTH, device=device).to(dtype), dim


def codebook(layout, dtype, device):
    logits, table, dim = _codebook(layout, dtype, device)
    return partial(triton_kernels.gumbel_codebook, logits, table, *_scalars(device), dim)


def codebook_backward(layout, dtype, device):
    logits, table, dim = _codebook(layout, dtype, device)
    grad = torch.randn(reference.embedding_shape(logits, table, dim), device=device).to(dtype)
    grad_kl = torch.randn(reference.kl_shape(logits, dim), device=device)
    return partial(triton_kernels.gumbel_codebook_backward, grad, grad_kl, logits, table, *_scalars(device), dim)


def _named(job, layout, dtype, hard=None) -> str:
    shape, dim = layout
    kind = "" if hard is None else " hard" if hard else " soft"
    return f"{job.__name__} {'x'.join(map(str, shape))} dim {dim} {str(dtype).removeprefix('torch.')}{kind}"


def _sample(job, tensors, layout, dtype, hard=False, row=None, candidates=()):
    elements = torch.Size(layout[0]).numel()
    return Case(
        _named(job, layout, dtype, hard),
        partial(job, layout, dtype, hard),
        row,
        list(candidates),
        bytes_moved=tensors * elements * dtype.itemsize,
    )


CASES = [
    _sample(job, tensors, layout, dtype, hard, *tuning)
    for job, tensors, op in ((forward, 2, "gumbel_softmax"), (backward, 4, "gumbel_softmax_backward"))
    for layout, dtype, hard, *tuning in (
        (LAST, torch.float32, False, (op, "rows"), IN_ROWS),
        (LAST, torch.bfloat16, False),
        (LAST, torch.bfloat16, True),
        (FIRST, torch.float32, False, (op, "columns apart"), APART),
        (FIRST, torch.bfloat16, True),
        (SHORT, torch.bfloat16, False),
        (LONG, torch.float32, False),
        (LONGER, torch.float32, False),
    )
] + [
    Case(_named(job, layout, dtype), partial(job, layout, dtype), None, [])
    for job in (codebook, codebook_backward)
    for layout, dtype in ((LAST, torch.bfloat16), (LAST, torch.float32), (FIRST, torch.bfloat16))
]
