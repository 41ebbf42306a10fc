"""Sparse attention over a stream of text and image tokens (see README.md beside this file)."""

from __future__ import annotations

from .cache import KVCache
from .decode import decode_attention
from .modules import SparseSelfAttention
from .ops import sparse_attention
from .pattern import AttentionPattern

__all__ = ["AttentionPattern", "KVCache", "SparseSelfAttention", "decode_attention", "sparse_attention"]
