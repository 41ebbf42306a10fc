"""The logit-Laplace likelihood of the dVAE's decoder: checks, operators and public functions (paper appendix A.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op
from dalle_kernels.logit_laplace import reference

REDUCTIONS = ("none", "mean", "sum")
_BLOCK = 2048  # LOGIT_LAPLACE_BLOCK in csrc/logit_laplace/logit_laplace.h
_MAX_DIMS = 8  # Strided::MAX_DIMS in csrc/common/strided.h
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INPUTS = "Tensor x, Tensor mu, Tensor log_b, str reduction"


def _fake(x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> Tensor:
    return x.new_empty(x.shape if reduction == "none" else (), dtype=reference.compute_dtype(x, mu, log_b))


def _fake_backward(grad_loss: Tensor, x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), log_b.new_empty(log_b.shape)


def _divisor(x: Tensor, reduction: str) -> float:
    return float(x.numel() if reduction == "mean" else 1)


def _native_loss(x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> Tensor:
    # Not by torch.empty, which takes twice as long to read its arguments. Of the partial sums there is at least one.
    if reduction == "none":
        loss, partial = torch.empty(x.shape, dtype=torch.float32), None
    else:
        loss = torch.empty_strided((), (), dtype=torch.float32)
        partial = torch.empty_strided((x.numel() // _BLOCK + 1,), (1,), dtype=torch.float64)
    _native.call("logit_laplace_loss", x.device, x, mu, log_b, loss, partial, _divisor(x, reduction))
    return loss


def _native_backward(grad_loss: Tensor, x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    gradients = _fake_backward(grad_loss, x, mu, log_b, reduction)
    inputs = grad_loss.expand(x.shape), x, mu, log_b
    _native.call("logit_laplace_loss_backward", x.device, *inputs, *gradients, _divisor(x, reduction))
    return gradients


def _native_unsupported(*arguments) -> str | None:
    tensors = arguments[:-1]
    for tensor in tensors:
        if tensor.dtype not in _NATIVE_DTYPES:
            return f"the compiled kernel takes float32, float16 and bfloat16, got {tensor.dtype}"
    dims = tensors[-1].dim()
    if dims > _MAX_DIMS:
        return f"the compiled kernel takes at most {_MAX_DIMS} dimensions, got {dims}"
    return None


logit_laplace_loss_op = Op(f"logit_laplace_loss({_INPUTS}) -> Tensor", _fake)
logit_laplace_loss_backward_op = Op(
    f"logit_laplace_loss_backward(Tensor grad_loss, {_INPUTS}) -> (Tensor, Tensor)", _fake_backward
)
_native_limits = {"unavailable": _native.unavailable_but_on_cpu, "unsupported": _native_unsupported}
_triton_limits = {"unavailable": _triton.unavailable, "unsupported": _triton.unsupported}
logit_laplace_loss_op.provide("native", _native_loss, **_native_limits)
logit_laplace_loss_op.provide("triton", _triton.launcher("logit_laplace", "logit_laplace_loss"), **_triton_limits)
logit_laplace_loss_op.provide("reference", reference.logit_laplace_loss)
logit_laplace_loss_backward_op.provide("native", _native_backward, **_native_limits)
logit_laplace_loss_backward_op.provide(
    "triton", _triton.launcher("logit_laplace", "logit_laplace_loss_backward"), **_triton_limits
)
logit_laplace_loss_backward_op.provide("reference", reference.logit_laplace_loss_backward)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_loss: Tensor):
    return None, *logit_laplace_loss_backward_op(grad_loss, *ctx.saved_tensors, ctx.reduction), None


logit_laplace_loss_op.register_autograd(_backward, _setup_context)


def _well_formed(x, mu, log_b, reduction: str) -> bool:
    """Whether :func:`_check` would find nothing wrong: one condition, for an eager call's time."""
    return (
        isinstance(x, Tensor)
        and isinstance(mu, Tensor)
        and isinstance(log_b, Tensor)
        and x.is_floating_point()
        and mu.is_floating_point()
        and log_b.is_floating_point()
        and x.shape == mu.shape == log_b.shape
        and x.device == mu.device == log_b.device
        and reduction in REDUCTIONS
        and not x.requires_grad
    )


def _check(x, mu, log_b, reduction: str) -> None:
    """Raise one clear sentence unless the arguments are right; x may require a gradient where none is recorded."""
    for name, tensor in (("x", x), ("mu", mu), ("log_b", log_b)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"expected {name} as a floating-point tensor, got {got}; convert it with {name}.float()")
        if tensor.shape != x.shape:
            raise ValueError(
                f"expected {name} of x's shape {tuple(x.shape)}, got {tuple(tensor.shape)}; expand it first"
            )
        if tensor.device != x.device:
            raise ValueError(f"expected {name} on x's device {x.device}, got {tensor.device}; move it with .to()")
    if reduction not in REDUCTIONS:
        raise ValueError(f"expected a reduction among {', '.join(REDUCTIONS)}, got {reduction!r}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("expected x without a gradient, since the loss has none for its pixels; pass x.detach()")


@names_wrong_types
def logit_laplace_loss(x: Tensor, mu: Tensor, log_b: Tensor, reduction: str = "mean") -> Tensor:
    """Negative log likelihood, in nats a value, of pixels under the logit-Laplace distribution (paper appendix A.3).

    ``-ln f(x | mu, b)`` with ``f = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))`` on (0, 1).

    Args:
        x: the pixels after :func:`map_pixels`, strictly inside (0, 1). They are data: no gradient reaches them. A value
            at or outside the ends gives an infinite or NaN loss, as the density says.
        mu, log_b: the decoder's location and ln b, of x's shape and on its device; any strides and floating dtypes.
        reduction: "mean" or "sum" over every value, or "none" for a loss of x's shape.

    Returns:
        The loss in float32 (float64 when any input is float64), whatever the inputs' dtypes. Gradients go to mu and
        log_b.

    Raises:
        TypeError, ValueError: an input that is not floating, of another shape or on another device, an unknown
            reduction, or an x that requires a gradient.
    """
    if not _well_formed(x, mu, log_b, reduction):
        _check(x, mu, log_b, reduction)
    return logit_laplace_loss_op(x, mu, log_b, reduction)


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < 0.5:
        raise ValueError(f"expected epsilon strictly between 0 and 0.5, got {epsilon}; the paper's is 0.1")


@names_wrong_types
def map_pixels(images: Tensor, epsilon: float = 0.1) -> Tensor:
    """phi of the paper: images in [0, 1] to ``(1 - 2·epsilon)·image + epsilon``, inside (0, 1) (appendix A.3).

    The paper writes pixels as 0 .. 255; divide such images by 255 first.
    """
    _check_epsilon(epsilon)
    if not images.is_floating_point():
        raise TypeError(f"expected images as floats in [0, 1], got {images.dtype}; convert them with images / 255")
    return (1 - 2 * epsilon) * images + epsilon


@names_wrong_types
def unmap_pixels(x: Tensor, epsilon: float = 0.1) -> Tensor:
    """The inverse of :func:`map_pixels`, clamped to [0, 1]; a decoder's picture is ``unmap_pixels(sigmoid(mu))``."""
    _check_epsilon(epsilon)
    return ((x - epsilon) / (1 - 2 * epsilon)).clamp(0, 1)
