"""Orthogonalization of a tall matrix against torch's QR decomposition and PowerSGD's Gram-Schmidt in torch."""

from __future__ import annotations

import pytest
import torch
from harness import OURS, Candidate, Case, Goal, Unavailable
from torch import Tensor

from dalle_kernels import orthogonalize
from dalle_kernels.testing import assert_accurate

QR, GRAM_SCHMIDT = "torch.linalg.qr", "torch's PowerSGD, Gram-Schmidt"
GOALS = [Goal("speed", 5, QR), Goal("speed", 20, GRAM_SCHMIDT)]
"""On a GPU, from rank 512 on; on a CPU ours is LAPACK's as well."""


def with_positive_diagonal(Q: Tensor, R: Tensor) -> Tensor:
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)


def gram_schmidt(P: Tensor) -> Candidate | Unavailable:
    try:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    except ImportError as error:
        return Unavailable(GRAM_SCHMIDT, str(error))
    matrices = P.unsqueeze(0).clone()
    return Candidate(
        GRAM_SCHMIDT,
        lambda: powerSGD_hook._orthogonalize_gram_schmidt(matrices, epsilon=1e-8),
        before=lambda: matrices.copy_(P),  # it works in place
        note="loses orthogonality by the condition",
    )


@pytest.mark.parametrize(
    ("rows", "rank"), [(3968, 112), (3968, 512), (3968, 896), (15872, 512), (15872, 896), (16384, 1024)]
)
def test_orthogonalize(side_by_side, device, rows, rank):
    P = torch.randn(rows, rank, device=device)

    def check() -> None:
        plain, exact = (with_positive_diagonal(*torch.linalg.qr(tensor)) for tensor in (P, P.double()))
        actual, identity = orthogonalize(P, eps=0.0), torch.eye(rank, dtype=torch.float64, device=device)
        assert_accurate(actual, plain, exact, f"Q of {rows} x {rank}")
        losses = [Q.double().mT @ Q.double() for Q in (actual, plain)]
        assert_accurate(*losses, identity, "its orthogonality")

    side_by_side(
        Case(
            family="powersgd",
            work="orthogonalize",
            dtype=torch.float32,
            settings={"rows": rows, "rank": rank},
            ours=Candidate(OURS, lambda: orthogonalize(P)),
            rivals=[Candidate(QR, lambda: torch.linalg.qr(P)), gram_schmidt(P)],
            check=check,
            goals=GOALS if device == "cuda" and rank >= 512 else [],
            operations=4 * rows * rank**2 - 4 * rank**3 / 3,
            memory=False,
            seconds=4,
        )
    )
