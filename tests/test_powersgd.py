"""Orthogonalization: every algorithm against float64 for all conditions, ranks and scales; the op, its errors."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

import dalle_kernels
from dalle_kernels import _native, _triton, orthogonalize
from dalle_kernels.powersgd import models, ops
from dalle_kernels.powersgd.reference import compute_dtype
from dalle_kernels.testing import assert_accurate, poisoned_allocations, strided_views

GPU = torch.cuda.is_available() and _native.unavailable("cuda") is None
EPS = 1e-6
ROUNDING = 5 * 2.0**-24
"""Errors of columns of length 1 below which the reference's own may lie by luck."""
SHAPES = [(1, 1), (70, 1), (5, 3), (33, 33), (64, 32), (65, 64), (129, 97), (300, 33), (4097, 33)]


def by_provider(provider: str):
    def run(P: Tensor, eps: float) -> Tensor:
        with dalle_kernels.use(provider), poisoned_allocations():
            return orthogonalize(P, eps)

    return run


def cholesky_with_fallback(P: Tensor, eps: float) -> Tensor:
    Q, certified = models.cholesky_qr(P, eps)
    return Q if certified else models.blocked_householder(P, eps)


def on_gpu(run):
    return lambda P, eps: run(P.cuda(), eps).cpu()


ALGORITHMS = {
    "reference": by_provider("reference"),
    "LAPACK": by_provider("native"),
    "model of Householder": models.blocked_householder,
    "model of Cholesky QR": cholesky_with_fallback,
    "Householder on CUDA": on_gpu(lambda P, eps: ops.householder(P[None], eps)[0]),
    "op on CUDA": on_gpu(by_provider("native")),
}


PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")])
    if "CUDA" in name
    else name
    for name in ALGORITHMS
]


@pytest.fixture(params=PARAMETERS)
def algorithm(request):
    return ALGORITHMS[request.param]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def conditioned(rows: int, columns: int, condition: float) -> Tensor:
    """A matrix whose singular values fall evenly, by their logarithm, from 1 to 1 / condition."""
    left, right = (torch.linalg.qr(gaussian(n, columns, n).double())[0] for n in (rows, columns))
    return (left * torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64) @ right.mT).float()


def loss(Q: Tensor) -> Tensor:
    """What Q' Q is off from the identity, in float64."""
    return Q.double().mT @ Q.double() - torch.eye(Q.shape[-1], dtype=torch.float64)


def assert_orthogonalizes(P: Tensor, eps: float, Q: Tensor, floor: float = ROUNDING) -> None:
    """Q is orthonormal, and R = Q' X upper triangular with X = Q R, as exactly as the reference's in float32.

    Of several matrices [draws, rows, columns] the largest errors count. Errors below ``floor`` pass.
    """
    with dalle_kernels.use("reference"):
        plain = orthogonalize(P, eps)
    X = models.with_diagonal(P, eps, torch.float64)
    X = X / X.norm(dim=-2, keepdim=True).clamp_min(1e-300)

    def errors(basis: Tensor) -> tuple[Tensor, Tensor]:
        R = basis.double().mT @ X
        negative = R.diagonal(dim1=-2, dim2=-1).clamp_max(0).unsqueeze(-2)
        return loss(basis).abs().max(), torch.cat([X - basis.double() @ R, R.tril(-1), negative], -2).abs().max()

    for name, ours, its in zip(("orthogonality", "decomposition"), errors(Q), errors(plain)):
        assert ours <= max(2 * its, floor), f"{name}: error {ours:.2e}, the reference's {its:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_meet_the_error_rule(algorithm, shape):
    draws = 3 if math.prod(shape) > 1000 else 12  # of few numbers the largest error is luck
    square = 3 * torch.eye(*shape) if shape[0] == shape[1] else 0  # well conditioned, as the others are
    P = torch.stack([gaussian(*shape, seed) + square for seed in range(draws)])
    Q = torch.stack([algorithm(one, EPS) for one in P])
    assert_orthogonalizes(P, EPS, Q)
    with dalle_kernels.use("reference"):
        assert_accurate(Q, orthogonalize(P), orthogonalize(P.double()), f"{shape}")


