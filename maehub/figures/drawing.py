"""Figures on white paper: pictures side by side with titles, labels and a caption, drawn with Pillow alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maehub.errors import UsageError
from maehub.files import atomic_write, check_place
from maehub.images import Size

_PANEL = 256  # pixels that a panel should have across: small pictures are scaled up to about this
_INK, _GREY, _RED, _PAPER = (20, 20, 20), (95, 95, 95), (178, 24, 24), (255, 255, 255)
# From black over purple and orange to pale yellow, even steps of lightness: also read in greyscale.
_HEAT = np.frombuffer(bytes.fromhex("000006 25094c 5f126e 972666 cd4247 f37819 fac12b fcfdbf"), np.uint8).reshape(8, 3)


class Bar(NamedTuple):
    """The colour bar of the last column of a figure."""

    low: float
    high: float


def compose(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    caption: str,
    *,
    notice: str = "",
    labels: Sequence[str] = (),
    bar: Bar | None = None,
) -> Image.Image:
    """Lay pictures out as a figure.

    Small pictures are enlarged by a whole number, so that every pixel stays a sharp square; none is made smaller.

    Args:
        rows: pictures (H, W, C) uint8, as many in a row as there are titles. One channel is grey, three are RGB, of
            two the first and of more the first three are shown.
        titles: above the columns.
        caption: below, in grey; a line break starts a new line, long lines are wrapped.
        notice: below the caption, in red.
        labels: left of the rows, one each, or none.
        bar: drawn right of the last column.
    """
    widest = max(picture.shape[1] for row in rows for picture in row)
    scale = max(1, round(_PANEL / widest))
    pictures = [[as_rgb(picture.repeat(scale, axis=0).repeat(scale, axis=1)) for picture in row] for row in rows]
    cell = widest * scale
    text = min(30, max(16, cell // 14))  # font size, from which all distances follow
    font, small = ImageFont.load_default(text), ImageFont.load_default(round(text * 0.8))
    margin, gap = text, max(4, text // 3)
    label_width = max((_extent(label, font)[0] for label in labels), default=0)
    left = margin + (label_width + gap * 2 if labels else 0)
    across = len(titles) * (cell + gap) - gap
    figures = [f"{value:.3g}" for value in (bar.high, bar.low)] if bar else []
    bar_width = gap + text + gap + max(_extent(figure, small)[0] for figure in figures) if bar else 0
    width = left + across + bar_width + margin
    below = [(line, _GREY) for line in _wrapped(caption, small, width - 2 * margin)]
    below += [(line, _RED) for line in _wrapped(notice, small, width - 2 * margin)]
    heights = [max(picture.height for picture in row) for row in pictures]
    top, line_height = margin + round(text * 1.5), round(text * 1.15)
    height = top + sum(heights) + gap * (len(rows) - 1) + (gap * 2 + line_height * len(below)) + margin - gap
    figure = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(figure)

    for column, title in enumerate(titles):
        x = left + column * (cell + gap) + cell // 2
        draw.text((x, top - round(text * 0.45)), title, _INK, font, anchor="ms")
    y = top
    for number, (row, high) in enumerate(zip(pictures, heights, strict=True)):
        if labels:
            size = _extent(labels[number], font)
            place = (margin + label_width - size[0], y + (high - size[1]) // 2)
            draw.multiline_text(place, labels[number], _INK, font, align="right")
        for column, picture in enumerate(row):
            x = left + column * (cell + gap) + (cell - picture.width) // 2
            figure.paste(picture, (x, y + (high - picture.height) // 2))
        y += high + gap
    if bar:
        x, bottom = left + across + gap, top + heights[0]
        figure.paste(Image.fromarray(heat(np.linspace(1, 0, heights[0])[:, None])).resize((text, heights[0])), (x, top))
        draw.text((x + text + gap, top), figures[0], _GREY, small, anchor="lt")
        draw.text((x + text + gap, bottom - 1), figures[1], _GREY, small, anchor="lb")
    y += gap
    for line, colour in below:
        draw.text((margin, y), line, colour, small)
        y += line_height
    return figure


def as_rgb(picture: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 as something to look at; see `compose` for other channel counts than 3."""
    shown = picture[:, :, :3] if picture.shape[2] >= 3 else picture[:, :, :1].repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(shown))


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of numbers between 0 (black) and 1 (pale yellow): (rows, columns) to (rows, columns, 3) uint8."""
    positions = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    bands = [np.interp(positions, np.arange(len(_HEAT)), band) for band in _HEAT.T]
    return np.stack(bands, axis=2).round().astype(np.uint8)


def over_patches(values: np.ndarray, size: Size) -> np.ndarray:
    """One number a patch to one a pixel: (rows, columns) to (height, width)."""
    return values.repeat(size[0] // values.shape[0], axis=0).repeat(size[1] // values.shape[1], axis=1)


def save_figure(figure: Image.Image, path: str | Path) -> None:
    """Write a figure in the format of the ending; a reader sees the old file or the whole new one.

    Raises:
        UsageError, CheckpointError: as in `check_figure`; CheckpointError also if the disk is full. What was there
            before is unchanged.
    """
    kind = check_figure(path)
    with atomic_write(path) as unfinished:
        figure.save(unfinished, kind)


def check_figure(path: str | Path) -> str:
    """Whether a figure can be written to a path; the format of its ending."""
    path = Path(path)
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise UsageError(f"{path} cannot be written: {path.suffix or 'no ending'!r} is not a format; use .png")
    check_place(path)
    return kind


def _extent(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Size:
    """(width, height) in pixels; the text may have several lines."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return round(box[2]), round(box[3])


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than that, broken at spaces; a longer word keeps its line."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
