"""How each Triton kernel is cut into blocks, by op, shape class and architecture: fixed, so that no call ever tunes.

A row belongs to an op's name and a class of shapes that its family names; it has an entry for DEFAULT, which serves any
chip that the row does not name and must fit 99 KiB of shared memory, as the gates check, and one for each architecture
that wants another.
``make tune`` measures the candidates of ``bench/triton_<family>.py`` on the GPU at hand and says which rows to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch

from dalle_kernels import _triton

DEFAULT = 0
"""In place of an architecture such as 80 or 90."""


@dataclass(frozen=True)
class Configuration:
    """Block sizes and other settings by the names of the kernel's constexpr parameters, and how a program runs.

    ``figure`` is the measurement that chose it, such as "H100: 3.9 TB/s, 2025-01-31"; None: no GPU has measured it.
    """

    blocks: Mapping[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None
    figure: str | None = None

    @cached_property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch: ``kernel[grid](..., **configuration.options)``."""
        options = {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]


def query_blocks(
    queries: int, text: int, keys: int, warps: int, stages: int, figure: str | None = None, *,
    run: int = 0, descriptors: bool = False,
) -> Configuration:  # fmt: skip
    """Attention's kernels that own queries.

    ``run``: for how many tiles of queries a program keeps the text in shared memory, where it fits; 0: it does not.
    ``descriptors``: whether tiles of keys and values are loaded by tensor descriptors, where these serve.
    """
    blocks = {"BLOCK_QUERIES": queries, "BLOCK_TEXT": text, "BLOCK_KEYS": keys, "RUN": run}
    return Configuration({**blocks, "DESCRIPTORS": int(descriptors)}, warps, stages, figure=figure)


def key_blocks(
    keys: int, queries: int, warps: int, stages: int, figure: str | None = None, *, descriptors: bool = False
) -> Configuration:
    """Attention's kernel that owns keys. ``descriptors``: whether tiles of queries and their gradients are loaded by
    tensor descriptors, where these serve, as they do not with ``column``."""
    blocks = {"BLOCK_KEYS": keys, "BLOCK_QUERIES": queries, "DESCRIPTORS": int(descriptors)}
    return Configuration(blocks, warps, stages, figure=figure)


def row_blocks(keys: int, warps: int, stages: int, figure: str | None = None) -> Configuration:
    """Decoding of one sample."""
    return Configuration({"BLOCK_KEYS": keys}, warps, stages, figure=figure)


def sample_blocks(samples: int, keys: int, warps: int, stages: int) -> Configuration:
    """Decoding of samples that share text."""
    return Configuration({"BLOCK_SAMPLES": samples, "BLOCK_KEYS": keys}, warps, stages)


def few_rows_blocks(
    parts: int, outputs: int, inputs: int, warps: int, stages: int, figure: str | None = None
) -> Configuration:
    """Products of few rows."""
    blocks = {"PARTS": parts, "BLOCK_OUTPUTS": outputs, "BLOCK_INPUTS": inputs}
    return Configuration(blocks, warps, stages, figure=figure)


