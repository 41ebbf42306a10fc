"""Which calls the CUDA kernels of csrc/gumbel_softmax serve, by what registers hold, and which before Triton's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle_kernels import _triton

_MOST_COLUMNS = {"gumbel_softmax": 16384, "gumbel_softmax_backward": 8192}

AHEAD = {
    **{("gumbel_softmax", dtype, False): (8192, 16384) for dtype in (torch.float32, torch.bfloat16)},
    **{
        (op, dtype, True): (8192, 8192)
        for op in ("gumbel_softmax_kl", "gumbel_softmax_kl_backward")
        for dtype in (torch.float32, torch.bfloat16)
    },
}
"""By op, dtype and whether codes lie apart in memory: from how many codes on, and up to how many, a run on an H200 has
shown the CUDA kernel ahead of Triton's for soft samples. Of anything else, and on other GPUs, it is opt-in."""


def _unsupported_on_cuda(kernel: str, first: Tensor, dim: int) -> str | None:
    """``first`` has the columns and the rows of the call."""
    columns, most = first.shape[dim], _MOST_COLUMNS[kernel]
    if columns > most:
        return f"the CUDA kernel takes rows of at most {most} codes, got {columns}"
    if first.numel() >= columns << 31:
        return "the CUDA kernel takes fewer than 2^31 rows"
    return None


def _left_to_triton(op: str, logits: Tensor, hard: bool, dim: int) -> str | None:
    """Why Triton's kernel serves a call that the CUDA kernel could serve too, unless that one is forced."""
    # Results are contiguous, and of channels-last logits too their codes lie apart.
    apart = logits.stride(dim) != 1 or math.prod(logits.shape[dim % logits.dim() + 1 :]) > 1
    columns, (least, most) = logits.shape[dim], AHEAD.get((op, logits.dtype, apart), (1, 0))
    return _triton.left_to_triton(logits.device, not hard and least <= columns <= most)


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
