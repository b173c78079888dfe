"""Samples of a training run: which picture, which crop, which mask at which step.

Everything is a pure function of the run's seed and the position in the run. A run is a row of views: view p is view
p mod k of image p div k, k being the masks per picture. The pictures of epoch e are in a random order of their own, and
the crop, the flip and the mask of a view follow from (seed, epoch, sample id, view). Step s takes views s·B to
(s + 1)·B, of which process r of R takes the r-th part. So a resumed run, one with other workers and one with another
number of processes see the same samples.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maehub.data import VALIDATION_VIEW, Key, Source, naming
from maehub.errors import DataError
from maehub.images import Augmentation, Size, colour_factors, crop, grid_size, open_image
from maehub.models import Strategy, make_masks
from maehub.rng import sample_seed


class Batch(NamedTuple):
    """Views of one step, or a part of them."""

    pixels: Tensor  # (B, H, W, C) uint8
    masked: Tensor  # (B, N) bool, True where hidden
    seeds: Tensor  # (B,) int64, for what else is random about a view
    factors: Tensor  # (B, 3) float32 of brightness, contrast, saturation; (B, 0) without colour jitter

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting for it."""
        return type(self)(*(field.to(device, non_blocking=True) for field in self))


@dataclass(frozen=True)
class View:
    """How pictures are looked at: crops, patches and masks."""

    size: Size
    patch_size: int
    channels: int
    augmentation: Augmentation
    strategy: Strategy
    mask_ratio: float

    @property
    def grid(self) -> Size:
        """(rows, columns) of patches in a crop."""
        return grid_size(*self.size, self.patch_size)

    def masks(self, seeds: list[int]) -> Tensor:
        """(B, N) bool, one mask a seed, True where hidden."""
        return make_masks(self.strategy, torch.tensor(seeds), self.grid, self.mask_ratio)

    def batch(self, pixels: Tensor, keys: list[Key]) -> Batch:
        """Crops (B, H, W, C) with what belongs to them."""
        jitters = self.augmentation.kind == "colour-jitter"
        factors = colour_factors([key.crop for key in keys]) if jitters else torch.empty(len(keys), 0)
        masks = [key.mask for key in keys]
        return Batch(pixels, self.masks(masks), torch.tensor(masks), factors)

    def empty(self, count: int) -> Tensor:
        """(count, H, W, C) uint8, to be filled with crops."""
        return torch.empty(count, *self.size, self.channels, dtype=torch.uint8)

    def batch_bytes(self, count: int) -> int:
        """Of crops and masks."""
        return count * (self.empty(1).nbytes + self.grid[0] * self.grid[1])


class Crops(Dataset[Batch | DataError]):
    """Crops with their masks, a whole batch at a time.

    With ``cache`` every picture is decoded once, here; forked workers share the memory. A picture that cannot be read
    comes back as its error: raised in a worker, it would arrive with a traceback for its text.
    """

    def __init__(self, samples: Source, view: View, cache: bool) -> None:
        self.samples = samples
        self.view = view
        self.decoded = [opened(samples, index, view.channels) for index in range(len(samples))] if cache else None

    def __getitems__(self, keys: list[Key]) -> Batch | DataError:
        view, pixels = self.view, self.view.empty(len(keys))
        if self.decoded is None:
            self.samples.prefetch([key.sample for key in keys])
        for row, key in enumerate(keys):
            if row and keys[row - 1][:2] == key[:2]:  # another mask of the same crop
                pixels[row] = pixels[row - 1]
                continue
            try:
                with naming(self.samples, key.sample):
                    source = self.decoded[key.sample] if self.decoded else self.samples.source(key.sample)
                    made = crop(source, view.size, view.channels, view.augmentation, key.crop)
                pixels[row] = torch.from_numpy(made)
            except DataError as error:
                return error
        return view.batch(pixels, keys)

    def __getitem__(self, key: Key) -> Batch | DataError:
        return self.__getitems__([key])


def opened(samples: Source, index: int, channels: int) -> Image.Image:
    """A picture, decoded; an error names it."""
    with naming(samples, index):
        return open_image(samples.source(index), channels=channels)


def first_by_id(samples: Source, count: int) -> list[int]:
    """At most so many pictures, whichever others there are, in the order of their sample ids."""
    return sorted(range(len(samples)), key=samples.sample_id)[:count]


def validation_batch(samples: Source, view: View, count: int, seed: int) -> Batch:
    """Crops and masks that never change: ``count`` of them, the pictures taken in turn.

    Of more pictures than that, ``count`` are chosen by their sample ids. Each is decoded once.
    """
    chosen = sorted(first_by_id(samples, count))
    pixels, keys = view.empty(count), [Key(0, 0, 0)] * count
    for place, index in enumerate(chosen):
        picture = opened(samples, index, view.channels)
        for row in range(place, count, len(chosen)):
            number = sample_seed(seed, row // len(chosen), samples.sample_id(index), VALIDATION_VIEW)
            keys[row] = Key(index, number, number)
            pixels[row] = torch.from_numpy(crop(picture, view.size, view.channels, view.augmentation, number))
    return view.batch(pixels, keys)
