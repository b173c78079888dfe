"""Samples of a training run: which picture, which crop, which mask at which step.

Everything is a pure function of the run's seed and the position in the run. A run is a row of views: view p is view
p mod k of image p div k, k being the masks per picture. The pictures of epoch e are in a random order of their own, and
the crop, the flip and the mask of a view follow from (seed, epoch, sample id, view). Step s takes views s·B to
(s + 1)·B, of which process r of R takes the r-th part. So a resumed run, one with other workers and one with another
number of processes see the same samples.
"""

import contextlib
import gc
import logging
import math
import os
import shutil
import traceback
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maehub.data.sources import Source
from maehub.errors import DataError
from maehub.images.augment import Augmentation, colour_factors, crop
from maehub.images.decoding import open_image
from maehub.models.masking import Strategy, make_masks, random_bits, sample_seed
from maehub.models.patches import Size, grid_size

log = logging.getLogger("maehub")

Read = TypeVar("Read")
"""What a data set gives for the keys of a batch."""

_SILENCE = 300  # seconds until a reading process that gives nothing counts as hanging
_PREFETCHED = 4  # batches that a reading process has ready
_ROUNDS = 6  # of the shuffling network; 4 look random already
_ORDER, _VALIDATION, _MORE_MASKS = 2, 3, 100  # views of `sample_seed` that are not the first of a picture
_SHARED_MEMORY = "/dev/shm"


class Batch(NamedTuple):
    """Views of one step, or a part of them."""

    pixels: Tensor  # (B, H, W, C) uint8
    masked: Tensor  # (B, N) bool, True where hidden
    seeds: Tensor  # (B,) int64, for what else is random about a view
    factors: Tensor  # (B, 3) float32 of brightness, contrast, saturation; (B, 0) without colour jitter

    def split(self, size: int) -> Iterator[Self]:
        """Parts of ``size`` views, the last one smaller."""
        return (type(self)(*part) for part in zip(*(field.split(size) for field in self), strict=True))

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting for it."""
        return type(self)(*(field.to(device, non_blocking=True) for field in self))


class Key(NamedTuple):
    """One view: which picture, and the seeds of its crop and its mask."""

    sample: int
    crop: int
    mask: int


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


class Crops(Dataset[Batch | DataError]):
    """Crops with their masks, a whole batch at a time.

    With ``cache`` every picture is decoded once, here; forked workers share the memory. A picture that cannot be read
    comes back as its error: raised in a worker, it would arrive with a traceback for its text.
    """

    def __init__(self, samples: Source, view: View, cache: bool) -> None:
        self.samples = samples
        self.view = view
        self.decoded = [self._decoded(index) for index in range(len(samples))] if cache else None

    def _decoded(self, index: int) -> Image.Image:
        with naming(self.samples, index):
            return open_image(self.samples.source(index), channels=self.view.channels)

    def __getitems__(self, keys: list[Key]) -> Batch | DataError:
        pixels = self.view.empty(len(keys))
        if self.decoded is None:
            self.samples.prefetch([key.sample for key in keys])
        for row, key in enumerate(keys):
            if row and keys[row - 1][:2] == key[:2]:  # another mask of the same crop
                pixels[row] = pixels[row - 1]
                continue
            try:
                pixels[row] = torch.from_numpy(self._crop(key))
            except DataError as error:
                return error
        return self.view.batch(pixels, keys)

    def _crop(self, key: Key) -> np.ndarray:
        view = self.view
        with naming(self.samples, key.sample):
            source = self.decoded[key.sample] if self.decoded else self.samples.source(key.sample)
            return crop(source, view.size, view.channels, view.augmentation, key.crop)

    def __getitem__(self, key: Key) -> Batch | DataError:
        return self.__getitems__([key])


@contextlib.contextmanager
def naming(samples: Source, index: int) -> Iterator[None]:
    """Put the place of a sample into an error that does not name it: bytes out of a shard have no path."""
    try:
        yield
    except DataError as error:
        where = samples.where(index)
        if where in str(error):
            raise
        raise DataError(f"{where}: {error}") from error


@dataclass(frozen=True)
class StepKeys:
    """The keys of every step's batch, from ``first_step`` on: of one process its part."""

    samples: Source
    batch_size: int
    """Views of a step, over all processes."""
    seed: int
    first_step: int
    steps: int
    masks: int = 1
    """Views of each picture."""
    rank: int = 0
    size: int = 1
    """Processes; divides ``batch_size``."""

    def __iter__(self) -> Iterator[list[Key]]:
        count, part = len(self.samples), self.batch_size // self.size
        for step in range(self.first_step, self.steps):
            start = step * self.batch_size + self.rank * part
            numbers, views = np.divmod(np.arange(start, start + part), self.masks)
            epochs, places = np.divmod(numbers, count)
            indices = np.empty(part, dtype=np.int64)
            for epoch in np.unique(epochs):
                of_epoch = epochs == epoch
                indices[of_epoch] = shuffled(places[of_epoch], count, sample_seed(self.seed, int(epoch), 0, _ORDER))
            keys = []
            for index, epoch, view in zip(indices.tolist(), epochs.tolist(), views.tolist(), strict=True):
                sample = self.samples.sample_id(index)
                seed = sample_seed(self.seed, epoch, sample)
                mask = sample_seed(self.seed, epoch, sample, _MORE_MASKS + view) if view else seed
                keys.append(Key(index, seed, mask))
            yield keys


