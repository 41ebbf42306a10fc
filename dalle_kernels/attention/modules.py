"""A self-attention layer to drop into a transformer."""

from __future__ import annotations

import torch
from torch import nn

from dalle_kernels._arguments import names_wrong_types

from .cache import KVCache
from .decode import decode_attention
from .ops import MAX_HEAD_DIM, checked_pattern, sparse_attention
from .pattern import AttentionPattern


class SparseSelfAttention(nn.Module):
    """Multi-head self-attention under an :class:`AttentionPattern`, with its input and output projections.

    Args:
        dim: width of the input and the output.
        heads: number of heads.
        pattern: which keys a query sees.
        head_dim: width of a head, by default ``dim // heads``; ``heads * head_dim`` may differ from ``dim``.
        bias: whether both projections have a bias.
        scale: factor on the dot products, by default ``head_dim ** -0.5``.
        device, dtype: of the parameters.

    Parameters: ``qkv.weight`` ``[3 * heads * head_dim, dim]`` (all queries, then all keys, then all values, head by
    head) and ``out.weight`` ``[dim, heads * head_dim]``, with biases.
    """

    @names_wrong_types
    def __init__(
        self,
        dim: int,
        heads: int,
        pattern: AttentionPattern,
        head_dim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or heads < 1:
            raise ValueError(f"expected a positive dim and number of heads, got dim {dim} and {heads} heads")
        if head_dim is None:
            if dim % heads:
                raise ValueError(
                    f"expected dim to be a multiple of heads, or head_dim to be given, got {dim} and {heads}"
                )
            head_dim = dim // heads
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"expected a head_dim between 1 and {MAX_HEAD_DIM}, got {head_dim}")
        self.pattern = checked_pattern(pattern)
        self.dim, self.heads, self.head_dim, self.scale = dim, heads, head_dim, scale
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias, device=device, dtype=dtype)

    def new_cache(self, batch: int, samples_per_prompt: int = 1) -> KVCache:
        """An empty cache for ``batch`` prompts, of the parameters' dtype and device."""
        weight = self.qkv.weight
        return KVCache(self.pattern, batch, self.heads, self.head_dim, weight.dtype, weight.device, samples_per_prompt)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[batch, seq, dim]`` to ``[batch, seq, dim]``, where ``seq`` is any prefix of ``pattern.seq_len``.

        With a cache: an empty one takes the whole prompt ``x`` ``[prompts, seq, dim]``; after that each call is one
        step, ``x`` being ``[prompts * samples_per_prompt, 1, dim]``. With a ``position``, a tensor, it is a step there:
        see :func:`decode_attention`.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"expected an input of shape [batch, seq, {self.dim}], got {list(x.shape)}")
        if cache is not None and cache.pattern != self.pattern:
            raise ValueError(
                f"expected a cache of this layer's pattern {self.pattern}, got one of {cache.pattern}; "
                "make it with new_cache()"
            )
        joint = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in joint.unbind(2))
        if position is not None or (cache is not None and cache.length):
            attended = decode_attention(q, k, v, cache, self.scale, position)
        else:
            attended = sparse_attention(q, k, v, self.pattern, self.scale)
            if cache is not None:
                cache.prefill(k, v)
        return self.out(attended.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, head_dim={self.head_dim}, pattern={self.pattern}"
