"""A linear layer in plain PyTorch: it defines the op, and is the oracle of every other provider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias``, with everything converted to ``dtype`` beforehand."""
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
