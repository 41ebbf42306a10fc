"""What the Hopper backward of attention computes beside its products, on the CPU against the patterns' masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_attention_hopper import CASES, TILE, library

from dalle_kernels import AttentionPattern, _native
from dalle_kernels.attention.pattern import KINDS

pytestmark = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")

STRIP, PAIR, THREADS = 32, 2, 128


def plan_of(case):
    kind, text_len, grid, kernel_size, seq = case
    return library().hopper_backward_plan(KINDS.index(kind), seq, text_len, *grid, kernel_size)


def seen_by_words(words):
    """Bool ``[64, 32]`` of a mask, put together from the words of its threads."""
    seen = torch.zeros(TILE, STRIP, dtype=torch.bool)
    for thread, word in enumerate(words):
        for bit in range(16):
            row = thread // 32 * 16 + thread % 32 // 4 + bit // 8 * 8
            seen[row, bit % 8 // 2 * 8 + thread % 4 * 2 + bit % 2] = word >> bit & 1
    return seen


def tokens_of(plan, image, places):
    return torch.tensor([plan.token_of(image, place) for place in places])


def met_pairs(plan, seq, strips_of, mask_of, masks):
    """How often each pair of an owned token and one that passes by in its own part of the stream meets, and is seen."""
    met = torch.zeros(seq, seq, dtype=torch.int)
    for image in (False, True):
        for first in range(0, plan.tiles_of(image) * TILE, TILE):
            own = tokens_of(plan, image, range(first, first + TILE))
            for strip in range(*strips_of(image, first)):
                passing = tokens_of(plan, image, range(strip * STRIP, (strip + 1) * STRIP))
                mask = mask_of(image, first, strip)
                seen = masks[mask] if mask >= 0 else torch.ones(TILE, STRIP, dtype=torch.bool)
                rows, columns = (seen & (own >= 0)[:, None] & (passing >= 0)).nonzero(as_tuple=True)
                met.index_put_((own[rows], passing[columns]), torch.ones(len(rows), dtype=torch.int), accumulate=True)
    return met


def expected_pairs(case, plan):
    """Those that a pattern lets see each other, but of image queries with text keys, which all meet."""
    kind, text_len, grid, kernel_size, seq = case
    mask = AttentionPattern(kind, text_len, grid, kernel_size).mask(seq).int()
    mask[plan.text_len :, : plan.text_len] = 0
    return mask


@pytest.mark.parametrize("case", CASES, ids=str)
def test_owned_queries_meet_each_key_that_they_see_once(case):
    plan = plan_of(case)
    masks = [seen_by_words(plan.query_mask_word(n, t) for t in range(THREADS)) for n in range(plan.query_masks)]
    met = met_pairs(plan, case[-1], plan.keys_seen, plan.query_mask, masks)
    assert torch.equal(met, expected_pairs(case, plan))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_owned_keys_meet_each_query_that_sees_them_once(case):
    plan = plan_of(case)
    masks = [seen_by_words(plan.key_mask_word(n, t) for t in range(THREADS)) for n in range(plan.key_masks)]
    met = met_pairs(plan, case[-1], plan.queries_seeing, plan.key_mask, masks)
    assert torch.equal(met.T, expected_pairs(case, plan))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_own_each_tile_once(case):
    plan, heads = plan_of(case), 5
    blocks = heads * (plan.pairs_of(False) + plan.pairs_of(True))
    owned = {(head, image, first) for head in range(heads) for image in (0, 1)
             for first in range(0, plan.tiles_of(image) * TILE, TILE)}  # fmt: skip
    for pair_of in (plan.pair_of_queries, lambda block: plan.pair_of_keys(block, heads)):
        found = []
        for head, image, first in map(pair_of, range(blocks)):
            found += [(head, image, first + group * TILE) for group in range(PAIR)
                      if first // TILE + group < plan.tiles_of(image)]  # fmt: skip
        assert len(found) == len(owned) and set(found) == owned


def test_columns_below_are_those_of_both_rows():
    for bound in range(-2, STRIP + 3):
        seen = seen_by_words(library().columns_below(bound, thread % 4) for thread in range(THREADS))
        assert torch.equal(seen, (torch.arange(STRIP) < bound).expand(TILE, STRIP))


def test_shared_memory_holds_all_pieces_apart():
    """Tiles and strips at multiples of 1,024 bytes, as the swizzle wants, what else copies bring at multiples of 16,
    barriers at multiples of 8: the same for each dtype and pattern, in blocks of which a multiprocessor holds two,
    or of heads of 128 one."""
    cases = itertools.product((64, 128), ((3, 4), (2, 8)))
    for layout, (head_dim, (operands, stages)) in zip(library().hopper_backward_layouts(), cases, strict=True):
        row = head_dim * 2
        pieces = [(layout["tiles_barrier"], 8, 8)]
        for name, count, size, alignment in [
            ("tiles", operands * PAIR, TILE * row, 1024),
            ("strips", stages, 2 * STRIP * row, 1024),
            ("statistics", stages * (operands == 2), STRIP * 2 * 4, 16),
            ("barriers", stages, 2 * 8, 8),
        ]:
            places = layout[name]
            assert places == (places[:count] if name == "tiles" else 2 * places[:count])  # a ring: places come again
            assert len(places[:count]) == count
            pieces += [(start, size, alignment) for start in places[:count]]
        pieces = [*sorted(pieces), (layout["end"], 0, 1)]
        assert pieces[0][0] == 0 and not any(start % alignment for start, _, alignment in pieces)
        assert all(a + size <= b for (a, size, _), (b, _, _) in itertools.pairwise(pieces))
        assert 128 // head_dim * (layout["end"] + 1024) <= 228 * 1024  # with what the system takes of each block
