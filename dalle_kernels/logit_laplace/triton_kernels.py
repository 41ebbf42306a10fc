"""Triton kernels of the logit-Laplace loss: one pass forward and one backward, tensors of any strides read in place.

Floor: bytes. In float32 12 an element forward (16 without a reduction) and 20 backward, half of that in 16 bits; for
[8, 3, 256, 256] that is 5 and 8 us on an H200 at 4.3 TB/s, little more than launches, for 512 pictures 280 and 470 us.
Arithmetic is about 75 instructions an element forward and 60 backward, 250 and 200 us for 512 pictures: below the bytes
in float32, above them in 16 bits. They have run on an H200; no time
of theirs without that of the launch was taken.

A reduced loss is summed in float64: blocks of a fixed size first, then their sums in order by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import configuration
from dalle_kernels.triton_elements import first_of_block, is_wide, layout, places
from dalle_kernels.triton_math import exponential, natural_log

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(tensor, index, count, sizes, strides):
    """Elements number ``index`` in float32."""
    return tl.load(tensor + places(index, sizes, strides), index < count, other=0.5).to(tl.float32)


@triton.jit
def _forward(x, mu, log_b, output, count, sizes, x_strides, mu_strides, log_b_strides, REDUCED: tl.constexpr,
             WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Each element's loss, or the sum of the program's in float64."""
    index = first_of_block(BLOCK, WIDE) + tl.arange(0, BLOCK)
    x_value = _load(x, index, count, sizes, x_strides)
    spread = _load(log_b, index, count, sizes, log_b_strides)
    log_x, log_complement = natural_log(x_value), natural_log(1.0 - x_value)
    deviation = tl.abs(log_x - log_complement - _load(mu, index, count, sizes, mu_strides))
    loss = deviation * exponential(-spread) + spread + log_x + log_complement + _LN_2
    if REDUCED:
        loss = tl.where(index < count, loss.to(tl.float64), 0.0)
        tl.store(output + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(output + index, loss, index < count)


@triton.jit
def _total(partial, loss, parts, count, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        index = first + tl.arange(0, BLOCK)
        sums += tl.load(partial + index, index < parts, other=0.0)
    total = tl.sum(sums, 0)
    if MEAN:
        total = total / (tl.zeros([], tl.float64) + count)
    tl.store(loss, total.to(tl.float32))


@triton.jit
def _backward(grad, x, mu, log_b, grad_mu, grad_log_b, count, sizes, grad_strides, x_strides, mu_strides,
              log_b_strides, MEAN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    index = first_of_block(BLOCK, WIDE) + tl.arange(0, BLOCK)
    upstream = _load(grad, index, count, sizes, grad_strides)
    if MEAN:
        # Not times an inverse, which would have been rounded before: the same error in every gradient.
        upstream = tl.div_rn(upstream, tl.zeros([], tl.float32) + count)
    x_value = _load(x, index, count, sizes, x_strides)
    inverse_b = exponential(-_load(log_b, index, count, sizes, log_b_strides))
    deviation = natural_log(tl.div_rn(x_value, 1.0 - x_value)) - _load(mu, index, count, sizes, mu_strides)
    sign = tl.where(deviation > 0, 1.0, 0.0) - tl.where(deviation < 0, 1.0, 0.0)
    kept = index < count
    tl.store(grad_mu + index, (-upstream * sign * inverse_b).to(grad_mu.dtype.element_ty), kept)
    value = upstream * tl.fma(-tl.abs(deviation), inverse_b, 1.0)
    tl.store(grad_log_b + index, value.to(grad_log_b.dtype.element_ty), kept)


def _grid(count: int, block: int) -> tuple[int]:
    return (max(1, triton.cdiv(count, block)),)


def logit_laplace_loss(x: Tensor, mu: Tensor, log_b: Tensor, reduction: str) -> Tensor:
    reduced, count = reduction != "none", x.numel()
    loss = x.new_empty(() if reduced else x.shape, dtype=torch.float32)
    chosen = configuration("logit_laplace_loss", "reduced" if reduced else "each", x.device)
    grid, wide = _grid(count, chosen["BLOCK"]), is_wide(count, chosen["BLOCK"])
    output = x.new_empty(grid, dtype=torch.float64) if reduced else loss
    _forward[grid](x, mu, log_b, output, count, *layout(x, mu, log_b), reduced, wide, **chosen.options)
    if reduced:
        _total[(1,)](output, loss, grid[0], count, reduction == "mean", BLOCK=1024)
    return loss


def logit_laplace_loss_backward(
    grad_loss: Tensor, x: Tensor, mu: Tensor, log_b: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    grad_mu, grad_log_b = mu.new_empty(mu.shape), log_b.new_empty(log_b.shape)
    count, grad = x.numel(), grad_loss.expand(x.shape)
    chosen = configuration("logit_laplace_loss_backward", "each", x.device)
    _backward[_grid(count, chosen["BLOCK"])](
        grad, x, mu, log_b, grad_mu, grad_log_b, count, *layout(grad, x, mu, log_b), reduction == "mean",
        is_wide(count, chosen["BLOCK"]), **chosen.options,
    )  # fmt: skip
    return grad_mu, grad_log_b
