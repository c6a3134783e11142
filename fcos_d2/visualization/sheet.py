"""Contact sheets: images in rows and columns, with titles and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .boxes import load_font

GUTTER = 6
INK, PAPER, FAINT = (50, 50, 50), (255, 255, 255), (150, 150, 150)


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray | None]],
    titles: Sequence[str] = (),
    heading: str = "",
    captions: Sequence[Sequence[str]] | None = None,
    group: int = 1,
) -> np.ndarray:
    """A grid of images on white paper.

    Args:
        rows: uint8 [h, w, 3] images, or None for an empty place; sizes may differ.
        titles: above the columns.
        heading: above everything.
        captions: below the images; the same layout as ``rows``.
        group: that many columns belong together: the gutter behind them is wider.

    Returns:
        uint8 [h, w, 3]: gutters of ``GUTTER`` pixels (three times that between groups) and around.
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
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GUTTER, GUTTER + 14), heading, fill=INK, font=large, anchor="lm")
    for left, title, room in zip(lefts, titles, widths, strict=False):
        draw.text((left, top - 12), _fit(title, font, room), fill=INK, font=font, anchor="lm")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                sheet.paste(Image.fromarray(image), (lefts[j], top))
            if captions:
                text, place = _fit(captions[i][j], font, widths[j]), (lefts[j], top + heights[i])
                draw.text((place[0], place[1] + 11), text, fill=FAINT, font=font, anchor="lm")
        top += heights[i] + below
    return np.asarray(sheet)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """``text``, shortened where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
