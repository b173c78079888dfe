"""Files below a folder, in an order that is the same everywhere."""

import contextlib
import importlib.util
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from maehub.data.storage import reading
from maehub.errors import log
from maehub.images import looks_like_picture, printable

HEIC = frozenset([b".heic", b".heif", b".hif"])
IMAGE_ENDINGS = frozenset(
    b".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 .j2k .j2c .jpx".split()
) | (HEIC if importlib.util.find_spec("pillow_heif") else frozenset())
"""What folders and shards are searched for, in lower case. A file that is named itself may have any ending."""

_TELLING = frozenset(
    b".txt .md .csv .tsv .json .jsonl .xml .yaml .yml .toml .html .log .py .ipynb .sh .ini .db .pdf .zip .gz .tgz .bz2 "
    b".xz .zst .7z .rar .tar .parquet .arrow .npy .npz .h5 .hdf5 .mat .pt .pth .bin .safetensors .onnx .pkl .mp4 .mov "
    b".avi .mkv .wav .mp3 .heic .heif .hif .dng .cr2 .nef .arw .svg .eps .psd .dcm .nii".split()
)
"""Endings that say what a file is; of any other, its first bytes do."""

JUNK = frozenset(b"@eadir __macosx $recycle.bin #recycle #snapshot lost+found @tmp".split()) | {
    b"system volume information"
}
"""Folders, in lower case, that storage boxes and systems leave among pictures."""


def say_passed_over(where: str, others: Counter[bytes]) -> dict[str, int]:
    """What a search left out, by ending (``""`` has none) or as the name of a junk folder with a slash.

    It is said in one line, whose record has the counts too.
    """
    kinds = {printable(kind): count for kind, count in others.most_common()}
    if kinds:
        log.warning("%s: passed over: %s", where, passed_over_words(others), extra={"passed_over": {where: kinds}})
    return kinds


def passed_over_words(others: Counter[bytes]) -> str:
    """The counts in words, and what would help."""
    words = ", ".join(f"{count:,} {printable(kind) or 'without an ending'}" for kind, count in others.most_common())
    if HEIC & others.keys():
        words += " (to read HEIC: pip install 'maehub[formats]')"
    if any(kind.startswith(b".*") for kind in others):
        words += ". As in webdataset an ending begins at the first dot of a name: a.b.jpg is no .jpg, name it a_b.jpg"
    return words


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
    the names of the folders on the way to one file are in memory. Where pictures are sought, a file whose ending says
    nothing is one if it begins as one. ``others`` counts the files with each other ending, and junk folders.
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
            folder = os.path.basename(name[:-1])
            if folder.lower() in JUNK:
                others[folder + b"/"] += 1
            else:
                waiting.append(_entries(root, name, above))
        else:
            ending = os.path.splitext(name)[1].lower()
            unsaid = endings is IMAGE_ENDINGS and ending not in endings | _TELLING
            if ending in endings or (unsaid and looks_like_picture(_head(os.path.join(root, name)))):
                yield name
            else:
                others[ending] += 1


def _entries(
    root: bytes, below: bytes, above: frozenset[tuple[int, int]]
) -> tuple[Iterator[bytes], frozenset[tuple[int, int]]]:
    """The names in a folder in the order of the paths below it, folders with a slash at their end; and its identity
    beside those of the folders above it."""
    folder = os.path.join(root, below)
    with reading(folder, "cannot be searched"):
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
    names.sort()
    return iter(names), above | {identity}


def entries_in(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, but for what a search leaves out."""
    with os.scandir(folder) as entries:
        return [
            entry for entry in entries if not entry.name.startswith(".") and os.fsencode(entry.name).lower() not in JUNK
        ]


def _head(path: bytes) -> bytes:
    """The first 16 bytes of a regular file; of anything else none."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return file.read(16)
    return b""


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    with contextlib.suppress(OSError):  # of a link that leads to itself
        return entry.is_dir()
    return False


def below_common(paths: Sequence[str]) -> list[bytes]:
    """Paths or addresses without the folder that holds them all."""
    encoded = [os.fsencode(path) for path in paths]
    # `commonpath` would make one slash of the two in an address.
    common: bytes = os.path.commonprefix([path[: path.rfind(b"/") + 1] for path in encoded])  # type: ignore[assignment]  # noqa: RUF071
    return [path[common.rfind(b"/") + 1 :] for path in encoded]
