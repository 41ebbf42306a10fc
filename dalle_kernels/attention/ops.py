"""The operators ``sparse_attention`` and ``sparse_attention_backward``, their checks and their providers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dalle_kernels._arguments import names_wrong_types

from .. import _native, _triton
from .._dispatch import Op
from .._prepared import Prepared
from . import reference
from .pattern import KINDS, AttentionPattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256

FORWARD_AHEAD = {
    ("row", torch.bfloat16, 64): 64,
    ("conv", torch.bfloat16, 64): 128,
    **{(kind, torch.bfloat16, 64): 496 for kind in ("column", "axial_row", "conv_corner")},
    **{(kind, torch.float16, 64): 496 for kind in ("row", "conv")},
    **{(kind, torch.bfloat16, 128): 248 for kind in ("row", "column")},
}
"""By pattern, dtype and head_dim: from how many heads on, of all samples together, a run on an H200 has shown the
compiled forward ahead of Triton's. Of anything else, and on other GPUs, it is opt-in."""
WIDE_TEXT = 256
"""In heads of 128 that run had a text of so many tokens: longer ones, for which there was no room then, are opt-in."""
BACKWARD_AHEAD = {(kind, torch.bfloat16, 64): 496 for kind in ("row", "column", "conv")}
"""As FORWARD_AHEAD, of the backward."""

PATTERN_SCHEMA = "str kind, int text_len, int height, int width, int kernel_size, float scale"


def _empty_results(q) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, seq, _ = q.shape
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Not by torch.empty, which takes twice as long to read its arguments.
    lse = q.new_empty_strided((batch, heads, seq), (heads * seq, seq, 1), dtype=statistics)
    return reference.empty_heads(q), lse


def _forward_fake(q, k, v, *_pattern):
    return _empty_results(q)


def _backward_fake(grad_out, q, k, v, out, lse, kind, text_len, height, width, kernel_size, scale):
    return reference.empty_heads(q), reference.empty_heads(k), reference.empty_heads(v)


def _forward_native(q, k, v, kind, *pattern):
    out, lse = _empty_results(q)
    _native.call("sparse_attention", q.device, q, k, v, out, lse, KINDS.index(kind), *pattern)
    return out, lse


def _backward_native(grad_out, q, k, v, out, lse, kind, *pattern):
    gradients = _backward_fake(grad_out, q, k, v, out, lse, kind, *pattern)
    inputs, results, settings = (grad_out, q, k, v), gradients, (KINDS.index(kind), *pattern)
    if q.is_cuda:
        size = _native.query("sparse_attention_backward_scratch", q.device, tuple(q.shape), *settings[:5])
        scratch = torch.empty(size, dtype=torch.uint8, device=q.device)
        inputs, results = (*inputs, out, lse), (*gradients, scratch.data_ptr())
    _native.call("sparse_attention_backward", q.device, *inputs, *results, *settings)
    return gradients


def _cuda_unsupported(q, kind, ahead: dict, refusal: str, tensors, pattern) -> str | None:
    fewest = ahead.get((kind, q.dtype, q.shape[-1]), math.inf)
    shown = q.shape[0] * q.shape[1] >= fewest and (q.shape[-1] == 64 or pattern[0] <= WIDE_TEXT)
    left = _triton.left_to_triton(q.device, shown)
    if left is not None:
        return left
    with torch.cuda.device(q.device):
        return getattr(_native.library("cuda"), refusal)(*tensors, KINDS.index(kind), *pattern[:4])


def _forward_unsupported(q, k, v, kind, *pattern) -> str | None:
    reason = _native_unsupported(q, k, v)
    if reason is None and q.is_cuda:
        return _cuda_unsupported(q, kind, FORWARD_AHEAD, "sparse_attention_refusal", (q, k, v), pattern)
    return reason


