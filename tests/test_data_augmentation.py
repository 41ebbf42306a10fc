"""The paper's two augmentations: ranges of Listings 1 and 2, area resizing, and exact repetition."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from dalle.data import augment
from dalle.data.augmentation import Window, cut, draw_window
from dalle.errors import UserError

DRAWS = 4000


def windows(height, width, size, kind, count=DRAWS):
    return [draw_window(height, width, size, kind, seed=11, epoch=i % 7, sample=i) for i in range(count)]


def assert_uniform(values, low, high):
    """Every integer in low .. high and no other is drawn, about as often as the next (6 standard deviations)."""
    counts = Counter(values)
    assert set(counts) == set(range(low, high + 1))
    expected = len(values) / len(counts)
    assert all(abs(count - expected) < 6 * math.sqrt(expected) for count in counts.values())


def test_listing_1_draws_what_the_paper_says():
    # R = 16: resized sides 18 .. 24 of a square of 30 from a picture of 30 x 37.
    drawn = windows(30, 37, 16, "dvae")
    assert {(w.top, w.side) for w in drawn} == {(0, 30)}
    assert_uniform([w.left for w in drawn], 0, 7)
    assert_uniform([w.resized for w in drawn], 18, 24)
    assert_uniform([w.flip for w in drawn], 0, 1)
    for axis in ("x", "y"):
        assert_uniform([getattr(w, axis) for w in drawn if w.resized == 24], 0, 8)
        assert all(0 <= getattr(w, axis) <= w.resized - 16 for w in drawn)


def test_listing_2_draws_what_the_paper_says():
    # Slack 40: offsets 15 .. 24 (3/8 and 5/8 of it, the end excluded); sides 16 .. 18; never a flip.
    drawn = windows(70, 30, 16, "dalle")
    assert {(w.left, w.side, w.flip) for w in drawn} == {(0, 30, False)}
    assert_uniform([w.top for w in drawn], 15, 24)
    assert_uniform([w.resized for w in drawn], 16, 18)
    assert_uniform([w.y for w in drawn if w.resized == 18], 0, 2)


@pytest.mark.parametrize(("side", "sides"), [(20, {18, 19, 20}), (17, {17}), (16, {16}), (9, {16})])
def test_sides_are_bounded_by_the_image_in_listing_1(side, sides):
    drawn = windows(side, side, 16, "dvae", 200)
    assert {w.resized for w in drawn} == sides
    if side <= 16:
        assert {(w.x, w.y) for w in drawn} == {(0, 0)} and {w.flip for w in drawn} == {True, False}


@pytest.mark.parametrize(("side", "sides"), [(40, {16, 17, 18}), (17, {16, 17}), (16, {16}), (9, {16})])
def test_sides_are_bounded_by_the_image_in_listing_2(side, sides):
    assert {w.resized for w in windows(side, side, 16, "dalle", 200)} == sides


def test_an_image_of_the_target_size_is_only_flipped():
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    seen = set()
    for sample in range(20):
        result = augment(image, 16, "dvae", seed=0, epochs=0, samples=[sample])
        flipped = torch.equal(result, image.flip(3))
        assert flipped or torch.equal(result, image)
        seen.add(flipped)
        assert torch.equal(augment(image, 16, "dalle", seed=0, epochs=0, samples=[sample]), image)
    assert seen == {True, False}


def test_a_sample_depends_on_seed_epoch_and_number_alone():
    images = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8)
    arguments = {"size": 16, "kind": "dvae", "seed": 5}
    whole = augment(images, epochs=3, samples=range(10, 16), **arguments)
    for row in (0, 5, 2):
        alone = augment(images[row : row + 1], epochs=[3], samples=[10 + row], **arguments)
        assert torch.equal(alone[0], whole[row])
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    assert torch.equal(augment(arrays, epochs=[3] * 6, samples=range(10, 16), **arguments), whole)

    same = draw_window(300, 400, 64, "dvae", 1, 2, 3)
    assert draw_window(300, 400, 64, "dvae", 1, 2, 3) == same
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert draw_window(300, 400, 64, "dvae", *other) != same


def test_the_draws_stay_as_they_are():
    # Fixed figures: a run must resume to the same pixels after an upgrade of the libraries.
    assert draw_window(300, 400, 64, "dvae", 1, 2, 3) == Window(0, 42, 300, 90, 5, 20, False)
    assert draw_window(300, 400, 64, "dalle", 1, 2, 3) == Window(0, 43, 300, 68, 0, 0, False)


def area_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The mean of the continuous picture over each output pixel, by fine subdivision (float64)."""
    side = image.shape[-1]
    fine = np.repeat(np.repeat(image.astype(np.float64), size, -1), size, -2)
    return fine.reshape(*image.shape[:-2], size, side, size, side).mean((-3, -1))


@pytest.mark.parametrize(("side", "size"), [(12, 6), (13, 7), (17, 16), (5, 8), (9, 1), (1, 4)])
def test_resizing_is_by_area(side, size):
    image = np.random.default_rng(side).integers(0, 256, (3, side, side), dtype=np.uint8)
    result = cut(torch.from_numpy(image), Window(0, 0, side, size, 0, 0, False), size).numpy().astype(np.float64)
    # Rounded to nearest: half a level, and the arithmetic of float32 before it.
    assert np.abs(result - area_resize(image, size)).max() <= 0.5 + 1e-4


def test_the_crop_is_of_the_resized_square():
    image = torch.randint(0, 256, (3, 30, 41), dtype=torch.uint8)
    window = Window(0, 6, 30, 22, 3, 5, True)
    whole = cut(image, Window(0, 6, 30, 22, 0, 0, False), 22)
    assert torch.equal(cut(image, window, 16), whole[:, 3:19, 5:21].flip(2))


def test_wrong_arguments_are_one_clear_sentence():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="expected the augmentation 'dvae', 'dalle' or 'none', got 'flip'"):
        augment(image, 8, "flip", seed=0, epochs=0, samples=[0])
    with pytest.raises(UserError, match="as many samples and epochs as images, got 2, 2 and 1"):
        augment(image, 8, "none", seed=0, epochs=0, samples=[0, 1])
    with pytest.raises(UserError, match=r"expected an image uint8 \[3, H, W\], got torch.float32"):
        augment(image.float(), 8, "none", seed=0, epochs=0, samples=[0])
    with pytest.raises(UserError, match="target size of at least 1, got 8 x 8 and 0"):
        draw_window(8, 8, 0, "none")
