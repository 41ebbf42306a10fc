"""Gumbel-softmax in plain PyTorch: the definition of the ops, in any floating dtype, on any device.

A call is seen as ``[outer, columns, inner]``, where the columns run along ``dim``, and is worked through in chunks that
stay in a CPU's cache. Arithmetic is float32 (float64 for float64 logits), the dtype of the scalar tensor tau; the noise
is that of ``dalle_kernels.philox``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dalle_kernels.philox import gumbel_noise

_CHUNK_ELEMENTS = 1 << 18


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the KL: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kl_shape(logits: Tensor, dim: int) -> list[int]:
    """The shape of one number per row: that of ``logits`` without ``dim``."""
    shape = list(logits.shape)
    del shape[dim]
    return shape


def embedding_shape(logits: Tensor, codebook: Tensor, dim: int) -> list[int]:
    """The shape of ``logits`` with the codebook's D in place of ``dim``."""
    shape = list(logits.shape)
    shape[dim] = codebook.shape[1]
    return shape


def _as_rows(tensor: Tensor, dim: int) -> Tensor:
    """``[outer, columns, inner]`` with the columns along ``dim``."""
    dim %= tensor.dim()
    outer, inner = math.prod(tensor.shape[:dim]), math.prod(tensor.shape[dim + 1 :])
    return tensor.reshape(outer, tensor.shape[dim], inner)


