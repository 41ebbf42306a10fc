"""Tensor descriptors of keys, values and queries: by them Hopper's copy engine loads a tile in one instruction."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Stream

_ALIGNMENT = 16
"""Bytes of which addresses and strides are multiples."""


def serve(*tensors: Tensor) -> bool:
    """Whether the tensors, ``[batch, heads, seq, head_dim]``, can have descriptors of tiles.

    In 16 bits, with a head_dim that is a power of two from 16 on, and aligned addresses and strides.
    """
    return all(
        tensor.dtype != torch.float32
        and tensor.shape[-1] >= 16
        and tensor.shape[-1].bit_count() == 1
        and tensor.data_ptr() % _ALIGNMENT == 0
        and all(step > 0 and step * tensor.element_size() % _ALIGNMENT == 0 for step in tensor.stride()[:-1])
        for tensor in tensors
    )


def give_tiles(part: Stream, seq: int, block: int) -> bool:
    """Whether they can be of ``block`` places of the part's window: of a permuted image only if its rows are whole and
    each tile is of one column."""
    return part.kind != "column" or (part.text_len + part.places == seq and part.rows % block == 0)


def tokens(tensor: Tensor, block: int) -> TensorDescriptor:
    """Tiles of ``block`` tokens in their own order; beyond the tensor's end are zeros."""
    return _described(tensor, [1, 1, block, tensor.shape[-1]])


def text_and_window(tensor: Tensor, part: Stream, text_block: int, block: int) -> tuple[TensorDescriptor, ...]:
    """Tiles of ``text_block`` tokens of the text and, for ``window_tile``, of ``block`` places of the window."""
    # Of a part without text the first is given to kernels that never load by it.
    text = tokens(tensor[:, :, : part.text_len or part.places], text_block)
    if part.kind != "column":
        return text, tokens(tensor[:, :, : part.text_len + part.places], block)
    image = tensor[:, :, part.text_len :].unflatten(2, (part.rows, part.width))
    return text, _described(image, [1, 1, block, 1, tensor.shape[-1]])


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
