"""Calls of Triton's kernels of family transformer: the last token of a 32 x 32 image in a few layers."""

from __future__ import annotations

from functools import partial

import torch
from triton_cases import Case

from dalle_kernels import AttentionPattern, KVCache
from dalle_kernels._triton_configurations import DEFAULT, few_rows_blocks
from dalle_kernels.transformer import triton_kernels

HEAD_DIM = 64


def layer(dim, hidden, dtype, device):
    """The tensors of :class:`LayerWeights`."""

    def matrix(outputs, inputs):
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
        return [weight, torch.randn(outputs, device=device, dtype=dtype)]

    norm = [torch.ones(dim, device=device, dtype=dtype), torch.zeros(dim, device=device, dtype=dtype)]
    return [*norm, *matrix(3 * dim, dim), *matrix(dim, dim), *norm, *matrix(hidden, dim), *matrix(dim, hidden)]


def step(rows, dim, hidden, count, dtype, device):
    pattern, head_dim = AttentionPattern("row", 256, (32, 32)), min(dim, HEAD_DIM)
    caches = [KVCache(pattern, rows, dim // head_dim, head_dim, dtype, device) for _ in range(count)]
    weights = [tensor for _ in range(count) for tensor in layer(dim, hidden, dtype, device)]
    held = [tensor for cache in caches for tensor in (cache.text, cache.image)]
    position = torch.full((1,), pattern.seq_len - 1, device=device)
    settings = ",".join(["row"] * count), *caches[0].pattern_arguments[1:], head_dim**-0.5, 1e-5
    x = torch.randn(rows, dim, device=device, dtype=dtype)
    return partial(triton_kernels.decode_layers, x, weights, held, position, *settings)


NARROW = [(4, 16, 64, 4, 3), (4, 32, 64, 4, 3), (4, 16, 64, 4, 5), (4, 16, 128, 4, 5)]
WIDE = [(4, 16, 16, 4, 2), (8, 16, 16, 8, 2), (4, 16, 16, 8, 2)]
CANDIDATES = {
    "16-bit 8": NARROW,
    "16-bit 16": NARROW,
    "16-bit 32": [(4, 16, 64, 4, 3), (4, 16, 64, 8, 3)],
    "float32 8": [*WIDE, (4, 16, 32, 4, 2)],
    "float32 16": WIDE,
    "float32 32": [(4, 16, 16, 8, 2), (8, 16, 16, 8, 2)],
}
CASES = [
    Case(
        f"{rows} rows of {dim}, {count} layers {str(dtype).removeprefix('torch.')}",
        partial(step, rows, dim, hidden, count, dtype),
        {
            ("decode_layers", prefix + key): {DEFAULT: [few_rows_blocks(*cut) for cut in CANDIDATES[key]]}
            for key in keys
            for prefix in ("", "normed ")
        },
        bytes_moved=count * dtype.itemsize * (4 * dim * dim + 2 * dim * hidden + 2 * rows * dim * (256 + 33)),
    )
    for rows, dim, hidden, count, dtype, *keys in (
        (8, 1920, 7680, 6, torch.bfloat16, "16-bit 8"),
        (16, 1920, 7680, 6, torch.bfloat16, "16-bit 16"),
        (32, 1920, 7680, 6, torch.bfloat16, "16-bit 32"),
        (8, 1920, 7680, 3, torch.float32, "float32 8"),
        (16, 1920, 7680, 3, torch.float32, "float32 16"),
        (32, 1920, 7680, 3, torch.float32, "float32 32"),
        (1, 1920, 7680, 1, torch.float16),
        (3, 64, 77, 1, torch.bfloat16),
        (1, 64, 77, 1, torch.float32),
        (2, 1, 1, 1, torch.float32),  # sizes that Triton compiles for as constants
    )
]
