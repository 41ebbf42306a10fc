"""Draw the attention masks as in the paper's figure 11: ``python -m dalle_kernels.attention OUT.png``."""

from __future__ import annotations

from pathlib import Path

import torch

from dalle_kernels._picture_command import picture_command
from dalle_kernels.attention.pattern import AttentionPattern

TEXT_LEN, GRID, KERNEL_SIZE = 6, (4, 4), 3
HIDDEN, TEXT, IMAGE, LINE, INK = (255, 255, 255), (157, 190, 222), (28, 92, 158), (208, 212, 218), (32, 36, 44)
CELL, MARGIN, TITLE = 14, 26, 46


def transposed_order(pattern: AttentionPattern) -> torch.Tensor:
    """Token indices with the image column by column, as the column mask is computed (paper B.1)."""
    height, width = pattern.grid
    image = torch.arange(height * width).reshape(height, width).T.flatten()
    return torch.cat((torch.arange(pattern.text_len), pattern.text_len + image))


def panels() -> list[tuple[str, str, torch.Tensor]]:
    """Title, subtitle and mask of each drawing."""
    row = AttentionPattern("row", TEXT_LEN, GRID, KERNEL_SIZE)
    column = AttentionPattern("column", TEXT_LEN, GRID, KERNEL_SIZE)
    conv = AttentionPattern("conv", TEXT_LEN, GRID, KERNEL_SIZE)
    order = transposed_order(column)
    return [
        ("Row attention", "the last W + 1 image tokens", row.mask()),
        ("Column attention", "raster order", column.mask()),
        ("Column attention", "image states transposed", column.mask()[order][:, order]),
        ("Convolutional attention", f"{KERNEL_SIZE}x{KERNEL_SIZE}, with wraparound", conv.mask()),
    ]


def draw(path: Path) -> None:
    """Write the picture to ``path`` as PNG: a row of a matrix is a query, a column a key, a filled cell is visible."""
    from PIL import Image, ImageDraw, ImageFont

    drawings = panels()
    side = CELL * drawings[0][2].shape[0]
    step = side + 2 * MARGIN
    picture = Image.new("RGB", (step * len(drawings), TITLE + side + 2 * MARGIN + 10), HIDDEN)
    pen = ImageDraw.Draw(picture)
    title_font, font = ImageFont.load_default(17), ImageFont.load_default(13)
    for i, (title, subtitle, mask) in enumerate(drawings):
        left, top = i * step + MARGIN, TITLE + MARGIN
        middle = left + side / 2
        pen.text((middle, 10), title, INK, title_font, anchor="mt")
        pen.text((middle, 34), subtitle, INK, font, anchor="mt")
        for query, keys in enumerate(mask.tolist()):
            for key, visible in enumerate(keys):
                x, y = left + key * CELL, top + query * CELL
                fill = HIDDEN if not visible else TEXT if key < TEXT_LEN else IMAGE
                pen.rectangle((x, y, x + CELL, y + CELL), fill, LINE)
        boundary = TEXT_LEN * CELL
        pen.line((left + boundary, top, left + boundary, top + side), INK, 2)
        pen.line((left, top + boundary, left + side, top + boundary), INK, 2)
        pen.rectangle((left, top, left + side, top + side), outline=INK)
        for start, end, name in ((0, boundary, "text"), (boundary, side, "image")):
            pen.text((left + (start + end) / 2, top + side + 6), f"{name} keys", INK, font, anchor="mt")
    picture.save(path, format="PNG", optimize=True)


def main() -> None:
    picture_command("attention", "Draw the attention masks.", draw)


if __name__ == "__main__":
    main()
