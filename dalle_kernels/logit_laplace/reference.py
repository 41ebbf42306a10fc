"""The logit-Laplace negative log likelihood in plain PyTorch: the definition of the op, in any floating dtype.

With ``d = logit(x) - mu``: ``loss = |d|/b + ln b + ln 2 + ln x + ln(1 - x)``. Arithmetic is float32 (float64 when any
input is float64); a reduced loss is summed in float64, since a picture has 200,000 values and a batch many pictures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: float64 when any input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def logit_laplace_loss(x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> Tensor:
    dtype = compute_dtype(x, mu, log_b)
    x, mu, log_b = x.to(dtype), mu.to(dtype), log_b.to(dtype)
    log_x, log_complement = x.log(), (-x).log1p()
    deviation = (log_x - log_complement - mu).abs_().mul_((-log_b).exp())
    loss = deviation.add_(log_b).add_(log_x).add_(log_complement).add_(math.log(2.0)).contiguous()
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.float64)
    return (total / loss.numel() if reduction == "mean" else total).to(dtype)


def logit_laplace_loss_backward(
    grad_loss: Tensor, x: Tensor, mu: Tensor, log_b: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """d loss / d mu = -sign(d)/b and d loss / d log_b = 1 - |d|/b; at d = 0 the first is 0, as torch's sign gives."""
    dtype = compute_dtype(x, mu, log_b)
    grad = grad_loss / x.numel() if reduction == "mean" else grad_loss
    inverse_b = (-log_b.to(dtype)).exp_()
    deviation = x.to(dtype).logit().sub_(mu.to(dtype))
    grad_mu = (-grad) * deviation.sign() * inverse_b
    grad_log_b = grad * (1 - deviation.abs_().mul_(inverse_b))
    return grad_mu.to(mu.dtype).contiguous(), grad_log_b.to(log_b.dtype).contiguous()
