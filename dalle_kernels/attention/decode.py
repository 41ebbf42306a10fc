"""The operators of one token a step from a cache, their checks and their providers.

``decode_attention`` is given the token's position as a number, ``decode_attention_at`` as a tensor, which it reads on
the device: a CUDA graph repeats the numbers that its calls were captured with, but reads tensors anew.
"""

from __future__ import annotations

import math

import torch

from dalle_kernels._arguments import names_wrong_types

from .. import _native, _triton
from .._dispatch import Op
from . import reference
from .cache import KVCache
from .ops import PATTERN_SCHEMA, check_heads, checked_scale
from .pattern import KINDS
from .slots import visible_keys

DECODE_AHEAD = {
    (kind, torch.bfloat16, 64, shared): 1984 if shared else 496
    for kind in ("row", "column", "conv")
    for shared in (False, True)
}
"""By pattern, dtype, head_dim and whether samples share a text: from how many heads on, of all samples together, a run
on an H200 has shown the compiled kernel ahead of Triton's. Of anything else, and on other GPUs, it is opt-in."""


def _fake(q, k_new, v_new, text, image, position, *pattern):
    return q.new_empty(q.shape)


def _decode_native(q, k_new, v_new, text, image, position, kind, text_len, height, width, kernel_size, scale):
    if q.is_cuda:
        pattern = kind, text_len, height, width, kernel_size, scale
        return _decode_cuda(q, k_new, v_new, text, image, (position, 0, False), *pattern)
    text_keys, slots, new_key = visible_keys(position, image.device, kind, text_len, height, width, kernel_size)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    seen = text_keys, slots.first, slots.count, slots.listed, new_key
    _native.call("decode_attention", q.device, q, k_new, v_new, text, image, out, *seen, scale)
    return out


