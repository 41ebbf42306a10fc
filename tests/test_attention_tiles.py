"""The tiles of Triton's kernels against the mask: every visible pair once, in both directions, and full tiles full."""

from __future__ import annotations

import itertools

import pytest
import torch

from dalle_kernels import AttentionPattern
from dalle_kernels.attention import tiles
from dalle_kernels.attention.pattern import KINDS

# Of queries, text keys, image keys: powers of 2 as Triton's are, above 1.
BLOCKS = [(2, 2, 2), (4, 2, 4), (8, 4, 2)]


def streams(kind):
    """Small grids, kernel sizes, texts, and prefixes that end within the text, within a row and at its end."""
    sizes = (1, 5) if kind in ("conv", "conv_corner") else (3,)
    for height, width, kernel_size, text_len in itertools.product((1, 3, 5), (1, 4, 7), sizes, (0, 5, 8)):
        pattern = AttentionPattern(kind, text_len, (height, width), kernel_size)
        for seq in sorted({1, text_len, text_len + 1, pattern.seq_len - width // 2, pattern.seq_len} - {0}):
            yield pattern, seq, tiles.stream(kind, seq, text_len, width, kernel_size)


def image_tokens(stream, seq):
    """Which token is at each place of the image; -1 where none is."""
    tokens = torch.arange(stream.places)
    if stream.kind == "column":
        tokens = tokens % stream.rows * stream.width + tokens // stream.rows
    tokens += stream.text_len
    return torch.where(tokens < seq, tokens, -1)


def place_range(tokens, first, count):
    found = tokens[first : first + count]
    return found[found >= 0]


def meet(mask, met, queries, keys, full):
    """Count the visible pairs of a tile in ``met``; of a full one all are."""
    visible = mask[queries][:, keys]
    assert visible.all() or not full
    met[queries[:, None], keys] += visible.long()


@pytest.mark.parametrize("kind", KINDS)
def test_places_hold_every_image_token_once(kind):
    for _, seq, stream in streams(kind):
        tokens = image_tokens(stream, seq)
        assert torch.equal(tokens[tokens >= 0].sort().values, torch.arange(stream.text_len, seq))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_queries_meet_each_visible_key_once(kind, blocks):
    block_queries, block_text, block_keys = blocks
    for pattern, seq, stream in streams(kind):
        mask, image_places = pattern.mask(seq), image_tokens(stream, seq)
        met = torch.zeros(seq, seq, dtype=torch.long)
        any_full = False

        for tile in range(stream.tiles(block_queries)):
            image, first, text_tiles, begin, count, ahead, full = tiles.query_tile(
                tile, *stream[1:], stream.kind, *blocks
            )
            part = image_places if image else torch.arange(stream.text_len)
            queries = place_range(part, first, block_queries)
            for text in range(text_tiles):
                keys = torch.arange(text * block_text, (text + 1) * block_text)
                assert keys[-1] < stream.text_len
                meet(mask, met, queries, keys, True)
            if image:
                meet(mask, met, queries, torch.arange(text_tiles * block_text, stream.text_len), False)
            assert begin >= 0 and (count - 1) * block_keys < len(part) - begin
            for number in range(count):
                is_full = ahead <= number < ahead + full
                keys = place_range(part, begin + number * block_keys, block_keys)
                assert len(keys) == block_keys or not is_full
                meet(mask, met, queries, keys, is_full)
            any_full |= bool(image) and full > 0
        assert torch.equal(met, mask.long())
        assert any_full == tiles.has_full_key_tiles(stream, *blocks)


@pytest.mark.parametrize("blocks", [(k, q) for q, k, _ in BLOCKS], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_meet_each_query_that_sees_them_once(kind, blocks):
    block_keys, block_queries = blocks
    for pattern, seq, stream in streams(kind):
        mask, image_places = pattern.mask(seq), image_tokens(stream, seq)
        met = torch.zeros(seq, seq, dtype=torch.long)
        for tile in range(stream.tiles(block_keys)):
            image, first, begin, count, ahead, full = tiles.key_tile(
                tile, seq, *stream[1:], stream.kind, block_keys, block_queries
            )
            keys = place_range(image_places if image else torch.arange(stream.text_len), first, block_keys)
            order = image_places if image else torch.arange(seq)
            assert begin >= 0 and (count - 1) * block_queries < len(order) - begin
            for number in range(count):
                queries = place_range(order, begin + number * block_queries, block_queries)
                meet(mask, met, queries, keys, ahead <= number < ahead + full)
        assert torch.equal(met, mask.long())


@pytest.mark.parametrize("kind", KINDS)
def test_few_tiles_are_met_in_vain(kind):
    """On the stream of the paper a tile is visited only if some pair of it is visible."""
    pattern = AttentionPattern(kind, 256, (32, 32))
    stream = tiles.stream(kind, pattern.seq_len, 256, 32, 11)
    mask, places = pattern.mask(), image_tokens(stream, pattern.seq_len)
    for tile in range(stream.text_tiles(64), stream.tiles(64)):
        image, first, _, begin, count, _, _ = tiles.query_tile(tile, *stream[1:], stream.kind, 64, 64, 32)
        assert image or stream.text_len == 0
        queries = place_range(places, first, 64)
        for number in range(count):
            assert mask[queries][:, place_range(places, begin + number * 32, 32)].any()
