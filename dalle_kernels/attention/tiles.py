"""Which tiles of keys a tile of queries sees, and which tiles of queries see a tile of keys, in closed form.

A *place* is a token's rank in the order in which tiles are cut. Text tokens have their own places, apart from the
image's, so that no tile holds both. The image's are in raster order, except that ``column`` puts its columns one after
the other: place ``c * rows + r`` is the token ``r * width + c``, where ``rows`` counts the rows that the sequence has
begun. The last row may be incomplete, and its missing tokens leave places empty. In this order a query at place ``p``
sees only keys at places up to ``p`` that begin not far before it, and ``causal`` needs no text: all is image.

Functions of whole numbers without calls, loops or early returns: Triton's kernels compile them as they are, and the
tests run them over every tile of many patterns. Numbers that are divided are never negative.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Stream(NamedTuple):
    """A prefix of a pattern's stream as the kernels see it."""

    kind: str
    text_len: int
    places: int
    rows: int
    width: int
    kernel_size: int

    def tiles(self, block: int) -> int:
        """How many tiles of ``block`` queries or keys there are."""
        return self.text_tiles(block) + -(-self.places // block)

    def text_tiles(self, block: int) -> int:
        return -(-self.text_len // block)


def stream(kind: str, seq: int, text_len: int, width: int, kernel_size: int) -> Stream:
    if kind == "causal" or seq <= text_len:
        return Stream("causal", 0, seq, 1, 1, 1)
    image = seq - text_len
    rows = -(-image // width)
    places = rows * width if kind == "column" else image
    return Stream(kind, text_len, places, rows, width, kernel_size)


def query_tile(tile, text_len, places, rows, width, kernel_size, KIND, BLOCK_QUERIES, BLOCK_TEXT, BLOCK_KEYS):
    """The keys of the tile of queries number ``tile``: text before image, ``BLOCK_QUERIES`` places each.

    Returns ``(image, first, text_tiles, begin, tiles, ahead, full)``: whether it is one of image queries; its first
    place; how many tiles of ``BLOCK_TEXT`` text keys from the text's start all of its queries see whole; and the
    ``tiles`` tiles of ``BLOCK_KEYS`` keys from place ``begin`` on that hold all other keys of its own part of the
    stream, of which those from number ``ahead`` to ``ahead + full`` are seen whole by all of its queries. What is left
    of the text after whole tiles, for image queries, is up to the kernel.
    """
    in_text = (text_len + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    image = tile >= in_text
    if image:
        first = (tile - in_text) * BLOCK_QUERIES
        last = min(first + BLOCK_QUERIES, places) - 1
        text_tiles = text_len // BLOCK_TEXT
        # All keys lie from `begin` to `last`, and those from `all_begin` to `first` are seen by every query.
        if KIND == "row":
            begin = max(first - width, 0)
            all_begin = max(last - width, 0)
        elif KIND == "column":
            begin = first // rows * rows
            all_begin = last // rows * rows
        elif KIND == "axial_row":
            begin = first // width * width
            all_begin = last // width * width
        elif KIND == "conv":
            reach = kernel_size // 2
            begin = max(first - reach * (width + 1), 0)
            all_begin = max(last - reach * (width + 1), 0)
            if 2 * reach + 1 < width:  # there are holes
                all_begin = last + 1
        elif KIND == "conv_corner":
            begin = max(first // width - kernel_size + 1, 0) * width
            if first // width >= kernel_size - 1:
                begin = begin + max(first % width - kernel_size + 1, 0)
            all_begin = last + 1
        else:
            begin = 0
            all_begin = 0
    else:
        first = tile * BLOCK_QUERIES
        last = min(first + BLOCK_QUERIES, text_len) - 1
        text_tiles = (first + 1) // BLOCK_TEXT
        begin = text_tiles * BLOCK_TEXT
        all_begin = last + 1
    tiles = (last + 1 - begin + BLOCK_KEYS - 1) // BLOCK_KEYS
    ahead = (all_begin - begin + BLOCK_KEYS - 1) // BLOCK_KEYS
    full = max(max(first + 1 - begin, 0) // BLOCK_KEYS - ahead, 0)
    return image, first, text_tiles, begin, tiles, ahead, full


def key_tile(tile, seq, text_len, places, rows, width, kernel_size, KIND, BLOCK_KEYS, BLOCK_QUERIES):
    """The queries of the tile of keys number ``tile``: text before image, ``BLOCK_KEYS`` places each.

    Returns ``(image, first, begin, tiles, ahead, full)``: whether it is one of image keys; its first place; and the
    ``tiles`` tiles of ``BLOCK_QUERIES`` queries from ``begin`` on that hold all queries which see a key of it, of which
    those from number ``ahead`` to ``ahead + full`` see all of its keys. For image keys these are places of image
    queries; for text keys they are tokens, text and image alike, in their own order. The last tile may reach beyond the
    end of the stream.
    """
    in_text = (text_len + BLOCK_KEYS - 1) // BLOCK_KEYS
    image = tile >= in_text
    if image:
        first = (tile - in_text) * BLOCK_KEYS
        last = min(first + BLOCK_KEYS, places) - 1
        limit = places
        # All queries lie from `first` up to `end`, and those from `last` up to `all_end` see every key.
        if KIND == "row":
            end = last + width + 1
            all_end = first + width + 1
        elif KIND == "column":
            end = (last // rows + 1) * rows
            all_end = (first // rows + 1) * rows
        elif KIND == "axial_row":
            end = (last // width + 1) * width
            all_end = (first // width + 1) * width
        elif KIND == "conv":
            reach = kernel_size // 2
            end = last + reach * (width + 1) + 1
            all_end = first + reach * (width + 1) + 1
            if 2 * reach + 1 < width:  # there are holes
                all_end = first
        elif KIND == "conv_corner":
            end = (last // width + kernel_size - 1) * width + min(last % width + kernel_size, width)
            all_end = first
        else:
            end = places
            all_end = places
    else:
        first = tile * BLOCK_KEYS
        last = min(first + BLOCK_KEYS, text_len) - 1
        limit = seq
        end = seq
        all_end = seq
    end = min(end, limit)
    tiles = (end - first + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    ahead = (last - first + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    # Nothing is beyond the end of the stream that a mask would have to hide.
    whole = max(all_end - first, 0) // BLOCK_QUERIES
    if all_end >= limit:
        whole = tiles
    return image, first, first, tiles, ahead, max(whole - ahead, 0)


@lru_cache(maxsize=256)
def has_full_key_tiles(stream: Stream, block_queries: int, block_text: int, block_keys: int) -> bool:
    """Whether some tile of image queries sees a tile of image keys whole: of most patterns none does."""
    text = stream.text_tiles(block_queries)
    return any(
        query_tile(tile, *stream[1:], stream.kind, block_queries, block_text, block_keys)[-1]
        for tile in range(text, stream.tiles(block_queries))
    )


@lru_cache(maxsize=256)
def has_full_query_tiles(stream: Stream, block_keys: int, block_queries: int) -> bool:
    """Whether some tile of image queries sees a tile of image keys whole, cut as the key tiles' kernel does."""
    seq = stream.text_len + stream.places  # no matter what for image keys
    return any(
        key_tile(tile, seq, *stream[1:], stream.kind, block_keys, block_queries)[-1]
        for tile in range(stream.text_tiles(block_keys), stream.tiles(block_keys))
    )


def most_visible(kind: str, height: int, width: int, kernel_size: int) -> int:
    """How many numbers a decode step needs for the image keys that a token may see, itself included."""
    reach = kernel_size // 2
    if kind == "row":
        return min(width + 1, height * width)
    if kind == "column":
        return height
    if kind == "axial_row":
        return width
    if kind == "conv":
        narrow = 2 * reach + 1 <= width
        return (reach + 1) * (2 * reach + 1) - reach if narrow else reach * (width + 1) + 1
    if kind == "conv_corner":
        return min(kernel_size, height) * min(kernel_size, width)
    return height * width
