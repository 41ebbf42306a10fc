"""Draw how far algorithms are from orthogonal at any condition: ``python -m dalle_kernels.powersgd OUT.png``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dalle_kernels._picture_command import picture_command
from dalle_kernels.powersgd import models, orthogonalize

ROWS, COLUMNS = 992, 128
CONDITIONS = [10 ** (step / 2) for step in range(15)]


def conditioned(condition: float) -> Tensor:
    """A matrix whose singular values fall evenly, by their logarithm, from 1 to 1 / condition."""
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, COLUMNS, dtype=torch.float64, generator=draw))[0] for size in (ROWS, COLUMNS)
    )
    sizes = torch.logspace(0, -math.log10(condition), COLUMNS, dtype=torch.float64)
    return (left * sizes @ right.mT).float()


def gram_schmidt(P: Tensor) -> Tensor:
    """As torch's PowerSGD has it: each column made short of the finished ones, one after the other."""
    Q = P.clone()
    for j in range(Q.shape[1]):
        Q[:, j] /= Q[:, j].norm()
        Q[:, j + 1 :] -= Q[:, j, None] * (Q[:, j] @ Q[:, j + 1 :])
    return Q


def plain_cholesky_qr(P: Tensor) -> Tensor:
    """Twice in float32; NaN where there is no decomposition."""
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(P.mT @ P)
        if info != 0:
            return torch.full_like(P, torch.nan)
        P = torch.linalg.solve_triangular(factor.mT, P, upper=True, left=False)
    return P


ALGORITHMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Gram-Schmidt, as in torch's PowerSGD": ("#d62728", gram_schmidt),
    "Cholesky QR twice, all in float32": ("#ff7f0e", plain_cholesky_qr),
    "Householder by LAPACK (here on a CPU)": ("#7f7f7f", lambda P: orthogonalize(P, 0.0)),
    "Householder in panels (model of the CUDA kernel)": ("#1f77b4", lambda P: models.blocked_householder(P, 0.0)),
    "Cholesky QR in float64 (model of the CUDA kernels)": ("#2ca02c", lambda P: models.cholesky_qr(P, 0.0)[0]),
}


def loss(Q: Tensor) -> float:
    """The largest element, in float64, that Q' Q is off from the identity."""
    return (Q.double().mT @ Q.double() - torch.eye(COLUMNS, dtype=torch.float64)).abs().max().item()


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    matrices = [conditioned(condition) for condition in CONDITIONS]
    for name, (colour, algorithm) in ALGORITHMS.items():
        axes.loglog(CONDITIONS, [loss(algorithm(P)) for P in matrices], "o-", color=colour, label=name, markersize=4)
    axes.axhline(torch.finfo(torch.float32).eps, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="condition", ylabel="largest element of |Q'Q - I|", ylim=(1e-9, 10))
    axes.set_title(f"Loss of orthogonality of {ROWS} × {COLUMNS} in float32")
    axes.legend(fontsize=8, loc="center right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    picture_command("powersgd", "Draw losses of orthogonality.", draw)


if __name__ == "__main__":
    main()
