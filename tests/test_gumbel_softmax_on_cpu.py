"""The CUDA kernels of Gumbel-softmax themselves, compiled for the CPU by tests/cuda_on_cpu, against float64."""

from __future__ import annotations

import math

import on_cpu
import pytest
import torch
from test_gumbel_softmax import OFFSET, SEED, TAU, _plain, _random, _run

import dalle_kernels
from dalle_kernels.gumbel_softmax import ops, reference
from dalle_kernels.testing import assert_accurate, poisoned_allocations


@pytest.fixture(autouse=True)
def kernels(served_on_cpu):
    with dalle_kernels.use("native"):
        yield


# A thread has 32 columns, a warp of a cluster 128 columns of 8 rows, a block of one up to 1,024. Of 4,100 columns the
# last three of 8 blocks have none.
ROWS = [(5, 33), (3, 40), (2, 8100)]
PLANES = [(2, 600, 5, 3), (1, 1024, 2, 3), (1, 1300, 3, 3), (1, 2048, 3, 3), (1, 4100, 1, 2), (1, 8192, 1, 2)]
CASES = [
    (shape, torch.contiguous_format if dense else torch.channels_last, dtype)
    for number, shape in enumerate([*ROWS, *PLANES])
    for dense in ([True] if len(shape) == 2 else [True, False])
    for dtype in [(torch.float32, torch.bfloat16, torch.float16)[(number + dense) % 3]]
]


@pytest.mark.parametrize(("shape", "layout", "dtype"), CASES, ids=str)
def test_sample_kl_and_gradient_meet_the_error_rule(shape, layout, dtype):
    """The logits and grad_y in the layout, what the op makes as it does."""
    logits = _random(shape, seed=5).to(dtype).double().contiguous(memory_format=layout)
    kl_shape = reference.kl_shape(logits, 1)
    weights = _random(shape, seed=6).to(dtype).double().contiguous(memory_format=layout), _random(kl_shape, seed=7)
    scalars = SEED, OFFSET, torch.tensor(0.7)
    results = []
    for _ in range(2):
        with poisoned_allocations():
            results.append(_run(lambda t: ops.gumbel_softmax_kl_op(t, *scalars, False, 1), [logits], dtype, weights))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    plain = _run(lambda t: _plain(t, 0.7, 1), [logits], dtype, weights)
    exact = _run(lambda t: _plain(t, 0.7, 1), [logits], torch.float64, weights)
    for name, *one in zip(("y", "kl", "gradient"), results[0], plain, exact, strict=True):
        assert_accurate(*one, name)


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize("shape", [(5, 33), (2, 600, 2, 3), (1, 2048, 3, 3)])
def test_hard_sample_is_the_one_hot_of_the_noisy_logits_with_the_soft_gradient(shape, with_kl):
    logits = _random(shape, seed=16).float().double()
    weights = _random(shape, seed=17), _random(reference.kl_shape(logits, 1), seed=18)
    op = ops.gumbel_softmax_kl_op if with_kl else lambda *args: (ops.gumbel_softmax_op(*args),)
    y, *_, gradient = _run(lambda t: op(t, SEED, OFFSET, TAU, True, 1), [logits], torch.float32, weights)
    with dalle_kernels.use("reference"):
        assert torch.equal(y.double(), ops.gumbel_softmax_op(logits, SEED, OFFSET, TAU.double(), True, 1))
    weights = weights if with_kl else (weights[0], torch.zeros_like(weights[1]))
    plain, exact = (
        _run(lambda t: _plain(t, TAU.item(), 1), [logits], dtype, weights)[-1]
        for dtype in (torch.float32, torch.float64)
    )
    assert_accurate(gradient, plain, exact)


@pytest.mark.parametrize("shape", [(9, 70), (1, 1300, 3, 3)])
def test_bad_rows_stay_alone(shape):
    logits = _random(shape, 19, torch.float32)
    rows = logits.movedim(1, -1).reshape(-1, shape[1])
    rows[0, 3], rows[1, 5], rows[3, 1:] = math.nan, math.inf, -math.inf
    rows[2] = -math.inf
    logits = rows.view(logits.movedim(1, -1).shape).movedim(-1, 1).contiguous()
    with poisoned_allocations():
        y, kl = ops.gumbel_softmax_kl_op(logits, SEED, OFFSET, TAU, False, 1)
    y = y.movedim(1, -1).reshape(-1, shape[1])
    assert y.isnan().all(1).tolist() == kl.flatten().isnan().tolist() == [True] * 3 + [False] * (len(rows) - 3)
    torch.testing.assert_close(y[3], torch.eye(shape[1])[0], rtol=1e-6, atol=0)
    assert y[4:].sum(1).sub(1).abs().max() < 1e-5


def test_code_for_older_gpus_makes_no_clusters(cuda_on_cpu):
    """Not on newer ones either, which run it translated."""
    with on_cpu.device(cuda_on_cpu, 100, 80):
        test_sample_kl_and_gradient_meet_the_error_rule((1, 600, 2, 3), torch.contiguous_format, torch.float32)
