"""Objects by JSON files in the form of LabelMe."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from maehub.data.label_sources import label_name
from maehub.data.objects.noted import json_object, rows_of
from maehub.data.objects.objects import Shape, coco_masks, code_of, outline_code
from maehub.data.objects.outlines import Thing, cut, numbers, same_size
from maehub.errors import DataError
from maehub.images import Size, read_label_map

FLAT = ("point", "points", "line", "linestrip")
"""Kinds of shapes that have no area."""
_ROUND = 64  # corners of a circle
_IGNORE = "__ignore__"


def things_of_labelme(path: str, size: Size) -> list[Thing]:
    """The objects in one file. Shapes of one label and group_id are one; a thing called as in `FLAT` has no area.

    A rectangle is a box and no outline, unless it is grouped with one.
    """
    said = json_object(path)
    same_size((said.get("imageHeight"), said.get("imageWidth")), size, "itself")
    groups: dict[tuple[Any, ...], list[Thing]] = {}
    for place, row in enumerate(rows_of(said, "shapes", "", "LabelMe's"), 1):
        label = label_name(row["label"]) if isinstance(row.get("label"), str) else ""
        group = row.get("group_id")
        if not label or not isinstance(group, int | str | None):
            raise DataError(f"shape {place} has no label, or a group_id that is no number")
        what = f"shape {place}, {label[:80]},"
        box, shape = _drawn(row, what, size)
        key = (place,) if group is None or row.get("shape_type") in FLAT else (label, group)
        thing = Thing(what, None if label == _IGNORE else label, box, shape, label == _IGNORE)
        groups.setdefault(key, []).append(thing)
    return [_joined(group, size) for group in groups.values()]


def _joined(parts: list[Thing], size: Size) -> Thing:
    if len(parts) == 1:
        return parts[0]
    if all(part.shape is None for part in parts):
        boxes = np.array([part.box for part in parts])
        return parts[0]._replace(box=np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]))
    shapes = [around(part.box) if part.shape is None else part.shape for part in parts]
    polygons = tuple(polygon for shape in shapes if not isinstance(shape, Mapping) for polygon in shape)
    codes = [dict(shape) for shape in shapes if isinstance(shape, Mapping)]
    if not codes:
        return parts[0]._replace(box=None, shape=polygons)
    if inside := tuple(part for polygon in polygons if len(part := cut(polygon, size)) > 2):
        codes.append(outline_code(inside, size))
    return parts[0]._replace(box=None, shape=coco_masks().merge(codes))


def around(box: np.ndarray | None) -> tuple[np.ndarray]:
    """The outline of a box (4,): its four corners, (4, 2)."""
    assert box is not None
    return (np.asarray(box, np.float64)[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2),)


def _drawn(row: dict[str, Any], what: str, size: Size) -> tuple[np.ndarray | None, Shape | None]:
    """A box, or an outline; neither of a shape without an area."""
    kind, said = row.get("shape_type") or "polygon", row.get("points")
    if not isinstance(said, list):
        raise DataError(f"{what} has no points")
    points = np.array([numbers(point, f"a point of {what}", 2) for point in said]).reshape(-1, 2)
    if kind in FLAT:
        return None, None
    least = 3 if kind == "polygon" else 2
    if len(points) < least or (len(points) != 2 and kind in ("circle", "mask")):
        raise DataError(f"{what} is a {kind} of {len(points)} points, and has {least}{' or more' * (least > 2)}")
    if kind in ("polygon", "oriented_rectangle") and least <= len(points):
        return None, (points,)
    if kind == "rectangle":
        return np.concatenate([points.min(axis=0), points.max(axis=0)]), None
    if kind == "circle":
        angles = np.arange(_ROUND) * (2 * np.pi / _ROUND)
        radius = float(np.linalg.norm(points[1] - points[0]))
        return None, (points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1),)
    if kind == "mask":
        return None, _mask(row.get("mask"), points, what, size)
    raise DataError(f"{what} is a {kind!r:.40}, which is not known")


def _mask(text: Any, points: np.ndarray, what: str, size: Size) -> Shape:
    """A picture of the mask, in the box whose first and last pixels are ``points``."""
    try:
        small = read_label_map(io.BytesIO(base64.b64decode(text, validate=True)))
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} has a mask that is no picture in base64: {error}") from error
    (left, top), (right, bottom) = np.sort(points, axis=0).astype(int).tolist()
    if small.ndim != 2 or small.shape != (bottom - top + 1, right - left + 1):
        raise DataError(
            f"{what} has a mask of the shape {small.shape} in a box of {bottom - top + 1}×{right - left + 1}"
        )
    if left < 0 or top < 0 or bottom >= size[0] or right >= size[1]:
        raise DataError(f"{what} has a mask that reaches out of the picture, which is {size[1]}×{size[0]}")
    whole = np.zeros(size, np.uint8)
    whole[top : bottom + 1, left : right + 1] = small > 0
    return code_of(whole)
