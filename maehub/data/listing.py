"""Files below a folder, in an order that is the same everywhere."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from maehub.errors import DataError
from maehub.images import printable

IMAGE_ENDINGS = frozenset(b".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split())
"""What folders and shards are searched for, in lower case. A file that is named itself may have any ending."""


@dataclass(frozen=True)
class Names:
    """Names end to end in one buffer: they cost no more than their letters, and a forked process shares them."""

    letters: bytes = field(repr=False)
    ends: np.ndarray = field(repr=False)
    """(names,) int64. Where each name ends in ``letters``."""

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Self:
        """Those of an iterable, in its order, which need never be in memory as a list."""
        letters, ends = bytearray(), array("q")
        for name in names:
            letters += name
            ends.append(len(letters))
        return cls(bytes(letters), np.array(ends, np.int64))

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Several, one after the other."""
        parts = list(parts)
        shifts = np.cumsum([0, *(len(part.letters) for part in parts)])
        ends = [part.ends + shift for part, shift in zip(parts, shifts, strict=False)]
        return cls(b"".join(part.letters for part in parts), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) if index else 0
        return self.letters[start : int(self.ends[index])]


def search(root: bytes, endings: frozenset[bytes], others: Counter[bytes]) -> Iterator[bytes]:
    """Names of files with these endings (lower case, with their dot) below a folder, sorted by their bytes.

    Hidden files and folders are left out; links are followed, except to a folder that is being searched. No more than
    the names of the folders on the way to one file are in memory. ``others`` counts the files with each other ending.
    """
    # Each folder with its entries that are left, and the identities of those above it: a link back to one of them
    # would never end.
    waiting: list[tuple[Iterator[bytes], frozenset[tuple[int, int]]]] = [_entries(root, b"", frozenset())]
    while waiting:
        entries, above = waiting[-1]
        name = next(entries, None)
        if name is None:
            waiting.pop()
        elif name.endswith(b"/"):
            waiting.append(_entries(root, name, above))
        else:
            ending = os.path.splitext(name)[1].lower()
            if ending in endings:
                yield name
            else:
                others[ending] += 1


def _entries(
    root: bytes, below: bytes, above: frozenset[tuple[int, int]]
) -> tuple[Iterator[bytes], frozenset[tuple[int, int]]]:
    """The names in a folder in the order of the paths below it, folders with a slash at their end; and its identity
    beside those of the folders above it."""
    folder = os.path.join(root, below)
    try:
        facts = os.stat(folder)
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:
            return iter(()), above
        with os.scandir(folder) as entries:
            names = [
                below + entry.name + (b"/" if _is_folder(entry) else b"")
                for entry in entries
                if not entry.name.startswith(b".")
            ]
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be searched: {error.strerror}") from error
    names.sort()
    return iter(names), above | {identity}


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def below_common(paths: Sequence[str]) -> list[bytes]:
    """Paths or addresses without the folder that holds them all."""
    encoded = [os.fsencode(path) for path in paths]
    # `commonpath` would make one slash of the two in an address.
    common: bytes = os.path.commonprefix([path[: path.rfind(b"/") + 1] for path in encoded])  # type: ignore[assignment]  # noqa: RUF071
    return [path[common.rfind(b"/") + 1 :] for path in encoded]
