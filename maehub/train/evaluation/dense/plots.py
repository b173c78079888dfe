"""Pictures with what is there and what a model says: label maps as colours; objects found, missed and made up."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maehub.data import IGNORED, MapClasses, ObjectClasses, Objects, coco_masks, masks_of
from maehub.dense import Detections, colours_of, scaled_size
from maehub.images import Size, nearest, scaled
from maehub.train.evaluation.dense.object_scores import coco_boxes
from maehub.train.evaluation.text_tables import printable

SURE = 0.5
"""The score from which on a detection is shown and counted."""
_SHARE = 0.6  # of an overlay that is the colour of the class
_MAP_SIDE, _OBJECT_SIDE = 300, 420  # pixels of a panel, the longer side
_GAP, _LINE = 8, 20
_INK, _GREY, _PAPER, _WRONG = (20, 20, 20), (95, 95, 95), (255, 255, 255), (200, 30, 30)
_FALSE, _MISSED, _IGNORED = (215, 25, 28), (255, 255, 255), (140, 140, 140)
_SWATCHES = 24  # classes in the legend

Colour = tuple[int, int, int]


class Example(NamedTuple):
    """A picture, with what is there and what is found in it."""

    name: str
    pixels: np.ndarray  # (H, W, C) uint8
    truth: Any  # places of classes (H, W), or `Objects`
    found: Any  # places of classes (H, W), or `Detections` that are `SURE`


def overlay(pixels: np.ndarray, places: np.ndarray, palette: Sequence[Colour]) -> np.ndarray:
    """A picture under the colours of its classes: (H, W, C) uint8 and (H, W) to (H, W, 3) uint8. What is ignored, and a
    class whose colour is black, stay as they are."""
    grey = pixels if pixels.shape[2] == 3 else pixels[:, :, :1].repeat(3, axis=2)
    colours = np.array([*palette, (0, 0, 0)], np.float32)[places]  # −1 is the last
    shown = _SHARE * colours + (1 - _SHARE) * grey
    return np.where((colours > 0).any(axis=2, keepdims=True), shown, grey).round().astype(np.uint8)


def map_sheet(examples: Sequence[Example], classes: Sequence[str], palette: Sequence[Colour]) -> Image.Image:
    """One row a picture: itself, under its true classes, under those that are said, and where they differ (red)."""
    used = sorted({int(place) for one in examples for map_ in (one.truth, one.found) for place in np.unique(map_)})
    legend = [(classes[place], palette[place]) for place in used if place != IGNORED]
    rows, captions = [], []
    for one in examples:
        counted = one.truth != IGNORED
        right = 100 * float((one.truth == one.found)[counted].mean()) if counted.any() else 0.0
        captions.append(f"{printable(one.name, 60)}: {right:.1f} % of the pixels right")
        size = _fitted(one.pixels, _MAP_SIDE)
        pixels = scaled(one.pixels, size).numpy()
        truth, found, wrong = (nearest(values, size) for values in (one.truth, one.found, one.truth != one.found))
        bare = overlay(pixels, np.full(size, IGNORED), palette)
        differs = overlay(bare, np.where(wrong & (truth != IGNORED), 0, IGNORED), [_WRONG])
        panels = (bare, overlay(pixels, truth, palette), overlay(pixels, found, palette), differs)
        rows.append([Image.fromarray(panel) for panel in panels])
    return panel_sheet(("picture", "true", "predicted", "wrong"), rows, captions, legend, _MAP_SIDE)


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


def _fitted(pixels: np.ndarray, side: int) -> Size:
    """(height, width) of a picture (H, W, C) whose longer side becomes ``side``."""
    return scaled_size(pixels.shape[:2], None, (side, side))


class Mark(NamedTuple):
    """What is drawn of an object."""

    box: np.ndarray  # (4,) as in `Objects`
    colour: Colour
    text: str
    code: Mapping[str, Any] | None = None  # of its mask
    dashed: bool = False


def sure_ones(found: Detections) -> Detections:
    """Those that are shown."""
    sure = found.scores >= SURE
    masks = None if found.masks is None else tuple(found.masks[place] for place in np.flatnonzero(sure))
    return Detections(found.boxes[sure], found.scores[sure], found.labels[sure], masks)


def owners(truth: Objects, found: Detections, bound: float = 0.5) -> np.ndarray:
    """(n,) int64, the object of its class that each detection has, the surest first; −1 for a false alarm.

    An object that is ignored is had by any number of them, and by none that has another.
    """
    owned = np.full(len(found), -1)
    if len(truth) and len(found):
        crowds = truth.ignored.astype(np.uint8).tolist()
        overlaps = coco_masks().iou(coco_boxes(found.boxes), coco_boxes(truth.boxes), crowds)
        for place in np.argsort(-found.scores, kind="stable").tolist():
            free = truth.ignored | ~np.isin(np.arange(len(truth)), owned)
            free &= ((truth.labels == found.labels[place]) | (truth.labels < 0)) & (overlaps[place] >= bound)
            if free.any():
                owned[place] = np.where(free, overlaps[place] - 2 * truth.ignored, -9).argmax()
    return owned


def counted(truth: Objects, found: Detections) -> tuple[int, int, int]:
    """How many objects are found, missed, and made up."""
    owned = owners(truth, found)
    right = int((~truth.ignored[owned[owned >= 0]]).sum())
    return right, int((~truth.ignored).sum()) - right, int((owned < 0).sum())


def object_colours(classes: ObjectClasses) -> tuple[Colour, ...]:
    """A colour a class, as label maps have them; none is black."""
    numbers = tuple(range(len(classes.names) + 1))
    return colours_of(MapClasses(tuple(map(str, numbers)), numbers, numbers))[1:]


def found_marks(found: Detections, classes: ObjectClasses) -> list[Mark]:
    """Of each detection its box, class and score."""
    colours, marks = object_colours(classes), []
    for place, label in enumerate(found.labels.tolist()):
        code = None if found.masks is None else found.masks[place]
        text = f"{printable(classes.names[label], 20)} {found.scores[place]:.2f}"
        marks.append(Mark(found.boxes[place], colours[label], text, code))
    return marks


def marked(pixels: np.ndarray, marks: Sequence[Mark], size: Size | None = None) -> Image.Image:
    """A picture (H, W, C) uint8, scaled to (height, width), with boxes and their texts, under the colours of masks."""
    size = size or (pixels.shape[0], pixels.shape[1])
    areas = [float(np.prod(mark.box[2:] - mark.box[:2])) for mark in marks]
    order = sorted(range(len(marks)), key=lambda place: (marks[place].dashed, -areas[place]))  # what is small on top
    ordered = [marks[place] for place in order]
    places = np.full(size, -1, np.int16)
    for number, mark in enumerate(ordered):
        if mark.code is not None:
            places[nearest(masks_of([mark.code])[0], size) > 0] = number
    base = scaled(pixels, size).numpy() if size != pixels.shape[:2] else pixels
    picture = Image.fromarray(overlay(base, places, [mark.colour for mark in ordered]))
    draw, line = ImageDraw.Draw(picture), max(2, round(min(size) / 250))
    points = max(11, round(min(size) / 40))
    font = ImageFont.load_default(points)
    scale = np.array(size[::-1] * 2) / np.array(pixels.shape[1::-1] * 2)
    edges = [np.round(mark.box * scale).astype(int).tolist() for mark in ordered]
    for mark, (left, top, right, bottom) in zip(ordered, edges, strict=True):
        right, bottom = max(left, right - 1), max(top, bottom - 1)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_beside(mark.colour), width=line + 2)
        for part in _dashes(left, top, right, bottom, line) if mark.dashed else [(left, top, right, bottom)]:
            draw.rectangle(part, outline=mark.colour, width=line)
    for mark, (left, top, right, bottom) in zip(ordered, edges, strict=True):
        width, height = draw.textlength(mark.text, font) + 4, points + 4
        if width <= 2 * max(right - left, bottom - top):  # or it would hide more than it says
            x = max(0, min(left, size[1] - width))
            y = top - height if top >= height else min(bottom + 2, size[0] - height)
            draw.rectangle((x, y, x + width, y + height), mark.colour)
            draw.text((x + 2, y + 1), mark.text, _beside(mark.colour), font)
    return picture


def object_sheet(examples: Sequence[Example], classes: ObjectClasses) -> Image.Image:
    """One row a picture: itself, its objects, and what is found in it; false alarms and missed ones stand out."""
    colours, rows, captions = object_colours(classes), [], []
    used = np.concatenate(
        [np.zeros(0, int), *(one for row in examples for one in (row.truth.labels, row.found.labels))]
    )
    names = [*(printable(name, 20) for name in classes.names), "no class"]  # the last of what is ignored
    for one in examples:
        truth, size, owned = one.truth, _fitted(one.pixels, _OBJECT_SIDE), owners(one.truth, one.found)
        there = [
            Mark(box, _IGNORED if ignored else colours[label], "ignored: " * ignored + names[label], code)
            for box, label, ignored, code in zip(
                truth.boxes, truth.labels.tolist(), truth.ignored.tolist(), _codes(truth), strict=True
            )
        ]
        missed = [
            mark._replace(colour=_MISSED, code=None, text=f"missed: {mark.text}")
            for place, mark in enumerate(there)
            if place not in owned and not truth.ignored[place]
        ]
        said = [
            mark if owner >= 0 else mark._replace(colour=_FALSE, dashed=True)
            for mark, owner in zip(found_marks(one.found, classes), owned.tolist(), strict=True)
        ]
        rows.append([marked(one.pixels, marks, size) for marks in ([], there, [*said, *missed])])
        found, lost, wrong = counted(truth, one.found)
        captions.append(f"{printable(one.name, 60)}: {found} found, {lost} missed, {wrong} false alarms")
    titles = ("picture", "true", f"found (score {SURE} or more); red dashes: false alarm, white: missed")
    legend = [(classes.names[label], colours[label]) for label in np.unique(used[used >= 0]).tolist()]
    return panel_sheet(titles, rows, captions, legend, _OBJECT_SIDE)


def _codes(truth: Objects) -> Sequence[Mapping[str, Any] | None]:
    return [None] * len(truth) if truth.shapes is None else truth.codes()


def _beside(colour: Colour) -> Colour:
    """Black or white, what is seen beside a colour."""
    return (0, 0, 0) if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 110 else (255, 255, 255)


def _dashes(left: int, top: int, right: int, bottom: int, line: int) -> list[tuple[int, int, int, int]]:
    long, across = 4 * line, line - 1
    level = [(x, min(x + long, right)) for x in range(left, right + 1, 2 * long)]
    upright = [(y, min(y + long, bottom)) for y in range(top, bottom + 1, 2 * long)]
    found = [(a, edge, b, edge + across) for a, b in level for edge in (top, max(top, bottom - across))]
    return found + [(edge, a, edge + across, b) for a, b in upright for edge in (left, max(left, right - across))]
