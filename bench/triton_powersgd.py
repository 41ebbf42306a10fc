"""Calls of Triton's kernels of family powersgd: one of 8 GPUs' shards of a pair of resblocks of the paper's width."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from triton_cases import Case

from dalle_kernels._triton_configurations import DEFAULT, Configuration
from dalle_kernels.powersgd import triton_kernels
from dalle_kernels.powersgd.compression import Layout
from dalle_kernels.powersgd.shards import local_shards
from dalle_kernels.powersgd.steps import Room

DIM, GPUS, RANK = 3968, 8, 112
SHAPES = dict.fromkeys(("q", "k", "v", "proj"), (DIM // GPUS, DIM))
SHAPES |= {"up": (4 * DIM // GPUS, DIM), "down": (DIM, 4 * DIM // GPUS)}
NUMBERS = sum(rows * columns for rows, columns in SHAPES.values())
CANDIDATES = [
    Configuration({"BLOCK": block}, num_warps=warps)
    for block in (2048, 4096, 8192)
    for warps in (4, 8)
    if block < 8192 or warps == 8
]


def layout_on(device: str) -> Layout:
    model = nn.ModuleDict({n: nn.Linear(*reversed(s), bias=False, device=device) for n, s in SHAPES.items()})
    return Layout(local_shards(model, None, {}, {}), RANK, torch.device(device))


def numbers(count: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, device=device).to(dtype)


def codes(count: int, device: str) -> torch.Tensor:
    return torch.ones(count, dtype=torch.int16, device=device)


def gradients(layout: Layout, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    parts = numbers(NUMBERS, device, dtype).split([shard.shape.numel() for shard in layout.shards])
    return [part.view(shard.shape) for part, shard in zip(parts, layout.shards)]


def accumulate(dtype, device):
    layout = layout_on(device)
    divisors = torch.ones(len(layout.shards), device=device)
    own, errors, largest = gradients(layout, dtype, device), codes(NUMBERS, device), torch.zeros_like(divisors)
    return partial(triton_kernels.accumulate, layout, own, errors, divisors, largest)


def encode(device):
    layout = layout_on(device)
    factors, before, sent = numbers(layout.Q.numel, device), codes(layout.matrices, device), Room.make(layout, 8).Q
    return partial(triton_kernels.encode, layout, layout.Q, factors, before, 0.7, sent)


def add(device):
    return partial(triton_kernels.add, codes(128 * 32768, device).view(128, -1))


def stacked(device):
    layout = layout_on(device)
    return partial(triton_kernels.stacked, layout, codes(layout.P.numel + layout.matrices, device))


def scaled(device):
    layout = layout_on(device)
    sums, largest = codes(layout.Q.numel + layout.matrices, device), torch.ones(len(layout.shards), device=device)
    return partial(triton_kernels.scaled, layout, sums, largest, 0.7)


def feed_back(device):
    layout = layout_on(device)
    errors, decompressed = numbers(NUMBERS, device), numbers(NUMBERS, device)
    lost = torch.zeros(layout.matrices, dtype=torch.int16, device=device)
    return partial(triton_kernels.feed_back, layout, errors, decompressed, codes(NUMBERS, device), lost, 128)


def give(dtype, is_scaled, device):
    layout = layout_on(device)
    factors = torch.ones(len(layout.shards), device=device) if is_scaled else None
    own, square = gradients(layout, dtype, device), torch.ones((), device=device)
    return partial(triton_kernels.give, layout, numbers(NUMBERS, device), own, factors, square)


CASES = [
    Case(
        "powersgd_accumulate float32",
        partial(accumulate, torch.float32),
        {("powersgd", "any"): {DEFAULT: CANDIDATES}},
        bytes_moved=(4 + 4 + 2 + 4) * NUMBERS,
    ),
    Case("powersgd_accumulate float16", partial(accumulate, torch.float16)),
    Case("powersgd_encode", encode),
    Case("powersgd_add", add),
    Case("powersgd_stacked", stacked),
    Case("powersgd_scaled", scaled),
    Case("powersgd_feed_back", feed_back, bytes_moved=(4 + 4 + 2) * NUMBERS),
    Case("powersgd_give float32", partial(give, torch.float32, False)),
    Case("powersgd_give float16 scaled", partial(give, torch.float16, True)),
]
