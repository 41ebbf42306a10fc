"""A linear layer of 16-bit numbers in eager training, whose bias may be float32 (paper App. D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_kernels._dispatch import dispatcher_is_needed, forced_provider
from dalle_kernels.linear.products import is_compiled, product
from dalle_kernels.linear.reference import rows_of

NARROW = (torch.float16, torch.bfloat16)


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias`` in x's dtype, float16 or bfloat16, the bias and its gradient in float32.

    A bias gradient, a sum over all rows, neither rounds to 16 bits nor leaves their range. On a CPU the products are
    summed in float32 and rounded once: torch's own in 16 bits are many times slower there, above all in the backward.

    Args:
        x: ``[..., inputs]``, float16 or bfloat16.
        weight: ``[outputs, inputs]`` of x's dtype and on its device.
        bias: ``[outputs]``, float32.

    Returns:
        ``[..., outputs]`` of x's dtype. Raises TypeError for other dtypes.
    """
    if x.dtype not in NARROW or weight.dtype != x.dtype or bias.dtype != torch.float32:
        raise TypeError(
            "mixed_linear: expected x and weight in float16 or bfloat16 and bias in float32, "
            f"got {x.dtype}, {weight.dtype} and {bias.dtype}"
        )
    return narrow_linear(x, weight, bias)


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, x and weight in one of 16 bits, the bias and its gradient in that or in float32."""
    # What a Function returns must be no view, or it could not be changed in place.
    return _NarrowLinear.apply(rows_of(x), weight, bias).view(*x.shape[:-1], len(weight))


def is_ahead(*tensors: Tensor | None) -> bool:
    """Whether the compiled product of tensors in one dtype is many times faster than torch's, and may be called.

    That is in 16 bits on a CPU with AVX2 and no more, in eager calls for which no other provider is forced.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or not first.is_cpu or first.dtype not in NARROW or not is_compiled():
        return False
    if forced_provider() not in (None, "native"):
        return False
    return not dispatcher_is_needed(tensors) and not any(map(_is_batched, tensors))


def _is_batched(tensor: Tensor | None) -> bool:
    """Whether it is of torch.autograd's own vectorization (``is_grads_batched``), which has no memory to read."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


class _NarrowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows_wanted, weight_wanted, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if weight_wanted else None, weight if rows_wanted else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(rows, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        return (
            None if weight is None else _product(grad, weight),
            None if rows is None else _product(grad.t(), rows),
            grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # A backward with create_graph is differentiated itself, which only torch's products are.
    if not torch.is_grad_enabled() and is_ahead(a, b, bias):
        return product(a, b, bias)
    dtype = a.dtype
    if a.is_cpu:
        a, b = a.float(), b.float()
    return (torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)).to(dtype)
