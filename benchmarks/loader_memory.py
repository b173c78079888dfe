"""Memory of the processes that read pictures, by the number of files, over three million views.

    python benchmarks/loader_memory.py [--files 10000 1000000] [--workers 2]

The paths are made up and nothing is decoded: a crop is replaced by zeros, so that what is left is the list of files,
the order of the epochs and the passing of batches. "Own" memory is what a process shares with no other, PSS adds its
share of the rest (Linux). Every number of files is run for as many views, since Python's full garbage collection, which
writes into every object and so copies its page into every forked process, comes late and once.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from maehub.data.listing import Names
from maehub.data.loader import StepKeys, batches_of
from maehub.data.sources import Samples
from maehub.images.augment import Augmentation
from maehub.train.pretraining import views as data
from maehub.train.pretraining.views import Crops, View

VIEW = View((16, 16), 8, 3, Augmentation(), "random", 0.75)
MILLIONS = 3
BATCH = 1000


class Memory(NamedTuple):
    """MB of a process."""

    own: float
    pss: float

    @classmethod
    def of(cls, process: str) -> Self:
        lines = Path("/proc", process, "smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines[1:]}
        return cls(sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"])


def memories(files: int, workers: int) -> Iterator[tuple[Memory, Memory]]:
    """Of this process, and of one that reads, after each million views."""
    names = (f"photographs/{number // 1000:04}/{number:07}.jpg".encode() for number in range(files))
    samples = Samples(b"", Names.of(names))
    every = 1_000_000 // BATCH
    # A little more: the readers end when they have nothing more to do.
    keys = StepKeys(samples, BATCH, 0, 0, MILLIONS * every + 20)
    with batches_of(Crops(samples, VIEW, False), keys, workers=workers, pin=False) as batches:
        for step, _ in enumerate(batches, start=1):
            if step % every == 0:
                yield Memory.of("self"), Memory.of(str(multiprocessing.active_children()[0].pid))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data.crop = lambda *_: np.zeros((*VIEW.size, VIEW.channels), np.uint8)
    print(
        "| files | a reading process, own MB after 1, 2, 3 million views | its PSS | the main process, own | its PSS |"
    )
    print("|---|---|---|---|---|")
    for files in options.files:
        mains, readers = zip(*memories(files, options.workers), strict=True)
        columns = [[memory[kind] for memory in of] for of in (readers, mains) for kind in (0, 1)]
        print(
            f"| {files:,} | " + " | ".join(", ".join(f"{value:.0f}" for value in column) for column in columns) + " |"
        )


if __name__ == "__main__":
    main()
