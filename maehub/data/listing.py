"""Files below a folder, in an order that is the same everywhere."""

import os
from collections import Counter
from collections.abc import Iterator

from maehub.errors import DataError
from maehub.images.decoding import printable


def search(root: bytes, endings: frozenset[bytes], others: Counter[bytes]) -> Iterator[bytes]:
    """Names of files with these endings below a folder, sorted by their bytes.

    Hidden files and folders are left out; links are followed, except to a folder that is being searched. No more than
    the names of the folders on the way to one file are in memory.

    Args:
        root: the folder.
        endings: in lower case, with their dot.
        others: counts the files with each other ending.

    Raises:
        DataError: a folder may not be read.
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
