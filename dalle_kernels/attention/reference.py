"""Masked softmax attention in plain PyTorch: it defines the op, and is the oracle of every other provider."""

from __future__ import annotations

from functools import lru_cache

import torch

from .pattern import AttentionPattern, cached_pattern
from .slots import slot_table, slot_tensors


@lru_cache(maxsize=32)
def _mask(pattern: AttentionPattern, seq_len: int, device: torch.device) -> torch.Tensor:
    # A tensor made under inference mode could not be used by a later training step.
    with torch.inference_mode(False):
        return pattern.mask(seq_len, device)


def _masked_scores(q: torch.Tensor, k: torch.Tensor, pattern: AttentionPattern, scale: float) -> torch.Tensor:
    scores = (q @ k.transpose(-2, -1)) * scale
    return scores.masked_fill(~_mask(pattern, q.shape[-2], q.device), -torch.inf)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_heads(like: torch.Tensor) -> torch.Tensor:
    """An uninitialized ``[batch, heads, seq, head_dim]`` tensor stored as ``[batch, seq, heads, head_dim]``.

    Joining the heads of such a tensor for the output projection moves no memory.
    """
    return like.new_empty_strided(like.shape, head_strides(*like.shape))


def head_strides(batch: int, heads: int, seq: int, head_dim: int) -> tuple[int, int, int, int]:
    """Those of a tensor by :func:`empty_heads`."""
    return seq * heads * head_dim, head_dim, heads * head_dim, 1


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kind: str,
    text_len: int,
    height: int,
    width: int,
    kernel_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    pattern = cached_pattern(kind, text_len, height, width, kernel_size)
    dtype = _statistics_dtype(q.dtype)
    scores = _masked_scores(q.to(dtype), k.to(dtype), pattern, scale)
    return empty_heads(q).copy_(scores.softmax(dim=-1) @ v.to(dtype)), scores.logsumexp(dim=-1)


def sparse_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    kind: str,
    text_len: int,
    height: int,
    width: int,
    kernel_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pattern = cached_pattern(kind, text_len, height, width, kernel_size)
    dtype = _statistics_dtype(q.dtype)
    grad_out, q, k, v = (x.to(dtype) for x in (grad_out, q, k, v))
    weights = _masked_scores(q, k, pattern, scale).softmax(dim=-1)
    grad_weights = grad_out @ v.transpose(-2, -1)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)) * scale
    dq, dk, dv = grad_scores @ k, grad_scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ grad_out
    return empty_heads(out).copy_(dq), empty_heads(out).copy_(dk), empty_heads(out).copy_(dv)


def decode_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    text: torch.Tensor,
    image: torch.Tensor,
    position: int,
    kind: str,
    text_len: int,
    height: int,
    width: int,
    kernel_size: int,
    scale: float,
) -> torch.Tensor:
    """One token a sample at ``position``, whose key and value are put into the cache first.

    ``q``, ``k_new`` and ``v_new`` are ``[prompts * samples, heads, 1, head_dim]``; the cache is ``text`` ``[2, prompts,
    heads, text_len, head_dim]`` and ``image`` ``[2, prompts, heads, samples, slots, head_dim]``, keys before values.
    """
    query, key, value = _of_prompts(image, q, k_new, v_new)
    if position < text_len:
        text[0, :, :, position], text[1, :, :, position] = key[:, :, 0], value[:, :, 0]
        seen = image[:, :, :, :, :0]
    else:
        slots = slot_table(q.device, kind, text_len, height, width, kernel_size)[position - text_len]
        image[0, :, :, :, slots.own_slot], image[1, :, :, :, slots.own_slot] = key, value
        if slots.listed is None:
            seen = image[:, :, :, :, slots.first : slots.first + slots.count]
        else:
            seen = image.index_select(4, slots.listed)
    text = text[:, :, :, : position + 1]
    weights = _weights(query, text[0], seen[0], scale)
    return _weighted(weights, text[1], seen[1]).reshape(q.shape).contiguous()


def _of_prompts(image: torch.Tensor, *tokens: torch.Tensor) -> list[torch.Tensor]:
    """Tokens as ``[prompts, heads, samples, head_dim]``, for a cache's ``image``."""
    _, prompts, heads, samples, _, head_dim = image.shape
    return [x.reshape(prompts, samples, heads, head_dim).transpose(1, 2) for x in tokens]


def _weights(
    query: torch.Tensor,
    text_keys: torch.Tensor,
    image_keys: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """The softmax over a cache's keys, the text's first, but for the ``hidden`` of them."""
    image_scores = (image_keys @ query.unsqueeze(-1)).squeeze(-1)
    scores = torch.cat((query @ text_keys.transpose(-2, -1), image_scores), dim=-1)
    scores = scores.to(_statistics_dtype(query.dtype)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1).to(query.dtype)


def _weighted(weights: torch.Tensor, text_values: torch.Tensor, image_values: torch.Tensor) -> torch.Tensor:
    """A cache's values by their weights, as ``[prompts, samples, heads, head_dim]``."""
    text_keys = text_values.shape[-2]
    out = weights[..., :text_keys] @ text_values
    out += (weights[..., None, text_keys:] @ image_values).squeeze(-2)
    return out.transpose(1, 2)


def decode_attention_at(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    text: torch.Tensor,
    image: torch.Tensor,
    position: torch.Tensor,
    kind: str,
    text_len: int,
    height: int,
    width: int,
    kernel_size: int,
    scale: float,
) -> torch.Tensor:
    """:func:`decode_attention` at a position that only the device knows: all keys are scored, and the unseen hidden.

    A position at which there is no step gives NaN and changes nothing: one outside the stream, and one of the text that
    several samples share.
    """
    samples = image.shape[3]
    query, key, value = _of_prompts(image, q, k_new, v_new)
    position = position.reshape(1).long()
    is_step = (position >= (text_len if samples > 1 else 0)) & (position < text_len + height * width)
    in_image = position >= text_len
    own_slot, seen = slot_tensors(q.device, kind, text_len, height, width, kernel_size)
    token = (position - text_len).clamp(0, len(seen) - 1)
    taken = torch.stack((key, value))
    if samples == 1 and text_len > 0:
        place = position.clamp(0, text_len - 1)
        text.index_copy_(3, place, torch.where(is_step & ~in_image, taken, text.index_select(3, place)))
    slot = own_slot[token]
    image.index_copy_(4, slot, torch.where(is_step & in_image, taken[..., None, :], image.index_select(4, slot)))

    text_seen = torch.arange(text_len, device=q.device) <= position
    image_seen = seen[token[0]] & in_image
    weights = _weights(query, text[0], image[0], scale, hidden=~torch.cat((text_seen, image_seen)))
    # Of what was never written a weight of zero would make NaN.
    values = text[1].masked_fill(~text_seen[:, None], 0), image[1].masked_fill(~image_seen[:, None], 0)
    return torch.where(is_step, _weighted(weights, *values), torch.nan).reshape(q.shape).contiguous()
