"""Two linear layers with GELU between them in plain PyTorch: it defines the op, and is the oracle of the native one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.linear.reference import rows_of


def mlp(
    x: Tensor, expansion: Tensor, expansion_bias: Tensor, contraction: Tensor, contraction_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``[..., dim]``, and what the backward needs: the hidden layer before its bias and GELU, ``[width, rows]``."""
    hidden = expansion @ rows_of(x).t()
    out = F.linear(F.gelu(hidden.t() + expansion_bias), contraction, contraction_bias)
    return out.view(*x.shape[:-1], len(contraction)), hidden


def mlp_backward(
    grad_out: Tensor, x: Tensor, hidden: Tensor, expansion: Tensor, expansion_bias: Tensor, contraction: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of :func:`mlp`'s arguments, in their order."""
    grad_rows, biased = rows_of(grad_out), hidden.t() + expansion_bias
    grad_hidden = torch.ops.aten.gelu_backward(grad_rows @ contraction, biased)
    return (
        (grad_hidden @ expansion).view(x.shape),
        grad_hidden.t() @ rows_of(x),
        grad_hidden.sum(0),
        grad_rows.t() @ F.gelu(biased),
        grad_rows.sum(0),
    )
