"""Pictures for people: labelled grids, reconstructions under their originals, the loss curve of a run."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from dalle.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BACKGROUND = (255, 255, 255)
TEXT = (33, 37, 41)
FRAME = (222, 226, 230)
MARK = (25, 113, 194)
MAX_SIDE = 2**16
MAX_PIXELS = 2**28


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def to_pil(image: torch.Tensor, scale: int = 1) -> Image.Image:
    """An image ``[3, height, width]`` in [0, 1] (values outside are clamped), each pixel ``scale`` x ``scale``."""
    pixels = (image.detach().float().nan_to_num().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def labelled_grid(
    images: torch.Tensor,
    captions: Sequence[str],
    title: str | None = None,
    scale: int = 2,
    columns: int | None = None,
    marks: Sequence[str | None] | None = None,
) -> Image.Image:
    """Draw the samples of each caption side by side with the caption under them.

    Args:
        images: ``[P, S, 3, height, width]`` in [0, 1], S samples of P captions.
        captions: P texts; long ones are wrapped.
        title: a line on top of the picture.
        scale: pixels a side that each pixel becomes.
        columns: captions side by side, by default what makes the picture about 4:3.
        marks: for each caption a short remark in another colour behind it (say "held out"), or None.
    """
    if images.dim() != 5 or images.shape[2] != 3 or images.numel() == 0:
        raise UserError(f"expected images of shape [prompts, samples, 3, height, width], got {list(images.shape)}")
    prompts, samples, _, height, width = images.shape
    marks = marks or [None] * prompts
    if len(captions) != prompts or len(marks) != prompts:
        raise UserError(f"expected {prompts} captions and marks, got {len(captions)} and {len(marks)}")
    image_width, image_height = width * scale, height * scale
    unit = max(8, min(16, image_width // 8))  # text and margins in proportion to the images
    gap = max(2, unit // 3)
    cell_width = max(samples * (image_width + gap) - gap, 10 * unit)
    font = ImageFont.load_default(unit)
    labels = [
        [(line, TEXT) for line in _wrap(caption, font, cell_width)] + ([(mark, MARK)] if mark else [])
        for caption, mark in zip(captions, marks, strict=True)
    ]
    line_height = round(1.4 * unit)
    columns = columns or _balanced_columns(prompts, cell_width, image_height + 3 * line_height)
    columns = min(columns, prompts)
    rows = [labels[start : start + columns] for start in range(0, prompts, columns)]
    row_heights = [image_height + gap + line_height * max(map(len, row)) + unit for row in rows]
    title_font = ImageFont.load_default(round(1.5 * unit))
    title_lines = _wrap(title, title_font, columns * (cell_width + 2 * unit) - 2 * unit) if title else []
    top = unit + len(title_lines) * 2 * unit + (unit // 2 if title_lines else 0)
    canvas = _canvas(columns * (cell_width + 2 * unit), top + sum(row_heights))
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(title_lines):
        draw.text((unit, unit + index * 2 * unit), line, TEXT, title_font)
    y = top
    for row, (row_labels, row_height) in enumerate(zip(rows, row_heights, strict=True)):
        for column, label in enumerate(row_labels):
            x = unit + column * (cell_width + 2 * unit)
            for sample in range(samples):
                picture = to_pil(images[row * columns + column, sample], scale)
                _paste(canvas, draw, picture, x + sample * (image_width + gap), y)
            for index, (line, colour) in enumerate(label):
                draw.text((x, y + image_height + gap + index * line_height), line, colour, font)
        y += row_height
    return canvas


def reconstruction_grid(
    originals: torch.Tensor, reconstructions: torch.Tensor, scale: int = 1, columns: int | None = None
) -> Image.Image:
    """Draw each original ``[B, 3, height, width]`` in [0, 1] above its reconstruction, pair beside pair."""
    fits = originals.dim() == 4 and originals.shape[1] == 3 and originals.shape == reconstructions.shape
    if not fits or len(originals) == 0:
        raise UserError(
            f"expected originals and reconstructions of one shape [batch, 3, height, width], got "
            f"{list(originals.shape)} and {list(reconstructions.shape)}"
        )
    count, _, height, width = originals.shape
    width, height = width * scale, height * scale
    gap, margin = max(1, width // 32), max(4, width // 8)
    columns = min(columns or _balanced_columns(count, width + margin, 2 * height + margin), count)
    rows = math.ceil(count / columns)
    canvas = _canvas(columns * (width + margin) + margin, rows * (2 * height + gap + margin) + margin)
    draw = ImageDraw.Draw(canvas)
    for index, pair in enumerate(zip(originals, reconstructions, strict=True)):
        x = margin + index % columns * (width + margin)
        y = margin + index // columns * (2 * height + gap + margin)
        for below, image in enumerate(pair):
            _paste(canvas, draw, to_pil(image, scale), x, y + below * (height + gap))
    return canvas


def _balanced_columns(count: int, width: int, height: int) -> int:
    """How many of ``count`` cells of this size to put side by side for a picture of about 4:3 with full rows."""
    wanted = min(count, max(1, round(math.sqrt(count * height / width * 4 / 3))))
    return math.ceil(count / math.ceil(count / wanted))


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, at spaces, or within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def loss_curve(log: str | os.PathLike, names: Sequence[str] | None = None) -> bytes:
    """A PNG of the curves in a training's JSON-lines log: every number logged beside "update" whose name ends in
    "loss".

    ``names`` chooses others. Needs matplotlib. A line that a crash has cut short is left out.
    """
    records = read_log(log)
    names = names or sorted({name for record in records for name in record if name.endswith("loss")})
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for name in names:
        points = [(record["update"], record[name]) for record in records if is_number(record.get(name))]
        if not points:
            raise UserError(f"expected numbers named {name!r} in {os.fspath(log)}, found none")
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.2)
    if not names:
        raise UserError(f"expected numbers whose name ends in 'loss' in {os.fspath(log)}, found none")
    axes.set_xlabel("update")
    axes.set_ylabel("nats")
    tidy(axes)
    axes.legend(frameon=False)
    return figure_png(figure)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of matplotlib's, in inches; UserError where that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("expected matplotlib to draw a figure: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame where there is no axis."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def read_log(log: str | os.PathLike) -> list[dict]:
    """The entries of a training's JSON-lines log that say of which update they are; broken lines are left out."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"expected a log at {os.fspath(log)}, but it cannot be read: {error.strerror}") from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and is_number(record.get("update")):
            records.append(record)
    return records


def is_number(value: object) -> bool:
    """Whether a value of a log is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _canvas(width: int, height: int) -> Image.Image:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise UserError(
            f"expected at most {MAX_SIDE} pixels a side and {MAX_PIXELS} in all, got a picture of {width}x{height}: "
            "draw fewer images, or a smaller scale"
        )
    return Image.new("RGB", (width, height), BACKGROUND)


def _paste(canvas: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int) -> None:
    canvas.paste(picture, (x, y))
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
