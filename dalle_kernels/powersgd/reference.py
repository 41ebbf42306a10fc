"""Orthogonalization by Householder's reflections in plain PyTorch: it defines the op, and is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(P: Tensor) -> torch.dtype:
    return torch.float64 if P.dtype == torch.float64 else torch.float32


def orthogonalize(P: Tensor, eps: float) -> Tensor:
    """Q of the QR decomposition of ``P + eps*I`` whose R has no negative diagonal; computed in float32 or float64.

    Reflection j maps what is left of column j onto a multiple of the j-th unit vector. Q is their product, applied to
    the first columns of the identity: orthonormal whatever P is. Where nothing is left of a column it is skipped; what
    is left to rounding may be so small that the precision of its squares is not that of numbers any more.
    """
    rows, columns = P.shape[-2:]
    identity = torch.eye(rows, columns, dtype=compute_dtype(P), device=P.device)
    left = with_scaled_columns(P.to(compute_dtype(P)) + eps * identity)
    number = torch.finfo(left.dtype)
    least = number.tiny**0.5 / number.eps
    vectors, signs = [], []
    for j in range(columns):
        vector = left[..., j:, j : j + 1].clone()
        norm = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        norm = torch.where(norm < least, 0, norm)
        away = torch.where(vector[..., :1, :] < 0, -norm, norm)  # the sign that cannot cancel
        vector[..., :1, :] += away
        length = torch.linalg.vector_norm(vector, dim=-2, keepdim=True)
        vectors.append(torch.where(norm == 0, 0, vector / length))
        signs.append(torch.where(away > 0, -1.0, 1.0))  # of R_jj = -away
        reflect(left[..., j:, j:], vectors[j])
    Q = identity.expand(P.shape).clone()
    for j in reversed(range(columns)):
        reflect(Q[..., j:, j:], vectors[j])
    return (Q * torch.cat(signs, -1)).to(P.dtype)


def reflect(matrix: Tensor, vector: Tensor) -> None:
    """``matrix -= 2 v v' matrix`` for a vector of length 1 (or 0, which changes nothing)."""
    matrix -= 2 * vector @ (vector.mT @ matrix)


def with_scaled_columns(matrix: Tensor) -> Tensor:
    """Each column times the power of two that brings its largest element near 1, so that no square leaves the range.

    A matrix and the same with scaled columns have the same Q.
    """
    largest = matrix.abs().amax(-2, keepdim=True)
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1)).exponent
    return torch.ldexp(matrix, -exponent.clamp(-126, 126))
