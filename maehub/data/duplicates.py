"""Pictures that are on both sides of a split: the same files, and pictures that differ by little.

What a network was trained on it tells too well: such pictures make a measured accuracy too high.
"""

import csv
import hashlib
import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from maehub.data.labels import Labelled
from maehub.data.loader import Whole, batches_of, worker_count
from maehub.data.sources import Source
from maehub.files import atomic_write, sha256_file, sheet_cells
from maehub.images import ImagePath, Preprocess, read_pixels

Pair = tuple[int, int]
"""(testing index, training index)"""

MOST_LOOKED_AT = 20_000
"""Pictures of both sides together up to which a run looks for duplicates by itself."""

_SMALL = Preprocess(size=(32, 36), resize="squash", interpolation="bilinear")
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of ITU-R BT.601
_STEP = 2.0  # grey levels between cells that count as brighter: less is noise of a flat background
_PLAIN = 1.0  # grey levels of standard deviation below which there is nothing to compare
_MOST_BITS, _MOST_DIFFERENCE = 8, 0.04  # measured on photos, and on clip-art that only looks alike
_AT_ONCE, _ROWS = 64, 512  # pictures read, and compared with all others, at once
_PICTURES_PER_WORKER = 256  # fewer than these are read sooner here than in processes that must be started


@dataclass(frozen=True)
class Duplicates:
    """Testing pictures that are in training too, each once, with the training picture that is most like it."""

    exact: list[Pair]
    """Files with the same bytes."""
    near: list[Pair]
    """Other files that show the same: compressed or scaled anew, or cropped by a little."""
    training: Labelled = field(repr=False)
    testing: Labelled = field(repr=False)

    def describe(self) -> str:
        """How many there are, in a sentence."""
        kinds = (self.exact, "the same file"), (self.near, "nearly the same picture")
        parts = [f"{len(pairs)} {what}" for pairs, what in kinds if pairs]
        count, share = len(self.testing), 100 * (len(self.exact) + len(self.near)) / len(self.testing)
        if not parts:
            return f"None of {count:,} testing pictures was found in training."
        text = f"Of {count:,} testing pictures {share:.1f} % are in training too: {' and '.join(parts)}"
        here, there = self.testing.labels, self.training.labels
        other = sum(bool(np.any(here[one] != there[same])) for one, same in self.exact + self.near)
        return f"{text}; {other} of them with another label there." if other else f"{text}."

    def save(self, path: str | Path) -> None:
        """Write a CSV of kind (exact or near), testing picture, training picture."""
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["kind", "testing", "training"])
            for kind, pairs in (("exact", self.exact), ("near", self.near)):
                for one, same in pairs:
                    where = self.testing.samples.where(one), self.training.samples.where(same)
                    rows.writerow(sheet_cells([kind, *where]))


def find_twins(
    training: Labelled, testing: Labelled, *, workers: int | None = None, progress: bool = True
) -> Duplicates:
    """Look for testing pictures in training.

    *Exact* are files with the same sha256: it costs nothing beside decoding and is never wrong, while equal small
    pictures could still differ in what matters. The same picture in another file is *near*: its difference hash (64
    bits, whether each cell of a 9 × 8 grid is darker than the next one: Krawetz 2013, "Kind of Like That") is off by
    few bits, *and* so is its colour thumbnail (16 × 18), by 1 − the correlation of pixels. The hash alone would take
    most clip-art on white for the same. Pictures that are turned, mirrored, recoloured or much cropped are not found.

    Read by ``workers`` processes, with 0 in this one; None chooses. The bar is shown if stderr is a terminal.
    """
    there = _prints(training.samples, workers, progress)
    here = _prints(testing.samples, workers, progress)
    known = {file: place for place, file in reversed(list(enumerate(there.files)))}  # the first of several
    exact = [(place, known[file]) for place, file in enumerate(here.files) if file in known]
    same = {place for place, _ in exact}
    near = [pair for pair in _near(here, there) if pair[0] not in same]
    return Duplicates(exact, near, training, testing)


class _Prints(NamedTuple):
    """What pictures are known by."""

    files: list[str]  # sha256 of each file
    hashes: np.ndarray  # (n,) uint64, difference hashes
    thumbnails: np.ndarray
    """(n, 864) float32, of mean 0 in each colour and length 1 together; zeros where there is nothing to compare."""


def difference_hashes(pixels: np.ndarray) -> np.ndarray:
    """Difference hashes of small pictures: (n, 32, 36, 3) uint8 to (n,) uint64."""
    cells = (pixels @ _GREY).reshape(-1, 8, 4, 9, 4).mean((2, 4))
    bits = cells[:, :, 1:] - cells[:, :, :-1] > _STEP
    return np.packbits(bits.reshape(-1, 64), axis=1).view(np.uint64)[:, 0]


def _joined(pictures: list[tuple[str, np.ndarray]]) -> _Prints:
    files, small = zip(*pictures, strict=True)
    pixels = np.stack(small)  # (n, 32, 36, 3) uint8
    cells = pixels.reshape(-1, 16, 2, 18, 2, 3).astype(np.float32).mean((2, 4)).reshape(len(pixels), -1, 3)
    cells = (cells - cells.mean(axis=1, keepdims=True)).reshape(len(pixels), -1)
    length = np.linalg.norm(cells, axis=1, keepdims=True)
    thumbnails = np.where(length > _PLAIN * np.sqrt(cells.shape[1]), cells / np.maximum(length, 1e-6), 0)
    return _Prints(list(files), difference_hashes(pixels), thumbnails)


def _read(source: ImagePath | BinaryIO) -> tuple[str, np.ndarray]:
    """The sha256 of a picture file, and its pixels, small."""
    if isinstance(source, ImagePath):
        pixels = read_pixels(source, _SMALL)  # first, since it refuses what is no regular file
        return sha256_file(os.fsdecode(source)), pixels
    data = source.read()
    return hashlib.sha256(data).hexdigest(), read_pixels(io.BytesIO(data), _SMALL)


def _prints(samples: Source, workers: int | None, progress: bool) -> _Prints:
    count = len(samples)
    if workers is None and count < _PICTURES_PER_WORKER:
        workers = 0
    keys = [list(range(start, min(start + _AT_ONCE, count))) for start in range(0, count, _AT_ONCE)]
    bar = tqdm(total=count, unit=" pictures", disable=None if progress else True, file=sys.stderr, leave=False)
    prints: list[_Prints] = []
    with batches_of(Whole(samples, _read, _joined), keys, workers=worker_count(workers), pin=False) as batches, bar:
        for batch in batches:
            prints.append(batch)
            bar.update(len(batch.files))
    files, hashes, thumbnails = zip(*prints, strict=True)
    return _Prints([file for some in files for file in some], np.concatenate(hashes), np.concatenate(thumbnails))


def _near(here: _Prints, there: _Prints) -> list[Pair]:
    """The nearest picture of ``there`` for each of ``here`` that has one near enough."""
    pairs = []
    for start in range(0, len(here.hashes), _ROWS):
        rows = slice(start, start + _ROWS)
        alike = here.thumbnails[rows] @ there.thumbnails.T  # (rows, training) correlations
        bits = np.bitwise_count(here.hashes[rows, None] ^ there.hashes)
        alike[bits > _MOST_BITS] = -1
        best = alike.argmax(axis=1)
        near = np.flatnonzero(alike.max(axis=1) >= 1 - _MOST_DIFFERENCE).tolist()
        pairs += [(start + row, int(best[row])) for row in near]
    return pairs