@cache
def of_full_size(name: str) -> tuple[Tensor, float]:
    """The largest matrix that there are kernels for, and eps."""
    rows, columns = 16384, 1024
    if name == "condition 1e7":
        return conditioned(rows, columns, 1e7), 0.0
    return gaussian(rows, 5) @ gaussian(5, columns), EPS


LOSSES = {"condition 1e7": 4.845e-6, "rank 5": 7.935e-6}
"""The reference's at the full size, where it takes 74 seconds."""


@pytest.mark.parametrize("algorithm", PARAMETERS[1:])  # all but the reference
@pytest.mark.parametrize("name", LOSSES)
def test_orthogonality_at_the_full_size(name, algorithm):
    P, eps = of_full_size(name)
    assert loss(ALGORITHMS[algorithm](P, eps)).abs().max() < 2 * LOSSES[name]


@pytest.mark.parametrize("condition", [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
def test_any_condition(algorithm, condition):
    P = conditioned(500, 96, condition)
    assert_orthogonalizes(P, 0.0, algorithm(P, 0.0))


def with_column(column: int, values: Tensor | float) -> Tensor:
    P = gaussian(200, 70)
    P[:, column] = values
    return P


AWKWARD = {
    "zeros": torch.zeros(200, 70),
    "rank 1": gaussian(200, 1) @ gaussian(1, 70),
    "rank 5": gaussian(200, 5) @ gaussian(5, 70),
    "rank 40, large": 1e4 * gaussian(200, 40) @ gaussian(40, 70),
    "a column of zeros": with_column(40, 0.0),
    "the first column is of zeros": with_column(0, 0.0),
    "two equal columns": with_column(40, gaussian(200, 70)[:, 3]),
    "ones": torch.ones(200, 70),
    "upper triangular": gaussian(200, 70).triu(),
    "columns of all sizes": gaussian(200, 70) * torch.logspace(-18, 18, 70),
    "a square of rank 3": gaussian(70, 3) @ gaussian(3, 70),
    "minus the identity's eps": -EPS * torch.eye(200, 70),
}


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("name", AWKWARD)
def test_any_rank(algorithm, name, eps):
    P = AWKWARD[name]
    # Sums of equal numbers round one way all the time, by how much is luck: the bound for as many terms holds.
    floor = len(P) * 2.0**-24 if name == "ones" else ROUNDING
    assert_orthogonalizes(P, eps, algorithm(P, eps), floor)


def test_zeros_give_the_identity(algorithm):
    assert torch.equal(algorithm(torch.zeros(50, 40), EPS), torch.eye(50, 40))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_any_scale(algorithm, size):
    P = gaussian(200, 70)
    assert_orthogonalizes(P * size, 0.0, algorithm(P * size, 0.0))
    torch.testing.assert_close(algorithm(P * size, 0.0), algorithm(P, 0.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_ends_in_nan(algorithm, value):
    P = gaussian(100, 40)
    P[3, 20] = value
    assert algorithm(P, EPS)[:, 20:].isnan().all()


def test_a_batch_is_its_matrices_and_nan_stays_in_its_own():
    P = gaussian(6 * 80, 33).view(2, 3, 80, 33)
    Q = orthogonalize(P)
    torch.testing.assert_close(Q, torch.stack([orthogonalize(p) for p in P.flatten(0, 1)]).view(P.shape))
    P[1, 2, 5, 6] = math.nan
    assert torch.equal(orthogonalize(P)[:1], Q[:1]) and torch.equal(orthogonalize(P)[1, :2], Q[1, :2])
    assert orthogonalize(P)[1, 2].isnan().any()
    assert orthogonalize(P[:, :0]).shape == (2, 0, 80, 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("provider", ["native", "reference"])
def test_dtypes_and_layouts(provider, dtype):
    P = gaussian(70, 20).to(dtype)
    with dalle_kernels.use(provider):
        Q = orthogonalize(P)
        assert Q.dtype == dtype and Q.is_contiguous()
        assert torch.equal(Q, orthogonalize(P.to(compute_dtype(P))).to(dtype))
        for _, view in strided_views(P):
            torch.testing.assert_close(orthogonalize(view), Q)
            assert orthogonalize(view).is_contiguous()


def test_float64_is_computed_in_float64():
    P = conditioned(300, 40, 1e7).double()
    for provider in ("native", "reference"):
        assert loss(by_provider(provider)(P, EPS)).abs().max() < 1e-14


def test_the_first_pass_of_cholesky_qr_suffices_for_what_is_well_conditioned():
    assert models.cholesky_qr(gaussian(500, 96), EPS)[1] == 1
    assert models.cholesky_qr(conditioned(500, 96, 1e2), 0.0)[1] == 1


@pytest.mark.parametrize("condition", [1e4, 1e7])
def test_the_second_pass_of_cholesky_qr_suffices_for_the_rest(condition):
    assert models.cholesky_qr(conditioned(500, 96, condition), 0.0)[1] == 2
    assert models.cholesky_qr(gaussian(500, 5) @ gaussian(5, 96), EPS)[1] == 2


def test_cholesky_qr_is_not_certified_where_it_fails():
    for P in (torch.zeros(500, 96), with_column(40, 0.0), with_column(0, math.nan)):
        assert models.cholesky_qr(P, 0.0)[1] == 0


def test_which_provider_runs_and_why():
    P = gaussian(5, 3)
    assert dalle_kernels.explain("orthogonalize", P, EPS).runs == "native"
    found = dalle_kernels.explain("orthogonalize", P.to("meta"), EPS)
    assert found.runs == "reference" and "got device type 'meta'" in str(found)


def test_which_matrices_its_own_kernels_take(monkeypatch):
    """On Hopper those that fit, as many as a launch has blocks along a side."""
    monkeypatch.setattr(_native, "unavailable", lambda _device_type: None)
    monkeypatch.setattr(_native, "query", lambda _name, _device: 16384)
    shapes = {(65535, 2, 1): True, (256, 256, 2, 1): False, (16384, 2): True, (16385, 2): False, (0, 2, 2): False}
    with _triton.assume(90, 132):
        assert {shape: ops._own_kernels_serve(torch.empty(shape, device="meta")) for shape in shapes} == shapes
    with _triton.assume(100, 132):
        assert not ops._own_kernels_serve(torch.empty(16384, 2, device="meta"))


def test_opcheck_and_one_graph():
    P = gaussian(20, 6)
    torch.library.opcheck(torch.ops.dalle_kernels.orthogonalize.default, (P, EPS))
    torch.library.opcheck(torch.ops.dalle_kernels.orthogonalize.default, (P.bfloat16().expand(2, 20, 6), EPS))
    torch._dynamo.reset()
    compiled = torch.compile(lambda P: orthogonalize(P * 2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(P), orthogonalize(P * 2) + 1)
    assert orthogonalize(P.to("meta")).shape == (20, 6)


def test_no_gradient_flows():
    assert not orthogonalize(gaussian(5, 3).requires_grad_()).requires_grad


def test_mistakes_get_one_clear_sentence():
    with pytest.raises(TypeError, match=r"float32, float64, float16 or bfloat16, got a tensor of torch.int64"):
        orthogonalize(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="got list"):
        orthogonalize([[1.0]])
    for eps in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="orthogonalize: expected eps at or above 0 and finite, got"):
            orthogonalize(torch.ones(3, 2), eps)
    for shape in ((2, 3), (3, 0), (0, 0), (3,), (), (4, 2, 3)):
        with pytest.raises(ValueError, match=r"with rows >= columns >= 1, got \[") as found:
            orthogonalize(torch.ones(shape))
        assert str(list(shape)) in str(found.value)
