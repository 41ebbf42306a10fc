"""The operator ``linear``, its checks, its providers, and the layer to drop in for ``torch.nn.Linear``."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_kernels import _native
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op, any_autocast, has_transform
from dalle_kernels.linear import reference
from dalle_kernels.linear.products import DTYPES, is_compiled, product
from dalle_kernels.linear.training import NARROW, is_ahead, mixed_linear, narrow_linear

FEW_ROWS = 64
"""Up to as many rows a compiled kernel that packs nothing is faster than a matrix product."""


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    outputs, inputs = weight.shape
    if not _are_few_rows(x):
        return product(reference.rows_of(x), weight.t(), bias, dtype=dtype).view(*x.shape[:-1], outputs)
    # For a matrix not by torch.empty, which takes twice as long to read its arguments.
    if x.dim() == 2:
        out = torch.empty_strided((x.shape[0], outputs), (outputs, 1), dtype=dtype)
    else:
        out = torch.empty((*x.shape[:-1], outputs), dtype=dtype)
    _native.call(
        "linear",
        x.device,
        _native.DTYPES[x.dtype],
        _native.DTYPES[dtype],
        x.numel() // inputs,
        inputs,
        outputs,
        x.data_ptr(),
        x.stride()[0] if x.dim() == 2 else inputs,
        weight.data_ptr(),
        weight.stride()[0],
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def _are_few_rows(x: Tensor) -> bool:
    return x.numel() <= FEW_ROWS * x.shape[-1]


def _native_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    if x.dtype not in DTYPES or dtype not in (x.dtype, torch.float32):
        return (
            f"the compiled kernel takes float32, float16 and bfloat16 to the same or float32, not {x.dtype} to {dtype}"
        )
    if x.numel() == 0 or weight.shape[0] == 0:
        return f"the compiled kernel takes no empty matrix, got {_sizes(x, weight)}"
    if not _are_few_rows(x):
        if x.dtype in NARROW and is_compiled():
            return None
        return f"more than {FEW_ROWS} rows of {x.dtype} are torch's product here, got {_sizes(x, weight)}"
    if not x.is_contiguous() and not (x.dim() == 2 and x.stride()[1] == 1):
        return "the compiled kernel takes a contiguous x, or a matrix of rows that are"
    if (weight.stride()[1] != 1 and weight.shape[1] > 1) or (bias is not None and not bias.is_contiguous()):
        return "the compiled kernel takes weights whose rows are contiguous, and a contiguous bias"
    return None


def _sizes(x: Tensor, weight: Tensor) -> str:
    return f"shapes {list(x.shape)} and {list(weight.shape)}"


linear_op = Op("linear(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor", _fake)
linear_op.provide("native", _native_linear, unavailable=_native.unavailable_but_on_cpu, unsupported=_native_unsupported)
linear_op.provide("reference", reference.linear)


@names_wrong_types
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``x @ weight.T + bias``, as ``torch.nn.functional.linear``; fast for few rows, as in the steps of generation.

    Up to ``FEW_ROWS`` rows, on a CPU and without a gradient, a compiled kernel reads every weight once, at the speed of
    memory, which a general matrix product does not reach. Sums are taken in float32, and a row's result does not depend
    on the rows beside it. More rows of 16 bits, and any in eager training, are a compiled product, likewise summed in
    float32, on a CPU with AVX2 and no more, where torch's is many times slower. Otherwise, and under autocast or a
    transform of ``torch.func``, it is torch's own.

    Args:
        x: ``[..., inputs]``, floating.
        weight: ``[outputs, inputs]`` of x's dtype and on its device.
        bias: ``[outputs]`` of the same, or None.
        dtype: of the result, by default x's (or autocast's). With float32 a 16-bit product is not rounded, and the
            compiled kernel copies no weight; torch's own converts them first.

    Returns:
        ``[..., outputs]``.

    Raises:
        TypeError, ValueError: for other dtypes, devices or shapes.
    """
    if dtype is None and any_autocast() and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    tensors = check_linear(x, weight, bias)
    if (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) or has_transform():
        if dtype is None:
            if not has_transform() and is_ahead(x, weight, bias):
                return narrow_linear(x, weight, bias)
            return F.linear(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return reference.linear(x, weight, bias, dtype)
    return linear_op(x, weight, bias, dtype or x.dtype)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors among them; raises as :func:`linear` does."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    dtype, device = x.dtype, x.device
    if weight.dtype != dtype or weight.device != device:
        _refuse(x, weight, bias)
    if bias is not None and (bias.dtype != dtype or bias.device != device):
        _refuse(x, weight, bias)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        _refuse(x, weight, bias)
    return tensors


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> NoReturn:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"expected {name} of x's dtype {x.dtype}, got {tensor.dtype}; convert one of them with .to()"
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"expected {name} on x's device {x.device}, got {tensor.device}; move it with .to()")
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"expected x of shape [..., inputs] and weight of shape [outputs, inputs], got {_sizes(x, weight)}"
        )
    raise ValueError(f"expected bias of shape [{weight.shape[0]}], got {list(bias.shape)}")


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`: the same parameters and results, fast for few rows.

    Beside a 16-bit weight the bias may stay in float32; in training it is then :func:`mixed_linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and bias.dtype != self.weight.dtype == input.dtype:
            if torch.is_grad_enabled():
                return mixed_linear(input, self.weight, bias)
            bias = bias.to(input.dtype)
        return linear(input, self.weight, bias)