def shuffled(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Where places of a row of ``count`` go when it is shuffled, without shuffling all of it.

    A permutation of 0 … count − 1 that is computed place by place, so that an epoch of a billion pictures costs no
    memory: a Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that holds ``count``, walked
    on until it ends inside (Black and Rogaway 2002).

    Args:
        places: (n,) int64 in [0, count).

    Returns:
        (n,) int64 in [0, count).
    """
    half = max(1, math.ceil(max(1, (count - 1).bit_length()) / 2))
    low = (1 << half) - 1
    keys = random_bits(torch.tensor([seed]), _ROUNDS)[0].tolist()

    def permuted(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & low
        for key in keys:
            bits = random_bits(torch.from_numpy(right ^ key), 1)[:, 0].numpy() >> 20  # the high bits are the best
            left, right = right, left ^ (bits & low)
        return left << half | right

    found = permuted(np.asarray(places, dtype=np.int64))
    while (outside := found >= count).any():
        found[outside] = permuted(found[outside])
    return found


@contextlib.contextmanager
def batches_of(
    dataset: Dataset[Read | DataError], keys: Iterable[list[Any]], *, workers: int, pin: bool
) -> Iterator[Iterator[Read]]:
    """Batches of a data set, such as `Crops`, in the order of their keys.

    Args:
        keys: one list a batch, for the data set's ``__getitems__``.
        workers: processes that read; 0 reads in this one.
        pin: put batches into page-locked memory, for a GPU.

    Raises:
        DataError: a picture cannot be read, or a reading process died or hangs, at any point of the block.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=_PREFETCHED if workers else None,
        timeout=_SILENCE if workers else 0,
        worker_init_fn=_own_group,
        multiprocessing_context="fork" if workers else None,
    )
    batches = _readable(loader)
    # A full garbage collection writes into every object there is: in each forked process it would copy what they share.
    if workers:
        gc.collect()
        gc.freeze()
    try:
        yield batches
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # what has ended by it holds the processes, which end when let go
        # torch tells of a dead process wherever the loop happens to be, not only where it asks for a batch.
        if (told := _of_a_reader(error)) is None:
            raise
        raise told from error
    finally:
        batches.close()
        if workers:
            gc.unfreeze()


def check_shared_memory(view: View, views: int, workers: int) -> None:
    """See whether finished batches fit into the memory that processes share: where it is full they die or hang.

    Warns if not all that may be ready at once do.

    Args:
        views: of one batch of this process.
        workers: processes that read.

    Raises:
        DataError: not even one batch fits.
    """
    each = (view.empty(1).nbytes + view.grid[0] * view.grid[1]) * views
    needed = workers * _PREFETCHED * each
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return
    if workers and each > free:
        raise DataError(
            f"a batch of {views} views needs {each / 1e6:,.1f} MB of {_SHARED_MEMORY}, which processes share, and "
            f"{free / 1e6:,.1f} MB are free. Give it more (docker: --shm-size), or read in this process by --workers 0."
        )
    if workers and needed > free:
        log.warning(
            "%d processes that read may need %.2f GB of %s, and %.2f GB are free: if one dies by SIGBUS, use fewer "
            "--workers, or give it more (docker: --shm-size)",
            workers,
            needed / 1e9,
            _SHARED_MEMORY,
            free / 1e9,
        )


def validation_batch(samples: Source, view: View, count: int, seed: int) -> Batch:
    """Crops and masks that never change: ``count`` of them, the pictures taken in turn.

    Of more pictures than that, ``count`` are chosen by their sample ids. Each is decoded once.

    Raises:
        DataError: a picture cannot be read.
    """
    chosen = sorted(sorted(range(len(samples)), key=samples.sample_id)[:count])
    pixels, keys = view.empty(count), [Key(0, 0, 0)] * count
    for place, index in enumerate(chosen):
        with naming(samples, index):
            picture = open_image(samples.source(index), channels=view.channels)
        for row in range(place, count, len(chosen)):
            number = sample_seed(seed, row // len(chosen), samples.sample_id(index), _VALIDATION)
            keys[row] = Key(index, number, number)
            pixels[row] = torch.from_numpy(crop(picture, view.size, view.channels, view.augmentation, number))
    return view.batch(pixels, keys)


def worker_count(workers: int | None, processes: int = 1) -> int:
    """As many reading processes as asked for, or as there are cores for each training process, one left for it."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes - 1)


def _readable(loader: Iterable[Read | DataError]) -> Generator[Read]:
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _of_a_reader(error: Exception) -> DataError | None:
    """What to say of an error that came from a reading process; None for all others."""
    # torch has no class of its own for a worker's death.
    if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader"):
        return None
    signalled = str(error.__cause__).startswith("DataLoader")  # the cause names the signal, if torch saw it
    reason = str(error.__cause__ if signalled else error).splitlines()[0].strip(" .")
    return DataError(
        f"a process that reads pictures failed: {reason}. Checkpoints are kept. If memory or /dev/shm is short, "
        "use fewer --workers; --workers 0 shows whether it is a picture. Then go on by --resume."
    )


def _as_is(batch: Any) -> Any:
    return batch


def _own_group(_: int) -> None:
    os.setpgid(0, 0)  # a signal to the group of the run is for the loop: it finishes its step with our batches
