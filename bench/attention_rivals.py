"""Other ways to compute the paper's masks: SDPA, FlexAttention, SDPA on gathered windows, DALLE-pytorch's layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle_kernels import AttentionPattern

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DENSE_CAUSAL = "SDPA, dense causal"
BACKENDS = {
    "cuDNN's SDPA, dense causal": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2 of SDPA, dense causal": SDPBackend.FLASH_ATTENTION,
}
MASKED = "SDPA, boolean mask"


def dense_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def of_backend(name: str) -> Attention:
    """Dense causal SDPA by one of BACKENDS."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return dense_causal(q, k, v)

    return attend


def masked(pattern: AttentionPattern, seq: int, device: str) -> Attention:
    return partial(F.scaled_dot_product_attention, attn_mask=pattern.mask(seq).to(device))


def eager(pattern: AttentionPattern, seq: int, device: str) -> Attention:
    """Masked softmax attention as torch's own operations have it in the inputs' dtype, every result rounded to that."""
    hidden = pattern.mask(seq).logical_not().to(device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    return attend


def mask_rule(pattern: AttentionPattern) -> Callable:
    """The pattern as a ``mask_mod`` of FlexAttention, in closed form."""
    text, width, reach = pattern.text_len, pattern.grid[1], pattern.kernel_size // 2

    def row(_batch, _head, query, key):
        window = (key <= query) & (key >= query - width)
        return torch.where(query < text, key <= query, (key < text) | window)

    def column(_batch, _head, query, key):
        window = (key <= query) & ((query - key) % width == 0)
        return torch.where(query < text, key <= query, (key < text) | window)

    def conv(_batch, _head, query, key):
        distance = query - key
        rows = (distance + reach) // width
        window = (distance >= 0) & (rows <= reach) & (distance - rows * width <= reach)
        return torch.where(query < text, key <= query, (key < text) | window)

    return {"row": row, "column": column, "conv": conv}[pattern.kind]


def permuted_column_rule(pattern: AttentionPattern) -> Callable:
    """The column mask where the image tokens stand column by column."""
    text, height = pattern.text_len, pattern.grid[0]

    def rule(_batch, _head, query, key):
        same = (query - text) // height == (key - text) // height
        return torch.where(query < text, key <= query, (key < text) | (same & (key <= query)))

    return rule


def column_order(pattern: AttentionPattern) -> torch.Tensor:
    """The order of the tokens for :func:`permuted_column_rule`: text, then the image column by column."""
    image = torch.arange(pattern.text_len, pattern.seq_len).view(pattern.grid).t().flatten()
    return torch.cat((torch.arange(pattern.text_len), image))


def flex(rule: Callable, seq: int, block: int, device: str) -> Attention:
    """FlexAttention compiled, with the block mask made beforehand."""
    blocks = create_block_mask(rule, None, None, seq, seq, device=device, BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options = None
    if device == "cuda" and block < 128:  # its kernels' own tiles must divide the mask's
        backward = {f"BLOCK_{side}{number}": block for side in "MN" for number in (1, 2)}
        options = {"BLOCK_M": block, "BLOCK_N": block, **backward}
    return partial(compiled, block_mask=blocks, kernel_options=options)


def gathered(pattern: AttentionPattern, device: str) -> Attention:
    """Dense SDPA over the text and a window of image keys that a line of queries shares.

    The line is a row of the grid, with the keys from ``back`` before it to its end; for ``column`` it is a column. The
    window's keys are gathered and stand after a copy of the text's; what a query must not see is masked.
    """
    text, (height, width) = pattern.text_len, pattern.grid
    back = {"row": width, "column": 0, "conv": pattern.kernel_size // 2 * (width + 1)}[pattern.kind]
    lines, length = (width, height) if pattern.kind == "column" else (height, width)

    def as_lines(x: torch.Tensor) -> torch.Tensor:
        """Image tokens ``[batch, heads, H*W, D]`` to ``[batch * heads, lines, length, D]``."""
        grid = x.unflatten(2, (height, width)).flatten(0, 1)
        return grid.transpose(1, 2) if pattern.kind == "column" else grid

    def windows(x: torch.Tensor) -> torch.Tensor:
        """Keys ``[batch, heads, seq, D]`` to ``[batch * heads, lines, text + window, D]``."""
        image = as_lines(x[:, :, text:])
        if back:
            image = F.pad(image.flatten(1, 2), (0, 0, back, 0)).unfold(1, back + width, width).transpose(2, 3)
        shared = x[:, :, :text].flatten(0, 1).unsqueeze(1).expand(-1, lines, -1, -1)
        return torch.cat((shared, image), dim=2)

    mask = _window_mask(pattern, lines, length, back).to(device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        begin = dense_causal(q[:, :, :text], k[:, :, :text], v[:, :, :text])
        image = F.scaled_dot_product_attention(as_lines(q[:, :, text:]), windows(k), windows(v), attn_mask=mask)
        if pattern.kind == "column":
            image = image.transpose(1, 2)
        return torch.cat((begin, image.flatten(1, 2).unflatten(0, q.shape[:2])), dim=2)

    return attend


def _window_mask(pattern: AttentionPattern, lines: int, length: int, back: int) -> torch.Tensor:
    """Which of its window's keys each query may see: bool ``[1, lines, length, text + window]``."""
    text, (height, width) = pattern.text_len, pattern.grid
    numbers = torch.arange(height * width).view(height, width)
    if pattern.kind == "column":
        queries = keys = numbers.t()
    else:
        queries = numbers
        keys = torch.arange(-back, width) + width * torch.arange(height)[:, None]
    image = pattern.mask()[text:, text:]
    seen = image[queries[:, :, None], keys.clamp(min=0)[:, None, :]] & (keys >= 0)[:, None, :]
    return torch.cat((torch.ones(lines, length, text, dtype=torch.bool), seen), dim=-1).unsqueeze(0)
