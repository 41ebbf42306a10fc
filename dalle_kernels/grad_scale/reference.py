"""The two casts of per-resblock gradient scaling in plain PyTorch (paper 2.4, Figure 4). It defines the ops."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _filter(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor with 0 for every infinity and NaN, and whether there was one."""
    finite = tensor.isfinite()
    return torch.where(finite, tensor, 0), finite.logical_not().any()


def _gathered(tensors: list[Tensor], results: list[tuple[Tensor, Tensor]], device: torch.device):
    outputs = [torch.empty_like(t, dtype=r.dtype).copy_(r) for t, (r, _) in zip(tensors, results)]
    nonfinite = torch.zeros((), dtype=torch.bool, device=device)
    for _, found in results:
        nonfinite |= found
    return outputs, nonfinite


def scale_cast_filter(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    scale = scale.reshape(())
    results = [_filter((t.to(compute_dtype(t)) * scale).to(dtype)) for t in tensors]
    return _gathered(tensors, results, scale.device)


def filter_cast_unscale(tensors: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    scale = scale.reshape(())
    filtered = [_filter(t) for t in tensors]
    results = [(t.to(compute_dtype(t)) / scale, found) for t, found in filtered]
    return _gathered(tensors, results, scale.device)
