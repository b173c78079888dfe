"""Samples of a training run: which picture, which crop, which mask at which step.

Everything is a pure function of the run's seed and the position in the run: the pictures of epoch e are in a random
order of their own, position p of the run is picture p mod n of epoch p div n, and the crop, the flip and the mask of
a sample follow from (seed, epoch, sample id). So a resumed run, and one with other workers, sees the same samples.
"""

import contextlib
import math
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maehub.errors import DataError
from maehub.masking import Strategy, make_masks, random_bits, random_uniform, sample_seed
from maehub.opening import open_image
from maehub.patches import Size, grid_size
from maehub.sources import Samples

_ASPECT = (3 / 4, 4 / 3)  # width to height of a random crop, Szegedy et al. 2015
_CROP_TRIES = 10
_SILENCE = 300  # seconds until a reading process that gives nothing counts as hanging


class Batch(NamedTuple):
    """One step's samples."""

    pixels: Tensor  # (B, H, W, C) uint8
    masked: Tensor  # (B, N) bool, True where hidden


@dataclass(frozen=True)
class View:
    """How samples are looked at: crop size, patches and masks."""

    size: Size
    patch_size: int
    channels: int
    crop_scale: tuple[float, float]
    strategy: Strategy
    mask_ratio: float

    @property
    def grid(self) -> Size:
        """(rows, columns) of patches in a crop."""
        return grid_size(*self.size, self.patch_size)

    def masks(self, seeds: list[int]) -> Tensor:
        """(B, N) bool, one mask a seed, True where hidden."""
        return make_masks(self.strategy, torch.tensor(seeds), self.grid, self.mask_ratio)

    def empty(self, count: int) -> Tensor:
        """(count, H, W, C) uint8, to be filled with crops."""
        return torch.empty(count, *self.size, self.channels, dtype=torch.uint8)


class Crops(Dataset[Batch | DataError]):
    """Random crops with their masks, a whole batch at a time; a key is (index, seed of the sample).

    With ``cache`` every picture is decoded once, here; forked workers share the memory. A picture that cannot be read
    comes back as its error: raised in a worker, it would arrive with a traceback for its text.
    """

    def __init__(self, samples: Samples, view: View, cache: bool) -> None:
        self.samples = samples
        self.view = view
        self.decoded = [self._open(index) for index in range(len(samples))] if cache else None

    def _open(self, index: int) -> Image.Image:
        return open_image(self.samples.path(index), channels=self.view.channels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | DataError:
        pixels = self.view.empty(len(keys))
        for row, (index, seed) in enumerate(keys):
            try:
                picture = self.decoded[index] if self.decoded else self._open(index)
            except DataError as error:
                return error
            pixels[row] = torch.from_numpy(random_crop(picture, self.view, seed))
        return Batch(pixels, self.view.masks([seed for _, seed in keys]))

    def __getitem__(self, key: tuple[int, int]) -> Batch | DataError:
        return self.__getitems__([key])


def random_crop(image: Image.Image, view: View, seed: int) -> np.ndarray:
    """A random part of a picture, scaled to the view's size with bicubic filtering, flipped half of the time.

    The part covers ``crop_scale`` of the area and has an aspect from 3/4 to 4/3 times the view's; where ten tries do
    not fit the picture, the largest centred part of a permitted aspect is taken.

    Returns:
        (H, W, C) uint8.
    """
    numbers = random_uniform(sample_seed(seed, 0, 0, 1), 1 + 4 * _CROP_TRIES)
    box = _crop_box(image.size, view, numbers[1:].reshape(_CROP_TRIES, 4))
    height, width = view.size
    crop = image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if numbers[0] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(crop).reshape(height, width, view.channels)


def _crop_box(size: tuple[int, int], view: View, tries: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the crop, pixels of a picture of ``size`` (width, height)."""
    width, height = size
    shape = view.size[1] / view.size[0]
    low, high = (math.log(shape * aspect) for aspect in _ASPECT)
    for area, aspect, right, down in tries.tolist():
        share = view.crop_scale[0] + area * (view.crop_scale[1] - view.crop_scale[0])
        ratio = math.exp(low + aspect * (high - low))
        w = round(math.sqrt(width * height * share * ratio))
        h = round(math.sqrt(width * height * share / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(right * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, math.exp(low)), math.exp(high))
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class StepKeys:
    """The keys of every step's batch, from ``first_step`` on."""

    samples: Samples
    batch_size: int
    seed: int
    first_step: int
    steps: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        count = len(self.samples)
        known, order = -1, torch.empty(0)
        for step in range(self.first_step, self.steps):
            keys = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, place = divmod(position, count)
                if epoch != known:
                    known, order = epoch, epoch_order(self.seed, epoch, count)
                index = int(order[place])
                keys.append((index, sample_seed(self.seed, epoch, self.samples.sample_id(index))))
            yield keys


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """The random order of an epoch: (count,) int64."""
    return random_bits(torch.tensor([sample_seed(seed, epoch, 0, 2)]), count)[0].argsort(stable=True)


@contextlib.contextmanager
def training_batches(
    samples: Samples, view: View, keys: StepKeys, *, workers: int, cache: bool, pin: bool
) -> Iterator[Iterator[Batch]]:
    """Batches of the steps of ``keys``, in order.

    Args:
        workers: processes that read; 0 reads in this one.
        cache: see `Crops`.
        pin: put batches into page-locked memory, for a GPU.

    Raises:
        DataError: a picture cannot be read, or a reading process died or hangs, at any point of the block.
    """
    loader = DataLoader(
        Crops(samples, view, cache),
        batch_sampler=keys,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        timeout=_SILENCE if workers else 0,
        worker_init_fn=_own_group,
        multiprocessing_context="fork" if workers else None,
    )
    batches = (_readable(batch) for batch in loader)
    try:
        yield batches
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # what has ended by it holds the processes, which end when let go
        # torch has no class of its own for a worker's death.
        if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader"):
            raise
        signalled = str(error.__cause__).startswith("DataLoader")  # the cause names the signal, if torch saw it
        reason = str(error.__cause__ if signalled else error).splitlines()[0].strip(" .")
        raise DataError(
            f"a process that reads pictures failed: {reason}. Checkpoints are kept. If memory or /dev/shm is short, "
            "use fewer --workers; --workers 0 shows whether it is a picture. Then go on by --resume."
        ) from error
    finally:
        batches.close()


def validation_batch(samples: Samples, view: View, count: int, seed: int) -> Batch:
    """Crops and masks that never change: ``count`` of them, the pictures taken in turn.

    Of more pictures than that, ``count`` are chosen by their sample ids. Each is decoded once.

    Raises:
        DataError: a picture cannot be read.
    """
    chosen = sorted(sorted(range(len(samples)), key=samples.sample_id)[:count])
    pixels, seeds = view.empty(count), [0] * count
    for place, index in enumerate(chosen):
        picture = open_image(samples.path(index), channels=view.channels)
        for row in range(place, count, len(chosen)):
            seeds[row] = sample_seed(seed, row // len(chosen), samples.sample_id(index), 3)
            pixels[row] = torch.from_numpy(random_crop(picture, view, seeds[row]))
    return Batch(pixels, view.masks(seeds))


def worker_count(workers: int | None) -> int:
    """As many processes as asked for, or as there are cores that this process may use, one left for the loop."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def _readable(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _as_is(batch: Any) -> Any:
    return batch


def _own_group(_: int) -> None:
    os.setpgid(0, 0)  # a signal to the group of the run is for the loop: it finishes its step with our batches
