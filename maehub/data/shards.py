"""Tar shards in the webdataset format as samples, on this machine or behind an address.

A picture is read at random, by the place of its bytes in its shard, so the order of samples is no business of the
shards. Members are read, never extracted.
"""

import io
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maehub.data.names import Names, below_common, digest
from maehub.data.storage import StoredFile, at_once, is_remote, matching, read_range, stored_file
from maehub.data.tar_index import TarIndex, tar_index
from maehub.errors import DataError, UsageError
from maehub.images.decoding import printable
from maehub.models.masking import sample_id

_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shards:
    """Pictures in tar shards: shard after shard, each in the order of its members."""

    files: tuple[StoredFile, ...] = field(repr=False)
    prefixes: tuple[bytes, ...] = field(repr=False)
    """The shards' paths below the folder that holds them all."""
    starts: np.ndarray = field(repr=False)
    """(shards + 1,) int64. The first sample of each shard, and their number."""
    index: TarIndex = field(repr=False)
    """Of all shards, one after the other."""
    _fetched: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> bytes:
        """The shard's path below their common folder, then the member's: ``b"000.tar/key.jpg"``."""
        return self.prefixes[self._shard(index)] + b"/" + self.index.names[index]

    def sample_id(self, index: int) -> int:
        """A 63-bit id that follows from the name."""
        return sample_id(self.name(index))

    def size(self, index: int) -> int:
        """Bytes of the picture file."""
        return int(self.index.sizes[index])

    def where(self, index: int) -> str:
        """Shard and member, for messages."""
        return f"{printable(self.files[self._shard(index)].path)}, member {printable(self.index.names[index])}"

    def prefetch(self, indices: Sequence[int]) -> None:
        """Fetch what is behind addresses, all at once; `source` gives it out. What fails is tried again there."""
        wanted = [index for index in dict.fromkeys(indices) if is_remote(self.files[self._shard(index)].path)]
        self._fetched.clear()
        if len(wanted) > 1:
            for index, data in zip(wanted, at_once(self._tried, wanted), strict=True):
                if data is not None:
                    self._fetched[index] = data

    def source(self, index: int) -> io.BytesIO:
        """The bytes of the picture file.

        Raises:
            DataError: they cannot be read; the text names shard and member.
        """
        data = self._fetched.pop(index, None)
        if data is None:
            data = self._read(index, self.index.offsets, self.index.sizes)
        return io.BytesIO(data)

    def label(self, index: int) -> int | None:
        """The number in the .cls member with the same key; None if there is no such member.

        Raises:
            DataError: it holds something else.
        """
        if not self.index.label_sizes[index]:
            return None
        text = self._read(index, self.index.label_offsets, self.index.label_sizes)
        try:
            return int(text)
        except ValueError as error:
            raise DataError(f"{self.where(index)}: its .cls member holds {text[:20]!r}, not a whole number") from error

    def digest(self, first: int = 0, last: int | None = None) -> str:
        """sha256 of names and sizes of samples ``first`` to before ``last``: tells another list from this one."""
        chosen = range(first, len(self) if last is None else last)
        return digest((self.name(index), self.size(index)) for index in chosen)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _tried(self, index: int) -> bytes | None:
        try:
            return self._read(index, self.index.offsets, self.index.sizes)
        except DataError:
            return None

    def _read(self, index: int, offsets: np.ndarray, sizes: np.ndarray) -> bytes:
        size = int(sizes[index])
        try:
            data = read_range(self.files[self._shard(index)], int(offsets[index]), size)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error
        if len(data) < size:
            raise DataError(f"{self.where(index)}: the shard ends {size - len(data):,} bytes too early; it has changed")
        return data


def find_shards(patterns: str | Sequence[str], index_dir: Path | None = None) -> Shards:
    """The pictures of tar shards.

    Args:
        patterns: paths or addresses of .tar files, with ``{000..099}``, ``{a,b}`` or the wildcards * and ?.
        index_dir: where to keep what was found in the headers, for shards that have not changed since. None reads
            them every time.

    Raises:
        DataError: a shard is missing or cannot be used, or there is no picture in them; see `tar_index`.
        UsageError: the pattern names too many shards, or one twice.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    paths = [path for pattern in given for path in shard_paths(pattern)]
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise UsageError(f"the shard {printable(path)} is named {times} times")
    if len(paths) > 1:
        kept = f", kept in {index_dir}" if index_dir else ""
        _logger.info("Reading the headers of %s tar shards%s", f"{len(paths):,}", kept)

    def indexed(path: str) -> tuple[StoredFile, TarIndex]:
        file = stored_file(path)
        return file, tar_index(file, index_dir)

    found = list(at_once(indexed, paths) if any(map(is_remote, paths)) else map(indexed, paths))
    indexes = [index for _, index in found]
    starts = np.cumsum([0, *(len(index.names) for index in indexes)], dtype=np.int64)
    if not starts[-1]:
        raise DataError(f"0 images in {len(paths)} tar shards, the first {printable(paths[0])}")
    columns = [np.concatenate(column) for column in list(zip(*indexes, strict=True))[1:]]
    joined = TarIndex(Names.joined(index.names for index in indexes), *columns)
    return Shards(tuple(file for file, _ in found), tuple(below_common(paths)), starts, joined)


def shard_paths(pattern: str) -> list[str]:
    """The files that a pattern with braces and wildcards names, in its order.

    Raises:
        DataError: a wildcard matches nothing.
        UsageError: it names too many.
    """
    paths = list(itertools.islice(expanded(pattern), _MOST_SHARDS + 1))
    if len(paths) > _MOST_SHARDS:
        raise UsageError(f"{printable(pattern)} names more than {_MOST_SHARDS:,} shards")
    found: list[str] = []
    for path in paths:
        wild = any(sign in path for sign in "*?") and not os.path.exists(path)
        matches = matching(path) if wild else [path]
        if not matches:
            raise DataError(f"{printable(path)} matches no file")
        found += matches
    return found


def expanded(pattern: str) -> Iterator[str]:
    """What braces stand for: ``{000..099}`` numbers as wide as they are written, ``{a,b}`` alternatives."""
    before, brace, rest = pattern.partition("{")
    inside, close, after = rest.partition("}")
    if not brace or not close:
        yield pattern
        return
    if "{" in inside:
        raise UsageError(f"{printable(pattern)}: braces inside braces are not understood; give one pattern for each")
    if bounds := _RANGE.fullmatch(inside):
        first, last = int(bounds[1]), int(bounds[2])
        width = max(map(len, bounds.groups())) if inside.startswith("0") or bounds[2].startswith("0") else 0
        step = 1 if first <= last else -1
        choices: Iterator[str] = (str(number).zfill(width) for number in range(first, last + step, step))
    else:
        choices = iter(inside.split(",") if "," in inside else ["{" + inside + "}"])
    for choice in choices:
        yield from (before + choice + end for end in expanded(after))
