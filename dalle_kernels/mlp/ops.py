"""The operators ``mlp`` and ``mlp_backward``, their checks and their providers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_kernels import _native
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op, has_transform
from dalle_kernels.linear.ops import check_linear, linear
from dalle_kernels.linear.products import product
from dalle_kernels.linear.reference import rows_of
from dalle_kernels.mlp import reference


def _fake(x, expansion, expansion_bias, contraction, contraction_bias):
    rows = x.shape[:-1].numel()
    return x.new_empty((*x.shape[:-1], contraction.shape[0])), x.new_empty((expansion.shape[0], rows))


def _backward_fake(grad_out, x, hidden, expansion, expansion_bias, contraction):
    gradients = (x, expansion, expansion_bias, contraction)
    return *(tensor.new_empty(tensor.shape) for tensor in gradients), x.new_empty(contraction.shape[:1])


def _sizes(hidden: Tensor) -> tuple[int, int, int]:
    """The first arguments of both kernels: dtype, width, rows."""
    return _native.DTYPES[hidden.dtype], *hidden.shape


def _native_forward(x, expansion, expansion_bias, contraction, contraction_bias):
    hidden = product(expansion, rows_of(x).t())
    activation = torch.empty_like(hidden)
    addresses = (hidden.data_ptr(), expansion_bias.data_ptr(), activation.data_ptr())
    _native.call("bias_gelu", x.device, *_sizes(hidden), *addresses)
    out = product(activation.t(), contraction.t(), contraction_bias)
    return out.view(*x.shape[:-1], len(contraction)), hidden


def _native_backward(grad_out, x, hidden, expansion, expansion_bias, contraction):
    rows, grad_rows = rows_of(x), rows_of(grad_out)
    grad_hidden = product(contraction.t(), grad_rows.t())
    activation, grad_expansion_bias = torch.empty_like(hidden), torch.empty_like(expansion_bias)
    tensors = (hidden, expansion_bias, grad_hidden, activation, grad_expansion_bias)
    _native.call("bias_gelu_backward", x.device, *_sizes(hidden), *(tensor.data_ptr() for tensor in tensors))
    return (
        product(grad_hidden.t(), expansion).view(x.shape),
        product(grad_hidden, rows),
        grad_expansion_bias,
        product(grad_rows.t(), activation.t()),
        grad_rows.sum(0),
    )


def _unsupported(hidden_like: Tensor, expansion_bias: Tensor) -> str | None:
    if expansion_bias.dtype == torch.float64:
        return "the compiled kernel takes float32, float16 and bfloat16, got float64"
    # What mlp saves is contiguous; a compiler that calls the operators may choose the layout.
    if not (hidden_like.is_contiguous() and expansion_bias.is_contiguous()):
        return "the compiled kernel takes a contiguous hidden layer and bias"
    return None


_forward = Op(
    "mlp(Tensor x, Tensor expansion, Tensor expansion_bias, Tensor contraction, Tensor contraction_bias)"
    " -> (Tensor out, Tensor hidden)",
    _fake,
)
_backward = Op(
    "mlp_backward(Tensor grad_out, Tensor x, Tensor hidden, Tensor expansion, Tensor expansion_bias,"
    " Tensor contraction) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
_forward.provide(
    "native",
    _native_forward,
    unavailable=_native.unavailable_but_on_cpu,
    unsupported=lambda x, expansion, expansion_bias, *_: _unsupported(expansion_bias, expansion_bias),
)
_forward.provide("reference", reference.mlp)
_backward.provide(
    "native",
    _native_backward,
    unavailable=_native.unavailable_but_on_cpu,
    unsupported=lambda grad_out, x, hidden, expansion, expansion_bias, _: _unsupported(hidden, expansion_bias),
)
_backward.provide("reference", reference.mlp_backward)


def _setup_context(ctx, inputs, output) -> None:
    _, hidden = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(inputs[0], hidden, *inputs[1:4])


def _gradients(ctx, grad_out: Tensor | None, _grad_hidden):
    return (None,) * 5 if grad_out is None else _backward(grad_out, *ctx.saved_tensors)


_forward.register_autograd(_gradients, _setup_context)


@names_wrong_types
def mlp(x: Tensor, expansion: Tensor, expansion_bias: Tensor, contraction: Tensor, contraction_bias: Tensor) -> Tensor:
    """``linear(gelu(linear(x, expansion, expansion_bias)), contraction, contraction_bias)``.

    In eager training on a CPU, where every argument wants a gradient, compiled kernels take bias and GELU in one pass
    and their gradients in another, and of the hidden layer only what comes before GELU is kept for the backward: half
    of what plain PyTorch keeps. Otherwise, and under autocast, a transform of ``torch.func`` or a compiler, it is that
    very expression of :func:`linear`. Differentiable once there.

    Args:
        x: ``[..., dim]``, floating.
        expansion, expansion_bias: ``[width, dim]`` and ``[width]``, of x's dtype and on its device.
        contraction, contraction_bias: ``[outputs, width]`` and ``[outputs]`` of the same.

    Returns:
        ``[..., outputs]``.

    Raises:
        TypeError, ValueError: for other dtypes, devices or shapes.
    """
    tensors = (x, expansion, expansion_bias, contraction, contraction_bias)
    if not x.is_cpu or not _trains_eagerly(tensors):
        return linear(F.gelu(linear(x, expansion, expansion_bias)), contraction, contraction_bias)
    check_linear(x, expansion, expansion_bias)
    check_linear(expansion.t(), contraction, contraction_bias)
    out, _ = _forward(*tensors)
    return out


def _trains_eagerly(tensors: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(tensor.requires_grad for tensor in tensors) and not has_transform()
