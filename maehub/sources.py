"""Folders, files and lists to samples: which pictures there are, in which order, under which names."""

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from maehub.errors import DataError, UsageError
from maehub.masking import sample_id
from maehub.opening import ImagePath, printable

Picture = Image.Image | np.ndarray | Tensor

IMAGE_ENDINGS = frozenset(b".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split())
"""What a folder is searched for, in lower case. A file that is named itself may have any ending."""


@dataclass(frozen=True)
class Samples:
    """Picture files in a fixed order.

    The names lie end to end in one buffer: a million of them cost no more than their letters, and a forked process
    shares them without copying.
    """

    root: bytes
    """What stands before every name; empty where the names are paths themselves."""
    names: bytes
    ends: np.ndarray = field(repr=False)
    """(samples,) int64. Where each name ends in ``names``."""

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> bytes:
        """The path below the folder that was searched, or the path as it was given."""
        start = int(self.ends[index - 1]) if index else 0
        return self.names[start : int(self.ends[index])]

    def path(self, index: int) -> bytes:
        """The path to open."""
        return os.path.join(self.root, self.name(index))

    def paths(self) -> Iterator[bytes]:
        """All paths, in order."""
        return (self.path(index) for index in range(len(self)))

    def sample_id(self, index: int) -> int:
        """A 63-bit id that follows from the name: the same wherever the folder lies."""
        return sample_id(self.name(index))

    def digest(self, first: int = 0, last: int | None = None) -> str:
        """sha256 of names and file sizes of samples ``first`` to before ``last``: tells another list from this one."""
        hasher = hashlib.sha256()
        for index in range(first, len(self) if last is None else last):
            name, path = self.name(index), self.path(index)
            try:
                size = os.stat(path).st_size
            except OSError:
                size = -1
            hasher.update(struct.pack("<qq", len(name), size) + name)
        return hasher.hexdigest()


def find_images(source: ImagePath | Iterable[ImagePath]) -> Samples:
    """The pictures of a folder, at any depth; or one file; or a list of files, in its order.

    A folder is sorted by the bytes of the paths below it. Hidden files and folders are left out; symbolic links are
    followed, except to a folder that is being searched. Files are chosen by their ending, see `IMAGE_ENDINGS`.

    Raises:
        DataError: there is nothing at the path, no picture in it, or a folder that may not be read.
    """
    if not isinstance(source, str | bytes | Path):
        return _samples(b"", [os.fsencode(path) for path in source])
    path = os.fsencode(source)
    if os.path.isfile(path):
        return _samples(b"", [path])
    if not os.path.isdir(path):
        raise DataError(f"{printable(path)} is neither a file nor a folder; look for a mistyped name")
    names, others = _search(path)
    if not names:
        found = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5)) or "nothing"
        raise DataError(
            f"0 images in {printable(path)}; found {found}. "
            f"Endings that count: {' '.join(sorted(ending.decode() for ending in IMAGE_ENDINGS))}"
        )
    return _samples(path, sorted(names))


def _samples(root: bytes, names: list[bytes]) -> Samples:
    if not names:
        raise DataError("the list of pictures is empty")
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return Samples(root, b"".join(names), ends)


def _search(root: bytes) -> tuple[list[bytes], Counter[str]]:
    """Names of pictures below ``root``, unsorted, and how many files of each other ending there are."""
    names: list[bytes] = []
    others: Counter[str] = Counter()
    # Each folder with the identities of those above it: a link back to one of them would never end.
    waiting: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while waiting:
        below, above = waiting.pop()
        folder = os.path.join(root, below)
        try:
            facts = os.stat(folder)
            identity = (facts.st_dev, facts.st_ino)
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    name = os.path.join(below, entry.name)
                    ending = os.path.splitext(entry.name)[1].lower()
                    if _is_folder(entry):
                        waiting.append((name, above | {identity}))
                    elif ending in IMAGE_ENDINGS:
                        names.append(name)
                    else:
                        others[printable(ending) if ending else "without an ending"] += 1
        except OSError as error:
            raise DataError(f"{printable(folder)} cannot be searched: {error.strerror}") from error
    return names, others


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


@dataclass(frozen=True)
class Pictures:
    """Pictures that are in memory already; they are called by their place."""

    items: Sequence[Picture]

    def __len__(self) -> int:
        return len(self.items)

    def path(self, index: int) -> bytes:
        """The place, as a name."""
        return str(index).encode()

    def digest(self, first: int = 0, last: int | None = None) -> str:
        """sha256 of sizes and pixels, as in `Samples.digest`."""
        hasher = hashlib.sha256()
        for item in self.items[first : len(self) if last is None else last]:
            array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
            hasher.update(f"{array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()


Source = ImagePath | Image.Image | np.ndarray | Tensor | Sequence[ImagePath] | Sequence[Image.Image | np.ndarray]
"""A folder, a file, a list of paths; a picture or a list of them; a (B, H, W, C) uint8 array; a (B, C, H, W) tensor."""


def as_samples(source: Source) -> Samples | Pictures:
    """What `find_images` finds, or the pictures themselves.

    Raises:
        UsageError: a list of both, or something else.
        DataError: nothing is there.
    """
    if isinstance(source, ImagePath):
        return find_images(source)
    if isinstance(source, Image.Image):
        return Pictures([source])
    if isinstance(source, Tensor | np.ndarray):
        if source.ndim != 4:
            raise UsageError(f"an array or tensor of pictures has 4 dimensions, not the shape {tuple(source.shape)}")
        items: list[Picture] = list(source)
        if isinstance(source, Tensor) and not source.is_floating_point():
            items = [np.ascontiguousarray(item.permute(1, 2, 0).cpu().numpy()) for item in source]
        if not items:
            raise DataError("there are no pictures: the first dimension is 0")
        return Pictures(items)
    paths = [item for item in source if isinstance(item, ImagePath)]
    pictures: list[Picture] = [item for item in source if isinstance(item, Image.Image | np.ndarray)]
    if len(paths) == len(source):
        return find_images(paths)
    if len(pictures) == len(source):
        return Pictures(pictures)
    kinds = ", ".join(sorted({type(item).__name__ for item in source}))
    raise UsageError(f"a list of pictures holds paths, or PIL images and (H, W, C) arrays, not {kinds}")
