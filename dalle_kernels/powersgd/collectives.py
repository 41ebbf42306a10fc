"""Sums over machines whose numbers travel in 1-6-9 (paper App. E)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_kernels.float16.ops import decode_fp169, encode_fp169


def all_reduce_fp169(numbers: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of a float32 vector over a process group, which sends 2 bytes a number both ways.

    Each rank receives the codes of its part from all, adds them in float32 in the order of the ranks, and gathers the
    encoded sums of the others. Every encoding saturates at ±15.984375. All ranks get the same bits.
    """
    ranks = dist.get_world_size(group)
    count = numbers.numel()
    codes = encode_fp169(torch.nn.functional.pad(numbers, (0, -count % ranks)) if count % ranks else numbers)
    parts = torch.empty_like(codes)
    # As bytes, since neither gloo nor NCCL knows int16.
    dist.all_to_all_single(parts.view(torch.uint8), codes.view(torch.uint8), group=group)
    part = encode_fp169(decode_fp169(parts.view(ranks, -1)).sum(0))
    # torch 2.13 deprecates the name that torch before it has.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(codes.view(torch.uint8), part.view(torch.uint8), group=group)
    return decode_fp169(codes)[:count]


def sum_factors(
    factors: Sequence[Tensor], nonfinite: Tensor, divisor: float, group: dist.ProcessGroup | None
) -> tuple[list[Tensor], Tensor]:
    """The sums over a group of many factors, each first divided by ``divisor``, by one pair of collectives.

    ``factors`` are float32 [matrices, rows, rank] each; ``nonfinite`` (bool, one for every matrix) marks those that
    count as nonfinite whatever they hold. A code holds no infinity and no NaN, so each matrix's mark travels beside the
    factors as one number more.

    Returns the sums in float32, still divided, and for every matrix whether it is finite on every rank (bool).
    """
    # The largest norm is NaN where a number is; comparing is one operation, isfinite several.
    largest = torch.cat([torch.linalg.vector_norm(factor, torch.inf, dim=(1, 2)) for factor in factors])
    found = (largest < torch.inf).logical_not_().logical_or_(nonfinite)
    numbers = torch.cat([*(factor.flatten() for factor in factors), found.float()])
    numbers[: -len(found)].div_(divisor)
    sums = all_reduce_fp169(numbers, group)
    *flat, marks = sums.split([*(factor.numel() for factor in factors), len(found)])
    return [part.view_as(factor) for part, factor in zip(flat, factors)], marks == 0
