"""The Hopper attention kernel itself, compiled for the CPU by tests/cuda_on_cpu, against float64: a schedule that
deadlocks or overwrites what is still read does so here as well."""

from __future__ import annotations

import math

import on_cpu
import pytest
import torch
from plain_attention import masked_softmax

from dalle_kernels import AttentionPattern
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.testing import assert_accurate


def check(cuda_on_cpu, pattern, seq, batch=1, heads=2, head_dim=64, dtype=torch.bfloat16, scale=0.125, growth=1):
    """Keys but the first 64 are ``growth`` times as long."""
    torch.manual_seed(seq)
    q, k, v = (torch.randn(batch, seq, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    k[:, :, 64:] *= growth
    out, lse = torch.full_like(q, math.nan), torch.full((batch, heads, seq), math.nan)
    settings = (KINDS.index(pattern.kind), pattern.text_len, *pattern.grid, pattern.kernel_size, scale)
    cuda_on_cpu.sparse_attention(q, k, v, out, lse, *settings, 0)
    exact, exact_lse = masked_softmax(q.double(), k.double(), v.double(), pattern, scale)
    assert_accurate(out, masked_softmax(q, k, v, pattern, scale)[0], exact, name=f"out of {pattern}")
    assert (lse - exact_lse).abs().max() < 1e-5 * max(1.0, exact_lse.abs().max().item())


# Four blocks of three warpgroups each: from fewer tiles than those to several heads a block.
CASES = [
    ("row", 256, (32, 32), 11, 1280),
    ("conv", 256, (32, 32), 11, 700),  # steps of 80 keys
    ("conv", 257, (32, 32), 11, 600),  # and as many places as text tiles, the last of 16 rows
    ("conv", 273, (32, 32), 11, 440),  # of 64
    ("row", 80, (4, 8), 11, 112),
    ("row", 81, (4, 8), 11, 113),
    ("column", 257, (32, 32), 11, 1270),
    ("row", 77, (24, 40), 11, 437),
    ("conv", 30, (16, 16), 5, 286),
    ("column", 13, (3, 5), 11, 20),
    ("row", 0, (5, 7), 11, 35),
    ("row", 256, (32, 32), 11, 200),
    ("row", 1, (1, 1), 11, 1),
    ("causal", 0, (32, 32), 11, 500),
    ("axial_row", 140, (9, 16), 11, 280),
    ("conv_corner", 64, (16, 16), 5, 320),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(cuda_on_cpu, case):
    kind, text_len, grid, kernel_size, seq = case
    check(cuda_on_cpu, AttentionPattern(kind, text_len, grid, kernel_size), seq)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_wide_heads_of_the_papers_stream(cuda_on_cpu, kind):
    check(cuda_on_cpu, AttentionPattern(kind, 257, (32, 32)), 420 if kind != "column" else 1270, head_dim=128)


@pytest.mark.parametrize("grid", [(64, 3), (5, 9)], ids=str)
def test_steps_of_half_a_tile_of_columns(cuda_on_cpu, grid):
    check(cuda_on_cpu, AttentionPattern("column", 257, grid), 256 + grid[0] * grid[1], head_dim=128)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_wide_heads_of_the_other_type(cuda_on_cpu, kind):
    check(cuda_on_cpu, AttentionPattern(kind, 130, (16, 16), 3), 386, head_dim=128, dtype=torch.float16)


def test_many_heads_take_turns_in_the_rings(cuda_on_cpu):
    check(cuda_on_cpu, AttentionPattern("row", 65, (8, 8)), 129, batch=2, heads=9)


@pytest.mark.parametrize("scale", [0.0, -0.3, 30.0])
def test_any_scale(cuda_on_cpu, scale):
    check(cuda_on_cpu, AttentionPattern("row", 65, (16, 16)), 321, scale=scale)


@pytest.mark.parametrize("growth", [20, 200])
def test_scores_may_outgrow_those_of_the_first_keys(cuda_on_cpu, growth):
    check(cuda_on_cpu, AttentionPattern("row", 80, (16, 16)), 336, growth=growth)


@pytest.mark.parametrize(("capability", "serves"), [(80, False), (90, True), (100, False)])
def test_only_hopper_is_served(cuda_on_cpu, capability, serves):
    q = torch.zeros(1, 1, 5, 64, dtype=torch.float16)
    with on_cpu.device(cuda_on_cpu, capability, min(capability, 90)):
        refusal = cuda_on_cpu.sparse_attention_refusal(q, q, q, KINDS.index("causal"), 1, 2, 2, 3)
    assert refusal is None if serves else "compute capability 9.0" in refusal
