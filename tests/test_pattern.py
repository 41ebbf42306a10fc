"""AttentionPattern against the paper's section 2 and DALLE-pytorch's layers, written out key by key."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dalle_kernels import AttentionPattern
from dalle_kernels.attention.pattern import KINDS

# Grids of one row, one column and one token; kernels wider than the grid; no text.
SHAPES = [
    (6, (4, 4), 3),
    (0, (3, 5), 3),
    (1, (1, 7), 5),
    (2, (7, 1), 5),
    (3, (1, 1), 1),
    (5, (6, 4), 11),
    (4, (5, 9), 7),
]


def visible_image_keys(kind: str, n: int, height: int, width: int, kernel_size: int) -> set[int]:
    """The keys of image query n, as the paper's section 2 (and DALLE-pytorch's layers) list them."""
    r, c = divmod(n, width)
    reach = (kernel_size - 1) // 2
    if kind == "causal":
        return set(range(n + 1))
    if kind == "row":
        return {m for m in range(n - width, n + 1) if m >= 0}
    if kind == "column":
        return {i * width + c for i in range(r + 1)}
    if kind == "conv":
        offsets = (dr * width + dc for dr in range(reach + 1) for dc in range(-reach, reach + 1))
        return {n - offset for offset in offsets if offset >= 0 and n - offset >= 0}
    if kind == "axial_row":
        return {r * width + j for j in range(c + 1)}
    rows, columns = range(max(0, r - kernel_size + 1), r + 1), range(max(0, c - kernel_size + 1), c + 1)
    return {i * width + j for i in rows for j in columns}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid", "kernel_size"), SHAPES)
def test_mask_holds_exactly_the_keys_that_the_paper_lists(kind, text_len, grid, kernel_size):
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    mask = pattern.mask()
    assert mask.dtype == torch.bool and mask.shape == (pattern.seq_len, pattern.seq_len)
    for i in range(pattern.seq_len):
        if i < text_len:
            expected = set(range(i + 1))
        else:
            image = visible_image_keys(kind, i - text_len, *grid, kernel_size)
            expected = set(range(text_len)) | {text_len + m for m in image}
        assert set(mask[i].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text_len", "grid", "kernel_size"), SHAPES)
def test_prefixes_are_corners_of_the_whole_and_pairs_counts_them(kind, text_len, grid, kernel_size):
    pattern = AttentionPattern(kind, text_len, grid, kernel_size)
    whole = pattern.mask()
    for length in range(pattern.seq_len + 1):
        mask = pattern.mask(length)
        assert torch.equal(mask, whole[:length, :length])
        assert pattern.pairs(length) == int(mask.sum())
    assert pattern.density == pytest.approx(whole.float().mean().item())


@pytest.mark.parametrize(
    ("kind", "pairs"), [("row", 328_304), ("column", 311_936), ("conv", 352_209), ("causal", 819_840)]
)
def test_pair_counts_of_the_paper_sizes(kind, pairs):
    pattern = AttentionPattern(kind, 256, (32, 32))
    assert pattern.seq_len == 1280
    assert pattern.pairs() == pairs == int(pattern.mask().sum())


@pytest.mark.parametrize(
    ("text_len", "grid", "seq"), [(257, (32, 32), 1280), (64, (16, 16), 320), (77, (24, 40), 1037)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_pair_counts_of_other_streams(kind, text_len, grid, seq):
    pattern = AttentionPattern(kind, text_len, grid)
    assert pattern.pairs(seq) == int(pattern.mask(seq).sum())


def test_conv_corner_is_dalle_pytorch_s_unfolded_window():
    height, width, kernel_size = 5, 6, 3
    index = torch.arange(height * width, dtype=torch.float64).reshape(1, 1, height, width) + 1
    padded = F.pad(index, (kernel_size - 1, 0, kernel_size - 1, 0))
    windows = F.unfold(padded, kernel_size)[0].T.long()  # [query, kernel_size^2], 0 for padding
    expected = torch.zeros(height * width, height * width + 1, dtype=torch.bool)
    expected[torch.arange(height * width)[:, None], windows] = True
    assert torch.equal(AttentionPattern("conv_corner", 0, (height, width), kernel_size).mask(), expected[:, 1:])


def test_row_reaches_above_where_axial_row_does_not():
    row, axial = AttentionPattern("row", 0, (3, 4)).mask(), AttentionPattern("axial_row", 0, (3, 4)).mask()
    assert row[6].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert axial[6].nonzero().flatten().tolist() == [4, 5, 6]


def test_conv_wraps_around_where_conv_corner_does_not():
    # Query (1, 0) of a 3 x 4 grid: its neighbours above are (0, 0), (0, 1) and, by wraparound, the token before (0, 0).
    conv = AttentionPattern("conv", 1, (3, 4), 3).mask()
    assert conv[1 + 8].nonzero().flatten().tolist() == [0, 1 + 3, 1 + 4, 1 + 5, 1 + 7, 1 + 8]
    corner = AttentionPattern("conv_corner", 1, (3, 4), 3).mask()
    assert corner[1 + 8].nonzero().flatten().tolist() == [0, 1 + 0, 1 + 4, 1 + 8]


def test_patterns_are_frozen_values():
    pattern = AttentionPattern("row", 4, [2, 3])
    assert pattern == AttentionPattern("row", 4, (2, 3)) and hash(pattern) == hash(AttentionPattern("row", 4, (2, 3)))
    assert pattern != AttentionPattern("column", 4, (2, 3))
    with pytest.raises(AttributeError):
        pattern.text_len = 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("diagonal", 4, (2, 2)), "expected kind to be one of causal, row, .* got 'diagonal'"),
        (("row", -1, (2, 2)), "expected text_len to be an integer of 0 or more, got -1"),
        (("row", 2.0, (2, 2)), "expected text_len to be an integer of 0 or more, got 2.0"),
        (("row", 4, (2, 0)), r"expected grid to be two positive integers \(height, width\), got \(2, 0\)"),
        (("row", 4, (2, 2, 2)), "expected grid to be two positive integers"),
        (("row", 4, 32), "expected grid to be two positive integers"),
        (("conv", 4, (2, 2), 4), "expected kernel_size to be an odd positive integer, got 4"),
        (("conv", 4, (2, 2), -1), "expected kernel_size to be an odd positive integer, got -1"),
    ],
)
def test_a_wrong_pattern_gets_one_clear_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        AttentionPattern(*arguments)


@pytest.mark.parametrize("length", [-1, 17, 3.0])
def test_a_prefix_beyond_the_pattern_gets_one_clear_sentence(length):
    with pytest.raises(ValueError, match="expected seq_len between 0 and the pattern's 16, got"):
        AttentionPattern("row", 4, (3, 4)).mask(length)


def test_the_command_draws_the_masks(tmp_path):
    from PIL import Image

    path = tmp_path / "masks.png"
    done = subprocess.run(
        [sys.executable, "-m", "dalle_kernels.attention", str(path)], capture_output=True, text=True, check=True
    )
    assert str(path) in done.stdout
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 4


def test_the_command_says_where_it_cannot_write(tmp_path):
    path = tmp_path / "missing" / "masks.png"
    done = subprocess.run([sys.executable, "-m", "dalle_kernels.attention", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected a path in an existing folder" in done.stderr and "Traceback" not in done.stderr
