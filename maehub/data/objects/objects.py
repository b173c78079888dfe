"""The objects of a picture in one form, whatever file said them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from maehub.data.maps.label_maps import IGNORED, MapClasses
from maehub.errors import MissingDependencyError, UsageError
from maehub.images import Box, Size

Shape = tuple[np.ndarray, ...] | Mapping[str, Any]
"""Polygons, (k, 2) float64 each, x and y of corners in pixels; or COCO's compressed run-length code of the picture."""


@dataclass(frozen=True)
class ObjectClasses:
    """The classes of objects, and the numbers by which COCO's files call them."""

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        named = self.names and all(isinstance(name, str) and name for name in self.names)
        numbered = all(type(number) is int for number in self.ids) and len(set(self.ids)) == len(self.ids)
        if not named or not numbered or len(set(self.names)) != len(self.names) or len(self.ids) != len(self.names):
            raise UsageError("classes of objects need a name or more, each once, and a number each")


@dataclass(frozen=True)
class Objects:
    """What one picture shows; n may be 0.

    ``size``: (height, width) of the picture as it is seen. ``boxes``: (n, 4) float32, left, top, right and bottom edge
    in pixels, 0 being the picture's left or top edge. ``labels``: (n,) int64, places of classes; −1 of an ignored one
    whose class is not known. ``ignored``: (n,) bool, a crowd or what is too difficult: neither trained on nor missed.
    ``shapes``: n outlines; None for boxes alone.
    """

    size: Size
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    shapes: tuple[Shape, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Objects":
        """Some of them: places, or (n,) bool."""
        places = np.arange(len(self))[indices]
        shapes = None if self.shapes is None else tuple(self.shapes[place] for place in places.tolist())
        boxes, labels, ignored = (values[places] for values in (self.boxes, self.labels, self.ignored))
        return Objects(self.size, boxes, labels, ignored, shapes)

    def codes(self) -> list[dict[str, Any]]:
        """The masks in COCO's compressed run-length code, of the whole picture; needs shapes."""
        assert self.shapes is not None
        return [outline_code(shape, self.size) for shape in self.shapes]

    def masks(self, box: Box, size: Size) -> np.ndarray:
        """The masks in a part of the picture scaled to (height, width): (n, h, w) uint8, 0 or 1; needs shapes."""
        assert self.shapes is not None
        drawn = np.zeros((len(self), *size), np.uint8)
        scale = np.array([size[1] / (box.right - box.left), size[0] / (box.bottom - box.top)])
        for place, shape in enumerate(self.shapes):
            if isinstance(shape, Mapping):
                part = masks_of([shape])[0][box.top : box.bottom, box.left : box.right]
                small = F.interpolate(torch.from_numpy(part)[None, None].float(), size=size, mode="area")
                drawn[place] = (small[0, 0] >= 0.5).numpy()
            else:
                moved = tuple((polygon - (box.left, box.top)) * scale for polygon in shape)
                drawn[place] = masks_of([outline_code(moved, size)])[0]
        return drawn


@dataclass(frozen=True)
class ObjectLabels:
    """The objects of each picture of a row."""

    rows: tuple[Objects, ...] = field(repr=False)
    classes: ObjectClasses

    @property
    def masked(self) -> bool:
        """Whether every object has an outline."""
        return all(row.shapes is not None for row in self.rows if len(row))

    def take(self, indices: np.ndarray) -> "ObjectLabels":
        return replace(self, rows=tuple(self.rows[index] for index in np.asarray(indices).tolist()))

    def digest(self) -> str:
        """sha256 of all of them."""
        found = hashlib.sha256()
        for row in self.rows:
            for values in (row.boxes, row.labels, row.ignored):
                found.update(np.ascontiguousarray(values).tobytes())
            for shape in row.shapes or ():
                parts = [shape["counts"]] if isinstance(shape, Mapping) else [part.tobytes() for part in shape]
                found.update(b"\0".join(parts))
        return found.hexdigest()


@dataclass(frozen=True)
class DrawnMaps:
    """As `LabelMaps`, drawn from objects with outlines: smaller ones lie on larger ones, ignored ones are `IGNORED`."""

    files: ObjectLabels
    classes: MapClasses
    values: tuple[int, ...]
    """What no object covers is drawn as, and after it what each class of ``files`` is."""

    def read(self, index: int) -> np.ndarray:
        """Places of classes, (H, W) int16."""
        row = self.files.rows[index]
        assert row.shapes is not None or not len(row)
        shapes, size = row.shapes or (), row.size
        drawn = np.full(size, self.values[0], np.int64)
        for at in sorted(range(len(row)), key=lambda place: -area(shapes[place])):
            mask = masks_of([outline_code(shapes[at], size)])[0].view(bool)
            np.copyto(drawn, IGNORED if row.ignored[at] else self.values[row.labels[at] + 1], where=mask)
        found = self.classes.decode(drawn.clip(min=0))
        found[drawn == IGNORED] = IGNORED
        return found

    def take(self, indices: np.ndarray) -> "DrawnMaps":
        return replace(self, files=self.files.take(indices))


def masks_of(codes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(n, H, W) uint8, 0 or 1, of compressed run-length codes of one picture, one at least."""
    return np.ascontiguousarray(np.moveaxis(coco_masks().decode(list(codes)), 2, 0))


def code_of(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool or uint8 to COCO's compressed run-length code."""
    found: dict[str, Any] = coco_masks().encode(np.asfortranarray(mask, np.uint8))
    return found


def coco_masks() -> Any:
    """The module of COCO's mask code.

    Raises:
        MissingDependencyError: pycocotools is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise MissingDependencyError("objects need pycocotools: pip install 'maehub[detect]'") from error
    return mask


def outline_code(shape: Shape, size: Size) -> dict[str, Any]:
    if isinstance(shape, Mapping):
        return dict(shape)
    polygons = [polygon.reshape(-1).tolist() for polygon in shape]
    code: dict[str, Any] = coco_masks().merge(coco_masks().frPyObjects(polygons, *size))
    return code


def area(shape: Shape) -> float:
    """Pixels within an outline, overlaps of its polygons counted twice."""
    if isinstance(shape, Mapping):
        return float(coco_masks().area(dict(shape)))
    turned = [np.roll(part, -1, axis=0) for part in shape]
    return sum(
        abs(float((a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]).sum())) / 2 for a, b in zip(shape, turned, strict=True)
    )
