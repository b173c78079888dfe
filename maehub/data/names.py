"""Names of samples: a million of them in one buffer, and what follows from them."""

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

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


def digest(samples: Iterable[tuple[bytes, int]]) -> str:
    """sha256 of names and sizes in bytes."""
    hasher = hashlib.sha256()
    for name, size in samples:
        hasher.update(struct.pack("<qq", len(name), size) + name)
    return hasher.hexdigest()


def below_common(paths: Sequence[str]) -> list[bytes]:
    """Paths or addresses without the folder that holds them all."""
    encoded = [os.fsencode(path) for path in paths]
    # `commonpath` would make one slash of the two in an address.
    common: bytes = os.path.commonprefix([path[: path.rfind(b"/") + 1] for path in encoded])  # type: ignore[assignment]  # noqa: RUF071
    return [path[common.rfind(b"/") + 1 :] for path in encoded]
