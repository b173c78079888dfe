"""A curve as a picture, for pages that show no drawings of their own making, such as model cards."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maehub.figures import Series, decimated, tick_words, ticks

_SIZE = (900, 380)  # width, height in pixels
_FINE = 3  # drawn so many times larger and shrunk, so that lines are smooth
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 24, 56, 56
_INK, _GREY, _GRID = (27, 31, 36), (101, 109, 118), (222, 226, 231)
_COLOURS = ((31, 111, 180), (201, 91, 12), (122, 122, 122), (46, 139, 87))
_FAINT = (176, 205, 230)


def plot(title: str, series: Sequence[Series], under: str = "step") -> Image.Image | None:
    """Curves on one pair of axes, RGB; None where there is no point to draw.

    Args:
        title: above; the names of the series stand behind it in their colours.
        series: what to draw, the first at the bottom.
        under: what the horizontal axis counts.
    """
    drawn = [one for one in series if len(one.values)]
    if not drawn:
        return None
    first, last = min(one.steps[0] for one in drawn), max(one.steps[-1] for one in drawn)
    values = np.concatenate([one.values for one in drawn])
    # A curve that starts far above the rest would flatten it: what is above the 99th percentile is cut off.
    low, high = float(values.min()), float(np.percentile(values, 99))
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad
    width, height = (side * _FINE for side in _SIZE)
    left, right, top, bottom = _LEFT * _FINE, width - _RIGHT * _FINE, _TOP * _FINE, height - _BOTTOM * _FINE

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first) if last > first else 0.5
        return left + across * (right - left), bottom - (min(value, high) - low) / (high - low) * (bottom - top)

    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(19 * _FINE), ImageFont.load_default(16 * _FINE)
    for tick in ticks(low, high):
        y = place(first, tick)[1]
        pen.line((left, y, right, y), _GRID, _FINE)
        pen.text((left - 10 * _FINE, y), tick_words(tick), _GREY, small, anchor="rm")
    for tick in ticks(float(first), float(last)) if last > first else [first]:
        x = place(tick, low)[0]
        pen.text((x, bottom + 8 * _FINE), tick_words(tick), _GREY, small, anchor="mt")
    pen.text((right, height - 6 * _FINE), under, _GREY, small, anchor="rb")
    pen.line((left, bottom, right, bottom), _GREY, _FINE)
    pen.text((left, 16 * _FINE), title, _INK, font, anchor="lt")
    after = left + font.getlength(title) + 24 * _FINE
    for one in drawn:
        colour = _FAINT if one.style == "faint" else _COLOURS[one.colour % len(_COLOURS)]
        points = [place(float(s), float(v)) for s, v in zip(*decimated(one.steps, one.values), strict=True)]
        if len(points) > 1:
            pen.line(points, colour, (1 if one.style == "faint" else 2) * _FINE, joint="curve")
        if one.style == "points" or len(points) == 1:
            reach = 4 * _FINE
            for x, y in points:
                pen.ellipse((x - reach, y - reach, x + reach, y + reach), colour)
        if one.name:
            pen.text((after, 18 * _FINE), one.name, colour, small, anchor="lt")
            after += small.getlength(one.name) + 20 * _FINE
    return picture.resize(_SIZE, Image.Resampling.LANCZOS)
