"""What PowerSGD does to each number of a group's matrices, in plain PyTorch; triton_kernels.py has the same for a GPU.

A group's matrices lie in flat tensors as its :class:`~dalle_kernels.powersgd.compression.Layout` tells. What is not
finite travels as numbers of int16, one a matrix: ``lost`` is 1 where a buffer is nonfinite and is to be zeroed, and a
mark, a code, is not 0 where a factor of some rank is nonfinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_kernels.float16.ops import decode_fp169, encode_fp169
from dalle_kernels.powersgd.compression import Flat, Layout


@dataclass(frozen=True)
class Room:
    """What a group's steps write into where they find zeros, so that one launch makes them all.

    ``largest``: float32, one a gradient. ``P`` and ``Q``: codes of the factor, of the matrices' marks, and padding.
    """

    largest: Tensor
    P: Tensor
    Q: Tensor

    @classmethod
    def make(cls, layout: Layout, ranks: int) -> Room:
        """``ranks`` divide the codes of P and of Q evenly."""
        used = [2 * len(layout.shards), *(factors.numel + layout.matrices for factors in (layout.P, layout.Q))]
        used[1:] = [count + -count % ranks for count in used[1:]]
        # Each begins where memory is best read.
        padded = [count + -count % 64 for count in used]
        zeros = torch.zeros(sum(padded), dtype=torch.int16, device=layout.device).split(padded)
        largest, *codes = (part[:count] for part, count in zip(zeros, used))
        return cls(largest.view(torch.float32), *codes)


def accumulate(
    layout: Layout, gradients: Sequence[Tensor], codes: Tensor, divisors: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 2: the buffers in float32 with the gradients over their divisors added, those that are finite.

    A gradient whose quotient leaves float32's range is not added either, and its buffer counts as nonfinite. Numbers of
    gradients that are not added may be lost. ``largest`` becomes each gradient's largest magnitude, NaN where it has
    one.

    Returns the buffers, flat, and ``lost``.
    """
    largest.copy_(largest_magnitudes(gradients))
    added = largest / divisors < torch.inf
    errors = decode_fp169(codes)
    sizes = [gradient.numel() for gradient in gradients]
    for part, gradient, skip, divisor in zip(errors.split(sizes), gradients, added.logical_not(), divisors):
        part.addcdiv_(gradient.masked_fill_(skip, 0).view(-1), divisor)
    lost = (largest < torch.inf) & added.logical_not()
    return errors, lost.to(torch.int16).index_select(0, layout.owners_on_device)


def largest_magnitudes(gradients: Sequence[Tensor]) -> Tensor:
    """Of each gradient, in float32; NaN where there is one."""
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, math.inf)).float()
    # On a CPU torch's largest norm takes eight times as long as this.
    extremes = torch.stack([torch.stack(torch.aminmax(gradient)) for gradient in gradients])
    return extremes.float().abs().amax(1)


def encode(layout: Layout, factors: Flat, numbers: Tensor, before: Tensor, divisor: float, codes: Tensor) -> None:
    """Into ``codes``, which are 0: those of ``factors``, the layout's P or Q, over ``divisor``, then the marks.

    A mark is 1 where the factor is nonfinite, or ``before`` (int16, one a matrix) is not 0.
    """
    # The largest norm is NaN where a number is; comparing is one operation, isfinite several.
    largest = [torch.linalg.vector_norm(factor, torch.inf, dim=(1, 2)) for factor in factors.views(numbers)]
    marks = (torch.cat(largest) < torch.inf).logical_not_().logical_or_(before != 0)
    both = encode_fp169(torch.cat([numbers / divisor, marks.float()]))
    codes[: len(both)] = both


def add(codes: Tensor) -> Tensor:
    """The codes of the sums over the ranks of [ranks, numbers], added in float32 in their order."""
    return encode_fp169(decode_fp169(codes).sum(0))


def stacked(layout: Layout, codes: Tensor) -> Tensor:
    """The numbers of P's codes as the stacks in which they are orthogonalized, flat."""
    numbers = decode_fp169(codes[: layout.P.numel])
    if layout.together.numel == layout.P.numel:
        return numbers
    stacks = numbers.new_zeros(layout.together.numel)
    parts = layout.parts_of_stacks(layout.together.views(stacks))
    torch._foreach_copy_(parts, layout.P.views(numbers))
    return stacks


def scaled(layout: Layout, codes: Tensor, largest: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The numbers of Q's codes times ``factor``, zeros where a matrix is marked; and the square of their norm.

    That is infinite where one is marked, or one of the gradients, whose magnitudes ``largest`` are, is not finite.
    """
    Q = decode_fp169(codes[: layout.Q.numel])
    marks = codes[layout.Q.numel :][: layout.matrices] != 0
    factors = torch.where(marks, 0.0, factor)
    parts = layout.Q.views(Q)
    counts = [len(part) for part in parts]
    torch._foreach_mul_(parts, [part.view(-1, 1, 1) for part in factors.split(counts)])
    square = torch.stack(torch._foreach_norm(parts)).square().sum()
    nonfinite = marks.any() | (largest < torch.inf).logical_not().any()
    return Q, square.masked_fill_(nonfinite, torch.inf)


def feed_back(
    layout: Layout, errors: Tensor, decompressed: Tensor, codes: Tensor, lost: Tensor, machines: int
) -> Tensor:
    """Step 12: the codes of what the sum of all machines' has not taken of ``errors``, or zeros where that is lost.

    ``errors`` and ``codes``, those of the buffers before, may be overwritten.
    """
    codes = encode_fp169(errors.sub_(decompressed, alpha=1 / machines))
    parts = layout.errors.views(codes)
    kept = (1 - lost).split([len(part) for part in parts])
    torch._foreach_mul_(parts, [part.view(-1, 1, 1) for part in kept])
    return codes


def bound(layout: Layout, decompressed: Tensor, factors: Tensor | None, square: Tensor) -> None:
    """Make ``square`` infinite where a decompressed number, times its gradient's factor, is beyond float16."""
    largest = largest_magnitudes(decompressed.split([shard.shape.numel() for shard in layout.shards]))
    if factors is not None:
        largest = largest * factors
    square.masked_fill_((largest > torch.finfo(torch.float16).max).any(), torch.inf)


def give(
    layout: Layout, decompressed: Tensor, gradients: Sequence[Tensor], factors: Tensor | None, square: Tensor
) -> None:
    """The decompressed sums into the gradients.

    With ``factors``, one a gradient, they are multiplied by these, and all infinite where ``square`` is.
    """
    parts = decompressed.split([gradient.numel() for gradient in gradients])
    if factors is not None:
        for part, factor in zip(parts, factors):
            part.mul_(factor)
        decompressed.masked_fill_(square == torch.inf, torch.inf)
    torch._foreach_copy_(list(gradients), [part.view_as(gradient) for part, gradient in zip(parts, gradients)])
