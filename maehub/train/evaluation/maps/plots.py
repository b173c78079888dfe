"""Pictures beside their label maps: what is there, and what a segmenter says is there."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maehub.data import IGNORED
from maehub.images import Size, nearest, scaled
from maehub.train.evaluation.text_tables import printable

_SHARE = 0.6  # of an overlay that is the colour of the class
_SIDE = 300  # pixels of a panel, the longer side
_GAP, _LINE = 8, 20
_INK, _GREY, _PAPER, _WRONG = (20, 20, 20), (95, 95, 95), (255, 255, 255), (200, 30, 30)
_SWATCHES = 24  # classes in the legend

Palette = Sequence[tuple[int, int, int]]


class MapExample(NamedTuple):
    """A picture with its maps."""

    name: str
    pixels: np.ndarray  # (H, W, C) uint8
    truth: np.ndarray  # (H, W) places of classes
    predicted: np.ndarray
    right: float  # percent of its pixels


def overlay(pixels: np.ndarray, places: np.ndarray, palette: Palette) -> np.ndarray:
    """A picture under the colours of its classes: (H, W, C) uint8 and (H, W) to (H, W, 3) uint8. What is ignored, and a
    class whose colour is black, stay as they are."""
    grey = pixels if pixels.shape[2] == 3 else pixels[:, :, :1].repeat(3, axis=2)
    colours = np.array([*palette, (0, 0, 0)], np.float32)[places]  # −1 is the last
    shown = _SHARE * colours + (1 - _SHARE) * grey
    return np.where((colours > 0).any(axis=2, keepdims=True), shown, grey).round().astype(np.uint8)


def map_sheet(examples: Sequence[MapExample], classes: Sequence[str], palette: Palette) -> Image.Image:
    """One row a picture: itself, under its true classes, under those that are said, and where they differ (red)."""
    used = sorted({int(place) for one in examples for map_ in (one.truth, one.predicted) for place in np.unique(map_)})
    legend = [(classes[place], palette[place]) for place in used if place != IGNORED]
    captions = [f"{printable(one.name, 60)}: {one.right:.1f} % of the pixels right" for one in examples]
    rows = [_panels(one, palette) for one in examples]
    return panel_sheet(("picture", "true", "predicted", "wrong"), rows, captions, legend, _SIDE)


def panel_sheet(
    titles: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    side: int,
) -> Image.Image:
    """Panels below their titles, ``side`` pixels wide at most, with a caption a row; colours and their names on top."""
    font = ImageFont.load_default(13)
    named = legend[:_SWATCHES]
    width = max([len(titles) * (side + _GAP) + _GAP, *(sum(p.width + _GAP for p in row) + _GAP for row in rows)])
    columns = max(1, width // 180)
    top = -(-len(named) // columns) * _LINE + _GAP
    height = top + _LINE + sum(row[0].height + _LINE + _GAP for row in rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (name, colour) in enumerate(named):
        x, y = _GAP + number % columns * 180, _GAP // 2 + number // columns * _LINE
        draw.rectangle((x, y + 2, x + 14, y + 16), colour, _GREY)
        draw.text((x + 20, y + 2), printable(name, 22), _INK, font)
    y = top
    for number, title in enumerate(titles):
        draw.text((_GAP + number * (side + _GAP), y), title, _GREY, font)
    y += _LINE
    for row, caption in zip(rows, captions, strict=True):
        for number, panel in enumerate(row):
            sheet.paste(panel, (_GAP + number * (side + _GAP), y))
        y += row[0].height
        draw.text((_GAP, y + 2), caption, _INK, font)
        y += _LINE + _GAP
    return sheet


def _panels(one: MapExample, palette: Palette) -> list[Image.Image]:
    size = fitted(one.pixels, _SIDE)
    pixels = scaled(one.pixels, size).numpy()
    truth, predicted, wrong = (
        nearest(values, size) for values in (one.truth, one.predicted, one.truth != one.predicted)
    )
    wrong &= truth != IGNORED
    bare = overlay(pixels, np.full(size, IGNORED), palette)
    differs = overlay(bare, np.where(wrong, 0, IGNORED), [_WRONG])
    shown = (bare, overlay(pixels, truth, palette), overlay(pixels, predicted, palette), differs)
    return [Image.fromarray(panel) for panel in shown]


def fitted(pixels: np.ndarray, side: int) -> Size:
    """(height, width) of a picture (H, W, C) whose longer side becomes ``side``."""
    factor = side / max(pixels.shape[:2])
    return max(1, round(pixels.shape[0] * factor)), max(1, round(pixels.shape[1] * factor))