def _chunks(logits: Tensor, offset: Tensor) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
    """Cut ``[outer, columns, inner]`` into pieces of rows; with each piece come its global row numbers."""
    outer, columns, inner = logits.shape
    rows = (offset + torch.arange(outer * inner, device=logits.device)).view(outer, 1, inner)
    if logits.numel() == 0:
        return
    inner_step = max(1, min(inner, _CHUNK_ELEMENTS // columns))
    outer_step = max(1, _CHUNK_ELEMENTS // (columns * inner_step))
    for first in range(0, outer, outer_step):
        for start in range(0, inner, inner_step):
            piece = (slice(first, first + outer_step), slice(None), slice(start, start + inner_step))
            yield piece, rows[piece]


def _along_columns(function: Callable[[Tensor, int], Tensor], scores: Tensor) -> Tensor:
    """``function(scores, dim)`` along dimension 1 of three; as the last dimension, where it can be, it is faster."""
    return function(scores.squeeze(2), 1).unsqueeze(2) if scores.shape[2] == 1 else function(scores, 1)


def _soft_sample(logits: Tensor, seed: Tensor, rows: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy scores ``logits + gumbel`` and the soft sample ``softmax(scores / tau)`` of one chunk."""
    scores = gumbel_noise(seed, rows, logits.shape[1], logits.dtype).add_(logits)
    return scores, _along_columns(torch.softmax, scores / tau)


def _hard_sample(scores: Tensor, soft: Tensor) -> Tensor:
    """One-hot at the largest score, the first of equals; a row whose soft sample is NaN stays NaN."""
    one_hot = torch.zeros_like(soft).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
    return one_hot.masked_fill_(soft.amax(1, keepdim=True).isnan(), math.nan)


def _posterior(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, ``log q + ln columns`` (0 where the logit is -inf, since 0·log 0 = 0) and the KL ``[outer, 1, inner]``."""
    log_q = _along_columns(torch.log_softmax, logits)
    q = log_q.exp()
    log_ratio = log_q.add_(math.log(logits.shape[1])).masked_fill_(log_q == -math.inf, 0.0)
    return q, log_ratio, (q * log_ratio).sum(1, keepdim=True)


def _softmax_backward(grad: Tensor, soft: Tensor, tau: Tensor) -> Tensor:
    weighted = grad * soft
    return weighted.sub_(soft * weighted.sum(1, keepdim=True)).div_(tau)


def _kl_backward(grad_kl: Tensor, logits: Tensor) -> Tensor:
    """Gradient of the KL: ``q·(log q + ln columns - kl)``."""
    q, log_ratio, kl = _posterior(logits)
    return q.mul_(log_ratio.sub_(kl)).mul_(grad_kl)


def gumbel_softmax(logits: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, hard: bool, dim: int) -> Tensor:
    return _sample(logits, seed, offset, tau, hard, dim, with_kl=False)[0]


def gumbel_softmax_kl(
    logits: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, hard: bool, dim: int
) -> tuple[Tensor, Tensor]:
    return _sample(logits, seed, offset, tau, hard, dim, with_kl=True)


def _sample(logits, seed, offset, tau, hard, dim, with_kl: bool) -> tuple[Tensor, Tensor]:
    source = _as_rows(logits, dim)
    dtype = compute_dtype(logits.dtype)
    y = torch.empty_like(source, memory_format=torch.contiguous_format)
    kl = torch.empty(source.shape[0], 1, source.shape[2], dtype=dtype, device=logits.device)
    for piece, rows in _chunks(source, offset):
        chunk = source[piece].to(dtype)
        scores, soft = _soft_sample(chunk, seed, rows, tau)
        y[piece] = _hard_sample(scores, soft) if hard else soft
        if with_kl:
            kl[piece] = _posterior(chunk)[2]
    return y.view(logits.shape), kl.view(kl_shape(logits, dim))


def gumbel_softmax_backward(
    grad_y: Tensor, logits: Tensor, y: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, hard: bool, dim: int
) -> Tensor:
    return gumbel_softmax_kl_backward(grad_y, None, logits, y, seed, offset, tau, hard, dim)


def gumbel_softmax_kl_backward(
    grad_y: Tensor,
    grad_kl: Tensor | None,
    logits: Tensor,
    y: Tensor,
    seed: Tensor,
    offset: Tensor,
    tau: Tensor,
    hard: bool,
    dim: int,
) -> Tensor:
    """A soft sample is its own best record; behind a one-hot ``y`` the soft sample is drawn again."""
    source, sample, grad = _as_rows(logits, dim), _as_rows(y, dim), _as_rows(grad_y, dim)
    dtype = compute_dtype(logits.dtype)
    grad_rows = None if grad_kl is None else grad_kl.reshape(source.shape[0], 1, source.shape[2])
    grad_logits = torch.empty_like(source, memory_format=torch.contiguous_format)
    for piece, rows in _chunks(source, offset):
        chunk = source[piece].to(dtype)
        soft = _soft_sample(chunk, seed, rows, tau)[1] if hard else sample[piece].to(dtype)
        result = _softmax_backward(grad[piece].to(dtype), soft, tau)
        if grad_rows is not None:
            result += _kl_backward(grad_rows[piece], chunk)
        grad_logits[piece] = result
    return grad_logits.view(logits.shape)


def gumbel_codebook(
    logits: Tensor, codebook: Tensor, seed: Tensor, offset: Tensor, tau: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    source = _as_rows(logits, dim)
    outer, _, inner = source.shape
    dtype = compute_dtype(logits.dtype)
    table = codebook.to(dtype).t()
    embedding = torch.empty(outer, codebook.shape[1], inner, dtype=codebook.dtype, device=logits.device)
    kl = torch.empty(outer, 1, inner, dtype=dtype, device=logits.device)
    for piece, rows in _chunks(source, offset):
        chunk = source[piece].to(dtype)
        embedding[piece] = torch.matmul(table, _soft_sample(chunk, seed, rows, tau)[1])
        kl[piece] = _posterior(chunk)[2]
    return embedding.view(embedding_shape(logits, codebook, dim)), kl.view(kl_shape(logits, dim))


def gumbel_codebook_backward(
    grad_embedding: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    offset: Tensor,
    tau: Tensor,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """The sample is never kept: it is drawn again from the same seed and offset."""
    source, grad = _as_rows(logits, dim), _as_rows(grad_embedding, dim)
    dtype = compute_dtype(logits.dtype)
    table = codebook.to(dtype)
    grad_rows = grad_kl.reshape(source.shape[0], 1, source.shape[2])
    grad_logits = torch.empty_like(source, memory_format=torch.contiguous_format)
    grad_table = torch.zeros_like(table)
    for piece, rows in _chunks(source, offset):
        chunk, grad_chunk = source[piece].to(dtype), grad[piece].to(dtype)
        soft = _soft_sample(chunk, seed, rows, tau)[1]
        grad_table += torch.einsum("oki,odi->kd", soft, grad_chunk)
        grad_soft = torch.matmul(table, grad_chunk)
        grad_logits[piece] = _softmax_backward(grad_soft, soft, tau) + _kl_backward(grad_rows[piece], chunk)
    return grad_logits.view(logits.shape), grad_table.to(codebook.dtype)
