"""Numbers and outlines as annotation files have them: checked, and cut at the edges of the picture."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maehub.data.objects.objects import Shape, area, coco_masks
from maehub.errors import DataError
from maehub.images import Size

_LARGEST = 1e7  # pixels from the corner of a picture, where no picture is
_BEYOND = 0.5  # pixels over an edge that are more than rounding


class Thing(NamedTuple):
    """One object as a file says it."""

    what: str
    """For messages: ``annotation 7``."""
    label: str | None
    """None of an ignored area that says no class."""
    box: np.ndarray | None
    """(4,) float64: left, top, right, bottom edge in pixels; None is what the outline fills."""
    shape: Shape | None = None
    ignored: bool = False


class Placed(NamedTuple):
    """An object within its picture."""

    label: str | None
    ignored: bool
    box: np.ndarray
    shape: Shape | None
    beyond: bool
    """It was cut at an edge of the picture, by more than rounding."""
    apart: bool
    """Its box and its outline have less than half of their area in common."""


def numbers(values: Any, what: str, count: int | None = None) -> np.ndarray:
    """(count,) float64 of a list of JSON."""
    said = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not said or len(values) != (len(values) if count is None else count):
        raise DataError(f"{what} must be {count or 'a list of'} numbers, not {values!r:.60}")
    try:
        found = np.array(values, np.float64)
    except OverflowError:
        found = np.array([np.inf])
    if not (np.abs(found) < _LARGEST).all():
        raise DataError(f"{what} is {values!r:.60}: NaN, infinity and what lies far from any picture are no pixels")
    return found


def corners(values: Any, what: str) -> np.ndarray:
    """(k, 2) float64 of a polygon that is written as x, y, x, y, …"""
    found = numbers(values, f"a polygon of {what}")
    if len(found) < 6 or len(found) % 2:
        raise DataError(f"{what}: a polygon has {len(found)} numbers, and 3 points are 6: x, y, x, y, …")
    return found.reshape(-1, 2)


def place(thing: Thing, size: Size) -> Placed:
    """Check an object and cut it at the edges of its picture, which is (height, width).

    Raises:
        DataError: it has no area, or lies outside of the picture.
    """
    shape, said = thing.shape, thing.box
    if said is None:
        assert shape is not None
        said = bounds(shape)
    shown = ", ".join(f"{edge:.6g}" for edge in said)
    if said[2] <= said[0] or said[3] <= said[1]:
        raise DataError(f"{thing.what} has no area: its left, top, right and bottom edge are {shown}")
    limits = np.array([size[1], size[0]] * 2, np.float64)
    over = max(-said[0], -said[1], said[2] - size[1], said[3] - size[0])
    box = np.clip(said, 0, limits)
    outside = box[2] <= box[0] or box[3] <= box[1]
    apart = False
    if shape is not None and not outside:
        if not isinstance(shape, Mapping):
            shape = tuple(part for part in (cut(part, size) for part in shape) if len(part) > 2)
        if not shape or area(shape) <= 0:
            raise DataError(f"{thing.what} has an outline without an area in the picture")
        filled = bounds(shape)
        common = np.minimum(box[2:], filled[2:]) - np.maximum(box[:2], filled[:2])
        both = float(np.prod(common.clip(min=0)))
        apart = both < 0.5 * float(np.prod(box[2:] - box[:2]) + np.prod(filled[2:] - filled[:2]) - both)
        box, apart = (filled, False) if thing.box is None else (box, apart)
    box = box.astype(np.float32)
    if outside or box[2] <= box[0] or box[3] <= box[1]:
        size_text = f"{size[1]}×{size[0]}"
        raise DataError(f"{thing.what} lies outside of the picture, which is {size_text}: its edges are {shown}")
    return Placed(thing.label, thing.ignored, box, shape, bool(over > _BEYOND), apart)


def cut(polygon: np.ndarray, size: Size) -> np.ndarray:
    """The part of a polygon (k, 2) that lies in a picture of (height, width); (0, 2) where there is none."""
    for axis, edge, sign in ((0, 0, 1), (0, size[1], -1), (1, 0, 1), (1, size[0], -1)):
        inside = sign * (polygon[:, axis] - edge)
        if (inside >= 0).all():
            continue
        kept: list[np.ndarray] = []
        for at, (here, there) in enumerate(zip(inside, np.roll(inside, -1), strict=True)):
            if here >= 0:
                kept.append(polygon[at])
            if (here < 0) != (there < 0):
                kept.append(polygon[at] + here / (here - there) * (polygon[(at + 1) % len(polygon)] - polygon[at]))
        polygon = np.array(kept, np.float64).reshape(-1, 2)
    return polygon.clip(0, (size[1], size[0]))


def bounds(shape: Shape) -> np.ndarray:
    """(4,) float64, left, top, right and bottom edge of an outline."""
    if isinstance(shape, Mapping):
        left, top, width, height = coco_masks().toBbox(dict(shape)).tolist()
        return np.array([left, top, left + width, top + height])
    points = np.concatenate(shape)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def run_length(code: Mapping[str, Any], size: Size, what: str) -> dict[str, Any]:
    """COCO's run-length code, compressed or not, to a compressed one that is sure to be of a picture of this size."""
    counts = code.get("counts")
    if isinstance(counts, str):
        counts = _runs(counts.encode("ascii", "replace"), what)
    if list(numbers(code.get("size"), f"the size of {what}", 2)) != list(size):
        raise DataError(f"{what}: its mask is of the size {code['size']!r:.60}, and the picture of {list(size)}")
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise DataError(f"{what}: the runs of its mask must be whole numbers from 0")
    if sum(counts) != size[0] * size[1]:
        raise DataError(
            f"{what}: the runs of its mask are {sum(counts)} pixels, and the picture has {size[0] * size[1]}"
        )
    found: dict[str, Any] = coco_masks().frPyObjects({"counts": counts, "size": list(size)}, *size)
    return found


def _runs(text: bytes, what: str) -> list[int]:
    """Compressed runs: 5 bits a letter, low ones first; from the fourth on the difference to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        digit = letter - 48
        value |= (digit & 31) << shift
        shift += 5
        if not 0 <= digit < 64 or shift > 60:
            raise DataError(f"{what}: its compressed mask has letters that mean nothing there")
        if digit & 32:
            continue
        value -= (1 << shift) * (digit >> 4 & 1)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise DataError(f"{what}: its compressed mask is cut off")
    return runs


def same_size(said: Sequence[Any], size: Size, where: str) -> None:
    """See that a picture is of the (height, width) that a file says; None and 0 say nothing.

    Raises:
        DataError: it is of another.
    """
    stated = tuple(said)
    if stated in ((None, None), (0, 0)) or stated == size:
        return
    turned = " The picture is turned by its EXIF orientation, and what is annotated was not?" * (stated == size[::-1])
    has = f"it says {stated[1]!r:.20}×{stated[0]!r:.20} pixels, and the picture {where} has {size[1]}×{size[0]}"
    raise DataError(f"{has}: it belongs to another picture, or that was scaled.{turned}")
