"""The tiles of Triton's kernels against the mask: every visible pair once, in both directions, and full tiles full."""

from __future__ import annotations

import itertools

import pytest
import torch

from dalle_kernels import AttentionPattern
from dalle_kernels._triton_configurations import TABLE, configuration
from dalle_kernels.attention import tiles
from dalle_kernels.attention.pattern import KINDS

# Of queries, text keys, image keys: powers of 2 as Triton's are, above 1.
BLOCKS = [(2, 2, 2), (4, 2, 4), (8, 4, 2), (2, 4, 8)]


def blocks_of_the_table(*names):
    """The sizes that ``names`` have in attention's rows, and with half of the first for odd heads."""
    keys = [key for key in TABLE if "sparse_attention" in key[0]]
    rows = [chosen.blocks for key in keys for chosen in TABLE[key].values()]
    rows += [configuration(*key, torch.device("cpu"), halved=names[:1]).blocks for key in keys]
    return sorted({tuple(blocks[name] for name in names) for blocks in rows if blocks.keys() == set(names)})


QUERY_BLOCKS = blocks_of_the_table("BLOCK_QUERIES", "BLOCK_TEXT", "BLOCK_KEYS")
KEY_BLOCKS = blocks_of_the_table("BLOCK_KEYS", "BLOCK_QUERIES")


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


@pytest.mark.parametrize("blocks", [*((k, q) for q, k, _ in BLOCKS), (2, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_meet_each_query_that_sees_them_once(kind, blocks):
    block_keys, block_queries = blocks
    for pattern, seq, stream in streams(kind):
        mask, image_places = pattern.mask(seq), image_tokens(stream, seq)
        met = torch.zeros(seq, seq, dtype=torch.long)
        any_full = False
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
            any_full |= bool(image) and full > 0
        assert torch.equal(met, mask.long())
        assert any_full == tiles.has_full_query_tiles(stream, *blocks)


class Pairs:
    """The visible pairs of a stream's places, text before image, to be counted in rectangles."""

    def __init__(self, pattern, seq, stream):
        tokens = torch.cat([torch.arange(stream.text_len), image_tokens(stream, seq)])
        visible = torch.nn.functional.pad(pattern.mask(seq), (0, 1, 0, 1))[tokens][:, tokens]  # no token sees none
        self.real = (tokens >= 0).long().cumsum(0).tolist()
        self.sums = torch.nn.functional.pad(visible.long().cumsum(0).cumsum(1), (1, 0, 1, 0)).tolist()
        self.all = self.sums[-1][-1]

    def count(self, queries, keys):
        """How many pairs of two ranges are visible."""
        (a, b), (c, d) = queries, keys
        return self.sums[b][d] - self.sums[a][d] - self.sums[b][c] + self.sums[a][c]

    def tokens(self, part):
        first, stop = part
        return (self.real[stop - 1] if stop else 0) - (self.real[first - 1] if first else 0)

    def meet(self, queries, keys, full):
        """How many are visible; if ``full`` all are."""
        found = self.count(queries, keys)
        assert not full or found == self.tokens(queries) * self.tokens(keys)
        return found


PAPER = [(kind, text_len) for kind in KINDS for text_len in (256, 257)]


def paper_stream(kind, text_len):
    """The 1280 inputs of the paper, with the start token in the text or without one."""
    pattern, seq = AttentionPattern(kind, text_len, (32, 32)), 1280
    stream = tiles.stream(kind, seq, text_len, 32, pattern.kernel_size)
    return stream, seq, Pairs(pattern, seq, stream)


@pytest.mark.parametrize(("kind", "text_len"), PAPER)
def test_queries_of_the_paper_meet_each_visible_key_once_by_the_blocks_of_the_table(kind, text_len):
    """Ranges of one tile do not overlap, so that pairs met as often as there are any are met once each."""
    stream, _, pairs = paper_stream(kind, text_len)
    end = stream.text_len + stream.places
    for block_queries, block_text, block_keys in QUERY_BLOCKS:
        met = 0
        for tile in range(stream.tiles(block_queries)):
            image, first, text_tiles, begin, count, ahead, full = tiles.query_tile(
                tile, *stream[1:], stream.kind, block_queries, block_text, block_keys
            )
            base, stop = (stream.text_len, end) if image else (0, stream.text_len)
            queries = base + first, min(base + first + block_queries, stop)
            met += pairs.meet(queries, (0, text_tiles * block_text), True)
            if image:
                met += pairs.meet(queries, (text_tiles * block_text, stream.text_len), False)
            assert image or begin == text_tiles * block_text
            for number in range(count):
                keys = base + begin + number * block_keys, min(base + begin + (number + 1) * block_keys, stop)
                is_full = ahead <= number < ahead + full
                assert not is_full or pairs.tokens(keys) == block_keys
                met += pairs.meet(queries, keys, is_full)
        assert met == pairs.all


@pytest.mark.parametrize(("kind", "text_len"), PAPER)
def test_keys_of_the_paper_meet_each_query_once_by_the_blocks_of_the_table(kind, text_len):
    """Queries of text keys go by tokens, whose number seen by a text key does not hang on the image's order."""
    stream, seq, pairs = paper_stream(kind, text_len)
    end = stream.text_len + stream.places
    for block_keys, block_queries in KEY_BLOCKS:
        met = 0
        for tile in range(stream.tiles(block_keys)):
            image, first, begin, count, ahead, full = tiles.key_tile(
                tile, seq, *stream[1:], stream.kind, block_keys, block_queries
            )
            base, stop = (stream.text_len, end) if image else (0, stream.text_len)
            keys = base + first, min(base + first + block_keys, stop)
            last = end if image else seq
            for number in range(count):
                queries = min(base + begin + number * block_queries, last), base + begin + (number + 1) * block_queries
                met += pairs.meet((queries[0], min(queries[1], last)), keys, ahead <= number < ahead + full)
        assert met == pairs.all


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
