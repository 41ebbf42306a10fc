"""The operator ``decode_layers``, its checks and its providers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_kernels import _native, _triton
from dalle_kernels._arguments import names_wrong_types
from dalle_kernels._dispatch import Op
from dalle_kernels.attention.cache import KVCache
from dalle_kernels.attention.decode import check_position, device_place
from dalle_kernels.attention.ops import checked_scale
from dalle_kernels.attention.pattern import KINDS
from dalle_kernels.attention.slots import visible_keys
from dalle_kernels.linear.ops import FEW_ROWS
from dalle_kernels.transformer import reference
from dalle_kernels.transformer.reference import LayerWeights

_SETTINGS = "str kinds, int text_len, int height, int width, int kernel_size, float scale, float epsilon"


def _fake(x, weights, caches, position, *settings):
    return x.new_empty(x.shape)


DECODE_AHEAD: dict[torch.dtype, int] = {}
"""By dtype: from what dim on a run on an H200 has shown the compiled kernels ahead of Triton's, in heads of 64. Of
anything else they are opt-in."""


def _decode_cuda(x, weights, caches, where, kinds, text_len, height, width, kernel_size, scale, epsilon):
    """``where`` is the position, the address of one on the device or 0, and whether that is of 8 bytes."""
    out = x.clone(memory_format=torch.contiguous_format)
    layers = _cuda_layers(x, weights, caches, kinds, text_len, height, width, kernel_size)
    inner = caches[1].shape[2] * caches[1].shape[5]
    scratch = x.new_empty(len(x) * (4 * inner + _hidden(weights)))
    position, place, is_wide = where
    _native.call(
        "decode_layers",
        x.device,
        **layers,
        scale=scale,
        epsilon=epsilon,
        position=position,
        place=place,
        wide_place=is_wide,
        x=out.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    return out


def _cuda_layers(x, weights, caches, kinds, *pattern) -> dict:
    """What the compiled kernels for GPUs must know of the layers."""
    _, prompts, heads, samples, _, head_dim = caches[1].shape
    return {
        "dtype": _native.DTYPES[x.dtype],
        "sizes": (prompts, samples, heads, head_dim, x.shape[1], _hidden(weights), pattern[0]),
        "weights": [weight.data_ptr() for weight in weights],
        "caches": [
            (text.data_ptr(), image.data_ptr(), image.shape[4], KINDS.index(kind))
            for text, image, kind in zip(caches[::2], caches[1::2], kinds.split(","))
        ],
        "pattern": pattern,
    }


def _decode_native(x, weights, caches, position, kinds, text_len, height, width, kernel_size, scale, epsilon):
    if x.is_cuda:
        settings = kinds, text_len, height, width, kernel_size, scale, epsilon
        return _decode_cuda(x, weights, caches, (position, 0, False), *settings)
    _, prompts, heads, samples, _, head_dim = caches[1].shape
    seen, held = [], []  # `held` keeps the slots' memory while another thread may put it out of visible_keys' cache
    for text, image, kind in zip(caches[::2], caches[1::2], kinds.split(",")):
        text_keys, slots, new_key = visible_keys(position, image.device, kind, text_len, height, width, kernel_size)
        held.append(slots)
        address = image.data_ptr() + slots.first * head_dim * image.element_size()
        listed = 0 if slots.listed is None else slots.listed.data_ptr()
        seen.append((text.data_ptr(), address, text_keys, image.shape[4], slots.count, listed, new_key))
    out = x.clone(memory_format=torch.contiguous_format)
    _native.call(
        "decode_layers",
        x.device,
        dtype=_native.DTYPES[x.dtype],
        sizes=(prompts, samples, heads, head_dim, x.shape[1], _hidden(weights), text_len),
        scale=scale,
        epsilon=epsilon,
        weights=[weight.data_ptr() for weight in weights],
        caches=seen,
        x=out.data_ptr(),
    )
    return out


def _decode_at_native(x, weights, caches, position, kinds, text_len, height, width, *settings):
    if x.is_cuda:
        where = device_place(position)
        return _decode_cuda(x, weights, caches, where, kinds, text_len, height, width, *settings)
    place = int(position)  # of the CPU, where nothing waits for it
    if not (text_len if caches[1].shape[3] > 1 else 0) <= place < text_len + height * width:
        return torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    return _decode_native(x, weights, caches, place, kinds, text_len, height, width, *settings)


def _hidden(weights: list[Tensor]) -> int:
    return weights[LayerWeights._fields.index("expansion_weight")].shape[0]


def _native_unsupported(x, weights, caches, position, kinds, text_len, *settings) -> str | None:
    if x.is_cuda:
        if position < text_len and caches[1].shape[3] > 1:
            return "the compiled kernel takes text tokens of one sample a prompt"
        return _cuda_unsupported(x, weights, caches, position, kinds, text_len, *settings)
    return _cpu_unsupported(x, weights, caches)


def _native_at_unsupported(x, weights, caches, *settings) -> str | None:
    if x.is_cuda:
        return _cuda_unsupported(x, weights, caches, *settings)
    return _cpu_unsupported(x, weights, caches)


def _cuda_unsupported(x, weights, caches, position, kinds, *settings) -> str | None:
    if x.dtype not in _triton.DTYPES:
        return f"the compiled kernel takes float16 and bfloat16, got {x.dtype}"
    if not all(tensor.is_contiguous() for tensor in (*weights, *caches)):
        return "the compiled kernel takes contiguous weights and caches"
    if len(x) == 0 or not all(tensor.numel() for tensor in (*weights, *caches[1::2])):
        return "the compiled kernel takes no empty weights, nor empty caches of the image"
    left = _triton.left_to_triton(x.device, x.shape[1] >= DECODE_AHEAD.get(x.dtype, math.inf))
    if left is not None:
        return left
    with torch.cuda.device(x.device):
        return _native.library("cuda").decode_layers_refusal(**_cuda_layers(x, weights, caches, kinds, *settings[:4]))


def _cpu_unsupported(x, weights, caches) -> str | None:
    if x.dtype == torch.float64:
        return "the compiled kernel takes float32, float16 and bfloat16, got float64"
    if not 0 < x.shape[0] <= FEW_ROWS:
        return f"the compiled kernel takes 1 to {FEW_ROWS} rows, got {x.shape[0]}"
    if x.shape[1] == 0 or _hidden(weights) == 0:
        return f"the compiled kernel takes no empty layers, got dim {x.shape[1]} and {_hidden(weights)} hidden"
    if not all(tensor.is_contiguous() and tensor.is_cpu for tensor in (*weights, *caches)):
        return "the compiled kernel takes contiguous weights and caches on the CPU"
    return None


def _triton_at_unsupported(x, weights, caches, *_settings) -> str | None:
    if x.dtype not in _triton.DTYPES:
        return f"the Triton kernel takes float32, bfloat16 and float16, got {x.dtype}"
    if len(x) == 0 or not all(tensor.is_contiguous() for tensor in (*weights, *caches)):
        return "the Triton kernel takes contiguous weights, and contiguous caches of at least one row"
    return None


def _triton_unsupported(x, weights, caches, position, kinds, text_len, *_settings) -> str | None:
    if position < text_len and caches[1].shape[3] > 1:
        return "the Triton kernel takes text tokens of one sample a prompt"
    return _triton_at_unsupported(x, weights, caches)


_TENSORS = "Tensor x, Tensor[] weights, Tensor(a!)[] caches"
_decode = Op(f"decode_layers({_TENSORS}, SymInt position, {_SETTINGS}) -> Tensor", _fake)
_decode_at = Op(f"decode_layers_at({_TENSORS}, Tensor position, {_SETTINGS}) -> Tensor", _fake)
_launch = _triton.launcher("transformer", "decode_layers")
_decode.provide("native", _decode_native, unavailable=_native.unavailable, unsupported=_native_unsupported)
_decode.provide("triton", _launch, unavailable=_triton.unavailable, unsupported=_triton_unsupported)
_decode.provide("reference", reference.decode_layers)
_decode_at.provide("native", _decode_at_native, unavailable=_native.unavailable, unsupported=_native_at_unsupported)
_decode_at.provide("triton", _launch, unavailable=_triton.unavailable, unsupported=_triton_at_unsupported)
_decode_at.provide("reference", reference.decode_layers_at)


def _shapes(dim: int, width: int, hidden: int) -> list[tuple[int, ...]]:
    """Of the tensors of one layer, in the order of :class:`LayerWeights`."""
    norm = [(dim,), (dim,)]
    attention = [(3 * width, dim), (3 * width,), (dim, width), (dim,)]
    return [*norm, *attention, *norm, (hidden, dim), (hidden,), (dim, hidden), (dim,)]


@names_wrong_types
def decode_layers(
    x: Tensor,
    layers: Sequence[LayerWeights],
    caches: Sequence[KVCache],
    scale: float | None = None,
    epsilon: float = 1e-5,
    position: Tensor | None = None,
) -> Tensor:
    """One decode step through a stack of pre-norm transformer layers, in one call.

    Each layer is ``x + projection(attention(norm(x)))``, then ``x + contraction(gelu(expansion(norm(x))))``, where the
    attention is :func:`decode_attention` from the layer's cache. Nothing here records a gradient.

    Args:
        x: ``[rows, dim]``, one token a row, floating.
        layers: their weights, of x's dtype and on its device, also under autocast; see :class:`LayerWeights`.
        caches: one a layer, all of one length (not checked while compiling), of patterns that differ in their kind
            alone; each grows by one token.
        scale: factor on the dot products, by default ``head_dim ** -0.5``.
        epsilon: of the layer normalizations.
        position: None, or the token's place in the stream as a tensor, as :func:`decode_attention` takes it. Then the
            caches stay as long as they are, and one CUDA graph serves every step.

    Returns:
        ``[rows, dim]``.

    Raises:
        TypeError, ValueError: for other shapes or dtypes, or caches that are full or not alike.
    """
    if not layers or len(layers) != len(caches):
        raise ValueError(f"expected one cache a layer, got {len(layers)} layers and {len(caches)} caches")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"expected epsilon at or above 0 and finite, got {epsilon}")
    first = caches[0]
    if position is None:
        first.check_step()
    else:
        check_position(position, first)
    if x.dim() != 2 or len(x) != first.step_shape[0]:
        raise ValueError(f"expected x of shape [{first.step_shape[0]}, dim], got {list(x.shape)}")
    for cache in caches:
        # Inductor loses the name of a length that was found equal to another one (torch 2.13).
        other_length = not torch.compiler.is_compiling() and cache.length != first.length
        if other_length or cache.step_shape != first.step_shape:
            raise ValueError("expected caches of one length, batch, heads, head_dim and samples_per_prompt")
        if cache.pattern_arguments[1:] != first.pattern_arguments[1:]:
            raise ValueError(f"expected patterns that differ in kind alone, got {first.pattern} and {cache.pattern}")
    weights = [tensor for layer in layers for tensor in layer]
    held = [tensor for cache in caches for tensor in (cache.text, cache.image)]
    shapes = _shapes(x.shape[1], first.heads * first.head_dim, layers[0].expansion_weight.shape[0])
    if [tensor.shape for tensor in weights] != shapes * len(layers):
        found = [{name: list(tensor.shape) for name, tensor in layer._asdict().items()} for layer in layers]
        raise ValueError(f"expected weights of shapes {[list(shape) for shape in shapes]}, got {found}")
    dtypes = {tensor.dtype for tensor in weights}.union(cache.dtype for cache in caches)
    if dtypes != {x.dtype}:
        raise TypeError(
            f"expected weights and caches of x's dtype {x.dtype}, got {', '.join(sorted(map(str, dtypes)))}"
        )
    kinds = ",".join(cache.pattern.kind for cache in caches)
    with torch.no_grad():
        scale = checked_scale(scale, first.head_dim)
        if position is not None:
            return _decode_at(x, weights, held, position, kinds, *first.pattern_arguments[1:], scale, epsilon)
        out = _decode(x, weights, held, first.length, kinds, *first.pattern_arguments[1:], scale, epsilon)
    for cache in caches:
        cache.length += 1
    return out
