"""The CUDA kernels of orthogonalization themselves, compiled for the CPU by tests/cuda_on_cpu, against float64."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_kernels.powersgd import models, ops
from dalle_kernels.powersgd.reference import orthogonalize

pytestmark = pytest.mark.usefixtures("served_on_cpu")
EPS = 1e-6


def errors(Q: torch.Tensor, P: torch.Tensor, eps: float) -> tuple[float, float]:
    """What Q' Q is off from the identity and how far from upper triangular R = Q' X is, X of columns of length 1."""
    X = models.with_diagonal(P, eps, torch.float64)
    X, Q = X / X.norm(dim=0).clamp_min(1e-300), Q.double()
    R = Q.mT @ X
    wrong = torch.cat([X - Q @ R, R.tril(-1), R.diagonal().clamp_max(0)[None]])
    return (Q.mT @ Q - torch.eye(Q.shape[1])).abs().max().item(), wrong.abs().max().item()


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


# 4 blocks hold 16 rows a warp, that is 512 in all, and 32 rows a warp beyond; panels and tiles are of 32 and 64.
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (70, 1), (33, 33), (80, 66), (520, 33)], ids=str)
def test_both_algorithms(shape):
    P = gaussian(*shape)
    Q, certified = ops.cholesky_qr(P[None], EPS)
    assert certified.tolist() == [1]
    exact = orthogonalize(P.double(), EPS)
    for result, limit in ((Q[0], 1e-7), (ops.householder(P[None], EPS)[0], 1.5e-6)):
        assert max(errors(result, P, EPS)) < limit
        assert (result - exact).abs().max() < 20 * limit


@pytest.mark.parametrize("condition", [1e4, 1e7])
def test_any_condition(condition):
    left, right = (torch.linalg.qr(gaussian(n, 34).double())[0] for n in (66, 34))
    P = (left * torch.logspace(0, -math.log10(condition), 34, dtype=torch.float64) @ right.mT).float()
    Q, certified = ops.cholesky_qr(P[None], 0.0)
    assert certified.tolist() == [1] and max(errors(Q[0], P, 0.0)) < 1e-7
    assert max(errors(ops.householder(P[None], 0.0)[0], P, 0.0)) < 1.5e-6


def test_a_batch_falls_back_matrix_by_matrix():
    P = torch.stack([gaussian(70, 12), gaussian(70, 2) @ gaussian(2, 12), torch.zeros(70, 12), gaussian(70, 12)])
    P[3, 5, 6] = math.nan
    Q, certified = ops.cholesky_qr(P, 0.0)
    assert certified[0] == 1 and certified[2] == 0 and certified[3] == -1
    kept = Q[0].clone()
    ops.householder(P, 0.0, Q, certified)
    assert torch.equal(Q[0], kept) and torch.equal(Q[2], torch.eye(70, 12)) and Q[3].isnan().any()
    assert max(errors(Q[1], P[1], 0.0)) < 1.5e-6


def test_what_misses_rank_is_certified_thanks_to_eps():
    P = gaussian(100, 5) @ gaussian(5, 40)
    Q, certified = ops.cholesky_qr(P[None], EPS)
    assert certified.tolist() == [1] and max(errors(Q[0], P, EPS)) < 1e-7


def test_the_same_bits_again():
    P = gaussian(80, 40)[None]
    for algorithm in (ops.householder, lambda P, eps: ops.cholesky_qr(P, eps)[0]):
        assert torch.equal(algorithm(P, EPS), algorithm(P, EPS))
