"""A linear layer in plain PyTorch: it defines the op, and is the oracle of every other provider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(tensor: Tensor) -> Tensor:
    """``[..., dim]`` as a matrix ``[rows, dim]``."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias``, with everything converted to ``dtype`` beforehand.

    Where a GPU's library sums a 16-bit product in float32 and can return that, no weight is copied.
    """
    differentiable = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    narrow = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    if narrow and x.numel() and not differentiable:
        product = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=dtype).unflatten(0, x.shape[:-1])
        return product if bias is None else product + bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
