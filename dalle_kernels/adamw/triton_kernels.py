"""Triton kernels of AdamW16's step: two launches for any number of parameters.

Floor: bytes. A parameter, its gradient and moments in 16 bits are 8 bytes to read and 6 to write; about 60 operations
an element are below that. The first launch counts the step and works out, in float64 as the reference does, what all
elements of a parameter are multiplied with; the second makes one pass over memory. So no program of the second reads a
count that another has raised, and a GPU slow in float64 does little of it.

The arithmetic is the reference's, operation by operation: products and sums are fused only where :func:`tl.fma` says so
(``enable_fp_fusion=False``), division and root are rounded to nearest. Powers of beta are exp2(count·log2(beta)) in
float64, whose last bits may differ; after rounding to float32 they were the same wherever it was tried.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_kernels._triton_configurations import configuration
from dalle_kernels._triton_tables import DTYPES, address, located, number_given, table
from dalle_kernels.adamw.reference import LARGEST_VARIANCE
from dalle_kernels.float16.triton_kernels import decoded, encoded
from dalle_kernels.triton_philox import ROUNDING, philox_words

_FACTORS = tl.constexpr(6)


@triton.jit
def _double(bits):
    """A float64 argument, which Triton would take as float32, from its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power_of_two(scale):
    """The power of two next to a float64 that is above it, from 2^-126 to 2^126, by its exponent bits."""
    exponent = ((scale.to(tl.int64, bitcast=True) >> 52) & 0x7FF) + 1
    return (tl.minimum(tl.maximum(exponent, 1023 - 126), 1023 + 126) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["tensors", "rate1", "rate2", "log2_beta1", "log2_beta2", "lr"])
def _factors(numbers, tensors, factors, grad_scale, found_nonfinite, rate1, rate2, log2_beta1, log2_beta2, lr):
    """One program a parameter: its step counted, and its factors.

    These are mean_rate, variance_rate, root_correction, step_size, gradient_factor; and the steps before this one.
    """
    tensor = tl.program_id(0)
    step = address(numbers, tensors, tensor, 4, tl.float32, False)
    count = tl.load(step).to(tl.float64) + 1
    mean_rate = _double(rate1)
    variance_rate = _double(rate2)
    gradient_factor = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
        power = _power_of_two(scale)
        gradient_factor = (1 / power).to(tl.float32)
        scale = scale / power
        mean_rate = mean_rate / scale
        variance_rate = variance_rate / (scale * scale)
    root_correction = 1 / tl.sqrt(1 - tl.exp2(count * _double(log2_beta2)))
    step_size = _double(lr) / (1 - tl.exp2(count * _double(log2_beta1)))
    tl.store(factors + tensor * _FACTORS, mean_rate.to(tl.float32))
    tl.store(factors + tensor * _FACTORS + 1, variance_rate.to(tl.float32))
    tl.store(factors + tensor * _FACTORS + 2, root_correction.to(tl.float32))
    tl.store(factors + tensor * _FACTORS + 3, step_size.to(tl.float32))
    tl.store(factors + tensor * _FACTORS + 4, gradient_factor)
    tl.store(factors + tensor * _FACTORS + 5, tl.load(step))
    taken = True if found_nonfinite is None else tl.load(found_nonfinite) == 0
    tl.store(step, tl.load(step) + 1, taken)


@triton.jit
def _rounded_stochastically(value, words, DTYPE: tl.constexpr):
    """float32 numbers up or down, as the reference does it, without a division and without float64.

    What is dropped of a normal number's significand is how far it lies from its neighbour towards 0, as a fraction of
    the way to the other. As 2^-32 of it, rounded up, that can be compared with the words.
    """
    nearest = value.to(DTYPE)
    towards = nearest.to(tl.uint16, bitcast=True)
    # One less in its bits is one step towards 0.
    towards -= (tl.abs(nearest.to(tl.float32)) > tl.abs(value)).to(tl.uint16)
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        away = bits << 16
        finite = magnitude < 0x7F7F0000  # and below the largest
    else:
        # Half's subnormals are multiples of 2^-24.
        steps = tl.where(magnitude < 0x38800000, tl.abs(value), 0.0) * 2.0**24
        subnormal = tl.ceil((steps - tl.floor(steps)) * 2.0**32).to(tl.uint32)
        away = tl.where(magnitude < 0x38800000, subnormal, bits << 19)
        finite = magnitude < 0x477FE000
    return (towards + (finite & (words < away)).to(tl.uint16)).to(DTYPE, bitcast=True)


