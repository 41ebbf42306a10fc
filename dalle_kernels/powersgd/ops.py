"""The op ``orthogonalize``: its checks, its providers, its public name."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels import _native
from dalle_kernels._dispatch import Op
from dalle_kernels.powersgd import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _fake(P: Tensor, eps: float) -> Tensor:
    return torch.empty_like(P, memory_format=torch.contiguous_format)


def _native_orthogonalize(P: Tensor, eps: float) -> Tensor:
    if P.is_cuda and _own_kernels_serve(P):
        return _by_own_kernels(P, eps)
    return _by_lapack(P, eps)


def _by_lapack(P: Tensor, eps: float) -> Tensor:
    """LAPACK's blocked Householder, or on CUDA that of cuSOLVER, through torch."""
    matrix = P.to(reference.compute_dtype(P), copy=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(eps)
    reflections, taus = torch.geqrf(matrix)
    signs = torch.where(reflections.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
    Q = torch.linalg.householder_product(reflections, taus)
    return torch.mul(Q, signs.unsqueeze(-2), out=matrix).to(P.dtype)


def _own_kernels_serve(P: Tensor) -> bool:
    """Whether the compiled library for CUDA is there and takes such matrices."""
    if P.dtype == torch.float64 or _native.unavailable("cuda") is not None:
        return False
    return P.shape[-2] <= _native.query("householder_most_rows", P.device)


def _by_own_kernels(P: Tensor, eps: float) -> Tensor:
    """Cholesky QR in float64 where the GPU is as fast in it, and Householder for what that cannot certify.

    Every decision falls on the device: the host waits for nothing.
    """
    *batch, rows, columns = P.shape
    count = P[..., 0, 0].numel()
    matrices = P.reshape(count, rows, columns)
    inputs = matrices.float().contiguous()
    certified = None
    if _native.query("has_fast_float64", P.device):
        out, certified = _cholesky_qr(matrices, eps)
    else:
        out = torch.empty_like(inputs)
    workspace = inputs.new_empty(_native.query("householder_workspace", P.device, rows, columns))
    for index in range(count):
        _native.call(
            "householder",
            P.device,
            inputs[index].data_ptr(),
            out[index].data_ptr(),
            workspace.data_ptr(),
            0 if certified is None else certified[index].data_ptr(),
            rows,
            columns,
            eps,
        )
    return out.view(P.shape).to(P.dtype)


def _cholesky_qr(matrices: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Q in float32 by two passes of Cholesky QR in float64, and for each matrix 1 where it is certified to be one."""
    Q = matrices.double()
    Q.diagonal(dim1=-2, dim2=-1).add_(eps)
    count, _, columns = Q.shape
    certified = torch.empty(count, dtype=torch.int32, device=Q.device)
    inverse = Q.new_empty(count, columns, columns)
    workspace = Q.new_empty(_native.query("cholesky_workspace", Q.device, columns))
    for again in (False, True):
        gram = Q.mT @ Q
        for index in range(count):
            _native.call(
                "cholesky_inverse",
                Q.device,
                gram[index].data_ptr(),
                inverse[index].data_ptr(),
                workspace.data_ptr(),
                certified[index].data_ptr(),
                again,
                columns,
            )
        Q = Q @ inverse
    return Q.float(), certified


def _unavailable(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"LAPACK and the compiled library serve CPU and CUDA tensors, got device type {device_type!r}"
    if device_type == "cpu" and not torch._C.has_lapack:
        return "this torch is built without LAPACK"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return None


orthogonalize_op = Op("orthogonalize(Tensor P, float eps) -> Tensor", _fake)
orthogonalize_op.provide("native", _native_orthogonalize, unavailable=_unavailable)
orthogonalize_op.provide("reference", reference.orthogonalize)


def orthogonalize(P: Tensor, eps: float = 1e-6) -> Tensor:
    """An orthonormal basis of the columns of ``P + eps*I``, by Householder's reflections (paper App. E, PowerSGD's P).

    ``I`` is the rectangular identity. The result is the Q of the QR decomposition whose R has no negative number on its
    diagonal: what Gram-Schmidt finds, with columns that are orthogonal to rounding whatever P is. Of a matrix that
    misses some rank the columns that carry none complete the basis; zeros give the identity's columns.

    Args:
        P: float32, float64, float16 or bfloat16 of shape [..., rows, columns] with rows >= columns >= 1, any strides;
            16-bit numbers are computed with in float32. Infinity or NaN in a matrix gives NaN in its Q.
        eps: what is added on the diagonal beforehand.

    Returns:
        Q of P's shape and dtype, contiguous. No gradient flows through it.

    Raises:
        TypeError, ValueError: for other dtypes or shapes.
    """
    if not isinstance(P, Tensor) or P.dtype not in _DTYPES:
        got = f"a tensor of {P.dtype}" if isinstance(P, Tensor) else type(P).__name__
        raise TypeError(f"orthogonalize: expected P to be a tensor of float32, float64, float16 or bfloat16, got {got}")
    if P.dim() < 2 or not P.shape[-2] >= P.shape[-1] >= 1:
        raise ValueError(
            f"orthogonalize: expected P of shape [..., rows, columns] with rows >= columns >= 1, got {list(P.shape)}; "
            "a wide matrix can be transposed by P.mT"
        )
    with torch.no_grad():
        return orthogonalize_op(P, eps)