TABLE: dict[tuple[str, str], dict[int, Configuration]] = {
    # gumbel_softmax
    ("gumbel_softmax", "short rows"): {DEFAULT: Configuration({"ELEMENTS": 4096}, num_warps=4)},
    ("gumbel_softmax", "rows"): {
        DEFAULT: Configuration({"ELEMENTS": 8192}, num_warps=8),
        90: Configuration({"ELEMENTS": 8192}, num_warps=8, figure="H200: 0.2480 ms, 2.17 TB/s, 2026-11-26"),
    },
    ("gumbel_softmax", "long rows"): {
        DEFAULT: Configuration({"ELEMENTS": 16384}, num_warps=16),
        90: Configuration({"ELEMENTS": 16384}, num_warps=8, figure="H200: 0.6190 ms, 1.73 TB/s, 2026-11-26"),
    },
    ("gumbel_softmax", "blocks of rows"): {
        DEFAULT: Configuration({"ROWS": 1, "GROUPS": 1024}, num_warps=8),
        90: Configuration({"ROWS": 1, "GROUPS": 1024}, num_warps=8, figure="H200: 0.2143 ms, 1.53 TB/s, 2026-11-26"),
    },
    ("gumbel_softmax", "columns apart"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 16}, num_warps=8),
        90: Configuration({"ROWS": 32, "GROUPS": 8}, num_warps=8, figure="H200: 0.5345 ms, 1.00 TB/s, 2026-11-26"),
    },
    ("gumbel_softmax_backward", "short rows"): {DEFAULT: Configuration({"ELEMENTS": 4096}, num_warps=4)},
    ("gumbel_softmax_backward", "rows"): {
        DEFAULT: Configuration({"ELEMENTS": 8192}, num_warps=8),
        90: Configuration({"ELEMENTS": 8192}, num_warps=8, figure="H200: 0.2889 ms, 3.72 TB/s, 2026-11-26"),
    },
    ("gumbel_softmax_backward", "blocks of rows"): {
        DEFAULT: Configuration({"ROWS": 1, "GROUPS": 1024}, num_warps=8),
        90: Configuration({"ROWS": 1, "GROUPS": 512}, num_warps=4, figure="H200: 0.2761 ms, 2.37 TB/s, 2026-11-26"),
    },
    ("gumbel_softmax_backward", "columns apart"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 16}, num_warps=8),
        90: Configuration({"ROWS": 32, "GROUPS": 8}, num_warps=8, figure="H200: 0.7162 ms, 1.50 TB/s, 2026-11-26"),
    },
    ("gumbel_codebook", "16 bits"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 16, "WIDTH": 128}, num_warps=4, num_stages=2),
        90: Configuration(
            {"ROWS": 64, "GROUPS": 8, "WIDTH": 128}, num_warps=8, num_stages=3, figure="H200: 0.3604 ms, 2026-11-26"
        ),
    },
    ("gumbel_codebook", "float32"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 8, "WIDTH": 64}, num_warps=4),
        90: Configuration({"ROWS": 32, "GROUPS": 8, "WIDTH": 64}, num_warps=4, figure="H200: 0.9015 ms, 2026-11-26"),
    },
    ("gumbel_codebook_backward_of_logits", "16 bits"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 8, "WIDTH": 128}, num_warps=4, num_stages=2),
        90: Configuration(
            {"ROWS": 64, "GROUPS": 16, "WIDTH": 128}, num_warps=8, num_stages=2, figure="H200: 1.5377 ms, 2026-11-26"
        ),
    },
    ("gumbel_codebook_backward_of_logits", "float32"): {
        DEFAULT: Configuration({"ROWS": 16, "GROUPS": 8, "WIDTH": 64}, num_warps=4),
        90: Configuration({"ROWS": 32, "GROUPS": 8, "WIDTH": 64}, num_warps=4, figure="H200: 6.7459 ms, 2026-11-26"),
    },
    ("gumbel_codebook_backward_of_codebook", "16 bits"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 8, "WIDTH": 128}, num_warps=4, num_stages=2),
        90: Configuration(
            {"ROWS": 32, "GROUPS": 8, "WIDTH": 128}, num_warps=4, num_stages=2, figure="H200: 1.5253 ms, 2026-11-26"
        ),
    },
    ("gumbel_codebook_backward_of_codebook", "float32"): {
        DEFAULT: Configuration({"ROWS": 32, "GROUPS": 8, "WIDTH": 64}, num_warps=4),
        90: Configuration({"ROWS": 16, "GROUPS": 16, "WIDTH": 64}, num_warps=4, figure="H200: 6.5754 ms, 2026-11-26"),
    },
    # logit_laplace
    ("logit_laplace_loss", "reduced"): {DEFAULT: Configuration({"BLOCK": 1024}, num_warps=4)},
    ("logit_laplace_loss", "each"): {DEFAULT: Configuration({"BLOCK": 1024}, num_warps=4)},
    ("logit_laplace_loss_backward", "each"): {DEFAULT: Configuration({"BLOCK": 1024}, num_warps=4)},
    # cross_entropy
    ("cross_entropy_losses", "any"): {DEFAULT: Configuration({"BLOCK": 4096}, num_warps=8)},
    ("cross_entropy_losses_and_gradients", "any"): {
        DEFAULT: Configuration({"BLOCK": 4096}, num_warps=8),
        90: Configuration({"BLOCK": 8192}, num_warps=8, figure="H200: 0.0356 ms, 2026-11-27"),
    },
    ("cross_entropy_gradients", "any"): {DEFAULT: Configuration({"BLOCK": 4096}, num_warps=8)},
    ("cross_entropy_scaled_gradient", "any"): {DEFAULT: Configuration({"BLOCK": 2048}, num_warps=4)},
    # float16
    ("encode", "dense"): {DEFAULT: Configuration({"BLOCK": 2048}, num_warps=4)},
    ("encode", "strided"): {DEFAULT: Configuration({"BLOCK": 1024}, num_warps=4)},
    ("decode", "dense"): {DEFAULT: Configuration({"BLOCK": 2048}, num_warps=4)},
    ("decode", "strided"): {DEFAULT: Configuration({"BLOCK": 1024}, num_warps=4)},
    # adamw
    ("adamw16_step", "any"): {DEFAULT: Configuration({"BLOCK": 2048}, num_warps=8)},
    # grad_scale
    ("grad_scale", "any"): {DEFAULT: Configuration({"BLOCK": 4096}, num_warps=8)},
    # powersgd
    ("powersgd", "any"): {DEFAULT: Configuration({"BLOCK": 4096}, num_warps=8)},
    # transformer
    ("decode_layers", "16-bit 8"): {
        DEFAULT: few_rows_blocks(4, 16, 64, warps=4, stages=5),
        90: few_rows_blocks(4, 16, 128, warps=4, stages=5, figure="H200: 0.0093 ms, 3.16 TB/s, 2026-11-26"),
    },
    ("decode_layers", "16-bit 16"): {DEFAULT: few_rows_blocks(4, 16, 64, warps=4, stages=3)},
    ("decode_layers", "16-bit 32"): {DEFAULT: few_rows_blocks(4, 16, 64, warps=4, stages=3)},
    ("decode_layers", "float32 8"): {DEFAULT: few_rows_blocks(4, 16, 32, warps=4, stages=2)},
    ("decode_layers", "float32 16"): {DEFAULT: few_rows_blocks(4, 16, 16, warps=4, stages=2)},
    ("decode_layers", "float32 32"): {DEFAULT: few_rows_blocks(4, 16, 16, warps=8, stages=2)},
    ("decode_layers", "normed 16-bit 8"): {
        DEFAULT: few_rows_blocks(4, 32, 64, warps=4, stages=3),
        90: few_rows_blocks(4, 32, 64, warps=4, stages=3, figure="H200: 0.0136 ms, 2.17 TB/s, 2026-11-26"),
    },
    ("decode_layers", "normed 16-bit 16"): {DEFAULT: few_rows_blocks(4, 16, 64, warps=4, stages=3)},
    ("decode_layers", "normed 16-bit 32"): {DEFAULT: few_rows_blocks(4, 16, 64, warps=4, stages=3)},
    ("decode_layers", "normed float32 8"): {DEFAULT: few_rows_blocks(4, 16, 32, warps=4, stages=2)},
    ("decode_layers", "normed float32 16"): {DEFAULT: few_rows_blocks(4, 16, 16, warps=4, stages=2)},
    ("decode_layers", "normed float32 32"): {DEFAULT: few_rows_blocks(4, 16, 16, warps=8, stages=2)},
    # attention
    ("sparse_attention", "16-bit 64"): {
        DEFAULT: query_blocks(64, 32, 32, warps=4, stages=2),
        90: query_blocks(64, 64, 32, warps=4, stages=3, figure="H200: 0.2132 ms, 196 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention", "16-bit 128"): {
        DEFAULT: query_blocks(32, 32, 32, warps=4, stages=2),
        90: query_blocks(64, 32, 32, warps=4, stages=2, figure="H200: 0.2275 ms, 189 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention", "16-bit 256"): {
        DEFAULT: query_blocks(64, 32, 32, warps=8, stages=1),
        90: query_blocks(128, 32, 32, warps=8, stages=2, figure="H200: 0.2831 ms, 152 TFLOP/s, 2026-11-26"),
    },
    # On sm_90 two stages took 4.45 ms, and spill beside a text of 257, as do the next row's blocks of 32.
    ("sparse_attention", "float32 64"): {DEFAULT: query_blocks(64, 32, 32, warps=8, stages=1)},
    ("sparse_attention", "float32 128"): {DEFAULT: query_blocks(32, 16, 16, warps=8, stages=1)},
    ("sparse_attention", "float32 256"): {
        DEFAULT: query_blocks(16, 16, 16, warps=8, stages=1),
        90: query_blocks(16, 16, 16, warps=4, stages=1, figure="H200: 7.3220 ms, 6 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dq 16-bit 64"): {
        DEFAULT: query_blocks(64, 32, 32, warps=8, stages=2),
        90: query_blocks(64, 64, 32, warps=4, stages=3, figure="H200: 0.6518 ms, 160 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dq 16-bit 128"): {
        DEFAULT: query_blocks(32, 32, 32, warps=8, stages=1),
        90: query_blocks(64, 32, 32, warps=4, stages=2, figure="H200: 1.1124 ms, 97 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dq 16-bit 256"): {
        DEFAULT: query_blocks(32, 32, 32, warps=8, stages=1),
        90: query_blocks(64, 32, 32, warps=8, stages=2, figure="H200: 1.5694 ms, 69 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dq float32 64"): {DEFAULT: query_blocks(32, 32, 32, warps=8, stages=1)},
    ("sparse_attention_backward", "dq float32 128"): {DEFAULT: query_blocks(16, 16, 16, warps=8, stages=1)},
    ("sparse_attention_backward", "dq float32 256"): {DEFAULT: query_blocks(8, 16, 16, warps=8, stages=1)},
    ("sparse_attention_backward", "dk 16-bit 64"): {
        DEFAULT: key_blocks(64, 32, warps=4, stages=2),
        90: key_blocks(64, 32, warps=4, stages=3, figure="H200: 0.6399 ms, 163 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dk 16-bit 128"): {
        DEFAULT: key_blocks(64, 32, warps=8, stages=2),
        90: key_blocks(128, 32, warps=8, stages=2, figure="H200: 0.8015 ms, 134 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dk 16-bit 256"): {
        DEFAULT: key_blocks(32, 32, warps=8, stages=1),
        90: key_blocks(32, 32, warps=8, stages=2, figure="H200: 1.5770 ms, 68 TFLOP/s, 2026-11-26"),
    },
    ("sparse_attention_backward", "dk float32 64"): {DEFAULT: key_blocks(32, 32, warps=8, stages=1)},
    ("sparse_attention_backward", "dk float32 128"): {DEFAULT: key_blocks(32, 16, warps=8, stages=1)},
    ("sparse_attention_backward", "dk float32 256"): {DEFAULT: key_blocks(8, 16, warps=8, stages=1)},
    ("decode_attention", "rows 16-bit 64"): {
        DEFAULT: row_blocks(32, warps=8, stages=1),
        90: row_blocks(128, warps=8, stages=1, figure="H200: 0.0109 ms, 2026-11-26"),
    },
    # Four warps spill on sm_90 in float16 beside a text of 257.
    ("decode_attention", "rows 16-bit 128"): {DEFAULT: row_blocks(32, warps=8, stages=1)},
    ("decode_attention", "rows 16-bit 256"): {DEFAULT: row_blocks(16, warps=4, stages=1)},
    ("decode_attention", "rows float32 64"): {DEFAULT: row_blocks(32, warps=8, stages=1)},
    ("decode_attention", "rows float32 128"): {DEFAULT: row_blocks(16, warps=4, stages=1)},
    ("decode_attention", "rows float32 256"): {DEFAULT: row_blocks(16, warps=4, stages=1)},
    ("decode_attention", "text 16-bit 64"): {
        DEFAULT: sample_blocks(16, 32, warps=4, stages=2),
        90: sample_blocks(16, 64, warps=4, stages=2),
    },
    ("decode_attention", "text 16-bit 128"): {DEFAULT: sample_blocks(16, 64, warps=4, stages=2)},
    ("decode_attention", "text 16-bit 256"): {DEFAULT: sample_blocks(16, 32, warps=8, stages=2)},
    ("decode_attention", "text float32 64"): {DEFAULT: sample_blocks(16, 32, warps=4, stages=1)},
    ("decode_attention", "text float32 128"): {DEFAULT: sample_blocks(16, 16, warps=4, stages=1)},
    ("decode_attention", "text float32 256"): {DEFAULT: sample_blocks(16, 16, warps=8, stages=1)},
}

_LEAST = {"GROUPS": 4}
"""Of four columns each; of all other blocks a matrix product takes 16 at least."""
_MOST_REGISTERS = 255
_REGISTERS_OF_LANES = 65536 // 32

_forced: dict[tuple[str, str], Configuration] = {}


@cache
def _for_odd_places(op: str, shape_class: str, halved: tuple[str, ...]) -> Configuration:
    """DEFAULT's configuration with half of the blocks ``halved``, by one stage and in as many registers as there are.

    Left to choose, ptxas spills a few numbers for room for another program.
    """
    chosen = TABLE[op, shape_class][DEFAULT]
    halves = {block: max(min(_LEAST.get(block, 16), chosen[block]), chosen[block] // 2) for block in halved}
    return replace(
        chosen,
        blocks={**chosen.blocks, **halves},
        num_stages=1,
        maxnreg=min(_MOST_REGISTERS, _REGISTERS_OF_LANES // chosen.num_warps),
    )


def configuration(op: str, shape_class: str, device: torch.device, halved: tuple[str, ...] = ()) -> Configuration:
    """The configuration for a launch on ``device``.

    ``halved``: the blocks of which a call takes half where its tensors are not :func:`._strides.aligned`: there each
    element has an address and a mask of its own, for which whole blocks leave no registers.
    """
    forced = _forced.get((op, shape_class))
    if forced is not None:
        return forced
    if halved:
        return _for_odd_places(op, shape_class, halved)
    row = TABLE[op, shape_class]
    return row.get(_triton.architecture(device)) or row[DEFAULT]


@contextmanager
def use_configuration(op: str, shape_class: str, chosen: Configuration) -> Iterator[None]:
    """Take ``chosen`` for this row inside the block, on every device: for tuning and tests."""
    key = op, shape_class
    if key not in TABLE:
        raise ValueError(f"expected a row among {', '.join(map(' '.join, TABLE))}, got {op} {shape_class}")
    previous = _forced.get(key)
    _forced[key] = chosen
    try:
        yield
    finally:
        del _forced[key]
        if previous is not None:
            _forced[key] = previous
