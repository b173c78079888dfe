"""Crops of pictures with their label maps or objects: the same part of both, scaled, turned, padded, recoloured.

Everything random about a crop is a pure function of (seed, epoch, sample id), as of the crops of classifiers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maehub.data import IGNORED, Key, Labelled, Objects
from maehub.dense import Target, scaled_size
from maehub.images import Box, Preprocess, Size, nearest, open_part, part_of, scaled
from maehub.rng import random_uniform, sample_seed
from maehub.train.finetuning.views import LabelledCrops

_PLACE, _COLOUR = 9, 10  # views of `sample_seed`
_TRIES = 10
_LEAST = 1.0  # pixels of a side of what is left of an object
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 0.1  # of 255, factors, share of the circle


class Targets(list[Target]):
    """Of each image what it shows."""

    def split(self, size: int) -> "list[Targets]":
        """Parts of so many images, as of a tensor."""
        return [Targets(self[first : first + size]) for first in range(0, len(self), size)]

    def to(self, device: torch.device, *, non_blocking: bool) -> "Targets":
        """On a device, without waiting for masks, which are large."""
        return Targets(one.to(device) for one in self)


class View(NamedTuple):
    """A part of a picture as it is seen in training."""

    canvas: np.ndarray  # (H, W, C) uint8 of the size of the window; what lies beyond the part is the mean colour
    box: Box  # of the picture
    shown: Size  # what the part is scaled to
    flips: tuple[bool, bool]  # upside down, left to right
    turns: int  # by 90 degrees, against the clock, after that

    def turned(self, values: np.ndarray) -> np.ndarray:
        """What lies over the part, (…, h, w) of ``shown``, turned as the canvas is, whose top left corner it fills."""
        for flips, axis in zip(self.flips, (-2, -1), strict=True):
            values = np.flip(values, axis) if flips else values
        return np.rot90(values, self.turns, (-2, -1))


@dataclass(frozen=True)
class DenseTransform:
    """How pictures with more than a class are looked at in training.

    ``short_side``, or ``fitted`` into one window: as of the segmenter or detector. ``resize``: as of the recipe.
    """

    preprocess: Preprocess
    short_side: int | None
    resize: tuple[float, float]
    hflip: bool = True
    vflip: bool = False
    rot90: bool = False
    colours: bool = True
    fitted: bool = False

    def view(self, source: Any, size: Size, seed: int, place: Callable[[Size, np.ndarray], Box]) -> View:
        """A random view of a picture of (height, width).

        ``place`` chooses which part of a given size is seen, by draws (10, 2) from 0 to 1.
        """
        window, channels = self.preprocess.size, self.preprocess.channels
        numbers = random_uniform(sample_seed(seed, 0, 0, _PLACE), 4 + 2 * _TRIES)
        low, high = self.resize
        factor = low + float(numbers[0]) * (high - low)
        whole = scaled_size(size, self.short_side, window if self.fitted else None)
        by = factor * whole[0] / size[0]  # pixels of the result a pixel of the picture
        taken = tuple(min(side, max(1, round(edge / by))) for side, edge in zip(size, window, strict=True))
        shown = sides(tuple(min(edge, max(1, round(part * by))) for part, edge in zip(taken, window, strict=True)))
        box = place(sides(taken), numbers[4:].reshape(_TRIES, 2))
        part = (part_of if isinstance(source, Image.Image) else open_part)(source, lambda _: box, shown)
        pixels = scaled(part.pixels, shown).numpy()
        if channels == 1 and pixels.ndim == 3:
            pixels = np.array(Image.fromarray(pixels).convert("L"))
        if pixels.ndim == 2:
            pixels = pixels[:, :, None].repeat(channels, axis=2)
        if self.colours:
            pixels = changed_colours(pixels, sample_seed(seed, 0, 0, _COLOUR))
        flips = bool(self.vflip and numbers[2] < 0.5), bool(self.hflip and numbers[1] < 0.5)
        seen = View(np.empty(0, np.uint8), part.box, shown, flips, int(4 * numbers[3]) if self.rot90 else 0)
        pixels = seen.turned(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
        canvas = np.empty((*window, channels), np.uint8)
        canvas[:] = self._mean_colour()
        canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        return seen._replace(canvas=canvas)

    def _mean_colour(self) -> list[int]:
        low, high = self.preprocess.value_range
        return [min(255, max(0, round(low + mean * (high - low)))) for mean in self.preprocess.mean]


@dataclass(frozen=True)
class MapTransform(DenseTransform):
    """How pictures with label maps are looked at in training. ``most_of_one``: as of the recipe."""

    most_of_one: float = 1.0

    def crop(self, source: Any, places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(H, W, C) uint8 and (H, W) int16 of the size of the window; what lies beyond a picture is ignored."""
        seen = self.view(source, sides(places.shape), seed, partial(self._placed, places))
        box = seen.box
        classes = seen.turned(nearest(places[box.top : box.bottom, box.left : box.right], seen.shown))
        target = np.full(self.preprocess.size, IGNORED, np.int16)
        target[: classes.shape[0], : classes.shape[1]] = classes
        return seen.canvas, target

    def _placed(self, places: np.ndarray, taken: Size, draws: np.ndarray) -> Box:
        """The first of ten places where no class fills too much, else the last."""
        for draw in draws:
            box = _placed(sides(places.shape), taken, draw)
            if self.most_of_one >= 1:
                break
            counts = np.bincount(places[box.top : box.bottom, box.left : box.right].reshape(-1) + 1)[1:]
            if counts.sum() and (counts > 0).sum() > 1 and counts.max() < self.most_of_one * counts.sum():
                break
        return box