def _backward_unsupported(grad_out, q, k, v, out, lse, kind, *pattern) -> str | None:
    reason = _native_unsupported(grad_out, q, k, v, out)
    if reason is None and q.is_cuda:
        if q.shape[2] == 1:
            return "the compiled kernel rounds the gradients of a sequence of one token, which are zero"
        if lse.dtype != torch.float32 or not lse.is_contiguous():
            return "the compiled kernel takes a contiguous log-sum-exp in float32"
        tensors = (grad_out, q, k, v, out)
        return _cuda_unsupported(q, kind, BACKWARD_AHEAD, "sparse_attention_backward_refusal", tensors, pattern)
    return reason


def _native_unsupported(first, *arguments) -> str | None:
    if first.dtype == torch.float64:
        return "the compiled kernel takes float32, float16 and bfloat16, got float64"
    # The public function refuses such inputs; a compiler that calls the operator may still choose the layout.
    for tensor in (first, *arguments):
        if not isinstance(tensor, torch.Tensor):
            break  # the pattern follows
        if tensor.stride()[-1] != 1 and tensor.shape[-1] > 1:
            return "the compiled kernel takes tensors with a unit stride in their last dimension"
    return None


_forward = Op(
    f"sparse_attention(Tensor q, Tensor k, Tensor v, {PATTERN_SCHEMA}) -> (Tensor out, Tensor lse)", _forward_fake
)
_backward = Op(
    "sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{PATTERN_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward_fake,
)
_triton_limits = {"unavailable": _triton.unavailable, "unsupported": _native_unsupported}
_forward.provide("native", _forward_native, unavailable=_native.unavailable, unsupported=_forward_unsupported)
_forward.provide("triton", _triton.launcher("attention", "sparse_attention"), **_triton_limits)
_forward.provide("reference", reference.sparse_attention)
_backward.provide("native", _backward_native, unavailable=_native.unavailable, unsupported=_backward_unsupported)
_backward.provide("triton", _triton.launcher("attention", "sparse_attention_backward"), **_triton_limits)
_backward.provide("reference", reference.sparse_attention_backward)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *ctx.pattern = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx, grad_out, _grad_lse):
    # Autograd hands over expanded gradients (of a sum, say); kernels read rows with a unit stride.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    return (*_backward(grad_out, *ctx.saved_tensors, *ctx.pattern), *[None] * len(ctx.pattern))


_forward.register_autograd(_gradients, _setup_context)


def _well_formed(q, k, v, pattern) -> bool:
    """Whether :func:`_check` would find nothing wrong: one condition, for an eager call's time."""
    return (
        isinstance(pattern, AttentionPattern)
        and isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and isinstance(v, torch.Tensor)
        and (shape := q.shape) == k.shape == v.shape
        and (dtype := q.dtype) == k.dtype == v.dtype
        and q.device == k.device == v.device
        and dtype in DTYPES
        and len(shape) == 4
        and shape[2] <= pattern.seq_len
        and 1 <= shape[3] <= MAX_HEAD_DIM
        and q.stride()[3] == k.stride()[3] == v.stride()[3] == 1
    )


def _check(q, k, v, pattern) -> None:
    """Raise one clear sentence unless the arguments are right; a last dimension of one number has any stride."""
    checked_pattern(pattern)
    check_heads(q=q, k=k, v=v)
    if q.shape[2] > pattern.seq_len:
        raise ValueError(
            f"expected at most the pattern's {pattern.seq_len} tokens ({pattern.text_len} text and a "
            f"{pattern.grid[0]}x{pattern.grid[1]} grid), got a sequence of {q.shape[2]}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride()[-1] != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"expected {name} with a unit stride in its last dimension, got strides {tuple(tensor.stride())}; "
                f"pass {name}.contiguous()"
            )


