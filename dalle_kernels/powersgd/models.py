"""The two algorithms of csrc/powersgd in plain PyTorch: the same arithmetic, so that its numerics are tested anywhere.

They are models for tests and for the figure of README.md, not providers: on a CPU LAPACK is faster. Each takes matrices
[..., rows, columns] in float32 and eps, and returns Q in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.powersgd.reference import with_scaled_columns

WIDTH = 32
UNIT = 2.0**-53
TOLERANCE = 2.0**-25
LEAST_SQUARE = 2.0**-80


def with_diagonal(P: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    matrix = P.to(dtype, copy=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(eps)
    return matrix


def cholesky_inverse(gram: Tensor) -> tuple[Tensor, bool, bool]:
    """R^-1 with R'R = gram, whether ``X @ R^-1`` is certified to be orthonormal, and whether there is no such R."""
    columns = len(gram)
    diagonal = gram.diagonal()
    scales = torch.where(diagonal > 0, diagonal.rsqrt(), 1)
    identity = torch.eye(columns, dtype=gram.dtype)
    for shift in (8 * columns**0.5 * UNIT, 64 * columns * UNIT):
        factor, info = torch.linalg.cholesky_ex(scales[:, None] * gram * scales + shift * identity)
        if info == 0 and factor.isfinite().all():
            inverse = torch.linalg.solve_triangular(factor.mT, identity, upper=True)
            certified = 2 * shift * inverse.square().sum(0).max() <= TOLERANCE
            return scales[:, None] * inverse, bool(certified), False
    return identity, False, True


def cholesky_qr(P: Tensor, eps: float) -> tuple[Tensor, int]:
    """Q of one matrix, and the pass (1 or 2) after which it was certified; 0 for never."""
    Q = with_diagonal(P, eps, torch.float64)
    for turn in (1, 2):
        inverse, certified, failed = cholesky_inverse(Q.mT @ Q)
        if failed:
            break
        Q = Q @ inverse
        if certified:
            return Q.float(), turn
    return Q.float(), 0


def blocked_householder(P: Tensor, eps: float) -> Tensor:
    """Panels of 32 columns, each applied to the rest as I - V T V'; all sums in float32."""
    left = with_scaled_columns(with_diagonal(P, eps, torch.float32))
    columns = left.shape[-1]
    panels, signs = [], []
    for first in range(0, columns, WIDTH):
        V, T, sign = factored_panel(left[..., first:, first : first + WIDTH])
        rest = left[..., first:, first + WIDTH :]
        rest -= V @ (T.mT @ (V.mT @ rest))
        panels.append((first, V, T))
        signs.append(sign)
    Q = torch.eye(*P.shape[-2:]).expand(P.shape).clone()
    for first, V, T in reversed(panels):
        rest = Q[..., first:, first:]
        rest -= V @ (T @ (V.mT @ rest))
    return Q * torch.cat(signs, -1).unsqueeze(-2)


def factored_panel(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V, T and the signs of R's diagonal. One product of a column with the panel gives its norm and v's products."""
    a = panel.clone()
    *batch, _, width = a.shape
    T, signs = a.new_zeros(*batch, width, width), a.new_ones(*batch, width)
    for j in range(width):
        x = a[..., j:, j].clone()
        z = (x.unsqueeze(-2) @ a[..., j:, :]).squeeze(-2)
        pivot = a[..., j, :].clone()
        alpha, square = pivot[..., j], z[..., j]
        beta = -torch.copysign(square.sqrt(), alpha)
        nothing = square < LEAST_SQUARE
        tau = torch.where(nothing, 0, (beta - alpha) / beta)
        inverse = torch.where(nothing, 0, 1 / (alpha - beta))
        product = pivot + inverse.unsqueeze(-1) * (z - alpha.unsqueeze(-1) * pivot)
        v = x * inverse.unsqueeze(-1)
        v[..., 0] = 1
        a[..., j:, j + 1 :] -= v.unsqueeze(-1) * (tau.unsqueeze(-1) * product[..., j + 1 :]).unsqueeze(-2)
        a[..., j:, j] = v
        before = (T[..., :j, :j] @ product[..., :j, None]).squeeze(-1)
        T[..., :j, j] = -tau.unsqueeze(-1) * before
        T[..., j, j] = tau
        signs[..., j] = torch.where((beta < 0) & ~nothing, -1.0, 1.0)
    return a.tril(), T, signs
