"""Grids hold every image unchanged at its place, captions are drawn and wrapped; loss curves survive a cut log."""

from __future__ import annotations

import io
import json

import numpy
import pytest
import torch
from PIL import Image, ImageFont

from dalle import pictures
from dalle.errors import UserError
from dalle.pictures import labelled_grid, loss_curve, png, reconstruction_grid, to_pil


def draw_images(*shape: int) -> torch.Tensor:
    """Images of plain colours that all differ, and from the colours of the grid itself."""
    count = torch.Size(shape).numel()
    colours = torch.tensor([[40 + index, 0, 200] for index in range(count)]) / 255
    return colours.view(*shape, 3, 1, 1).expand(*shape, 3, 6, 8)


def positions(picture: Image.Image, red: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the rectangle that is filled with a colour of :func:`draw_images`."""
    pixels = numpy.asarray(picture)
    rows, columns = numpy.nonzero((pixels == (red, 0, 200)).all(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


@pytest.mark.parametrize(("prompts", "samples", "scale"), [(1, 1, 1), (5, 2, 2), (12, 4, 3)])
def test_every_sample_is_in_the_grid_in_reading_order(prompts, samples, scale):
    picture = labelled_grid(draw_images(prompts, samples), ["a cat"] * prompts, title="A title", scale=scale, columns=2)
    places = [positions(picture, 40 + index) for index in range(prompts * samples)]
    assert all((right - left, bottom - top) == (8 * scale, 6 * scale) for left, top, right, bottom in places)
    assert places == sorted(places, key=lambda place: (place[1], place[0]))
    for prompt in range(prompts):
        assert len({place[1] for place in places[prompt * samples : (prompt + 1) * samples]}) == 1


def test_captions_and_marks_are_drawn_under_their_images():
    plain = labelled_grid(draw_images(2, 1), [" ", " "], columns=2)
    captioned = labelled_grid(draw_images(2, 1), [" ", "a cat"], columns=2)
    changed = numpy.nonzero((numpy.asarray(plain) != numpy.asarray(captioned)).any(-1))
    left, _, _, bottom = positions(captioned, 41)
    assert changed[0].min() >= bottom and changed[1].min() >= left
    marked = labelled_grid(draw_images(2, 1), ["a cat", "a cat"], columns=2, marks=[None, "held out"])
    blueish = (numpy.asarray(marked)[..., 2].astype(int) - numpy.asarray(marked)[..., 0] > 100).nonzero()
    assert blueish[0].max() > positions(marked, 41)[3]


def test_long_captions_are_wrapped_and_none_is_lost():
    font = ImageFont.load_default(12)
    caption = "a house with a garden and averyverylongwordthatdoesnotfitintooneline, noto style"
    lines = pictures._wrap(caption, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == caption.replace(" ", "")
    short = labelled_grid(draw_images(1, 1), ["a"])
    assert labelled_grid(draw_images(1, 1), [caption]).height > short.height


def test_any_caption_can_be_drawn():
    labelled_grid(draw_images(1, 1), ["\u3042 \u202e \x00 \U0001f600 e\u0301 \n"])


def test_reconstructions_stand_under_their_originals():
    images = draw_images(14)
    picture = reconstruction_grid(images[:7], images[7:], scale=2, columns=3)
    for index in range(7):
        left, _, right, bottom = positions(picture, 40 + index)
        below = positions(picture, 47 + index)
        assert (below[0], below[2]) == (left, right) and 0 < below[1] - bottom < 8


def test_pixels_are_clamped_and_rounded():
    image = torch.tensor([-0.5, 0.499 / 255, 0.501 / 255, 1.5, float("nan")]).expand(3, 1, 5)
    assert numpy.asarray(to_pil(image))[0, :, 0].tolist() == [0, 0, 1, 255, 0]
    again = Image.open(io.BytesIO(png(to_pil(image))))
    assert again.format == "PNG" and numpy.array_equal(again, to_pil(image))


def test_loss_curve_of_a_log_that_was_cut_short(tmp_path):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    records = [{"update": update, "loss": 5 / (update + 1), "image_loss": 6.0} for update in range(20)]
    records += [{"update": 10, "held_out_image_loss": 4.0}, {"update": 11, "loss": float("nan")}]
    log.write_text("\n".join(map(json.dumps, records)) + '\n{"update": 20, "lo')
    assert Image.open(io.BytesIO(loss_curve(log))).width > 600
    assert Image.open(io.BytesIO(loss_curve(log, ["loss"]))).width > 600
    with pytest.raises(UserError, match="named 'kl'"):
        loss_curve(log, ["kl"])
    log.write_text("")
    with pytest.raises(UserError, match="ends in 'loss'"):
        loss_curve(log)
    with pytest.raises(UserError, match="cannot be read"):
        loss_curve(tmp_path / "missing.jsonl")


def test_bad_arguments_are_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"got \[2, 3, 6, 8\]"):
        labelled_grid(draw_images(2), ["a", "b"])
    with pytest.raises(UserError, match="2 captions and marks, got 1 and 2"):
        labelled_grid(draw_images(2, 1), ["a"])
    with pytest.raises(UserError, match="one shape"):
        reconstruction_grid(draw_images(2), draw_images(3))
    with pytest.raises(UserError, match="draw fewer images"):
        labelled_grid(draw_images(1, 1).expand(1, 400, 3, 6, 8), ["a"], scale=40)
    with pytest.raises(UserError, match="268435456 in all, got a picture of"):  # Each side alone would do.
        labelled_grid(draw_images(1, 1), ["a"], scale=4000)
