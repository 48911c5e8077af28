"""Many images in one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from uvit.common.errors import one_line, printable

CELL = 64
"""Small images are enlarged by an integer factor until their shorter side has about this many pixels."""
GAP = 2
NAME_WIDTH, NAME_LINES = 28, 3
"""Characters per line, and lines, of a row's name; longer names are truncated."""


def image_grid(images: Tensor, columns: int, row_names: Sequence[str] = ()) -> Image.Image:
    """Arranges images in rows.

    Args:
        images: (N, C, H, W) uint8 with 1 or 3 channels, row by row.
        columns: images per row; the last row may be shorter.
        row_names: a name for each row, drawn to its left.

    Returns:
        An RGB picture.
    """
    factor = max(1, round(CELL / min(images.shape[-2:])))
    cells = rearrange(images.cpu().expand(-1, 3, -1, -1), "N C H W -> N H W C").numpy()
    cells = cells.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = cells.shape[1] + GAP, cells.shape[2] + GAP
    wrapped = [
        textwrap.wrap(printable(one_line(name)), NAME_WIDTH, max_lines=NAME_LINES, placeholder=" …")
        for name in row_names
    ]
    most_lines = max(map(len, wrapped), default=1)
    font = ImageFont.load_default(size=max(12, min(height // (most_lines + 2), 24)))
    margin = round(max((font.getlength(line) for lines in wrapped for line in lines), default=0))
    margin += 2 * GAP + 8 if margin else GAP

    rows = -(-len(cells) // columns)
    picture = Image.new("RGB", (margin + columns * width, GAP + rows * height), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        picture.paste(Image.fromarray(np.ascontiguousarray(cell)), (margin + column * width, GAP + row * height))
    draw = ImageDraw.Draw(picture)
    for row, lines in enumerate(wrapped):
        place = (margin - 8, GAP + (row + 0.5) * height)
        draw.text(place, "\n".join(lines), fill="black", font=font, anchor="rm", align="right")
    return picture
