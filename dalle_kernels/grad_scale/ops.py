"""The ops ``scale_cast_filter`` and ``filter_cast_unscale`` of per-resblock gradient scaling (paper 2.4, Figure 4).

In the backward of a resblock the gradient that arrives in float32 is multiplied by the block's scale, cast to 16 bits
and filtered; what leaves the block is filtered, cast to float32 and divided by the scale. Each op does one of the two
in one pass over many tensors. The scale stays a tensor: the host never waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op
from dalle_kernels.adamw.ops import share_layout
from dalle_kernels.grad_scale import reference

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

AHEAD = {(torch.float32, torch.float16), (torch.bfloat16, torch.float32)}
"""From which dtype to which a run on an H200 has shown the compiled CUDA kernels ahead of Triton's. Of others, and on
other GPUs, they are opt-in."""


def _fake(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(t, dtype=dtype) for t in tensors], torch.empty((), dtype=torch.bool, device=scale.device)


def _fake_unscale(tensors: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    nonfinite = torch.empty((), dtype=torch.bool, device=scale.device)
    return [torch.empty_like(t, dtype=reference.compute_dtype(t)) for t in tensors], nonfinite


scale_cast_filter_op = Op(
    "scale_cast_filter(Tensor[] tensors, Tensor scale, ScalarType dtype) -> (Tensor[], Tensor)", _fake
)
filter_cast_unscale_op = Op("filter_cast_unscale(Tensor[] tensors, Tensor scale) -> (Tensor[], Tensor)", _fake_unscale)


def _addresses(tensors: list[Tensor], outputs: list[Tensor], scale: Tensor, nonfinite: Tensor) -> dict[str, object]:
    return {
        "inputs": [t.data_ptr() for t in tensors],
        "outputs": [t.data_ptr() for t in outputs],
        "counts": [t.numel() for t in tensors],
        "input_dtype": _native.DTYPES[tensors[0].dtype] if tensors else 0,
        "scale": scale.data_ptr(),
        "nonfinite": nonfinite.data_ptr(),
    }


def _native_scale(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    outputs, nonfinite = _fake(tensors, scale, dtype)
    addresses = _addresses(tensors, outputs, scale, nonfinite)
    _native.call("scale_cast_filter", scale.device, **addresses, output_dtype=_native.DTYPES[dtype])
    return outputs, nonfinite


def _native_unscale(tensors: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    outputs, nonfinite = _fake_unscale(tensors, scale)
    _native.call("filter_cast_unscale", scale.device, **_addresses(tensors, outputs, scale, nonfinite))
    return outputs, nonfinite


def _unsupported(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes.issubset(_DTYPES) or dtype not in _DTYPES:
        return "the kernel takes tensors of one dtype of float32, float16 and bfloat16 a call"
    if not all(share_layout(t) for t in tensors):
        return "the kernel takes tensors that are dense"
    return None


def _native_unsupported(tensors: list[Tensor], scale: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    reason = _unsupported(tensors, scale, dtype)
    if reason is not None or not scale.is_cuda:
        return reason
    return _triton.left_to_triton(scale.device, not tensors or (tensors[0].dtype, dtype) in AHEAD)


for _op, _run, _plain in (
    (scale_cast_filter_op, _native_scale, reference.scale_cast_filter),
    (filter_cast_unscale_op, _native_unscale, reference.filter_cast_unscale),
):
    _launch = _triton.launcher("grad_scale", _op.name)
    _op.provide("native", _run, unavailable=_native.unavailable, unsupported=_native_unsupported)
    _op.provide("triton", _launch, unavailable=_triton.unavailable, unsupported=_unsupported)
    _op.provide("reference", _plain)


def _check(name: str, tensors: list[Tensor], scale: Tensor) -> None:
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.numel() != 1:
        got = f"{scale.dtype} of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{name}: expected scale as a float32 tensor of one element, got {got}")
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dtype not in (*_DTYPES, torch.float64):
            got = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected tensors of float32, float16, bfloat16 or float64, got {got}")
        if tensor.device != scale.device:
            raise ValueError(f"{name}: expected tensors on the scale's device {scale.device}, got {tensor.device}")


@names_wrong_types
def scale_cast_filter(
    tensors: list[Tensor], scale: Tensor, dtype: torch.dtype = torch.float16
) -> tuple[list[Tensor], Tensor]:
    """``filter(cast(tensor * scale))`` for many tensors at once, on the way into a resblock (paper 2.4, Figure 4).

    Args:
        tensors: float32, float16, bfloat16 or float64 of any shapes and strides, on one device.
        scale: float32 tensor of one element on that device.
        dtype: of the results, float16 or another of these; rounded to nearest even after a product in float32.

    Returns:
        The results, dense, in the order of the tensors, and a bool tensor of no dimensions: whether any element was an
        infinity or NaN after the cast, an overflow of the cast included. Such elements are 0.

    No gradient flows through it. Raises TypeError or ValueError for other dtypes or devices.
    """
    _check("scale_cast_filter", tensors, scale)
    if dtype not in (*_DTYPES, torch.float64):
        raise TypeError(f"scale_cast_filter: expected dtype float16, bfloat16, float32 or float64, got {dtype}")
    with torch.no_grad():
        return scale_cast_filter_op(tensors, scale, dtype)


@names_wrong_types
def filter_cast_unscale(tensors: list[Tensor], scale: Tensor) -> tuple[list[Tensor], Tensor]:
    """``cast(filter(tensor)) / scale`` for many tensors at once, on the way out of a resblock (paper 2.4, Figure 4).

    Args and the flag are those of :func:`scale_cast_filter`; the results are float32 (float64 for float64 tensors).
    """
    _check("filter_cast_unscale", tensors, scale)
    with torch.no_grad():
        return filter_cast_unscale_op(tensors, scale)
