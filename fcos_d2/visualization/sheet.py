"""Arranges images in rows and columns, with titles and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .boxes import load_font

GUTTER = 6  # pixels
DARK_GRAY, WHITE, GRAY = (50, 50, 50), (255, 255, 255), (150, 150, 150)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    titles: Sequence[str] = (),
    heading: str = "",
    captions: Sequence[Sequence[str]] | None = None,
    group: int = 1,
) -> np.ndarray:
    """Draws a grid of images on a white background.

    Args:
        rows: uint8 [h, w, 3] images, or None for an empty cell; sizes may differ.
        titles: titles of the columns.
        heading: heading of the sheet.
        captions: captions below the images, in the layout of ``rows``.
        group: number of columns in a group; gutters between groups are three times as wide.

    Returns:
        uint8 [h, w, 3].
    """
    font, large = load_font(13), load_font(17)
    shapes = [[(0, 0) if image is None else image.shape[:2] for image in row] for row in rows]
    heights = [max((height for height, _ in row), default=0) for row in shapes]
    columns = range(max(map(len, rows), default=0))
    widths = [max(row[i][1] for row in shapes if i < len(row)) for i in columns]
    gaps = [GUTTER * (3 if (i + 1) % group == 0 and group > 1 else 1) for i in columns]
    lefts = [GUTTER + sum(widths[:i]) + sum(gaps[:i]) for i in columns]
    top = GUTTER + (30 if heading else 0) + (22 if titles else 0)
    below = GUTTER + (20 if captions else 0)
    size = (2 * GUTTER + sum(widths) + sum(gaps[:-1]), top + sum(heights) + below * len(rows))
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((GUTTER, GUTTER + 14), heading, fill=DARK_GRAY, font=large, anchor="lm")
    for left, title, width in zip(lefts, titles, widths, strict=False):
        title = _truncate(title, font, width)
        draw.text((left, top - 12), title, fill=DARK_GRAY, font=font, anchor="lm")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                sheet.paste(Image.fromarray(image), (lefts[j], top))
            if captions:
                caption = _truncate(captions[i][j], font, widths[j])
                position = (lefts[j], top + heights[i] + 11)
                draw.text(position, caption, fill=GRAY, font=font, anchor="lm")
        top += heights[i] + below
    return np.asarray(sheet)


def _truncate(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shortens ``text`` to at most ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
