"""The op ``orthogonalize``: its checks, its providers, its public name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op
from dalle_kernels.powersgd import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_MATRICES = 65535


def _fake(P: Tensor, eps: float) -> Tensor:
    return torch.empty_like(P, memory_format=torch.contiguous_format)


def _native_orthogonalize(P: Tensor, eps: float) -> Tensor:
    if P.is_cuda and _own_kernels_serve(P):
        return _by_own_kernels(P, eps)
    return _by_lapack(P, eps)


def _by_lapack(P: Tensor, eps: float) -> Tensor:
    """LAPACK's blocked Householder, or on CUDA that of cuSOLVER, through torch."""
    matrix = torch.empty(P.shape, dtype=reference.compute_dtype(P), device=P.device).copy_(P)
    matrix.diagonal(dim1=-2, dim2=-1).add_(eps)
    reflections, taus = torch.geqrf(matrix)
    signs = torch.where(reflections.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
    Q = torch.linalg.householder_product(reflections, taus)
    return torch.mul(Q, signs.unsqueeze(-2), out=matrix).to(P.dtype)


def _own_kernels_serve(P: Tensor) -> bool:
    """Whether the compiled library for CUDA is there, takes such matrices, and was measured to be faster on this GPU.

    That is on Hopper, whose float64 products are as fast as its float32 ones; elsewhere cuSOLVER stays, which also
    takes more matrices than a launch has blocks along a side.
    """
    if P.dtype == torch.float64 or not P.numel() or _native.unavailable("cuda") is not None:
        return False
    if _triton.architecture(P.device) != 90 or P.shape[:-2].numel() > _MOST_MATRICES:
        return False
    return P.shape[-2] <= _native.query("householder_most_rows", P.device)


def _by_own_kernels(P: Tensor, eps: float) -> Tensor:
    """Cholesky QR in float64, and Householder for what that cannot certify.

    Every decision falls on the device: the host waits for nothing.
    """
    matrices = P.reshape(-1, *P.shape[-2:]).float().contiguous()
    Q, certified = cholesky_qr(matrices, eps)
    return householder(matrices, eps, Q, certified).view(P.shape).to(P.dtype)


def cholesky_qr(matrices: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Q by up to two passes of Cholesky QR, and for each matrix 1 where it is certified to be one (csrc/powersgd).

    The matrices [matrices, rows, columns] are on a GPU, float32 and contiguous.
    """
    device, shape = matrices.device, matrices.shape
    count, _, columns = shape
    parts = _native.query("gram_parts", device, *shape)
    size = _native.query("cholesky_workspace", device, count, columns)
    gram, inverse, workspace = (
        torch.empty(sizes, dtype=torch.float64, device=device)
        for sizes in ((count, parts, columns, columns), (count, columns, columns), (size,))
    )
    certified = torch.empty(2, count, dtype=torch.int32, device=device)
    Q = torch.empty_like(matrices)
    source, before = matrices.data_ptr(), 0
    for after in (certified[0].data_ptr(), certified[1].data_ptr()):
        _native.call("gram", device, source, gram.data_ptr(), before, *shape, parts, eps)
        _native.call(
            "cholesky_inverse",
            device,
            gram.data_ptr(),
            inverse.data_ptr(),
            workspace.data_ptr(),
            before,
            after,
            count,
            columns,
            parts,
        )
        _native.call("apply", device, source, inverse.data_ptr(), Q.data_ptr(), before, *shape, eps)
        source, before, eps = Q.data_ptr(), after, 0.0
    return Q, certified[1]


def householder(matrices: Tensor, eps: float, Q: Tensor | None = None, certified: Tensor | None = None) -> Tensor:
    """Q by Householder's reflections, of matrices as :func:`cholesky_qr` takes; those certified in ``Q`` stay as is."""
    if Q is None:
        Q = torch.empty_like(matrices)
    workspace = matrices.new_empty(_native.query("householder_workspace", matrices.device, *matrices.shape))
    _native.call(
        "householder",
        matrices.device,
        matrices.data_ptr(),
        Q.data_ptr(),
        workspace.data_ptr(),
        0 if certified is None else certified.data_ptr(),
        *matrices.shape,
        eps,
    )
    return Q


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


@names_wrong_types
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
    if not 0 <= eps < math.inf:
        raise ValueError(f"orthogonalize: expected eps at or above 0 and finite, got {eps}")
    with torch.no_grad():
        return orthogonalize_op(P, eps)
