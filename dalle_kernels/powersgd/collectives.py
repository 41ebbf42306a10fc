"""Sums over machines whose numbers travel in 1-6-9 (paper App. E)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_codes(
    codes: Tensor, add: Callable[[Tensor], Tensor], group: dist.ProcessGroup | None, ranks: int
) -> None:
    """Replace codes by those of their sums over a process group of ``ranks``, which sends 2 bytes a number both ways.

    Each rank receives the codes of its part from all, which ``add`` sums, [ranks, numbers], and gathers the sums of the
    others. All ranks get the same bits. The ranks divide the number of codes evenly; one alone has the sums.
    """
    if ranks == 1:
        return
    parts = torch.empty_like(codes)
    # As bytes, since neither gloo nor NCCL knows int16.
    dist.all_to_all_single(parts.view(torch.uint8), codes.view(torch.uint8), group=group)
    part = add(parts.view(ranks, -1))
    # torch 2.13 deprecates the name that torch before it has.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(codes.view(torch.uint8), part.view(torch.uint8), group=group)
