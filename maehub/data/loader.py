"""Which pictures at which step, read by worker processes."""

import contextlib
import gc
import math
import os
import shutil
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from maehub.data.sources import Source
from maehub.data.workers import core_count
from maehub.errors import DataError, log
from maehub.images import ImagePath
from maehub.rng import random_bits, sample_seed

Read = TypeVar("Read")
"""What a data set gives for the keys of a batch."""
_SILENCE = 300  # seconds until a reading process that gives nothing counts as hanging
_PREFETCHED = 4  # batches that a reading process has ready
_ROUNDS = 6  # of the shuffling network; 4 look random already
_ORDER, VALIDATION_VIEW, _MORE_MASKS = 2, 3, 100  # views of `sample_seed` that are not the first of a picture
_SHARED_MEMORY = "/dev/shm"


class Key(NamedTuple):
    """One view: which picture, and the seeds of its crop and its mask."""

    sample: int
    crop: int
    mask: int


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
    """Where places of a row of ``count`` go when it is shuffled, without shuffling all of it: (n,) int64 to the same.

    A permutation of 0 … count − 1 that is computed place by place, so that an epoch of a billion pictures costs no
    memory: a Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that holds ``count``, walked
    on until it ends inside (Black and Rogaway 2002).
    """
    half = max(1, math.ceil((count - 1).bit_length() / 2))
    low = (1 << half) - 1
    keys = random_bits(torch.tensor([seed]), _ROUNDS)[0].tolist()

    def permuted(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & low
        for key in keys:
            bits = random_bits(torch.from_numpy(right ^ key), 1)[:, 0].numpy() >> 20  # the high bits are the best
            left, right = right, left ^ (bits & low)
        return left << half | right

    shuffled_places = permuted(np.asarray(places, dtype=np.int64))
    while (outside := shuffled_places >= count).any():
        shuffled_places[outside] = permuted(shuffled_places[outside])
    return shuffled_places


@dataclass(frozen=True)
class Whole(Dataset[Read | DataError]):
    """Whole pictures by their indices, each ``read`` and a batch joined; of one that cannot be read its error."""

    samples: Source
    read: Callable[[ImagePath | BinaryIO], Any]
    join: Callable[[list[Any]], Read]

    def __getitems__(self, indices: list[int]) -> Read | DataError:
        self.samples.prefetch(indices)
        pictures = []
        for index in indices:
            try:
                with naming(self.samples, index):
                    pictures.append(self.read(self.samples.source(index)))
            except DataError as error:
                return error
        return self.join(pictures)


@contextlib.contextmanager
def batches_of(
    dataset: Dataset[Read | DataError], keys: Iterable[list[Any]], *, workers: int, pin: bool
) -> Iterator[Iterator[Read]]:
    """Batches of a data set, such as `Crops`, one for each list of keys for its ``__getitems__``, in their order.

    Read by ``workers`` processes, with 0 in this one; ``pin`` puts them into page-locked memory, for a GPU.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=lambda batch: batch,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=_PREFETCHED if workers else None,
        timeout=_SILENCE if workers else 0,
        worker_init_fn=_own_group,
        multiprocessing_context="fork" if workers else None,
    )

    def readable() -> Generator[Read]:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    batches = readable()
    # A full garbage collection writes into every object there is: in each forked process it would copy what they share.
    if workers:
        gc.collect()
        gc.freeze()
    try:
        yield batches
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # what has ended by it holds the processes, which end when let go
        # torch has no class of its own for a worker's death, and tells of it wherever the loop happens to be, not only
        # where it asks for a batch.
        if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader"):
            raise
        signalled = str(error.__cause__).startswith("DataLoader")  # the cause names the signal, if torch saw it
        reason = str(error.__cause__ if signalled else error).splitlines()[0].strip(" .")
        raise DataError(
            f"a process that reads pictures failed: {reason}. If memory or /dev/shm is short, use fewer --workers; "
            "--workers 0 shows whether it is a picture. Start again, a run with checkpoints by --resume."
        ) from error
    finally:
        batches.close()
        if workers:
            gc.unfreeze()


def check_shared_memory(each: int, views: int, workers: int) -> None:
    """See whether finished batches fit into the memory that processes share: where it is full they die or hang.

    ``each`` is the bytes of one batch of this process, of so many views. Warns if not all that may be ready at once do.
    """
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
        has = f"{needed / 1e9:.2f} GB of {_SHARED_MEMORY}, and {free / 1e9:.2f} GB are free"
        hint = "if one dies by SIGBUS, use fewer --workers, or give it more (docker: --shm-size)"
        log.warning("%d processes that read may need %s: %s", workers, has, hint)


def worker_count(workers: int | None, processes: int = 1) -> int:
    """As many reading processes as asked for, or as there are cores for each training process, one left for it."""
    return max(1, core_count() // processes - 1) if workers is None else workers


def _own_group(_: int) -> None:
    os.setpgid(0, 0)  # a signal to the group of the run is for the loop: it finishes its step with our batches
