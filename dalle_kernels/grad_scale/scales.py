"""``GradScales``: one loss scale a resblock, moved after every update on the device (paper 2.4, App. D)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from dalle_kernels._arguments import names_wrong_types

# Both factors and both bounds are powers of two with exponents in thousandths, so that is what is counted.
UNIT = 1000
GROWTH = 1  # times 2^(1/1000)
BACKOFF = 500  # divided by sqrt(2)
START, LOWEST, HIGHEST = 13 * UNIT, 7 * UNIT, 24 * UNIT
WINDOW = 125
"""Updates from one division of a scale to the next, at least."""


class GradScales:
    """The loss scales of ``n_blocks`` resblocks (paper 2.4, App. D).

    Each starts at ``replicas * 2^13``. :meth:`update`, after each backward, multiplies the scale of a block whose own
    gradients are all finite by 2^(1/1000), and divides it by sqrt(2) otherwise, unless that happened less than 125
    updates ago, when it stays. It is kept within ``replicas * 2^7`` and ``replicas * 2^24``.

    Everything is on the device and changes in place; the host never waits and a captured graph replays it.

    Attributes:
        scales: float32 ``[n_blocks]``; ``scales[i]`` is block i's and follows what :meth:`update` does.
        exponents: int32 ``[n_blocks]``, thousandths: ``scales = replicas * 2^(exponents / 1000)``, without the error
            that 10,000 products would gather.
        waiting: int32 ``[n_blocks]``, the updates before the scale may be divided again.

    ``replicas``, the number of data-parallel ones, is not part of the state: a run may be resumed on fewer or more.
    """

    @names_wrong_types
    def __init__(self, n_blocks: int, replicas: int = 1, device: torch.device | str | None = None):
        if n_blocks < 0 or replicas < 1:
            raise ValueError(f"GradScales: expected n_blocks >= 0 and replicas >= 1, got {n_blocks} and {replicas}")
        self.replicas = replicas
        self.exponents = torch.full((n_blocks,), START, dtype=torch.int32, device=device)
        self.waiting = torch.zeros_like(self.exponents)
        self.scales = torch.empty(n_blocks, dtype=torch.float32, device=device)
        self._follow_exponents()

    @torch.no_grad()
    def update(self, nonfinite: Tensor) -> None:
        """Move every scale on by one update.

        ``nonfinite``, bool ``[n_blocks]`` on the scales' device: whether a gradient of the block's own parameters was
        infinite or NaN. The update of the parameters is to be skipped where ``nonfinite.any()``.
        """
        if nonfinite.dtype != torch.bool or nonfinite.shape != self.scales.shape:
            raise ValueError(
                f"GradScales.update: expected nonfinite as bool of shape {tuple(self.scales.shape)}, "
                f"got {nonfinite.dtype} of shape {tuple(nonfinite.shape)}"
            )
        divided = nonfinite & (self.waiting == 0)
        self.waiting.sub_(1).clamp_(min=0).masked_fill_(divided, WINDOW - 1)
        self.exponents.add_(nonfinite.logical_not(), alpha=GROWTH).add_(divided, alpha=-BACKOFF)
        self.exponents.clamp_(LOWEST, HIGHEST)
        self._follow_exponents()

    def state_dict(self) -> dict[str, Tensor]:
        """``exponents`` and ``waiting``, copied."""
        return {"exponents": self.exponents.clone(), "waiting": self.waiting.clone()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load in place what :meth:`state_dict` gave; ValueError, with nothing changed, where it does not fit."""
        own = {"exponents": self.exponents, "waiting": self.waiting}
        if state_dict.keys() != own.keys():
            raise ValueError(f"GradScales: expected a state of {', '.join(own)}, got {', '.join(state_dict)}")
        for name, tensor in own.items():
            if state_dict[name].shape != tensor.shape or state_dict[name].dtype != tensor.dtype:
                raise ValueError(
                    f"GradScales: expected {name} as {tensor.dtype} of shape {tuple(tensor.shape)}, got "
                    f"{state_dict[name].dtype} of shape {tuple(state_dict[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        self._follow_exponents()

    def _follow_exponents(self) -> None:
        # In float64, whose rounding to float32 is the same whatever device took the power.
        self.scales.copy_(torch.exp2(self.exponents.double() / UNIT) * self.replicas)


@torch.no_grad()
@names_wrong_types
def squared_norms(blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """The sum of squares of the gradients of each block, float32 ``[len(blocks)]``, in one pass and on the device.

    ``blocks`` holds each block's gradients as the backward left them, multiplied by the block's scale, of any shapes
    and of float16, bfloat16 or float32; at least one gradient in all. A sum is infinite or NaN where a
    gradient is (or where its square leaves float32), so that with those of the whole job added up::

        nonfinite = squared_norms(blocks).isfinite().logical_not()      # for GradScales.update, AdamW16.found_inf
        norm = (squared_norms(blocks) / scales.square()).sum().sqrt()   # of the gradients unscaled

    Gradients in 16 bits are best left multiplied by the scale, which is what holds them above underflow, until
    something divides in float32: ``AdamW16``, with one parameter group a block and their scales as ``grad_scale``, or
    ``filter_cast_unscale``, which also tells of infinities.
    """
    gradients = [gradient for block in blocks for gradient in block]
    norms = iter(torch._foreach_norm(gradients, 2, torch.float32))
    zero = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    longest = max(map(len, blocks))
    # Rows of one length, so that one sum serves all blocks, always in the same order.
    rows = [[*islice(norms, len(block)), *[zero] * (longest - len(block))] for block in blocks]
    return torch.stack([norm for row in rows for norm in row]).view(len(blocks), longest).square().sum(1)
