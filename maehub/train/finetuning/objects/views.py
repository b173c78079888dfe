"""Crops of pictures with their objects: boxes and masks are moved, cut and turned as the picture is."""

from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from maehub.data import Key, Labelled, Objects
from maehub.dense import Target
from maehub.images import Box, Size
from maehub.train.finetuning.maps.views import DenseCrops, DenseTransform, View

_LEAST = 1.0  # pixels of a side of what is left of an object


class Targets(list[Target]):
    """Of each image what it shows."""

    def split(self, size: int) -> "list[Targets]":
        """Parts of so many images, as of a tensor."""
        return [Targets(self[first : first + size]) for first in range(0, len(self), size)]


class ObjectBatch(NamedTuple):
    """Crops of one step, or a part of them."""

    pixels: Tensor  # (B, H, W, C) uint8
    targets: Targets
    seeds: Tensor  # (B,) int64 on the CPU

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting for it."""
        targets = Targets(one.to(device) for one in self.targets)
        return type(self)(self.pixels.to(device, non_blocking=True), targets, self.seeds)


def crop(transform: DenseTransform, source: Any, objects: Objects, seed: int, *, masks: bool) -> tuple[np.ndarray, Any]:
    """(H, W, C) uint8 of the size of the window, and what is left of the objects in it.

    What is cut to less than a pixel is left out, and so is what is ignored. With ``masks`` a box is that of what is
    left of its mask.
    """
    seen = transform.view(source, objects.size, seed, partial(_placed, objects.size))
    objects = objects.take(~objects.ignored)
    drawn = None
    if masks and len(objects):
        flat = seen.turned(objects.masks(seen.box, seen.shown))
        drawn = np.zeros((len(objects), *transform.preprocess.size), np.uint8)
        drawn[:, : flat.shape[1], : flat.shape[2]] = flat
        boxes = np.array([_bounds(mask) for mask in drawn], np.float32)
    elif masks:
        drawn, boxes = np.zeros((0, *transform.preprocess.size), np.uint8), objects.boxes
    else:
        boxes = moved(objects.boxes, seen)
    kept = (boxes[:, 2:] - boxes[:, :2] >= _LEAST).all(axis=1)
    labels = torch.from_numpy(objects.labels[kept])
    mask = None if drawn is None else torch.from_numpy(drawn[kept])
    return seen.canvas, Target(torch.from_numpy(boxes[kept]), labels, mask, seed)


def moved(boxes: np.ndarray, seen: View) -> np.ndarray:
    """Boxes (n, 4) of a picture in the pixels of a view of it, cut at its edges."""
    part, (height, width) = seen.box, seen.shown
    scale = np.array([width / (part.right - part.left), height / (part.bottom - part.top)] * 2)
    found = (boxes - np.array([part.left, part.top] * 2)) * scale
    left, top, right, bottom = np.clip(found, 0, [width, height] * 2).T
    if seen.flips[0]:
        top, bottom = height - bottom, height - top
    if seen.flips[1]:
        left, right = width - right, width - left
    for _ in range(seen.turns):  # against the clock: what was right is on top
        left, top, right, bottom = top, width - right, bottom, width - left
        height, width = width, height
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32)


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else (0, 0, 0, 0)


def _placed(size: Size, taken: Size, draws: np.ndarray) -> Box:
    top, left = (int(draw * (side - part + 1)) for draw, side, part in zip(draws[0], size, taken, strict=True))
    return Box(left, top, left + taken[1], top + taken[0])


class ObjectCrops(DenseCrops):
    """Crops of pictures and their objects."""

    def __init__(self, labelled: Labelled, transform: DenseTransform, masks: bool, cache: bool) -> None:
        assert labelled.objects is not None
        super().__init__(labelled, transform.preprocess.channels, cache)
        self.rows, self.transform, self.masks = labelled.objects.rows, transform, masks

    def crop(self, source: Any, key: Key) -> tuple[np.ndarray, Target]:
        return crop(self.transform, source, self.rows[key.sample], key.crop, masks=self.masks)

    def batch(self, crops: list[tuple[np.ndarray, Target]], seeds: Tensor) -> ObjectBatch:
        pixels, targets = zip(*crops, strict=True)
        return ObjectBatch(torch.from_numpy(np.stack(pixels)), Targets(targets), seeds)
