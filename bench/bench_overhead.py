"""What a call costs before any work is done: the Python side of each op on tiny inputs, and the import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from harness import OURS, Candidate, Case, Goal

import dalle_kernels
from dalle_kernels import AttentionPattern, KVCache

PATTERN = AttentionPattern("row", 1, (2, 2))


def _decode() -> Callable[[], object]:
    cache = KVCache(PATTERN, 1, 1, 8)
    step = torch.randn(1, 1, 1, 8)
    k = torch.randn(1, 1, PATTERN.seq_len - 1, 8)
    cache.prefill(k, k)

    def run() -> object:
        cache.length = PATTERN.seq_len - 1
        return dalle_kernels.decode_attention(step, step, step, cache)

    return run


def _calls() -> dict[str, Callable[[], object]]:
    """Every op on the smallest input, so that next to nothing but the way to its kernel is left."""
    q = torch.randn(1, 1, PATTERN.seq_len, 8)
    logits, codebook = torch.randn(1, 2), torch.randn(2, 1)
    x, mu = torch.full((1,), 0.5), torch.zeros(1)
    hidden, weight, target = torch.randn(1, 8), torch.randn(2, 8), torch.zeros(1, dtype=torch.int64)
    codes = torch.zeros(1, dtype=torch.int16)
    return {
        "sparse_attention": lambda: dalle_kernels.sparse_attention(q, q, q, PATTERN),
        "decode_attention": _decode(),
        "gumbel_softmax": lambda: dalle_kernels.gumbel_softmax(logits),
        "gumbel_softmax_kl": lambda: dalle_kernels.gumbel_softmax_kl(logits),
        "gumbel_codebook": lambda: dalle_kernels.gumbel_codebook(logits, codebook),
        "logit_laplace_loss": lambda: dalle_kernels.logit_laplace_loss(x, mu, mu),
        "linear": lambda: dalle_kernels.linear(hidden, weight),
        "linear_cross_entropy": lambda: dalle_kernels.linear_cross_entropy(hidden, weight, target),
        "encode_fp169": lambda: dalle_kernels.encode_fp169(x),
        "decode_fp169": lambda: dalle_kernels.decode_fp169(codes),
    }


@pytest.mark.parametrize("op", _calls())
def test_call(side_by_side, op):
    """Beside torch.softmax of two numbers, the yardstick: how many of it a call takes depends less on the machine."""
    run = _calls()[op]
    row = torch.ones(1, 2)
    with torch.no_grad():
        side_by_side(
            Case(
                family="overhead",
                work="one call on the smallest input",
                dtype=torch.float32,
                settings={"op": op},
                ours=Candidate(OURS, run),
                rivals=[Candidate("torch.softmax", lambda: row.softmax(-1), same_function=False)],
                check=run,
                goals=[Goal("milliseconds", 0.015)],
                calls=200,
                memory=False,
                seconds=2,
            )
        )


IMPORT = """
import time
import torch
begin = time.perf_counter()
import dalle_kernels
print(time.perf_counter() - begin)
"""


def test_import(side_by_side):
    """The import beyond torch's own, each time in a new process, which also pays for its share of lazy modules."""
    took = []

    def run() -> None:
        took.append(float(subprocess.check_output([sys.executable, "-c", IMPORT], text=True)))

    side_by_side(
        Case(
            family="overhead",
            work="import beyond torch's",
            dtype=None,
            settings={"op": "import dalle_kernels"},
            ours=Candidate(OURS, run, seconds=lambda: took[-1]),
            rivals=[],
            check=run,
            goals=[Goal("milliseconds", 300)],
            memory=False,
            seconds=20,
        )
    )
