"""A linear layer of 16-bit numbers in eager training, whose bias may be float32 (paper App. D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_kernels._dispatch import dispatcher_is_needed
from dalle_kernels.linear.products import is_compiled, product

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
    return NarrowLinear.apply(x, weight, bias)


def is_ahead(*tensors: Tensor | None) -> bool:
    """Whether the compiled product of tensors in one dtype is many times faster than torch's, and can be called.

    That is in 16 bits on a CPU without AVX-512, in eager calls.
    """
    narrow = not torch.compiler.is_compiling() and tensors[0].is_cpu and tensors[0].dtype in NARROW
    return narrow and is_compiled(alike=True) and not dispatcher_is_needed(tensors)


class NarrowLinear(torch.autograd.Function):
    """``x @ weight.T + bias``, x and weight in one of 16 bits, the bias and its gradient in that or in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = _product(x.reshape(-1, x.shape[-1]), weight.t(), bias)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_wanted, weight_wanted, bias_wanted = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad_rows, weight).view(x.shape) if x_wanted else None,
            _product(grad_rows.t(), rows) if weight_wanted else None,
            grad_rows.sum(0, dtype=ctx.bias_dtype) if bias_wanted else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    # A backward with create_graph is differentiated itself, which only torch's products are.
    if not torch.is_grad_enabled() and is_ahead(a, b, bias):
        return product(a, b, bias)
    dtype = a.dtype
    if a.is_cpu:
        a, b = a.float(), b.float()
    return (torch.mm(a, b) if bias is None else torch.addmm(bias.to(a.dtype), a, b)).to(dtype)
