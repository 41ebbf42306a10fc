"""Orthogonalization by Householder's reflections, and PowerSGD as a whole, in plain PyTorch.

They define the op and what the hooks do, and are the oracles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels.float16 import reference as float16


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


class Simulation:
    """PowerSGD between virtual machines in one process, step by step as the paper's App. E has them; no speed intended.

    ``fixed`` has the Q of step 3 for the name of each compressed matrix, [n, rank]; gradients of other names are summed
    as they are. ``coded`` rounds error buffers and sums to 1-6-9 as often as the paper does. The other settings are
    those of ``PowerSGD``.
    """

    def __init__(
        self,
        machines: int,
        fixed: dict[str, Tensor],
        dtype: torch.dtype = torch.float64,
        coded: bool = False,
        gradient_divisor: float = 1.0,
        p_divisor: float = 1.0,
        q_divisor: float = 1.0,
        eps: float = 1e-6,
    ):
        self.fixed = {name: Q.to(dtype) for name, Q in fixed.items()}
        self.dtype, self.coded, self.eps = dtype, coded, eps
        self.gradient_divisor, self.p_divisor, self.q_divisor = gradient_divisor, p_divisor, q_divisor
        self.errors: list[dict[str, Tensor]] = [{} for _ in range(machines)]

    def update(self, gradients: list[dict[str, Tensor]], scales: dict[str, float]) -> tuple[dict[str, Tensor], Tensor]:
        """The sums of the machines' gradients, each ``scales`` times its own, and the square of their norm."""
        sums, square, finite = {}, torch.zeros((), dtype=self.dtype), True
        for name in gradients[0]:
            divisor = self.gradient_divisor * scales.get(name, 1.0)
            own = [gradient[name].to(self.dtype) for gradient in gradients]
            if name in self.fixed:
                added = [self._accumulate(*pair, name, divisor) for pair in zip(self.errors, own)]
                finite = finite and all(added)
                sums[name], Q, compressed = self._compress(name)
                square, finite = square + Q.square().sum(), finite and compressed
            else:
                sums[name] = sum(gradient / divisor for gradient in own)
                square, finite = square + sums[name].square().sum(), finite and bool(sums[name].isfinite().all())
        return sums, square if finite else torch.full_like(square, torch.inf)

    def _accumulate(self, errors: dict[str, Tensor], gradient: Tensor, name: str, divisor: float) -> bool:
        """Step 2; whether the gradient is finite."""
        before = errors.setdefault(name, torch.zeros_like(gradient))
        if gradient.isfinite().all():
            errors[name] = self._stored(before + gradient / divisor)
            return True
        return False

    def _compress(self, name: str) -> tuple[Tensor, Tensor, bool]:
        """Steps 3 to 7, 11 and 12: the decompressed sum, its factor Q, and whether P and Q are finite."""
        buffers = [errors[name] for errors in self.errors]
        is_tall = buffers[0].shape[0] > buffers[0].shape[1]
        matrices = [buffer.mT if is_tall else buffer for buffer in buffers]
        P = self._sum([matrix @ self.fixed[name] for matrix in matrices], self.p_divisor)
        finite = bool(P.isfinite().all())
        P = orthogonalize(P, self.eps)
        Q = self._sum([matrix.mT @ P for matrix in matrices], self.q_divisor) * self.q_divisor
        finite = finite and bool(Q.isfinite().all())
        decompressed = P @ Q.mT
        for errors, matrix in zip(self.errors, matrices):
            if finite:
                left = self._stored(matrix - decompressed / len(matrices))
                errors[name] = left.mT if is_tall else left
            elif not matrix.isfinite().all():
                errors[name] = torch.zeros_like(errors[name])
        return decompressed.mT if is_tall else decompressed, Q, finite

    def _sum(self, factors: list[Tensor], divisor: float) -> Tensor:
        return self._stored(sum(self._stored(factor / divisor) for factor in factors))

    def _stored(self, numbers: Tensor) -> Tensor:
        """Numbers as their codes have them, which saturate; infinities and NaN are known and stay."""
        if not self.coded:
            return numbers
        codes, _ = float16.encode(numbers, float16.FP169)
        return torch.where(numbers.isfinite(), float16.decode(codes, self.dtype, float16.FP169), numbers)
