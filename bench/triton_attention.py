"""Calls of Triton's kernels of family attention: batch 8, text 256 and a 32 x 32 image, unless they say otherwise."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import starmap

import torch
from triton_cases import Case

from dalle_kernels import AttentionPattern, KVCache
from dalle_kernels._triton_configurations import (
    DEFAULT,
    key_blocks,
    query_blocks,
    row_blocks,
    sample_blocks,
    use_configuration,
)
from dalle_kernels.attention import triton_kernels

BATCH, TEXT, GRID = 8, 256, (32, 32)


def pattern_of(kind: str) -> AttentionPattern:
    return AttentionPattern(kind, TEXT, GRID)


def arguments(pattern, head_dim):
    return (pattern.kind, pattern.text_len, *pattern.grid, pattern.kernel_size, head_dim**-0.5)


def heads_of(count, kind, heads, head_dim, dtype, device):
    """Tensors as a joint projection makes them."""
    seq = pattern_of(kind).seq_len
    joint = torch.randn(BATCH, seq, count, heads, head_dim, device=device, dtype=dtype)
    return joint.permute(2, 0, 3, 1, 4).unbind()


def forward(kind, heads, head_dim, dtype, device):
    q, k, v = heads_of(3, kind, heads, head_dim, dtype, device)
    return partial(triton_kernels.sparse_attention, q, k, v, *arguments(pattern_of(kind), head_dim))


def backward(kind, heads, head_dim, dtype, device):
    q, k, v, grad_out = heads_of(4, kind, heads, head_dim, dtype, device)
    options = arguments(pattern_of(kind), head_dim)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    if device != "meta":
        out, lse = triton_kernels.sparse_attention(q, k, v, *options)
    return partial(triton_kernels.sparse_attention_backward, grad_out, q, k, v, out, lse, *options)


def decode(kind, prompts, samples, heads, head_dim, dtype, device):
    """The last token; slots that the cache never took hold whatever they held."""
    pattern = pattern_of(kind)
    cache = KVCache(pattern, prompts, heads, head_dim, dtype, device, samples)
    token = torch.randn(3, *cache.step_shape, device=device, dtype=dtype).unbind()
    options = *cache.pattern_arguments, head_dim**-0.5
    return partial(triton_kernels.decode_attention, *token, cache.text, cache.image, pattern.seq_len - 1, *options)


def odd(kind, head_dim, dtype, device):
    """What is compiled for texts that end within a tile, padded heads, a negative scale, few heads and wide grids."""
    pattern = AttentionPattern(kind, 257, (24, 200) if kind != "column" else (200, 24))
    q, k, v, grad_out = torch.randn(4, 1, 2, pattern.seq_len, head_dim, dtype=dtype, device=device).unbind()
    cache = KVCache(pattern, 1, 2, head_dim, dtype, device)
    position = torch.full((1,), pattern.seq_len - 1, dtype=torch.int32, device=device)
    options = *cache.pattern_arguments, -0.1

    def call():
        out, lse = triton_kernels.sparse_attention(q, k, v, *options)
        triton_kernels.sparse_attention_backward(grad_out, q, k, v, out, lse, *options)
        token = (x[:, :, -1:] for x in (q, k, v))
        triton_kernels.decode_attention(*token, cache.text, cache.image, position, *options)

    return call


def one_head(kind, device):
    """Numbers that Triton compiles for as constants where they are 1, and a text cut into segments."""
    pattern = AttentionPattern(kind, 17, (4, 8), 3)
    q, k, v, grad_out = torch.randn(4, 1, 1, pattern.seq_len, 16, dtype=torch.bfloat16, device=device).unbind()
    cache = KVCache(pattern, 1, 1, 16, torch.bfloat16, device)
    options = *cache.pattern_arguments, 0.25

    def call():
        out, lse = triton_kernels.sparse_attention(q, k, v, *options)
        triton_kernels.sparse_attention_backward(grad_out, q, k, v, out, lse, *options)
        token = (x[:, :, -1:] for x in (q, k, v))
        triton_kernels.decode_attention(*token, cache.text, cache.image, pattern.seq_len - 1, *options)

    return call


def by_hopper_forms(kind, text_len, run, descriptors, device):
    """Forward and backward as a row of the table for Hopper may have them run."""
    pattern = AttentionPattern(kind, text_len, GRID)
    q, k, v, grad_out = torch.randn(4, BATCH, 62, pattern.seq_len, 64, dtype=torch.bfloat16, device=device).unbind()
    options = arguments(pattern, 64)
    of_queries = query_blocks(64, 64, 32, 4, 3, run=run, descriptors=descriptors)
    rows = {
        ("sparse_attention", "16-bit 64"): of_queries,
        ("sparse_attention_backward", "dq 16-bit 64"): of_queries,
        ("sparse_attention_backward", "dk 16-bit 64"): key_blocks(64, 32, 4, 3, descriptors=descriptors),
    }

    def call():
        with ExitStack() as stack:
            for row, blocks in rows.items():
                stack.enter_context(use_configuration(*row, blocks))
            out, lse = triton_kernels.sparse_attention(q, k, v, *options)
            triton_kernels.sparse_attention_backward(grad_out, q, k, v, out, lse, *options)

    return call


def listed(blocks):
    """A function that makes a list of configurations by ``blocks`` from tuples of its arguments."""
    return lambda *cuts: list(starmap(blocks, cuts))


queries, keys, decoded_rows, decoded_text = map(listed, (query_blocks, key_blocks, row_blocks, sample_blocks))
described, kept, described_keys = (
    listed(partial(blocks, **form))
    for blocks, form in (
        (query_blocks, {"descriptors": True}),
        (query_blocks, {"descriptors": True, "run": 4}),
        (key_blocks, {"descriptors": True}),
    )
)
kept_by_pointers = listed(partial(query_blocks, run=4))

CANDIDATES = {
    ("sparse_attention", "16-bit 64"): {
        DEFAULT: queries((32, 32, 32, 4, 2), (64, 32, 32, 4, 2), (64, 32, 32, 4, 3), (64, 64, 32, 4, 2),
                         (64, 64, 64, 4, 2), (128, 32, 32, 8, 2), (128, 64, 32, 8, 2), (128, 64, 64, 8, 2)),
        90: queries((64, 32, 32, 4, 3), (64, 64, 32, 4, 3), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (64, 128, 32, 4, 2),
                    (128, 64, 32, 8, 2), (128, 64, 32, 8, 3), (128, 64, 64, 8, 3), (128, 128, 32, 8, 2))
        + described((64, 64, 32, 4, 2), (64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (128, 64, 32, 8, 3),
                    (128, 64, 64, 8, 3))
        + kept((64, 64, 32, 4, 3), (64, 128, 32, 4, 2), (128, 64, 32, 8, 3), (128, 64, 64, 8, 2))
        + kept_by_pointers((64, 64, 32, 4, 3), (128, 64, 32, 8, 3)),
    },
    ("sparse_attention", "16-bit 128"): {
        DEFAULT: queries((32, 32, 32, 4, 2), (64, 32, 32, 4, 2), (64, 32, 32, 8, 2), (64, 64, 32, 8, 2),
                         (128, 32, 32, 8, 2)),
        90: queries((64, 32, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (64, 64, 32, 4, 3), (128, 64, 32, 8, 2),
                    (128, 64, 64, 8, 2), (128, 128, 32, 8, 2))
        + described((64, 32, 32, 4, 2), (64, 64, 32, 4, 3), (128, 64, 32, 8, 2)),
    },
    ("sparse_attention", "16-bit 256"): {
        DEFAULT: queries((32, 32, 32, 8, 1), (64, 32, 32, 8, 1), (32, 32, 32, 8, 2)),
        90: queries((64, 32, 32, 8, 1), (64, 32, 32, 8, 2), (128, 32, 32, 8, 2)),
    },
    ("sparse_attention", "float32 64"): {
        DEFAULT: queries((64, 32, 32, 8, 1), (64, 32, 32, 8, 2)),
    },
    ("sparse_attention", "float32 128"): {
        DEFAULT: queries((32, 16, 16, 8, 1), (16, 16, 16, 4, 1)),
        90: queries((32, 16, 16, 8, 1), (32, 32, 32, 8, 1)),
    },
    ("sparse_attention", "float32 256"): {
        DEFAULT: queries((16, 16, 16, 4, 1), (16, 16, 16, 8, 1)),
    },
    ("sparse_attention_backward", "dq 16-bit 64"): {
        DEFAULT: queries((32, 32, 32, 4, 2), (64, 32, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 64, 8, 2),
                         (128, 32, 32, 8, 2), (128, 64, 32, 8, 2)),
        90: queries((64, 32, 32, 4, 2), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3), (64, 64, 64, 4, 2), (128, 32, 32, 8, 2),
                    (128, 64, 32, 8, 2), (128, 64, 64, 8, 2))
        + described((64, 64, 32, 4, 3), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2))
        + kept((64, 64, 32, 4, 3), (128, 64, 32, 8, 2)),
    },
    ("sparse_attention_backward", "dq 16-bit 128"): {
        DEFAULT: queries((32, 32, 32, 4, 2), (32, 32, 32, 8, 1), (64, 32, 32, 8, 1), (64, 32, 32, 8, 2)),
        90: queries((64, 32, 32, 4, 2), (64, 32, 32, 8, 2), (64, 64, 32, 8, 2), (128, 32, 32, 8, 2))
        + described((64, 32, 32, 4, 2), (128, 32, 32, 8, 2)),
    },
    ("sparse_attention_backward", "dq 16-bit 256"): {
        DEFAULT: queries((32, 32, 32, 8, 1), (32, 16, 16, 8, 1)),
        90: queries((32, 32, 32, 8, 2), (64, 32, 32, 8, 2)),
    },
    ("sparse_attention_backward", "dq float32 64"): {
        DEFAULT: queries((32, 32, 32, 8, 1), (32, 16, 16, 8, 1), (16, 16, 16, 4, 1)),
    },
    ("sparse_attention_backward", "dq float32 128"): {
        DEFAULT: queries((16, 16, 16, 8, 1)),
    },
    ("sparse_attention_backward", "dq float32 256"): {
        DEFAULT: queries((8, 16, 16, 8, 1)),
    },
    ("sparse_attention_backward", "dk 16-bit 64"): {
        DEFAULT: keys((32, 32, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2)),
        90: keys((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2))
        + described_keys((64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
    },
    ("sparse_attention_backward", "dk 16-bit 128"): {
        DEFAULT: keys((64, 32, 8, 1), (64, 32, 8, 2)),
        90: keys((64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2)) + described_keys((64, 32, 8, 2)),
    },
    ("sparse_attention_backward", "dk 16-bit 256"): {
        DEFAULT: keys((16, 32, 8, 1), (32, 32, 8, 1)),
        90: keys((32, 32, 8, 1), (32, 32, 8, 2)),
    },
    ("sparse_attention_backward", "dk float32 64"): {
        DEFAULT: keys((32, 32, 8, 1), (32, 16, 8, 1), (64, 16, 8, 1)),
    },
    ("sparse_attention_backward", "dk float32 128"): {DEFAULT: keys((16, 16, 8, 1), (32, 16, 8, 1))},
    ("sparse_attention_backward", "dk float32 256"): {DEFAULT: keys((8, 16, 8, 1))},
    ("decode_attention", "rows 16-bit 64"): {
        DEFAULT: decoded_rows((16, 4, 1), (32, 4, 1), (32, 8, 1), (64, 8, 1)),
        90: decoded_rows((32, 4, 1), (64, 4, 1), (64, 8, 1), (128, 4, 1), (128, 8, 1)),
    },
    ("decode_attention", "rows 16-bit 128"): {DEFAULT: decoded_rows((16, 4, 1), (32, 4, 1), (32, 8, 1))},
    ("decode_attention", "rows 16-bit 256"): {DEFAULT: decoded_rows((16, 4, 1), (16, 8, 1), (32, 8, 1))},
    ("decode_attention", "rows float32 64"): {DEFAULT: decoded_rows((16, 4, 1), (32, 4, 1), (32, 8, 1))},
    ("decode_attention", "rows float32 128"): {DEFAULT: decoded_rows((16, 4, 1), (16, 8, 1), (32, 8, 1))},
    ("decode_attention", "rows float32 256"): {DEFAULT: decoded_rows((16, 4, 1), (16, 8, 1))},
    ("decode_attention", "text 16-bit 64"): {
        DEFAULT: decoded_text((16, 32, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
        90: decoded_text((16, 32, 4, 2), (16, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    },
    ("decode_attention", "text 16-bit 128"): {
        DEFAULT: decoded_text((16, 32, 4, 2), (16, 64, 4, 2), (32, 32, 4, 2), (32, 64, 4, 2)),
    },
    ("decode_attention", "text 16-bit 256"): {DEFAULT: decoded_text((16, 32, 4, 2), (16, 32, 8, 2), (32, 32, 8, 2))},
    ("decode_attention", "text float32 64"): {DEFAULT: decoded_text((16, 16, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1))},
    ("decode_attention", "text float32 128"): {DEFAULT: decoded_text((16, 16, 4, 1), (16, 16, 8, 1), (32, 16, 8, 1))},
    ("decode_attention", "text float32 256"): {DEFAULT: decoded_text((16, 16, 8, 1))},
}  # fmt: skip


def tuned(op, kind, head_dim, dtype, *prefixes):
    """What a call is to choose among: the call of kind row, of each class of shapes."""
    if kind != "row" or dtype == torch.float16 or head_dim < 64:
        return {}
    shapes = f"{'float32' if dtype == torch.float32 else '16-bit'} {head_dim}"
    return {(op, prefix + shapes): CANDIDATES[op, prefix + shapes] for prefix in prefixes}


SHAPES = [
    ("row", 62, 64, torch.bfloat16),
    ("column", 62, 64, torch.bfloat16),
    ("conv", 62, 64, torch.bfloat16),
    ("causal", 62, 64, torch.bfloat16),
    ("row", 62, 64, torch.float16),
    ("row", 62, 16, torch.bfloat16),
    ("row", 62, 32, torch.bfloat16),
    ("row", 32, 128, torch.bfloat16),
    ("row", 16, 256, torch.bfloat16),
    ("row", 62, 64, torch.float32),
    ("row", 32, 128, torch.float32),
    ("row", 16, 256, torch.float32),
]
STEPS = [
    ("row", 8, 1, 62, 64, torch.bfloat16, "rows "),
    ("column", 8, 1, 62, 64, torch.bfloat16),
    ("conv", 8, 1, 62, 64, torch.bfloat16),
    ("row", 1, 1, 16, 64, torch.bfloat16),
    ("row", 1, 32, 62, 64, torch.bfloat16, "text "),
    ("row", 1, 32, 16, 128, torch.bfloat16, "rows ", "text "),
    ("row", 1, 32, 16, 256, torch.bfloat16, "rows ", "text "),
    ("row", 1, 32, 16, 64, torch.float32, "rows ", "text "),
    ("row", 1, 32, 16, 128, torch.float32, "rows ", "text "),
    ("row", 1, 32, 16, 256, torch.float32, "rows ", "text "),
]
CASES = [
    Case(
        f"{job.__name__} {kind} {head_dim} {str(dtype).removeprefix('torch.')}",
        partial(job, kind, heads, head_dim, dtype),
        tuned("sparse_attention", kind, head_dim, dtype, "")
        if job is forward
        else tuned("sparse_attention_backward", kind, head_dim, dtype, "dq ", "dk "),
        operations=(4 if job is forward else 10) * head_dim * pattern_of(kind).pairs() * BATCH * heads,
    )
    for kind, heads, head_dim, dtype in SHAPES
    for job in (forward, backward)
] + [
    Case(
        f"decode {kind} {prompts}x{samples} samples, {heads} heads of {head_dim} {str(dtype).removeprefix('torch.')}",
        partial(decode, kind, prompts, samples, heads, head_dim, dtype),
        tuned("decode_attention", kind, head_dim, dtype, *prefixes),
    )
    for kind, prompts, samples, heads, head_dim, dtype, *prefixes in STEPS
]
# Compiling these takes longest, so most are compiled for one architecture; `make gates FUZZ=1` compiles more for both.
CASES += [Case(f"odd {kind}", partial(odd, kind, 80, torch.bfloat16)) for kind in ("row", "column", "conv")]
CASES += [
    Case(f"odd {kind}", partial(odd, kind, 80, torch.bfloat16), architectures=(architecture,))
    for kind, architecture in (("axial_row", 90), ("conv_corner", 80), ("causal", 90))
]
CASES += [
    Case(f"one head {kind}", partial(one_head, kind), architectures=(architecture,))
    for kind, architecture in (("conv", 90), ("column", 80))
]
CASES += [
    Case(
        f"odd {kind} {head_dim} {str(dtype).removeprefix('torch.')}",
        partial(odd, kind, head_dim, dtype),
        architectures=architectures,
    )
    for kind, head_dim, dtype, architectures in (
        ("column", 200, torch.float32, (80,)),
        ("row", 64, torch.bfloat16, (90,)),
        ("row", 64, torch.float32, (80, 90)),
        ("conv", 128, torch.bfloat16, (90,)),
        ("conv", 129, torch.bfloat16, (80,)),
    )
]
CASES += [
    Case(
        f"{kind}, text {text_len}{' kept' * (run > 0)}{', descriptors' * descriptors}",
        partial(by_hopper_forms, kind, text_len, run, descriptors),
        architectures=(90,),
    )
    for kind, text_len, run, descriptors in (
        ("row", 256, 0, True),
        ("row", 256, 4, True),
        ("column", 256, 4, True),
        ("conv", 257, 4, True),
    )
]
