"""A cache of the keys and values that the pattern can still see, for :func:`decode_attention`."""

from __future__ import annotations

import torch

from dalle_kernels._arguments import names_wrong_types

from .ops import DTYPES, MAX_HEAD_DIM, check_heads, checked_pattern
from .pattern import AttentionPattern
from .slots import slot_count, slot_table


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

    @names_wrong_types
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
        # Keys, then values. A slot is read only after it was written, so they need no initial value.
        text = (2, batch, heads, pattern.text_len, head_dim)
        image = (2, batch, heads, samples_per_prompt, slot_count(pattern), head_dim)
        self.text = torch.empty(text, dtype=dtype, device=device)
        self.image = torch.empty(image, dtype=dtype, device=device)
        self.pattern_arguments = (pattern.kind, pattern.text_len, *pattern.grid, pattern.kernel_size)
        self.step_shape = torch.Size((batch * samples_per_prompt, heads, 1, head_dim))

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the keys and values occupy."""
        return self.text.nbytes + self.image.nbytes

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
        self.check(k, (self.batch, self.heads, seq, self.head_dim))
        if self.length:
            raise ValueError(f"expected an empty cache to prefill, got one holding {self.length} tokens; reset() it")
        if seq > self.pattern.seq_len:
            raise ValueError(f"expected at most the pattern's {self.pattern.seq_len} tokens to prefill, got {seq}")
        if seq < text_len and self.samples_per_prompt > 1:
            raise ValueError(
                f"expected the {text_len} text tokens that samples share to be prefilled at once, got {seq}"
            )
        text = min(seq, text_len)
        # In order, so that a ring ends up holding the last tokens; the slots among them are distinct.
        kept = range(max(0, seq - text_len - self.image.shape[4]), seq - text_len)
        for cached_text, cached_image, tensor in zip(self.text, self.image, (k, v)):
            cached_text[:, :, :text] = tensor[:, :, :text]
            if len(kept):
                table = slot_table(self.device, *self.pattern_arguments)
                slots = torch.tensor([table[n].own_slot for n in kept], device=self.device)
                cached_image[:, :, :, slots] = tensor[:, :, None, text_len + kept.start : text_len + kept.stop]
        self.length = seq

    def check_step(self) -> None:
        """Raise one clear sentence unless the cache can take one more token a sample."""
        text_len, position = self.pattern.text_len, self.length
        if position >= self.pattern.seq_len:
            raise ValueError(f"expected at most the pattern's {self.pattern.seq_len} tokens, the cache is full")
        if position < text_len and self.samples_per_prompt > 1:
            raise ValueError(
                f"expected the {text_len} text tokens that samples share to be prefilled, got a step at {position}"
            )

    def fits(self, *tokens: torch.Tensor) -> bool:
        """Whether each is a tensor of one token a sample, of the cache's dtype and device."""
        dtype, device = self.text.dtype, self.text.device
        for token in tokens:
            if not isinstance(token, torch.Tensor) or token.shape != self.step_shape:
                return False
            if token.dtype != dtype or token.device != device:
                return False
        return True

    def check(self, k: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Raise one clear sentence unless ``k`` has this shape and the cache's dtype and device."""
        if tuple(k.shape) != tuple(shape):
            raise ValueError(f"expected keys of shape {list(shape)} for this cache, got {list(k.shape)}")
        if k.dtype != self.dtype:
            raise TypeError(f"expected keys of the cache's dtype {self.dtype}, got {k.dtype}")
        if k.device != self.device:
            raise ValueError(f"expected keys on the cache's device {self.device}, got {k.device}")