def check_heads(**tensors: torch.Tensor) -> None:
    """Raise one clear sentence unless the tensors are alike, ``[batch, heads, seq, head_dim]``, of a served dtype."""
    (first_name, first), *others = tensors.items()
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"expected {first_name} to be a tensor, got {type(first).__name__}")
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 4:
        raise ValueError(f"expected {first_name} of shape [batch, heads, seq, head_dim], got {list(shape)}")
    for name, tensor in others:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(
                f"expected {name} of the same shape as {first_name}, {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"expected {name} of the same dtype as {first_name}, {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"expected {name} on the same device as {first_name}, {device}, got {tensor.device}")
    if dtype not in DTYPES:
        raise TypeError(f"expected {first_name} of dtype float32, bfloat16, float16 or float64, got {dtype}")
    if not 1 <= shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"expected a head_dim between 1 and {MAX_HEAD_DIM}, got {shape[3]}")


def checked_scale(scale: float | None, head_dim: int) -> float:
    """``scale`` as a float, by default ``head_dim ** -0.5``."""
    if scale is None:
        return head_dim**-0.5
    # Comparisons, not math.isfinite, which a compiler that takes the scale as a variable cannot follow.
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise ValueError(f"expected scale to be a finite number or None, got {scale!r}")
    return float(scale)


def checked_pattern(pattern: AttentionPattern) -> AttentionPattern:
    if not isinstance(pattern, AttentionPattern):
        raise TypeError(f"expected pattern to be an AttentionPattern, got {type(pattern).__name__}")
    return pattern


@names_wrong_types
def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern, scale: float | None = None
) -> torch.Tensor:
    """Softmax attention in which each query sees the keys that ``pattern`` allows (paper section 2).

    ``out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]`` over the visible ``j``: one softmax over text and image keys
    together. Dot products and softmax statistics are accumulated in float32 (float64 for float64 inputs).
    Differentiable once in ``q``, ``k`` and ``v``; the gradient is deterministic.

    Args:
        q, k, v: ``[batch, heads, seq, head_dim]`` of float32, bfloat16, float16 or float64, on one device, of one
            shape; any strides with a unit last one. ``seq`` may be any prefix of ``pattern.seq_len``; head_dim is 1 to
            256.
        pattern: which keys a query sees.
        scale: factor on the dot products, by default ``head_dim ** -0.5``.

    Returns:
        ``[batch, heads, seq, head_dim]`` of the inputs' dtype, stored as ``[batch, seq, heads, head_dim]``, so that
        ``out.transpose(1, 2).flatten(2)`` moves no memory. A hidden key has no influence as long as it is finite.

    Raises:
        ValueError, TypeError: for arguments outside these bounds; nothing is copied or converted silently.
    """
    run = _prepared.find((q, k, v), (pattern, scale))
    if run is not None:
        return run(q, k, v)
    if not _well_formed(q, k, v, pattern):
        _check(q, k, v, pattern)
    return _forward(q, k, v, *_settings(q, pattern, scale))[0]


def _settings(q: torch.Tensor, pattern: AttentionPattern, scale: float | None) -> tuple:
    """The operator's arguments that are no tensors."""
    numbers = pattern.text_len, *pattern.grid, pattern.kernel_size
    return pattern.kind, *numbers, checked_scale(scale, q.shape[-1])


def _prepare(q, k, v, pattern, scale) -> Callable | None:
    """How a call without a gradient runs: as the operator's, but for the log-sum-exp, which nobody asks for."""
    _check(q, k, v, pattern)
    kind, *numbers = settings = _settings(q, pattern, scale)
    if _forward.choose("cpu", (q, k, v, *settings)).name != "native":
        return None
    kernel, settings = _native.cpu_kernel("sparse_attention"), (KINDS.index(kind), *numbers)
    shape, strides = q.shape, reference.head_strides(*q.shape)

    def run(q, k, v):
        out = q.new_empty_strided(shape, strides)
        kernel(q, k, v, out, None, *settings, torch.get_num_threads())
        return out

    return run


_prepared = Prepared(_prepare)
