"""Triton kernels of a decode step through a stack of layers: what launches them.

Floor: bytes. Every weight is read once: at 4.3 TB/s (an H200) a layer of width 1920 takes 20.6 µs in bfloat16, and the
keys and values of 8 samples of 30 heads 4 µs more. A layer is five launches, of which four read weights.

Reached on an H200, one launch after another in a graph: 11.8 µs for queries, keys and values (floor 5.1), 4.3 for the
projection (1.7), 13.6 for the expansion (6.9) and 9.3 for the contraction (6.9); a step of 24 layers with embedding,
logits and drawing 1.56 ms.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dalle_kernels import _triton
from dalle_kernels._triton_configurations import configuration
from dalle_kernels.attention.triton_kernels import decode_attention
from dalle_kernels.transformer import reference
from dalle_kernels.transformer.reference import LayerWeights
from dalle_kernels.transformer.triton_few_rows import few_rows_kernel

_MOST_ROWS = 32
"""Of more rows the products are the library's. Measured with 8 rows in 16 bits; others no GPU has timed."""


def decode_layers(x, weights, caches, position, kinds, text_len, height, width, kernel_size, scale, epsilon):
    """The operators ``decode_layers``, ``position`` a number, and ``decode_layers_at``, a tensor of one."""
    few = len(x) <= _MOST_ROWS and all(weight.numel() for weight in weights)
    layer = _decode_layer if few else reference.decode_layer
    step = (position, text_len, height, width, kernel_size, scale)
    return reference.by_layers(layer, decode_attention, x.contiguous(), weights, caches, kinds, step, epsilon)


def _decode_layer(x: Tensor, layer: LayerWeights, attend, heads: int, epsilon: float) -> Tensor:
    """As :func:`reference.decode_layer`."""
    norm = layer.attention_norm_weight, layer.attention_norm_bias
    joint = _product(x, layer.query_key_value_weight, layer.query_key_value_bias, norm=norm, epsilon=epsilon)
    out = attend(*joint.view(len(x), 3, heads, 1, -1).unbind(1)).flatten(1)
    x = _product(out, layer.projection_weight, layer.projection_bias, residual=x)
    norm = layer.mlp_norm_weight, layer.mlp_norm_bias
    expanded = _product(x, layer.expansion_weight, layer.expansion_bias, norm=norm, epsilon=epsilon, gelu=True)
    return _product(expanded, layer.contraction_weight, layer.contraction_bias, residual=x)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
    gelu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``linear(x, weight, bias)`` of x that ``norm``, weight and bias, normalizes; through GELU; plus ``residual``."""
    outputs, inputs = weight.shape
    out = torch.empty((len(x), outputs), dtype=x.dtype, device=x.device)
    block_rows = max(8, triton.next_power_of_2(len(x)))
    dtype = "float32" if x.dtype == torch.float32 else "16-bit"
    chosen = configuration("decode_layers", f"{'normed ' if norm else ''}{dtype} {block_rows}", x.device)
    even = inputs % (chosen["PARTS"] * chosen["BLOCK_INPUTS"]) == 0 and outputs % chosen["BLOCK_OUTPUTS"] == 0
    norm_weight, norm_bias = norm or (bias, bias)
    few_rows_kernel[(triton.cdiv(outputs, chosen["BLOCK_OUTPUTS"]),)](
        x, weight, bias, norm_weight, norm_bias, bias if residual is None else residual, out, len(x), inputs, outputs,
        epsilon, NORM=norm is not None, GELU=gelu, RESIDUAL=residual is not None, EVEN=even, BLOCK_ROWS=block_rows,
        **_triton.dependent_launch(x.device), **chosen.options,
    )  # fmt: skip
    return out
