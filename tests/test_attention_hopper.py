"""What the Hopper attention kernel computes beside its products, on the CPU against plain models."""

from __future__ import annotations

import itertools

import pytest
import torch

from dalle_kernels import AttentionPattern, _native
from dalle_kernels.attention.pattern import KINDS

pytestmark = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason="the compiled library is not built")

TILE = 64
GROUPS = 3


def library():
    return _native.library("cpu")


def bits(word):
    return [bit for bit in range(32) if word >> bit & 1]


def columns(word, lane):
    """The columns of a step that a thread's mask holds: of every eight it has 2 * lane and the next one."""
    return [bit // 2 * 8 + 2 * lane + bit % 2 for bit in bits(word)]


def test_the_swizzle_moves_pieces_within_rows_and_spreads_columns_over_all_banks():
    offsets = [[library().swizzled_offset(row, piece) for piece in range(8)] for row in range(96)]
    for row, row_offsets in enumerate(offsets):
        assert sorted(row_offsets) == [128 * row + 16 * piece for piece in range(8)]
        assert row_offsets == [128 * row + (16 * piece ^ (row % 8 * 16)) for piece in range(8)]
    for first, piece in itertools.product(range(0, 96, 8), range(8)):
        assert {offsets[row][piece] % 128 for row in range(first, first + 8)} == set(range(0, 128, 16))


def test_a_descriptor_holds_address_distance_and_swizzle():
    for address in range(0, 227 * 1024, 1024):
        descriptor = library().tile_descriptor(address)
        assert descriptor & 0x3FFF == address // 16
        assert descriptor >> 32 & 0x3FFF == 1024 // 16  # eight rows of 128 bytes
        assert descriptor >> 62 == 1  # of 128 bytes
        for moved in range(0, 16384 + 1, 32):
            if address + moved < 1 << 18:
                assert library().moved_descriptor(descriptor, moved) == library().tile_descriptor(address + moved)


@pytest.mark.parametrize("keys", [16, 32, 64, 96, 128])
def test_a_mask_below_a_column_holds_the_columns_below_it(keys):
    for bound in range(-3, keys + 5):
        words = [library().mask_below(bound, lane) & (1 << keys // 4) - 1 for lane in range(4)]
        found = sorted(column for lane, word in enumerate(words) for column in columns(word, lane))
        assert found == list(range(max(0, min(bound, keys))))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_turns_take_each_tile_of_a_block_once_and_in_order(groups):
    for first, count in itertools.product(range(0, 60, 7), range(1, 40)):
        rounds = range(count)
        turns = [[library().tile_of_turn(first, turn, group, groups) for turn in rounds] for group in range(groups)]
        assert sorted(itertools.chain(*turns)) == list(range(first, first + count * groups))
        assert all(earlier < later for own in turns for earlier, later in itertools.pairwise(own))


@pytest.mark.parametrize(("heads", "shares"), [(496, 132), (1, 7), (3, 3), (5, 64)])
@pytest.mark.parametrize("case", [("row", 256), ("conv", 77), ("causal", 0)], ids=str)
def test_shares_hold_all_tiles_and_cost_about_the_same(case, heads, shares):
    kind, text_len = case
    plan = library().HopperPlan(KINDS.index(kind), text_len + 1024, text_len, 32, 32, 11, (96, 64), 64, GROUPS)
    costs = [plan.tile_cost(tile) for tile in range(plan.tiles)] * heads
    bounds = [plan.share_begin(heads, share, shares) for share in range(shares + 1)]
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, len(costs))
    for first, last in itertools.pairwise(bounds):
        assert abs(sum(costs[first:last]) - sum(costs) / shares) <= max(costs)


def seen_columns(plan, mask):
    """Bool ``[64, step]`` of a mask of the plan, put together from its threads' parts."""
    seen = torch.zeros(TILE, plan.step, dtype=torch.bool)
    for row, lane in itertools.product(range(TILE), range(4)):
        seen[row, columns(plan.window_mask(mask, row, lane), lane)] = True
    return seen


CASES = [
    ("row", 256, (32, 32), 11, 1280),
    ("row", 257, (32, 32), 11, 1280),
    ("row", 77, (24, 40), 11, 1037),
    ("row", 0, (5, 7), 3, 33),
    ("row", 100, (3, 150), 3, 450),
    ("row", 256, (32, 32), 3, 200),
    ("column", 256, (32, 32), 11, 1280),
    ("column", 257, (32, 32), 11, 1280),
    ("column", 77, (24, 40), 3, 1000),
    ("column", 30, (3, 5), 3, 41),
    ("column", 300, (64, 7), 3, 745),
    ("conv", 256, (32, 32), 11, 1280),
    ("conv", 77, (24, 40), 11, 1037),
    ("conv", 3, (9, 5), 11, 48),
    ("conv", 1, (20, 70), 3, 1401),
    ("causal", 10, (10, 30), 3, 310),
    ("axial_row", 5, (9, 16), 3, 140),
    ("conv_corner", 7, (9, 16), 5, 150),
    ("conv_corner", 64, (32, 32), 11, 1000),
]


@pytest.mark.parametrize(("head_dim", "groups"), [(64, 3), (128, 2)])
@pytest.mark.parametrize("steps", [(96, 64), (64, 32), (80, 64)], ids=str)
def test_shared_memory_holds_all_pieces_apart(steps, head_dim, groups):
    """Tiles at multiples of 1,024 bytes, as the swizzle wants, barriers at multiples of 8."""
    planned = 0
    for kind, text_len, grid in itertools.product(KINDS, (1, 64, 65, 80, 81, 129, 256, 257, 400), ((8, 16), (32, 32))):
        seq = text_len + grid[0] * grid[1]
        try:
            plan = library().HopperPlan(KINDS.index(kind), seq, text_len, *grid, 11, steps, head_dim, groups)
        except ValueError:
            continue  # it does not fit
        planned += 1
        slots, stages = plan.text_slots, plan.stages
        row = head_dim * 2
        text_rows = slots * TILE
        if slots == plan.text_tiles and 0 < text_len % TILE <= 16:
            text_rows += 16 - TILE
        sizes = [groups * TILE * row, text_rows * 2 * row, groups * stages * 2 * plan.step * row]  # tiles
        sizes += [groups * 2 * 8, slots * 2 * 8, groups * stages * 2 * 8, 8, 8]  # barriers
        sizes += [16, plan.masks * 128 * 2 * 4]  # whether to go again, masks
        starts = [0, *plan.shared_layout(head_dim, groups)]
        assert all(a + size <= b for (a, b), size in zip(itertools.pairwise(starts), sizes, strict=True))
        assert starts[-1] <= 227 * 1024 and slots >= plan.text_tiles and stages >= 1
        assert not any(start % 1024 for start in starts[:3]) and not any(start % 8 for start in starts)
        assert plan.step * row % 1024 == 0
    assert planned > 10


@pytest.mark.parametrize("steps", [(96, 64), (64, 32), (80, 64)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_meet_each_visible_key_once(case, steps):
    kind, text_len, grid, kernel_size, seq = case
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    plan = library().HopperPlan(KINDS.index(kind), seq, text_len, *grid, kernel_size, steps, 64, GROUPS)
    assert plan.text_slots >= plan.text_tiles and plan.stages >= 1
    met, taken = torch.zeros(seq, seq, dtype=torch.int), torch.zeros(seq, dtype=torch.int)
    masks = [seen_columns(plan, mask) for mask in range(plan.masks)]
    for tile in range(plan.tiles):
        image = tile >= plan.text_tiles
        first = (tile - plan.text_tiles if image else tile) * TILE
        tokens = torch.tensor([plan.token_of(image, first + row) for row in range(TILE)])
        real = tokens >= 0
        taken[tokens[real]] += 1
        for token in tokens[real]:
            met[token, : plan.text_len if image else token + 1] += 1
        start, begin, end = plan.window(first) if image else (0, 0, 0)
        for step in range(begin, end):
            key, mask = start + step * plan.step, plan.mask_of(first, step)
            seen = (masks[mask] if mask >= 0 else torch.ones(TILE, plan.step, dtype=torch.bool))[real]
            places = range(key, key + plan.step)
            keys = torch.tensor([plan.token_of(True, place) if place >= 0 else -1 for place in places])
            exists = keys >= 0
            assert not seen[:, ~exists & (torch.arange(plan.step) >= -key)].any()
            met[tokens[real][:, None], keys[exists]] += seen[:, exists].int()
    assert (taken == 1).all()
    assert torch.equal(met, pattern.mask(seq).int())


def test_a_step_is_chosen_that_leaves_room_for_two_stages():
    arguments = KINDS.index("conv"), 1280, 256, 32, 32, 11, (80, 64), 64, GROUPS
    plan = library().HopperPlan(*arguments)
    assert (plan.step, plan.stages) == (80, 2)  # the fewest keys
    papers = library().HopperPlan(arguments[0], 1280, 257, *arguments[3:])
    assert (papers.step, papers.stages, papers.text_slots) == (80, 2, 5)  # the last of which is of 16 rows
    longer = library().HopperPlan(arguments[0], 1297, 273, *arguments[3:])
    assert (longer.step, longer.stages) == (64, 2)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize("text_len", [256, 257])
def test_wide_heads_fit(kind, text_len):
    arguments = KINDS.index(kind), text_len + 1023, text_len, 32, 32, 11, (64, 32), 128, 2
    assert library().HopperPlan(*arguments).stages >= 1


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (("column", 8, (65, 3), 3, 203), "columns of up to 64 rows"),
        (("column", 3, (4, 8), 3, 28), "incomplete grids only after a longer text"),
        (("axial_row", 8, (4, 24), 3, 104), "widths that divide 64"),
        (("row", 900, (32, 32), 3, 1924), "does not fit into shared memory"),
        (("conv_corner", 0, (1, 64), 4097, 64), "kernel sizes of up to 2"),
        (("conv", 0, (1, 1 << 24), 4095, 99), "windows of up to 2"),
    ],
)
def test_what_the_kernel_does_not_serve_is_told(case, sentence):
    kind, text_len, grid, kernel_size, seq = case
    with pytest.raises(ValueError, match=sentence):
        library().HopperPlan(KINDS.index(kind), seq, text_len, *grid, kernel_size, (96, 64), 64, GROUPS)
