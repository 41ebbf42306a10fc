"""Which keys each query of the text-and-image stream may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

KINDS = ("causal", "row", "column", "conv", "axial_row", "conv_corner")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class AttentionPattern:
    """A causal attention mask over ``text_len`` text tokens followed by a raster-ordered grid of image tokens.

    Text query ``i`` sees text keys ``j <= i``. Image query ``n = r * W + c`` (row ``r``, column ``c``, counted from the
    first image token) sees every text key and these image keys ``m = r' * W + c'`` (paper section 2, figure 11, for the
    first four):

    - ``causal``: ``m <= n``, so the whole mask is the ordinary triangle;
    - ``row``: the previous ``W + 1`` tokens in raster order, itself included, ``n - W <= m <= n``;
    - ``column``: ``m <= n`` with ``c' == c``;
    - ``conv``: ``m = n - (dr * W + dc)`` with ``0 <= dr <= (K - 1) / 2``, ``|dc| <= (K - 1) / 2``, ``dr * W + dc >= 0``
      and ``m >= 0``: the causal half of a ``K x K`` neighbourhood in raster order, wrapping around at the grid's left
      and right edges;
    - ``axial_row`` (DALLE-pytorch's ``SparseAxialCausalAttention`` with ``axis=0``): ``r' == r`` and ``c' <= c``. Its
      ``axis=1`` is ``column``;
    - ``conv_corner`` (DALLE-pytorch's ``SparseConvCausalAttention`` with ``dilation=1``): ``0 <= r - r' < K`` and
      ``0 <= c - c' < K``: a ``K x K`` window whose bottom right corner is the query, cut off at the edges, never
      wrapped.

    Args:
        kind: one of ``KINDS``.
        text_len: number of text tokens (a start token included, if the stream has one), 0 or more.
        grid: height and width ``(H, W)`` of the grid of image tokens, both positive.
        kernel_size: ``K``, odd and positive; used by ``conv`` and ``conv_corner`` only.

    Raises:
        ValueError: for an argument outside these ranges.
    """

    kind: str
    text_len: int
    grid: tuple[int, int]
    kernel_size: int = 11

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not _is_integer(self.text_len) or self.text_len < 0:
            raise ValueError(f"expected text_len to be an integer of 0 or more, got {self.text_len!r}")
        sides = self.grid if isinstance(self.grid, (tuple, list)) else ()
        if len(sides) != 2 or not all(_is_integer(side) and side > 0 for side in sides):
            raise ValueError(f"expected grid to be two positive integers (height, width), got {self.grid!r}")
        if not _is_integer(self.kernel_size) or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"expected kernel_size to be an odd positive integer, got {self.kernel_size!r}")
        object.__setattr__(self, "grid", tuple(sides))

    @property
    def seq_len(self) -> int:
        """Length of the whole stream, ``text_len + H * W``."""
        return self.text_len + self.grid[0] * self.grid[1]

    @property
    def density(self) -> float:
        """The visible share of the full ``seq_len x seq_len`` square, between 0 and 1."""
        return self.pairs() / self.seq_len**2

    def mask(self, seq_len: int | None = None, device: torch.device | str | None = None) -> torch.Tensor:
        """Bool ``[N, N]``, True where query (row) may see key (column); N is ``seq_len``, by default the whole."""
        length = self._prefix(seq_len)
        position = torch.arange(length, device=device)
        visible = position[:, None] >= position[None, :]
        if length > self.text_len:
            visible[self.text_len :, self.text_len :] &= self._image_mask(length - self.text_len, device)
        return visible

    def pairs(self, seq_len: int | None = None) -> int:
        """Number of visible (query, key) pairs of a prefix of ``seq_len`` tokens, counted without forming the mask."""
        length = self._prefix(seq_len)
        text = min(length, self.text_len)
        image = length - text
        return text * (text + 1) // 2 + image * text + int(self._image_keys_per_query(image).sum())

    def _prefix(self, seq_len: int | None) -> int:
        if seq_len is None:
            return self.seq_len
        if not _is_integer(seq_len) or not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"expected seq_len between 0 and the pattern's {self.seq_len}, got {seq_len!r}")
        return seq_len

    def _conv_offsets(self, count: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Bool ``[count]``: which distances ``n - m`` the raster neighbourhood of ``conv`` holds."""
        width, reach = self.grid[1], self.kernel_size // 2
        distance = torch.arange(count, device=device)[:, None]
        center = torch.arange(reach + 1, device=device) * width
        return ((distance - center).abs() <= reach).any(dim=1)

    def _image_mask(self, count: int, device: torch.device | str | None) -> torch.Tensor:
        """Bool ``[count, count]`` over image tokens; the caller adds causality."""
        width = self.grid[1]
        token = torch.arange(count, device=device)
        distance = token[:, None] - token[None, :]
        rows = token[:, None] // width - token[None, :] // width
        columns = token[:, None] % width - token[None, :] % width
        if self.kind == "row":
            return distance <= width
        if self.kind == "column":
            return columns == 0
        if self.kind == "conv":
            return self._conv_offsets(count, device)[distance.clamp(min=0)]
        if self.kind == "axial_row":
            return rows == 0
        if self.kind == "conv_corner":
            return (rows < self.kernel_size) & (columns >= 0) & (columns < self.kernel_size)
        return distance >= 0

    def _image_keys_per_query(self, count: int) -> torch.Tensor:
        """Int64 ``[count]``: how many image keys each image query sees."""
        width = self.grid[1]
        token = torch.arange(count)
        row, column = token // width, token % width
        if self.kind == "row":
            return token.clamp(max=width) + 1
        if self.kind == "column":
            return row + 1
        if self.kind == "conv":
            return self._conv_offsets(count).cumsum(0)
        if self.kind == "axial_row":
            return column + 1
        if self.kind == "conv_corner":
            return (row + 1).clamp(max=self.kernel_size) * (column + 1).clamp(max=self.kernel_size)
        return token + 1


@lru_cache(maxsize=256)
def cached_pattern(kind: str, text_len: int, height: int, width: int, kernel_size: int) -> AttentionPattern:
    """The pattern named by an operator's plain arguments, without validating them again at each call."""
    return AttentionPattern(kind, text_len, (height, width), kernel_size)
