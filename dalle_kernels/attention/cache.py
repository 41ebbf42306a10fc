"""Decoding one token at a time with a cache of the keys that the pattern can still see."""

from __future__ import annotations

from functools import lru_cache

import torch

from .ops import DTYPES, MAX_HEAD_DIM, check_heads, checked_pattern, checked_scale
from .pattern import AttentionPattern


def _conv_reach(pattern: AttentionPattern) -> int:
    """Distance in raster order from an image query to the furthest key that its neighbourhood may hold."""
    reach = pattern.kernel_size // 2
    width = pattern.grid[1]
    return reach * width + reach if pattern.kind == "conv" else (pattern.kernel_size - 1) * (width + 1)


def _slot_count(pattern: AttentionPattern) -> int:
    """How many image keys a cache must hold at once."""
    height, width = pattern.grid
    furthest = {"row": width, "axial_row": width - 1}
    if pattern.kind in ("conv", "conv_corner"):
        furthest[pattern.kind] = _conv_reach(pattern)
    return min(height * width, furthest.get(pattern.kind, height * width) + 1)


@lru_cache(maxsize=64)
def _slot_table(pattern: AttentionPattern, device: torch.device) -> list[tuple[int, slice | torch.Tensor]]:
    """For each image token: the slot where its key goes, and the slots that its query sees once it is there.

    Slots are a ring in raster order, except that the keys of a column lie side by side. Only the two convolutional
    kinds have holes and need a gather; the others see a contiguous run (a softmax does not mind the order within it).
    """
    height, width = pattern.grid
    count, slots = height * width, _slot_count(pattern)
    if pattern.kind == "column":
        return [(c * height + r, slice(c * height, c * height + r + 1)) for r in range(height) for c in range(width)]
    if pattern.kind not in ("conv", "conv_corner"):
        return [
            (n % slots, slice(0, min(n % width if pattern.kind == "axial_row" else n, slots - 1) + 1))
            for n in range(count)
        ]
    image = AttentionPattern(pattern.kind, 0, pattern.grid, pattern.kernel_size)
    with torch.inference_mode(False):
        visible = image.mask().nonzero()
        keys = (visible[:, 1] % slots).split(visible[:, 0].bincount().tolist())
        return [(n % slots, keys[n].to(device)) for n in range(count)]


