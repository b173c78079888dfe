"""Crops of pictures with their label maps: the same part of both, scaled, turned, padded, its colours changed.

Everything random about a crop is a pure function of (seed, epoch, sample id), as of the crops of classifiers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maehub.data import IGNORED, Key, Labelled, naming
from maehub.dense import scaled_size
from maehub.errors import DataError
from maehub.images import Box, Preprocess, Size, nearest, open_part, part_of, scaled
from maehub.rng import random_uniform, sample_seed
from maehub.train.pretraining import opened

_PLACE, _COLOUR = 9, 10  # views of `sample_seed`
_TRIES = 10
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 0.1  # of 255, factors, share of the circle


class MapBatch(NamedTuple):
    """Crops of one step, or a part of them."""

    pixels: Tensor  # (B, H, W, C) uint8
    targets: Tensor  # (B, H, W) int16, places of classes
    seeds: Tensor  # (B,) int64 on the CPU

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting for it."""
        pixels, targets = (field.to(device, non_blocking=True) for field in self[:2])
        return type(self)(pixels, targets, self.seeds)


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
        height, width = places.shape
        for down, right in draws.tolist():
            top, left = int(down * (height - taken[0] + 1)), int(right * (width - taken[1] + 1))
            box = Box(left, top, left + taken[1], top + taken[0])
            if self.most_of_one >= 1:
                break
            counts = np.bincount(places[box.top : box.bottom, box.left : box.right].reshape(-1) + 1)[1:]
            if counts.sum() and (counts > 0).sum() > 1 and counts.max() < self.most_of_one * counts.sum():
                break
        return box


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


class DenseCrops(Dataset[Any], ABC):
    """Crops, a whole batch at a time; what cannot be read comes back as its error.

    With ``cache`` every picture is decoded once, here; forked workers share the memory.
    """

    def __init__(self, labelled: Labelled, channels: int, cache: bool) -> None:
        self.labelled = labelled
        samples = labelled.samples
        self.decoded = [opened(samples, index, channels) for index in range(len(samples))] if cache else None

    def __getitems__(self, keys: list[Key]) -> Any:
        samples, crops = self.labelled.samples, []
        for key in keys:
            try:
                with naming(samples, key.sample):
                    source = self.decoded[key.sample] if self.decoded else samples.source(key.sample)
                    crops.append(self.crop(source, key))
            except DataError as error:
                return error
        return self.batch(crops, torch.tensor([key.crop for key in keys]))

    @abstractmethod
    def crop(self, source: Any, key: Key) -> Any:
        """One crop, by its key."""

    @abstractmethod
    def batch(self, crops: list[Any], seeds: Tensor) -> Any:
        """All of them together."""


class MapCrops(DenseCrops):
    """Crops of pictures and their label maps, which are decoded once too with ``cache``."""

    def __init__(self, labelled: Labelled, transform: MapTransform, cache: bool) -> None:
        assert labelled.maps is not None
        super().__init__(labelled, transform.preprocess.channels, cache)
        self.maps, self.transform = labelled.maps, transform
        self.places = [self.maps.read(index) for index in range(len(labelled))] if cache else None

    def crop(self, source: Any, key: Key) -> tuple[np.ndarray, np.ndarray]:
        places = self.places[key.sample] if self.places else self.maps.read(key.sample)
        return self.transform.crop(source, places, key.crop)

    def batch(self, crops: list[tuple[np.ndarray, np.ndarray]], seeds: Tensor) -> MapBatch:
        pixels, targets = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
        return MapBatch(pixels, targets, seeds)
