"""Calls on meta tensors that are too large to make, for tests/gates_fuzz.py: forms that no small call launches.

They have the sizes of real use but for what decides on a form of a kernel: texts that end within a tile, scales of zero
and below, few heads, sizes that no block divides, more than 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dalle_kernels import AttentionPattern, KVCache
from dalle_kernels.attention.pattern import KINDS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Arguments = Iterator[tuple]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_settings() -> Iterator[tuple[str, int, torch.dtype, float]]:
    """Kinds, widths of heads, dtypes and scales."""
    for kind in KINDS:
        yield kind, 64, torch.bfloat16, 0.125
    yield "row", 64, torch.bfloat16, 0.0
    for kind in ("row", "conv"):
        yield kind, 64, torch.float32, 0.125
        yield kind, 33, torch.bfloat16, 0.125
        yield kind, 128, torch.bfloat16, 0.125
    yield "conv", 64, torch.float32, 0.0
    yield "row", 64, torch.float16, -0.125
    yield "conv", 128, torch.float16, 0.125
    yield "row", 128, torch.float32, 0.125
    yield "conv", 129, torch.bfloat16, 0.125


def attention(op: str) -> Arguments:
    """The stream of the paper, whose text of 257 ends within a tile; of two heads, whose text is cut into segments."""
    for kind, head_dim, dtype, scale in attention_settings():
        x = tensor(1, 2, 257 + 1023, head_dim, dtype=dtype)
        settings = (kind, 257, 32, 32, 11, scale)
        if op == "sparse_attention":
            yield x, x, x, *settings
        else:
            yield x, x, x, x, x, tensor(1, 2, 257 + 1023), *settings


def decoding(op: str) -> Arguments:
    for kind, head_dim, dtype, scale in attention_settings():
        pattern = AttentionPattern(kind, 257, (32, 32))
        for prompts, heads, samples in ((1, 2, 1), (8, 62, 33)):
            cache = KVCache(pattern, prompts, heads, head_dim, dtype, "meta", samples)
            token = tensor(*cache.step_shape, dtype=dtype)
            position = tensor(1, dtype=torch.int32) if op.endswith("_at") else pattern.seq_len - 1
            yield token, token, token, cache.text, cache.image, position, *cache.pattern_arguments, scale


def gumbel_softmax(op: str) -> Arguments:
    noise = tensor(dtype=torch.int64), tensor(dtype=torch.int64), tensor()
    for shape, dim in (((64, 8191), 1), ((64, 16383), 1), ((64, 40001), 1), ((8, 8191, 15, 17), 1)):
        for dtype in FLOATS:
            logits = tensor(*shape, dtype=dtype)
            rows = tensor(*(size for axis, size in enumerate(shape) if axis != dim))
            if "codebook" in op:
                forward = logits, tensor(shape[dim], 100, dtype=dtype), *noise, dim
                embedding = tensor(*rows.shape, 100, dtype=dtype).movedim(-1, dim)
                yield (embedding, rows, *forward) if op.endswith("_backward") else forward
                continue
            gradients = (logits, rows) if "_kl" in op else (logits,)
            for hard in (False, True):
                settings = *noise, hard, dim
                yield (*gradients, logits, logits, *settings) if op.endswith("_backward") else (logits, *settings)


def cross_entropy(op: str) -> Arguments:
    if op.endswith(("_scaled_gradient", "_scale_gradient_")):
        for dtype in FLOATS:
            yield tensor(16384, 3968, dtype=dtype), tensor()
            yield tensor(1 << 16, 1 << 16, dtype=dtype), tensor()
        return
    for rows, classes, dtype in (
        (1021, 16383, torch.float16),
        (8191, 16384, torch.float16),
        (1021, 16384, torch.bfloat16),
    ):
        hidden, weight = tensor(rows, 3968, dtype=dtype), tensor(classes, 3968, dtype=dtype)
        inputs = hidden, weight, tensor(rows, dtype=torch.int64), tensor(classes, dtype=dtype), -100
        wanted = [True, True, True]
        if op.endswith("_backward"):
            yield tensor(rows), *inputs, wanted
        elif op.endswith("_with_gradient"):
            yield *inputs, "mean", wanted
        else:
            yield (*inputs, "sum") if op.endswith("_reduced") else inputs


def float16(op: str) -> Arguments:
    for shape in ((1 << 24,), (1 << 16, 1 << 16)):
        for step in (1, 3):
            for dtype in (*FLOATS, torch.float64):
                if op.startswith("decode"):
                    yield tensor(*shape[:-1], step * shape[-1], dtype=torch.int16)[..., ::step], dtype
                else:
                    yield (tensor(*shape[:-1], step * shape[-1], dtype=dtype)[..., ::step],)


def logit_laplace(op: str) -> Arguments:
    for shape in ((63, 3, 255, 255), (1 << 15, 3, 255, 255)):
        for dtype in FLOATS:
            x, (mu, log_b) = tensor(*shape, dtype=dtype), tensor(shape[0], 6, *shape[2:], dtype=dtype).chunk(2, 1)
            for reduction in ("none", "sum"):
                grad = tensor() if reduction == "sum" else tensor(*shape)
                yield (grad, x, mu, log_b, reduction) if op.endswith("_backward") else (x, mu, log_b, reduction)


FAMILIES: dict[str, Callable[[str], Arguments]] = {
    "sparse_attention": attention,
    "decode_attention": decoding,
    "gumbel_": gumbel_softmax,
    "linear_cross_entropy": cross_entropy,
    "encode_": float16,
    "decode_fp": float16,
    "logit_laplace": logit_laplace,
}
"""By how the names of their operators begin."""


def odd_calls(op: str) -> Arguments:
    """The operator's arguments."""
    for beginning, calls in FAMILIES.items():
        if op.startswith(beginning):
            yield from calls(op)
