"""A decode step through transformer layers in plain PyTorch: it defines the op, and is the oracle of all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.attention.reference import decode_attention, decode_attention_at


class LayerWeights(NamedTuple):
    """One layer, pre-norm: an attention resblock, then an MLP resblock with GELU.

    Matrices are ``[outputs, inputs]``; ``query_key_value`` gives all queries, then all keys, then all values.
    """

    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    query_key_value_weight: Tensor
    query_key_value_bias: Tensor
    projection_weight: Tensor
    projection_bias: Tensor
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    expansion_weight: Tensor
    expansion_bias: Tensor
    contraction_weight: Tensor
    contraction_bias: Tensor


def decode_layers(
    x: Tensor,
    weights: list[Tensor],
    caches: list[Tensor],
    position: int,
    kinds: str,
    text_len: int,
    height: int,
    width: int,
    kernel_size: int,
    scale: float,
    epsilon: float,
) -> Tensor:
    """One token a row, ``x`` ``[rows, dim]``, through all layers.

    ``weights`` are the tensors of each layer's :class:`LayerWeights`, ``caches`` its cache's text and image, and
    ``kinds`` their patterns' kinds, joined by commas.
    """
    step = (position, text_len, height, width, kernel_size, scale)
    return by_layers(decode_layer, decode_attention, x, weights, caches, kinds, step, epsilon)


def decode_layers_at(
    x: Tensor,
    weights: list[Tensor],
    caches: list[Tensor],
    position: Tensor,
    kinds: str,
    text_len: int,
    height: int,
    width: int,
    kernel_size: int,
    scale: float,
    epsilon: float,
) -> Tensor:
    """:func:`decode_layers` at a position that only the device knows: see ``decode_attention_at``."""
    step = (position, text_len, height, width, kernel_size, scale)
    return by_layers(decode_layer, decode_attention_at, x, weights, caches, kinds, step, epsilon)


def by_layers(
    run_layer: Callable[..., Tensor],
    decode: Callable[..., Tensor],
    x: Tensor,
    weights: list[Tensor],
    caches: list[Tensor],
    kinds: str,
    step: tuple,
    epsilon: float,
) -> Tensor:
    """The layers by any provider's ``decode_layer`` and ``decode_attention``.

    ``step`` are the arguments of the latter after the cache but the kind.
    """
    position, *settings = step
    layers = zip(*[iter(weights)] * len(LayerWeights._fields), strict=True)
    for layer, text, image, kind in zip(layers, caches[::2], caches[1::2], kinds.split(","), strict=True):

        def attend(*tokens: Tensor, text=text, image=image, kind=kind) -> Tensor:
            return decode(*tokens, text, image, position, kind, *settings)

        x = run_layer(x, LayerWeights(*layer), attend, image.shape[2], epsilon)
    return x


def decode_layer(x: Tensor, layer: LayerWeights, attend: Callable[..., Tensor], heads: int, epsilon: float) -> Tensor:
    """One layer; ``attend`` takes q, k and v ``[rows, heads, 1, head_dim]`` of the token."""
    normed = F.layer_norm(x, x.shape[-1:], layer.attention_norm_weight, layer.attention_norm_bias, epsilon)
    joint = F.linear(normed, layer.query_key_value_weight, layer.query_key_value_bias)
    out = attend(*joint.view(len(x), 3, heads, 1, -1).unbind(1)).flatten(1)
    x = x + F.linear(out, layer.projection_weight, layer.projection_bias)
    normed = F.layer_norm(x, x.shape[-1:], layer.mlp_norm_weight, layer.mlp_norm_bias, epsilon)
    expanded = F.gelu(F.linear(normed, layer.expansion_weight, layer.expansion_bias))
    return x + F.linear(expanded, layer.contraction_weight, layer.contraction_bias)
