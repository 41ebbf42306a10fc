"""The AdamW16 step in plain PyTorch. It defines the arithmetic: compiled kernels give the same bits.

float32 (float64 for float64 parameters), each operation rounded on its own but for four sums of a product, which are
rounded once, as a fused multiply-add does. Where a seed is given, 16-bit parameters are rounded stochastically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels import philox
from dalle_kernels.float16 import reference as float16
from dalle_kernels.float16.reference import FP0610, FP169, Format

LARGEST_VARIANCE = torch.finfo(torch.float32).max
SMALLEST_POWER = torch.finfo(torch.float32).smallest_normal


def adamw16_step(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_variance: float,
    grad_scale: Tensor | None,
    found_nonfinite: Tensor | None,
    rounding_seed: int | None,
    numbers: list[int],
) -> None:
    # Tensors of one element may have dimensions, which others would take over.
    grad_scale = None if grad_scale is None else grad_scale.reshape(())
    found_nonfinite = None if found_nonfinite is None else found_nonfinite.reshape(())
    lists = (params, grads, first_moments, second_moments, steps)
    for index, (param, grad, first_moment, second_moment, step) in enumerate(zip(*lists)):
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        # What all elements are multiplied with is worked out in float64, on the device, and rounded once.
        count = step.double().reshape(()) + 1
        scale = torch.ones_like(count) if grad_scale is None else grad_scale.double()
        # Gradients are divided by the scale's power of two first, which rounds nothing: the square of the whole scale
        # may be far out of float32's range, and so may that of a gradient as it comes.
        power = (scale / scale.frexp().mantissa).clamp(SMALLEST_POWER, 1 / SMALLEST_POWER)
        gradient = grad.to(dtype) * (1 / power).to(dtype)
        scale = scale / power
        mean_rate = ((1 - beta1) / scale).to(dtype)
        variance_rate = ((1 - beta2) / (scale * scale)).to(dtype)
        root_correction = (1 / (1 - beta2**count).sqrt()).to(dtype)
        step_size = (lr / (1 - beta1**count)).to(dtype)
        smallest_root = torch.full_like(step_size, eps)
        limit = torch.full_like(step_size, min(max_variance, LARGEST_VARIANCE))

        mean = _multiply_add(gradient, mean_rate, _read(first_moment, dtype, FP169) * beta1)
        variance = _read(second_moment, dtype, FP0610) * beta2
        variance = torch.fmin(_multiply_add(gradient * variance_rate, gradient, variance), limit)
        # torch's float32 root may be the neighbour of the correctly rounded one.
        root = _multiply_add(variance.double().sqrt().to(dtype), root_correction, smallest_root)
        value = _multiply_add(-step_size, mean / root, param.to(dtype) * (1 - lr * weight_decay))

        if rounding_seed is None or param.dtype not in (torch.float16, torch.bfloat16):
            value = value.to(param.dtype)
        else:
            row = (numbers[index] << 32) + step.long() + 1
            value = stochastically_rounded(value, param.dtype, rounding_seed, row)
        for tensor, new in (
            (param, value),
            (first_moment, _written(mean, first_moment.dtype, FP169)),
            (second_moment, _written(variance, second_moment.dtype, FP0610)),
            (step, step + 1),
        ):
            tensor.copy_(new if found_nonfinite is None else torch.where(found_nonfinite, tensor, new))


def stochastically_rounded(value: Tensor, dtype: torch.dtype, seed: int, row: Tensor) -> Tensor:
    """float32 numbers as float16 or bfloat16, each up or down with the probabilities that keep its mean.

    ``value`` lies d of the way from its neighbour towards 0 to the one away from it: it becomes the latter where
    random bits * 2^-32 < d. The bits are Philox's for ``seed``, int64 ``row`` (one element) and, as column, the number
    of the element. What lies beyond the largest finite number becomes that number; infinities and NaN stay.
    """
    rounded = value.to(dtype)
    # One less in its bits is one step towards 0.
    towards = rounded.view(torch.int16) - (rounded.float().abs() > value.abs()).short()
    low, high = towards.view(dtype).double(), (towards + 1).view(dtype).double()
    distance = (value.double() - low) / (high - low)
    seed = torch.tensor(seed, dtype=torch.int64, device=value.device)
    words = philox.random_bits(seed, row.view(1, 1, 1), value.numel(), philox.ROUNDING)
    bits = torch.stack(words, dim=-1).flatten()[: value.numel()].view(value.shape)
    return (towards + (bits * 2.0**-32 < distance).short()).view(dtype)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c rounded once to c's dtype, float32 (in float64: twice)."""
    if c.dtype == torch.float64:
        return a * b + c
    product, c = a.double() * b.double(), c.double()  # both exact
    total = product + c
    # What the sum lost (Knuth's two-sum). Where it lost anything, an odd last bit keeps the next rounding from
    # mistaking it for a tie.
    part = total - product
    lost = (product - (total - part)) + (c - part)
    is_odd = (total.view(torch.int64) & 1).bool()
    towards = torch.copysign(torch.full_like(total, torch.inf), lost)
    return torch.where((lost == 0) | lost.isnan() | is_odd, total, torch.nextafter(total, towards)).float()


def _read(moment: Tensor, dtype: torch.dtype, form: Format) -> Tensor:
    return float16.decode(moment, dtype, form) if moment.dtype == torch.int16 else moment.to(dtype)


def _written(moment: Tensor, dtype: torch.dtype, form: Format) -> Tensor:
    return float16.encode(moment, form)[0] if dtype == torch.int16 else moment.to(dtype)