class KVCache:
    """Keys and values for :func:`decode_attention`: the text's once a prompt, the image's once a sample.

    Only what the pattern can still see is held: for ``row`` the last ``W + 1`` image tokens, for ``axial_row`` the
    current row, for ``conv`` and ``conv_corner`` the band that the window spans, for ``column`` and ``causal`` the
    whole grid.

    Args:
        pattern: the layer's pattern.
        batch: number of prompts.
        heads, head_dim: as in ``sparse_attention``.
        dtype, device: of the keys and values.
        samples_per_prompt: samples drawn from each prompt; they share its text keys. Sample ``s`` of prompt ``b`` is
            row ``b * samples_per_prompt + s`` of the tensors that ``decode_attention`` takes.

    ``length`` is the number of tokens held so far. Not differentiable: nothing here records a gradient.
    """

    def __init__(
        self,
        pattern: AttentionPattern,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        samples_per_prompt: int = 1,
    ):
        self.pattern = checked_pattern(pattern)
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "samples_per_prompt": samples_per_prompt}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"expected {name} to be a positive integer, got {size!r}")
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"expected a head_dim between 1 and {MAX_HEAD_DIM}, got {head_dim}")
        if dtype not in DTYPES:
            raise TypeError(f"expected a cache of dtype float32, bfloat16, float16 or float64, got {dtype}")
        self.batch, self.heads, self.head_dim = batch, heads, head_dim
        self.samples_per_prompt = samples_per_prompt
        self.length = 0
        text = (2, batch, heads, pattern.text_len, head_dim)
        image = (2, batch, heads, samples_per_prompt, _slot_count(pattern), head_dim)
        # Zeros, not uninitialized memory: a slot that is not yet visible must not hold a NaN.
        self._text_keys, self._text_values = torch.zeros(text, dtype=dtype, device=device)
        self._image_keys, self._image_values = torch.zeros(image, dtype=dtype, device=device)
        self._slots = _slot_table(pattern, self._text_keys.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._text_keys.dtype

    @property
    def device(self) -> torch.device:
        return self._text_keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the keys and values occupy."""
        tensors = (self._text_keys, self._text_values, self._image_keys, self._image_values)
        return sum(tensor.nbytes for tensor in tensors)

    def reset(self) -> None:
        """Forget everything, so that the cache can serve another batch of prompts of the same size."""
        self.length = 0

    @torch.no_grad()
    def prefill(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take the keys and values ``[batch, heads, seq, head_dim]`` of the prompts' first ``seq`` tokens.

        ``seq`` may go beyond the text: given image tokens (image priming) are copied to every sample of their prompt.
        The cache must be empty, and with several samples a prompt the whole text must be given.
        """
        check_heads(k=k, v=v)
        seq, text_len = k.shape[2], self.pattern.text_len
        self._check(k, (self.batch, self.heads, seq, self.head_dim))
        if self.length:
            raise ValueError(f"expected an empty cache to prefill, got one holding {self.length} tokens; reset() it")
        if seq > self.pattern.seq_len:
            raise ValueError(f"expected at most the pattern's {self.pattern.seq_len} tokens to prefill, got {seq}")
        if seq < text_len and self.samples_per_prompt > 1:
            raise ValueError(
                f"expected the {text_len} text tokens that samples share to be prefilled at once, got {seq}"
            )
        text = min(seq, text_len)
        self._text_keys[:, :, :text] = k[:, :, :text]
        self._text_values[:, :, :text] = v[:, :, :text]
        # In order, so that a ring ends up holding the last tokens; the slots among them are distinct.
        kept = range(max(0, seq - text_len - self._image_keys.shape[3]), seq - text_len)
        if self.pattern.kind in ("causal", "column"):
            kept = range(seq - text_len)
        if len(kept):
            slots = torch.tensor([self._slots[n][0] for n in kept], device=self.device)
            tokens = slice(text_len + kept.start, text_len + kept.stop)
            self._image_keys[:, :, :, slots] = k[:, :, None, tokens]
            self._image_values[:, :, :, slots] = v[:, :, None, tokens]
        self.length = seq

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor) -> slice | torch.Tensor | None:
        """Store one token a sample and return the image slots that its query sees (None for a text token)."""
        position, text_len = self.length, self.pattern.text_len
        if position >= self.pattern.seq_len:
            raise ValueError(f"expected at most the pattern's {self.pattern.seq_len} tokens, the cache is full")
        if position < text_len:
            if self.samples_per_prompt > 1:
                raise ValueError(
                    f"expected the {text_len} text tokens that samples share to be prefilled, got a step at {position}"
                )
            self._text_keys[:, :, position] = k_new[:, :, 0]
            self._text_values[:, :, position] = v_new[:, :, 0]
            visible = None
        else:
            slot, visible = self._slots[position - text_len]
            by_sample = (self.batch, self.samples_per_prompt, self.heads, self.head_dim)
            self._image_keys[:, :, :, slot] = k_new.reshape(by_sample).transpose(1, 2)
            self._image_values[:, :, :, slot] = v_new.reshape(by_sample).transpose(1, 2)
        self.length += 1
        return visible

    def text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, heads, tokens, head_dim]`` of the text held."""
        tokens = min(self.length, self.pattern.text_len)
        return self._text_keys[:, :, :tokens], self._text_values[:, :, :tokens]

    def image(self, visible: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, heads, samples, slots, head_dim]`` of the given slots."""
        if isinstance(visible, slice):
            return self._image_keys[:, :, :, visible], self._image_values[:, :, :, visible]
        return self._image_keys.index_select(3, visible), self._image_values.index_select(3, visible)

    def _check(self, k: torch.Tensor, shape: tuple[int, ...]) -> None:
        if tuple(k.shape) != shape:
            raise ValueError(f"expected keys of shape {list(shape)} for this cache, got {list(k.shape)}")
        if k.dtype != self.dtype:
            raise TypeError(f"expected keys of the cache's dtype {self.dtype}, got {k.dtype}")
        if k.device != self.device:
            raise ValueError(f"expected keys on the cache's device {self.device}, got {k.device}")


@torch.no_grad()
def decode_attention(
    q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, cache: KVCache, scale: float | None = None
) -> torch.Tensor:
    """One step of generation: put the new token's key and value in the cache, and attend from it.

    Equals the last row of ``sparse_attention`` over all tokens so far.

    Args:
        q, k_new, v_new: ``[batch * samples_per_prompt, heads, 1, head_dim]`` of the cache's dtype, any strides.
        cache: see :class:`KVCache`; it grows by one token.
        scale: factor on the dot products, by default ``head_dim ** -0.5``.

    Returns:
        ``[batch * samples_per_prompt, heads, 1, head_dim]``.

    Raises:
        ValueError, TypeError: for another shape, dtype or device, a full cache, or a text token where samples share the
        text.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"expected cache to be a KVCache, got {type(cache).__name__}")
    check_heads(q=q, k_new=k_new, v_new=v_new)
    batch, samples, heads, head_dim = cache.batch, cache.samples_per_prompt, cache.heads, cache.head_dim
    cache._check(k_new, (batch * samples, heads, 1, head_dim))
    scale = checked_scale(scale, head_dim)
    visible = cache.append(k_new, v_new)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32

    query = q.reshape(batch, samples, heads, head_dim).transpose(1, 2)
    text_keys, text_values = cache.text()
    scores = query @ text_keys.transpose(-2, -1)
    if visible is None:
        out = (scores.to(statistics) * scale).softmax(dim=-1).to(q.dtype) @ text_values
    else:
        image_keys, image_values = cache.image(visible)
        image_scores = (image_keys @ query.unsqueeze(-1)).squeeze(-1)
        weights = (torch.cat((scores, image_scores), dim=-1).to(statistics) * scale).softmax(dim=-1).to(q.dtype)
        text = text_keys.shape[2]
        out = weights[..., :text] @ text_values
        out += (weights[..., None, text:] @ image_values).squeeze(-2)
    return out.transpose(1, 2).reshape(batch * samples, heads, 1, head_dim)