def _decode_cuda(q, k_new, v_new, text, image, where, kind, *pattern):
    """``where`` is the position, the address of one on the device or 0, and whether that is of 8 bytes."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _native.call("decode_attention", q.device, q, k_new, v_new, text, image, out, *where, KINDS.index(kind), *pattern)
    return out


def _decode_at_native(q, k_new, v_new, text, image, position, kind, text_len, height, width, kernel_size, scale):
    if q.is_cuda:
        where, pattern = device_place(position), (kind, text_len, height, width, kernel_size, scale)
        return _decode_cuda(q, k_new, v_new, text, image, where, *pattern)
    place = int(position)  # of the CPU, where nothing waits for it
    if not (text_len if image.shape[3] > 1 else 0) <= place < text_len + height * width:
        return q.new_full(q.shape, torch.nan)
    return _decode_native(q, k_new, v_new, text, image, place, kind, text_len, height, width, kernel_size, scale)


def device_place(position: torch.Tensor) -> tuple[int, int, bool]:
    """A place that the device knows, as the compiled kernels take it."""
    return 0, position.data_ptr(), position.dtype == torch.int64


def _native_at_unsupported(q, k_new, v_new, text, image, position, kind, *pattern) -> str | None:
    reason = _triton_at_unsupported(q, k_new, v_new, text, image)
    if reason is None and q.is_cuda:
        return cuda_unsupported(q, k_new, v_new, text, image, kind, *pattern)
    return reason


def _native_unsupported(q, k_new, v_new, text, image, position, kind, *pattern) -> str | None:
    if q.is_cuda and position < text.shape[3] and image.shape[3] > 1:
        return "the compiled kernel takes text tokens of one sample a prompt"
    return _native_at_unsupported(q, k_new, v_new, text, image, position, kind, *pattern)


def cuda_unsupported(q, k_new, v_new, text, image, kind, *pattern) -> str | None:
    """Why the compiled kernel for GPUs cannot, or should not, serve a step of these tensors and settings."""
    shared = image.shape[3] > 1 and text.shape[3] > 0
    fewest = DECODE_AHEAD.get((kind, q.dtype, q.shape[-1], shared), math.inf)
    left = _triton.left_to_triton(q.device, q.shape[0] * q.shape[1] >= fewest)
    if left is not None:
        return left
    with torch.cuda.device(q.device):
        refusal = _native.library("cuda").decode_attention_refusal
        return refusal(q, k_new, v_new, text, image, KINDS.index(kind), *pattern[:4])


def _triton_at_unsupported(q, k_new, v_new, text, image, *_arguments) -> str | None:
    if q.dtype == torch.float64:
        return "the compiled kernel takes float32, float16 and bfloat16, got float64"
    if not (text.is_contiguous() and image.is_contiguous()):
        return "the compiled kernel takes a contiguous cache"
    return None


def _triton_unsupported(q, k_new, v_new, text, image, position, *pattern) -> str | None:
    if position < text.shape[3] and image.shape[3] > 1:
        return "the Triton kernel takes text tokens of one sample a prompt"
    return _triton_at_unsupported(q, k_new, v_new, text, image)


_TENSORS = "Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) text, Tensor(b!) image"
_decode = Op(f"decode_attention({_TENSORS}, SymInt position, {PATTERN_SCHEMA}) -> Tensor", _fake)
_decode_at = Op(f"decode_attention_at({_TENSORS}, Tensor position, {PATTERN_SCHEMA}) -> Tensor", _fake)
_launch = _triton.launcher("attention", "decode_attention")
_decode.provide("native", _decode_native, unavailable=_native.unavailable, unsupported=_native_unsupported)
_decode.provide("triton", _launch, unavailable=_triton.unavailable, unsupported=_triton_unsupported)
_decode.provide("reference", reference.decode_attention)
_decode_at.provide("native", _decode_at_native, unavailable=_native.unavailable, unsupported=_native_at_unsupported)
_decode_at.provide("triton", _launch, unavailable=_triton.unavailable, unsupported=_triton_at_unsupported)
_decode_at.provide("reference", reference.decode_attention_at)


@names_wrong_types
def decode_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KVCache,
    scale: float | None = None,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of generation: put the new token's key and value in the cache, and attend from it.

    Equals the last row of ``sparse_attention`` over all tokens so far. Nothing here records a gradient.

    Args:
        q, k_new, v_new: ``[batch * samples_per_prompt, heads, 1, head_dim]`` of the cache's dtype, any strides.
        cache: see :class:`KVCache`; it grows by one token.
        scale: factor on the dot products, by default ``head_dim ** -0.5``.
        position: None for the token that follows the ``cache.length`` held so far, or the token's place in the stream
            as an int32 or int64 tensor of one element on the cache's device, which is read there. Then the caller
            counts, ``cache.length`` stays as it is, and one CUDA graph serves every step: capture this call and
            ``position.add_(1)`` after a call that is not captured. At a place where there is no step, outside the
            stream or in the text that samples share, the result is NaN and the cache stays as it is.

    Returns:
        ``[batch * samples_per_prompt, heads, 1, head_dim]``, contiguous.

    Raises:
        ValueError, TypeError: for another shape, dtype or device, a full cache, or a text token where samples share the
        text.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"expected cache to be a KVCache, got {type(cache).__name__}")
    if not cache.fits(q, k_new, v_new):  # then one of these says how
        check_heads(q=q, k_new=k_new, v_new=v_new)
        cache.check(k_new, cache.step_shape)
    if position is None:
        cache.check_step()
    else:
        check_position(position, cache)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _step(q, k_new, v_new, cache, scale, position)
    return _step(q, k_new, v_new, cache, scale, position)


def check_position(position: torch.Tensor, cache: KVCache) -> None:
    """Raise one clear sentence unless it is a place that a step reads on the cache's device."""
    if not isinstance(position, torch.Tensor) or position.dtype not in (torch.int32, torch.int64):
        got = position.dtype if isinstance(position, torch.Tensor) else type(position).__name__
        raise TypeError(f"expected position as a tensor of int32 or int64, or None, got {got}")
    if position.numel() != 1:
        raise ValueError(f"expected position as a tensor of one element, got one of shape {list(position.shape)}")
    if position.device != cache.device:
        raise ValueError(f"expected position on the cache's device {cache.device}, got {position.device}")


def _step(q, k_new, v_new, cache: KVCache, scale: float | None, position: torch.Tensor | None) -> torch.Tensor:
    scale = checked_scale(scale, cache.head_dim)
    if position is not None:
        return _decode_at(q, k_new, v_new, cache.text, cache.image, position, *cache.pattern_arguments, scale)
    out = _decode(q, k_new, v_new, cache.text, cache.image, cache.length, *cache.pattern_arguments, scale)
    cache.length += 1
    return out
