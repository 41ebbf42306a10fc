"""``mixed_linear``: 16-bit products with a bias in float32, as in a resblock that trains in 16 bits (paper App. D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mixed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias`` in x's dtype, float16 or bfloat16, the bias and its gradient in float32.

    A bias gradient, a sum over all rows, neither rounds to 16 bits nor leaves their range. On a CPU the products are
    those of float32, rounded once: torch's own in 16 bits are many times slower there, above all in the backward.

    Args:
        x: ``[..., inputs]``, float16 or bfloat16.
        weight: ``[outputs, inputs]`` of x's dtype and on its device.
        bias: ``[outputs]``, float32.

    Returns:
        ``[..., outputs]`` of x's dtype. Raises TypeError for other dtypes.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype or bias.dtype != torch.float32:
        raise TypeError(
            "mixed_linear: expected x and weight in float16 or bfloat16 and bias in float32, "
            f"got {x.dtype}, {weight.dtype} and {bias.dtype}"
        )
    return _MixedLinear.apply(x, weight, bias)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu":
            out = torch.addmm(bias, rows.float(), weight.t().float()).to(x.dtype)
        else:
            out = torch.addmm(bias.to(x.dtype), rows, weight.t())
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_bias = grad_rows.sum(0, dtype=torch.float32)
        return _product(grad_rows, weight).view(x.shape), _product(grad_rows.t(), rows), grad_bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.float(), b.float()).to(a.dtype) if a.device.type == "cpu" else torch.mm(a, b)