@triton.jit
def _rounding_words(numbers, tensors, tensor, factors, seed, start, BLOCK: tl.constexpr):
    """The words of a block whose first element is number ``start`` of the tensor."""
    row = (number_given(numbers, tensors, tensor, 5) << 32) + tl.load(factors + 5).to(tl.int64) + 1
    groups = (start // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    x0, x1, x2, x3 = philox_words(seed.to(tl.int64), row, groups, ROUNDING)
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [BLOCK])


@triton.jit
def _step_block(param, grad, first, second, index, mask, words, factors, beta1, beta2, eps, decay, limit,
                FIRST_CODED: tl.constexpr, SECOND_CODED: tl.constexpr):  # fmt: skip
    gradient = tl.load(grad + index, mask).to(tl.float32) * tl.load(factors + 4)
    mean = tl.load(first + index, mask)
    mean = decoded(mean, 9) if FIRST_CODED else mean
    variance = tl.load(second + index, mask)
    variance = decoded(variance, 10) if SECOND_CODED else variance
    value = tl.load(param + index, mask).to(tl.float32)

    mean = tl.fma(gradient, tl.load(factors), mean * beta1)
    variance = tl.minimum(tl.fma(gradient * tl.load(factors + 1), gradient, variance * beta2), limit)
    root = tl.fma(tl.sqrt_rn(variance), tl.load(factors + 2), eps + tl.zeros_like(variance))
    value = tl.fma(-tl.load(factors + 3), tl.div_rn(mean, root), value * decay)

    if words is not None:
        value = _rounded_stochastically(value, words, param.dtype.element_ty)
    tl.store(param + index, value.to(param.dtype.element_ty), mask)
    if FIRST_CODED:
        tl.store(first + index, encoded(mean.to(tl.int32, bitcast=True), 9, 23, 127)[0], mask)
    else:
        tl.store(first + index, mean, mask)
    if SECOND_CODED:
        tl.store(second + index, encoded(variance.to(tl.int32, bitcast=True), 10, 23, 127)[0], mask)
    else:
        tl.store(second + index, variance, mask)


@triton.jit(do_not_specialize=["tensors", "seed"])
def _step(numbers, owners, tensors, factors, found_nonfinite, seed, beta1, beta2, eps, decay, limit,
          PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ALIGNED: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    taken = True if found_nonfinite is None else tl.load(found_nonfinite) == 0
    if taken:
        tensor, start, count = located(numbers, owners, tensors, BLOCK)
        param = address(numbers, tensors, tensor, 0, PARAM, ALIGNED) + start
        grad = address(numbers, tensors, tensor, 1, GRAD, ALIGNED) + start
        first = address(numbers, tensors, tensor, 2, FIRST, ALIGNED) + start
        second = address(numbers, tensors, tensor, 3, SECOND, ALIGNED) + start
        factors += tensor * _FACTORS
        index = tl.arange(0, BLOCK)
        words = None if seed is None else _rounding_words(numbers, tensors, tensor, factors, seed, start, BLOCK)
        if start + BLOCK <= count:
            _step_block(param, grad, first, second, index, None, words, factors, beta1, beta2, eps, decay, limit,
                        tl.int16 == FIRST, tl.int16 == SECOND)  # fmt: skip
        else:
            _step_block(param, grad, first, second, index, index < count - start, words, factors, beta1, beta2, eps,
                        decay, limit, tl.int16 == FIRST, tl.int16 == SECOND)  # fmt: skip


def _bits(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf


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
    if not params:
        return
    chosen = configuration("adamw16_step", "any", params[0].device)
    found = table((params, grads, first_moments, second_moments, steps), chosen["BLOCK"], numbers)
    seed = None if params[0].dtype == torch.float32 else rounding_seed
    factors = torch.empty(len(params), _FACTORS.value, device=params[0].device)
    _factors[(len(params),)](
        found.numbers, found.tensors, factors, grad_scale, found_nonfinite, _bits(1 - beta1), _bits(1 - beta2),
        _bits(_log2(beta1)), _bits(_log2(beta2)), _bits(lr), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    if found.blocks:
        dtypes = (DTYPES[tensors[0].dtype] for tensors in (params, grads, first_moments, second_moments))
        _step[(found.blocks,)](
            found.numbers, found.owners, found.tensors, factors, found_nonfinite, seed, beta1, beta2, eps,
            1 - lr * weight_decay, min(max_variance, LARGEST_VARIANCE), *dtypes, found.aligned,
            enable_fp_fusion=False, **chosen.options,
        )  # fmt: skip
    # The kernels wrote through addresses, of which autograd knows nothing.
    torch.autograd.graph.increment_version(params)
