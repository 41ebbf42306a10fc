"""The steps of PowerSGD that need no other rank, for many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_kernels import philox
from dalle_kernels.float16.ops import decode_fp169, encode_fp169
from dalle_kernels.powersgd.shards import LocalShard

_ROWS_OF_A_PARAMETER = 2**32


def fixed_gaussian(shard: LocalShard, rank: int, seed: int) -> Tensor:
    """The codes of a shard's Q of step 3: standard normal numbers [matrices, n, rank], n the larger of the sizes.

    They are a function of the seed, the parameter's place, the matrix, row and column alone: every rank draws the same.
    """
    count, *sizes = shard.matrices
    device = shard.parameter.device
    first = shard.index * _ROWS_OF_A_PARAMETER
    rows = torch.arange(first, first + count * max(sizes), device=device).view(-1, 1, 1)
    uniform = philox.complement_uniform(torch.tensor(seed, device=device), rows, rank)
    return encode_fp169(torch.special.ndtri(uniform.double())).view(count, max(sizes), rank)


class Batch:
    """Shards whose matrices have equal sizes, each step of all of them by one call.

    A matrix has ``rows`` and ``columns``; the smaller of them is the paper's m, the larger one n. The shards' error
    buffers are parts of one tensor of codes from here on.
    """

    def __init__(self, shards: Sequence[LocalShard], rank: int, seed: int):
        _, rows, columns = shards[0].matrices
        self.shards = shards
        self.counts = [shard.matrices[0] for shard in shards]
        self.is_tall = rows > columns
        rank = min(rank, rows, columns)
        self.fixed = torch.cat([fixed_gaussian(shard, rank, seed) for shard in shards])
        self._keep(torch.cat([shard.errors for shard in shards]))

    def _keep(self, errors: Tensor) -> None:
        self.errors = errors
        for shard, part in zip(self.shards, errors.split(self.counts)):
            shard.errors = part

    def accumulate(self, gradients: Sequence[Tensor], skipped: Sequence[Tensor], divisors: Sequence[Tensor]) -> Tensor:
        """Step 2: the buffers [matrices, rows, columns], in float32, and the gradients over ``divisors`` added.

        Gradients that are ``skipped`` (bool) add nothing; they are zeros afterwards.
        """
        errors = decode_fp169(self.errors)
        for part, gradient, skip, divisor in zip(errors.split(self.counts), gradients, skipped, divisors):
            part.addcdiv_(gradient.masked_fill_(skip, 0).view_as(part), divisor)
        return errors

    def project(self, errors: Tensor) -> Tensor:
        """Step 3: P = E Q for the fixed Q, [matrices, m, rank]."""
        return self._wide(errors) @ decode_fp169(self.fixed)

    def project_back(self, errors: Tensor, P: Tensor) -> Tensor:
        """Step 6: Q = E' P, [matrices, n, rank]."""
        return self._wide(errors).mT @ P

    def decompress(self, P: Tensor, Q: Tensor) -> Tensor:
        """Step 11: P Q' as the gradient's matrices [matrices, rows, columns]."""
        return Q @ P.mT if self.is_tall else P @ Q.mT

    def feed_back(self, errors: Tensor, decompressed: Tensor, machines: int, kept: Tensor) -> None:
        """Step 12: what the sum of all machines' has not taken of ``errors`` (overwritten) stays for the next time.

        ``kept`` (int16, one a matrix) is 0 for buffers that are zeroed instead, and 1 otherwise.
        """
        codes = encode_fp169(errors.sub_(decompressed, alpha=1 / machines))
        self._keep(codes.mul_(kept.view(-1, 1, 1)))

    def _wide(self, errors: Tensor) -> Tensor:
        return errors.mT if self.is_tall else errors


def largest_magnitudes(gradients: Sequence[Tensor]) -> Tensor:
    """Of each gradient, in float32; NaN where there is one."""
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(gradients, math.inf)).float()
    # On a CPU torch's largest norm takes eight times as long as this.
    extremes = torch.stack([torch.stack(torch.aminmax(gradient)) for gradient in gradients])
    return extremes.float().abs().amax(1)
