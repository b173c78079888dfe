"""Tar shards in the webdataset format as samples, on this machine or behind an address.

A picture is read at random, by the place of its bytes in its shard, so the order of samples is no business of the
shards. Members are read, never extracted.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maehub.data.listing import IMAGE_ENDINGS, Names, below_common, passed_over_words, say_passed_over
from maehub.data.sources import Source
from maehub.data.storage import StoredFile, at_once, is_remote, matching, read_range, stored_file
from maehub.errors import DataError, MaehubError, UsageError, log
from maehub.files import atomic_write
from maehub.images import printable

_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

LARGEST_MEMBER = 2**29
"""Bytes of a picture file in a shard: a larger one is refused before it is read."""
_PADDING = 2**20  # zeros that may follow the end
_LARGEST_HEADER = 2**20  # bytes of a long name or a block of attributes
_ATTRIBUTE = re.compile(rb"(\d{1,7}) [^=\n]{1,200}=")
_MOST_ATTRIBUTES = 100  # in a block, and of a whole shard: they are copied for each member
_LARGEST_LABEL = 100  # bytes
_AHEAD_HERE, _AHEAD_REMOTE = 2**12, 2**21  # bytes read at once while headers are sought
# Of webdataset: up to the first dot of the file's name.
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]*)", re.DOTALL)
_VERSION = 2  # of cached indexes


class TarIndex(NamedTuple):
    """The pictures of one shard, in the order of its members."""

    names: Names  # of members
    offsets: np.ndarray  # (pictures,) int64, where the bytes begin in the shard
    sizes: np.ndarray  # (pictures,) int64, bytes
    label_offsets: np.ndarray  # (pictures,) int64, of the .cls member with the same key
    label_sizes: np.ndarray  # (pictures,) int64, 0 where there is none
    others: Counter[bytes]  # how many members of each ending are no picture and no label


_COLUMNS = TarIndex._fields[1:-1]


@dataclass(frozen=True)
class Shards(Source):
    """Pictures in tar shards: shard after shard, each in the order of its members."""

    files: tuple[StoredFile, ...] = field(repr=False)
    prefixes: tuple[bytes, ...] = field(repr=False)
    """The shards' paths below the folder that holds them all."""
    starts: np.ndarray = field(repr=False)
    """(shards + 1,) int64. The first sample of each shard, and their number."""
    index: TarIndex = field(repr=False)
    """Of all shards, one after the other."""
    passed_over: dict[str, int] = field(repr=False, compare=False)
    _fetched: dict[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> bytes:
        """The shard's path below their common folder, then the member's: ``b"000.tar/key.jpg"``."""
        return self.prefixes[self._shard(index)] + b"/" + self.index.names[index]

    def size(self, index: int) -> int:
        return int(self.index.sizes[index])

    def where(self, index: int) -> str:
        return f"{printable(self.files[self._shard(index)].path)}, member {printable(self.index.names[index])}"

    def prefetch(self, indices: Sequence[int]) -> None:
        """Fetch what is behind addresses, all at once; `source` gives it out. What fails is tried again there."""
        remote = [index for index in dict.fromkeys(indices) if is_remote(self.files[self._shard(index)].path)]
        self._fetched.clear()
        if len(remote) > 1:
            fetched = zip(remote, at_once(self._tried, remote), strict=True)
            self._fetched.update((index, data) for index, data in fetched if data is not None)

    def source(self, index: int) -> io.BytesIO:
        data = self._fetched.pop(index, None)
        return io.BytesIO(self._read(index) if data is None else data)

    def label(self, index: int) -> int | None:
        """The number in the .cls member with the same key; None if there is no such member."""
        if not (size := self.index.label_sizes[index]):
            return None
        if size > _LARGEST_LABEL:
            raise DataError(f"{self.where(index)}: its .cls member has {size:,} bytes, and is no whole number")
        text = self._read(index, label=True)
        try:
            return int(text)
        except ValueError as error:
            raise DataError(f"{self.where(index)}: its .cls member holds {text[:20]!r}, not a whole number") from error

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _tried(self, index: int) -> bytes | None:
        with contextlib.suppress(DataError):
            return self._read(index)
        return None

    def _read(self, index: int, *, label: bool = False) -> bytes:
        found = self.index
        columns = (found.label_offsets, found.label_sizes) if label else (found.offsets, found.sizes)
        offset, size = (int(column[index]) for column in columns)
        try:
            data = read_range(self.files[self._shard(index)], offset, size)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from error
        if len(data) < size:
            raise DataError(f"{self.where(index)}: the shard ends {size - len(data):,} bytes too early; it has changed")
        return data


def find_shards(patterns: str | Sequence[str], index_dir: Path | None = None) -> Shards:
    """The pictures of tar shards: paths or addresses with ``{000..099}``, ``{a,b}`` or the wildcards * and ?.

    What was found in the headers is kept in ``index_dir``, for shards that have not changed since.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    paths = [path for pattern in given for path in shard_paths(pattern)]
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise UsageError(f"the shard {printable(path)} is named {times} times")
    if len(paths) > 1:
        kept = f", kept in {index_dir}" if index_dir else ""
        log.info("Reading the headers of %s tar shards%s", f"{len(paths):,}", kept)
    remote, indexed = any(map(is_remote, paths)), functools.partial(tar_index, index_dir=index_dir)
    files = tuple(at_once(stored_file, paths) if remote else map(stored_file, paths))
    indexes = list(at_once(indexed, files) if remote else map(indexed, files))
    starts = np.cumsum([0, *(len(index.names) for index in indexes)], dtype=np.int64)
    others: Counter[bytes] = sum((index.others for index in indexes), Counter())
    if not starts[-1]:
        found = passed_over_words(others) or "nothing"
        raise DataError(f"0 images in {len(paths)} tar shards, the first {printable(paths[0])}; found {found}")
    kinds = say_passed_over(printable(paths[0]) + (" and the others" * (len(paths) > 1)), others)
    columns = {column: np.concatenate([getattr(index, column) for index in indexes]) for column in _COLUMNS}
    joined = TarIndex(Names.joined(index.names for index in indexes), **columns, others=others)
    return Shards(files, tuple(below_common(paths)), starts, joined, kinds)


def shard_paths(pattern: str) -> list[str]:
    """The files that a pattern with braces and wildcards names, in its order."""
    paths = list(itertools.islice(expanded(pattern), _MOST_SHARDS + 1))
    if len(paths) > _MOST_SHARDS:
        raise UsageError(f"{printable(pattern)} names more than {_MOST_SHARDS:,} shards")
    files: list[str] = []
    for path in paths:
        wild = any(sign in path for sign in "*?") and not os.path.exists(path)
        matches = matching(path) if wild else [path]
        if not matches:
            raise DataError(f"{printable(path)} matches no file")
        files += matches
    return files


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


def tar_index(file: StoredFile, index_dir: Path | None = None) -> TarIndex:
    """The index of a shard: from ``index_dir`` if it is there and the shard has not changed, else from its headers.

    The picture of a sample is the member whose ending, after the first dot of its name, is one of `IMAGE_ENDINGS`;
    a .cls member is its label. Other members are passed over.
    """
    if index_dir is None or not file.stamp:
        return _read(file)
    identity = hashlib.sha256(_letters("\n".join((str(_VERSION), *map(str, file)))))
    path = index_dir / f"{identity.hexdigest()[:32]}.npz"
    # Where there is none, or not a whole one, whatever a damaged archive makes of itself, it is made anew.
    with contextlib.suppress(Exception), open(path, "rb") as kept, np.load(kept, allow_pickle=False) as arrays:
        rest = {name: arrays[name] for name in _COLUMNS}
        others = Counter(dict(zip(arrays["endings"].tolist(), arrays["times"].tolist(), strict=True)))
        return TarIndex(Names(arrays["letters"].tobytes(), arrays["names"]), **rest, others=others)
    index = _read(file)
    index_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as out:
        columns = {name: getattr(index, name) for name in _COLUMNS} | {"names": index.names.ends}
        columns |= {"endings": np.array(list(index.others), bytes), "times": np.array(list(index.others.values()), int)}
        np.savez(out, letters=np.frombuffer(index.names.letters, np.uint8), **columns)
    return index


def _read(file: StoredFile) -> TarIndex:
    names: list[bytes] = []
    rows = array("q")  # what the columns hold of each picture
    others: Counter[bytes] = Counter()
    keys = array("Q")
    current = ""  # key of the last picture
    waiting = ("", 0, 0)  # a label that came before its picture: key, offset, size
    for member in _members(file):
        parts = _KEY.fullmatch(member.name)
        if member.isdir():
            continue
        if not parts:
            others[b""] += 1
            continue
        key, ending = parts[1], parts[2].lower()
        is_picture = b"." + _letters(ending) in IMAGE_ENDINGS
        if (is_picture or ending == "cls") and member.size > LARGEST_MEMBER:
            limit = f"the limit is {LARGEST_MEMBER / 2**20:.0f} MiB"
            raise _bad(file, member.name, f"it is {member.size / 2**20:,.0f} MiB large, and {limit}")
        if ending == "cls":
            waiting = (key, member.offset_data, member.size)
            if key == current:
                rows[-2:] = array("q", waiting[1:])
        elif is_picture:
            current = key
            names.append(_letters(member.name))
            keys.append(int.from_bytes(hashlib.blake2b(_letters(key), digest_size=8).digest(), "little"))
            label = waiting[1:] if waiting[0] == key else (0, 0)
            rows.extend((member.offset_data, member.size, *label))
        else:
            last = b"." + _letters(ending.rpartition(".")[2])
            others[b".*" + last if "." in ending and last in IMAGE_ENDINGS else last] += 1
    _, first = np.unique(np.array(keys), return_index=True)
    if len(first) < len(keys):
        name = names[int(np.setdiff1d(np.arange(len(keys)), first)[0])].decode("utf-8", "surrogateescape")
        raise _bad(file, name, "another picture of the shard has the same key, so one of them would be lost")
    columns = dict(zip(_COLUMNS, np.array(rows, np.int64).reshape(-1, len(_COLUMNS)).T, strict=True))
    return TarIndex(Names.of(names), **columns, others=others)


def _members(file: StoredFile) -> Iterator[tarfile.TarInfo]:
    """All members, each looked at for what a shard must not hold."""
    name = ""
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:", tarinfo=_Member) as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                name = member.name
                tar.members.clear()  # it would keep them all
                _check(file, member)
                yield member
            end = tar.offset
    except MaehubError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise _broken(file, name, f"the shard is truncated or broken ({error})" if name else str(error)) from error
    # tarfile takes a header that it cannot read for the end. The true end is a block of zeros.
    block = read_range(file, end, tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise _broken(file, name, "the shard is truncated: the mark of its end is missing")
    if any(block):
        raise _broken(file, name, f"what follows at byte {end:,} is not a header")
    rest = file.size - end
    if rest > _PADDING or any(read_range(file, end, rest)):
        raise _broken(
            file, name, "behind its end more follows, perhaps another archive; join tars by `tar -A`, not `cat`"
        )


def _check(file: StoredFile, member: tarfile.TarInfo) -> None:
    if not (member.isreg() or member.isdir()) or member.type == tarfile.GNUTYPE_SPARSE:
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.GNUTYPE_SPARSE: "sparse"}
        kind = kinds.get(member.type, "neither a file nor a folder")
        raise _bad(file, member.name, f"it is {kind}, which has no place in a shard")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise _bad(file, member.name, "its name leads out of the shard")
    end = member.offset_data + member.size
    if member.size < 0 or member.offset_data <= member.offset:
        raise _bad(file, member.name, f"its header gives it {member.size} bytes")
    if end > file.size:
        raise _bad(file, member.name, f"the shard is truncated: it ends {end - file.size:,} bytes before this member")


class _Member(tarfile.TarInfo):
    """A member whose attributes are looked at before tarfile parses them, which may take the square of their size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            return super()._proc_builtin(tar)  # type: ignore[misc]  # without its map; it is refused
        if self.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            position = tar.fileobj.tell()
            block = tar.fileobj.read(-(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            tar.fileobj.seek(position)
            at, attributes = 0, len(tar.pax_headers)
            while at < len(block) and block[at]:
                record = _ATTRIBUTE.match(block, at)
                attributes += 1
                if not record or int(record[1]) < record.end() - at or attributes > _MOST_ATTRIBUTES:
                    raise tarfile.ReadError(f"its pax header is malformed, or has over {_MOST_ATTRIBUTES} attributes")
                at += int(record[1])
            if b"GNU.sparse." in block or re.search(rb"\d{100}", block):
                raise tarfile.ReadError("its pax header is of a sparse file, or has a number of 100 digits")
        return super()._proc_member(tar)  # type: ignore[misc]  # what subclasses override, says its comment


class _Headers:
    """A shard as tarfile reads it: the headers alone, in a few large reads."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._ahead = _AHEAD_REMOTE if is_remote(file.path) else _AHEAD_HERE
        self._position = 0
        self._start, self._block = 0, b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:  # a header that claims gigabytes must not get them
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        start = self._position - self._start
        if not 0 <= start <= start + size <= len(self._block):
            self._block = read_range(self._file, self._position, max(size, self._ahead))
            self._start, start = self._position, 0
        data = self._block[start : start + size]
        self._position += len(data)
        return data


def _letters(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _bad(file: StoredFile, member: str, why: str) -> DataError:
    return DataError(f"{printable(file.path)}, member {printable(_letters(member))}: {why}")


def _broken(file: StoredFile, last: str, why: str) -> DataError:
    if last:
        return DataError(f"{printable(file.path)}, after member {printable(_letters(last))}: {why}. Copy it again")
    packed = read_range(file, 0, 6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    hint = "it is compressed, and shards are read at random: unpack it to a plain .tar" if packed else why
    return DataError(f"{printable(file.path)} is not a tar shard: {hint}")
