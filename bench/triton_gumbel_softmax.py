"""Calls of Triton's kernels of family gumbel_softmax: 8192 rows of 8192 codes, as in bench_gumbel_softmax.py."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.gumbel_softmax import reference, triton_kernels

LAST, FIRST = ((8192, 8192), -1), ((8, 8192, 32, 32), 1)
SHORT, LONG, LONGER = ((16384, 512), -1), ((8192, 16384), -1), ((1024, 40000), -1)
SINGLE = (64, 1), -1
"""Triton compiles for a number that is 1 as a constant."""
ODD, ODD_SHORT = ((64, 8191), -1), ((16384, 65), -1)
"""Each element has an address and a mask of its own, and registers are few."""
WIDTH, ODD_WIDTH = 128, 100
SHORT_ROWS = [Configuration({"ELEMENTS": 1024 * warps}, num_warps=warps) for warps in (1, 2, 4, 8)]
ROWS = [Configuration({"ELEMENTS": 8192}, num_warps=warps) for warps in (4, 8, 16)]
LONG_ROWS = [Configuration({"ELEMENTS": 16384}, num_warps=warps) for warps in (8, 16, 32)]
BLOCKS_OF_ROWS = [
    Configuration({"ROWS": 1, "GROUPS": groups}, num_warps=warps) for groups in (256, 512, 1024) for warps in (4, 8, 16)
]
APART = [
    Configuration({"ROWS": rows, "GROUPS": groups}, num_warps=warps)
    for rows in (16, 32, 64)
    for groups in (8, 16, 32)
    for warps in (4, 8)
]


PRODUCTS = {
    kind: [
        Configuration({"ROWS": rows, "GROUPS": groups, "WIDTH": width}, num_warps=warps, num_stages=stages)
        for rows, groups, width, warps, stages in blocks
    ]
    for kind, blocks in {
        "16 bits": [(32, 8, 128, 4, 2), (32, 16, 128, 4, 2), (32, 16, 128, 8, 2), (64, 8, 128, 4, 2),
                    (64, 16, 128, 8, 2), (64, 8, 128, 8, 3)],
        "float32": [(16, 8, 64, 4, 1), (32, 8, 64, 4, 1), (32, 8, 64, 8, 1), (32, 16, 64, 8, 1), (16, 16, 64, 4, 1)],
    }.items()
}  # fmt: skip


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
    table = torch.randn(shape[dim], ODD_WIDTH if layout is ODD else WIDTH, device=device)
    return torch.randn(shape, device=device).to(dtype), table.to(dtype), dim


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
        {row: {DEFAULT: candidates}} if row else {},
        bytes_moved=tensors * elements * dtype.itemsize,
    )


CASES = [
    _sample(job, tensors, layout, dtype, hard, *tuning)
    for job, tensors, op, tuning_of_long in (
        (forward, 2, "gumbel_softmax", [("gumbel_softmax", "long rows"), LONG_ROWS]),
        (backward, 4, "gumbel_softmax_backward", []),  # such rows go by blocks
    )
    for layout, dtype, hard, *tuning in (
        (LAST, torch.float32, False, (op, "rows"), ROWS),
        (LAST, torch.bfloat16, False),
        (LAST, torch.bfloat16, True),
        (FIRST, torch.float32, False, (op, "columns apart"), APART),
        (FIRST, torch.bfloat16, True),
        (SHORT, torch.bfloat16, False, (op, "short rows"), SHORT_ROWS),
        (LONG, torch.float32, False, *tuning_of_long),
        (LONGER, torch.float32, False, (op, "blocks of rows"), BLOCKS_OF_ROWS),
        (SINGLE, torch.float32, False),
        (ODD_SHORT, torch.bfloat16, False),
    )
] + [
    Case(
        _named(job, layout, dtype),
        partial(job, layout, dtype),
        {(op, kind): {DEFAULT: PRODUCTS[kind]} for op in ops} if layout is LAST else {},
    )
    for job, ops in (
        (codebook, ("gumbel_codebook",)),
        (codebook_backward, ("gumbel_codebook_backward_of_logits", "gumbel_codebook_backward_of_codebook")),
    )
    for layout, dtype, kind in (
        (LAST, torch.bfloat16, "16 bits"),
        (LAST, torch.float32, "float32"),
        (FIRST, torch.bfloat16, "16 bits"),
        (ODD, torch.bfloat16, "16 bits"),
    )
]