def object_crop(
    transform: DenseTransform, source: Any, objects: Objects, seed: int, *, masks: bool
) -> tuple[np.ndarray, Any]:
    """(H, W, C) uint8 of the size of the window, and what is left of the objects in it.

    What is cut to less than a pixel is left out, and so is what is ignored. With ``masks`` a box is that of what is
    left of its mask.
    """
    seen = transform.view(source, objects.size, seed, lambda taken, draws: _placed(objects.size, taken, draws[0]))
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
    top, left = (int(draw * (side - part + 1)) for draw, side, part in zip(draws, size, taken, strict=True))
    return Box(left, top, left + taken[1], top + taken[0])


def changed_colours(pixels: np.ndarray, seed: int) -> np.ndarray:
    """Brightness, contrast, saturation and hue of (h, w, C) uint8, each changed half of the time.

    It is the distortion of SSD (Liu et al. 2016, arXiv 1512.02325, section 2.2) by the numbers that segmentation uses:
    brightness by up to 32 of 255, contrast and saturation by factors from 0.5 to 1.5, hue by up to a tenth of the
    circle; contrast comes before or after the colours. Greyscale has brightness and contrast.
    """
    draws = random_uniform(seed, 9).tolist()
    values = pixels.astype(np.float32)
    if draws[0] < 0.5:
        values = values + _BRIGHTNESS * (2 * draws[1] - 1)
    low, high = _CONTRAST
    contrast = low + draws[3] * (high - low) if draws[2] < 0.5 else 1.0
    late = draws[4] < 0.5
    if not late:
        values = values * contrast
    result = values.clip(0, 255).round().astype(np.uint8)
    if result.shape[2] == 3 and (draws[5] < 0.5 or draws[7] < 0.5):
        hsv = np.array(Image.fromarray(result).convert("HSV"))
        if draws[5] < 0.5:
            low, high = _SATURATION
            hsv[:, :, 1] = (hsv[:, :, 1] * (low + draws[6] * (high - low))).clip(0, 255)
        if draws[7] < 0.5:
            hsv[:, :, 0] += np.uint8(round(256 * _HUE * (2 * draws[8] - 1)) % 256)  # round the circle
        result = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if late and contrast != 1:
        result = (result * np.float32(contrast)).clip(0, 255).round().astype(np.uint8)
    return result


def sides(shape: Any) -> Size:
    """(height, width) of the shape of an array."""
    return int(shape[0]), int(shape[1])


class MapCrops(LabelledCrops):
    """Crops of pictures and their label maps, which are decoded once too with ``cache``.

    ``targets`` of a batch are places of classes, (B, H, W) int16.
    """

    def __init__(self, labelled: Labelled, transform: MapTransform, cache: bool) -> None:
        assert labelled.maps is not None
        super().__init__(labelled, transform, cache)
        self.maps = labelled.maps
        self.places = [self.maps.read(index) for index in range(len(labelled))] if cache else None

    def crop(self, source: Any, key: Key) -> tuple[np.ndarray, np.ndarray]:
        places = self.places[key.sample] if self.places else self.maps.read(key.sample)
        return self.transform.crop(source, places, key.crop)

    def joined(self, crops: list[Any], keys: list[Key]) -> tuple[Tensor, Tensor]:
        pixels, targets = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
        return pixels, targets


class ObjectCrops(LabelledCrops):
    """Crops of pictures and their objects; ``targets`` of a batch are `Targets`."""

    def __init__(self, labelled: Labelled, transform: DenseTransform, masks: bool, cache: bool) -> None:
        assert labelled.objects is not None
        super().__init__(labelled, transform, cache)
        self.rows, self.masks = labelled.objects.rows, masks

    def crop(self, source: Any, key: Key) -> tuple[np.ndarray, Target]:
        return object_crop(self.transform, source, self.rows[key.sample], key.crop, masks=self.masks)

    def joined(self, crops: list[Any], keys: list[Key]) -> tuple[Tensor, Targets]:
        pixels, targets = zip(*crops, strict=True)
        return torch.from_numpy(np.stack(pixels)), Targets(targets)
