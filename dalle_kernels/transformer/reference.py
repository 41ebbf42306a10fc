"""A decode step through transformer layers in plain PyTorch: it defines the op, and is the oracle of all else."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dalle_kernels.attention.reference import decode_attention


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
    layers = zip(*[iter(weights)] * len(LayerWeights._fields), strict=True)
    for layer, text, image, kind in zip(layers, caches[::2], caches[1::2], kinds.split(","), strict=True):
        layer = LayerWeights(*layer)
        heads, head_dim = image.shape[2], image.shape[-1]
        normed = F.layer_norm(x, x.shape[-1:], layer.attention_norm_weight, layer.attention_norm_bias, epsilon)
        joint = F.linear(normed, layer.query_key_value_weight, layer.query_key_value_bias)
        tokens = joint.view(len(x), 3, heads, 1, head_dim).unbind(1)
        pattern = (kind, text_len, height, width, kernel_size)
        out = decode_attention(*tokens, text, image, position, *pattern, scale).flatten(1)
        x = x + F.linear(out, layer.projection_weight, layer.projection_bias)
        normed = F.layer_norm(x, x.shape[-1:], layer.mlp_norm_weight, layer.mlp_norm_bias, epsilon)
        expanded = F.gelu(F.linear(normed, layer.expansion_weight, layer.expansion_bias))
        x = x + F.linear(expanded, layer.contraction_weight, layer.contraction_bias)
    return x
