"""Which calls the CUDA kernels of csrc/gumbel_softmax serve, by what registers hold, and which before Triton's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dalle_kernels import _triton
from dalle_kernels._dispatch import forced_provider

_MOST_COLUMNS = {"gumbel_softmax": 16384, "gumbel_softmax_backward": 8192}
_MOST_COLUMNS_APART = 8192
_LEAST_COLUMNS_SHOWN = 4096
_triton_unavailable = cache(_triton.unavailable)


def _unsupported_on_cuda(kernel: str, first: Tensor, dim: int) -> str | None:
    """``first`` has the columns and the rows of the call."""
    columns, most = first.shape[dim], _MOST_COLUMNS[kernel]
    if columns > most:
        return f"the CUDA kernel takes rows of at most {most} codes, got {columns}"
    if first.numel() >= columns << 31:
        return "the CUDA kernel takes fewer than 2^31 rows"
    return None


def _left_to_triton(op: str, logits: Tensor, hard: bool, dim: int) -> str | None:
    """Why Triton's kernel serves a call that the CUDA kernel could serve too, unless that one is forced.

    Soft samples of long rows on an H200 are what the CUDA kernels have been measured with.
    """
    if forced_provider() is not None or _triton_unavailable("cuda") is not None:
        return None
    columns, apart = logits.shape[dim], logits.stride(dim) != 1
    if hard or columns < _LEAST_COLUMNS_SHOWN or _triton.architecture(logits.device) < 90:
        return f"only shown to be faster for soft samples, {_LEAST_COLUMNS_SHOWN} codes and more, and sm_90"
    if apart and columns > _MOST_COLUMNS_APART:
        return f"slower than Triton's where more than {_MOST_COLUMNS_APART} codes lie apart from each other"
    # Results are contiguous, and of channels-last logits too their codes lie apart.
    apart |= math.prod(logits.shape[dim % logits.dim() + 1 :]) > 1
    if not apart and op == "gumbel_softmax_backward":
        return "no faster than Triton's where codes lie next to each other"
    if not apart and op == "gumbel_softmax_kl_backward" and logits.dtype != torch.float32:
        return "slower than Triton's for 16-bit codes that lie next to each other"
    return None


def on_cuda_too(op: str, unsupported: Callable[..., str | None]) -> Callable[..., str | None]:
    """The check of a kernel that both compiled libraries have; what follows the noise in all its ops is hard, dim."""
    kernel = op.replace("_kl", "")
    place = {"gumbel_softmax_backward": 1, "gumbel_softmax_kl_backward": 2}.get(op, 0)  # of the logits

    def checked(*args) -> str | None:
        reason = unsupported(*args)
        if reason is not None or not args[0].is_cuda:
            return reason
        *_, hard, dim = args
        return _unsupported_on_cuda(kernel, args[0], dim) or _left_to_triton(op, args[place], hard, dim)

    return checked
