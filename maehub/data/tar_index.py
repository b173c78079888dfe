"""Which pictures a tar shard holds and where their bytes lie. Headers are read; nothing is ever extracted."""

import hashlib
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maehub.data.names import IMAGE_ENDINGS, Names
from maehub.data.storage import StoredFile, is_remote, read_range
from maehub.errors import DataError, MaehubError
from maehub.files import atomic_write
from maehub.images.decoding import printable

LARGEST_MEMBER = 2**29
"""Bytes of a picture file in a shard: a larger one is refused before it is read."""

_BLOCK = tarfile.BLOCKSIZE
_LARGEST_HEADER = 2**20  # bytes of a long name or a block of attributes
_AHEAD_HERE, _AHEAD_REMOTE = 2**12, 2**21  # bytes read at once while headers are sought
_KEY = re.compile(
    r"((?:.*/|)[^./][^./]*)[.]([^/]*)", re.DOTALL
)  # of webdataset: up to the first dot of the file's name
_VERSION = 1  # of cached indexes


class TarIndex(NamedTuple):
    """The pictures of one shard, in the order of its members."""

    names: Names  # of members
    offsets: np.ndarray  # (pictures,) int64, where the bytes begin in the shard
    sizes: np.ndarray  # (pictures,) int64, bytes
    label_offsets: np.ndarray  # (pictures,) int64, of the .cls member with the same key
    label_sizes: np.ndarray  # (pictures,) int64, 0 where there is none


def tar_index(file: StoredFile, index_dir: Path | None = None) -> TarIndex:
    """The index of a shard: from ``index_dir`` if it is there and the shard has not changed, else from its headers.

    The picture of a sample is the member whose ending, after the first dot of its name, is one of `IMAGE_ENDINGS`;
    a .cls member is its label. Other members are passed over.

    Raises:
        DataError: the shard is truncated, broken or compressed, a key is used twice, a member is a link or a device,
            its name leads out of the shard, or it is larger than `LARGEST_MEMBER`. The text names shard and member.
    """
    if index_dir is None or not file.stamp:
        return _read(file)
    identity = hashlib.sha256("\n".join((str(_VERSION), *map(str, file))).encode("utf-8", "surrogateescape"))
    path = index_dir / f"{identity.hexdigest()[:32]}.npz"
    known = _cached(path)
    if known is None:
        known = _read(file)
        index_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, open(temporary, "wb") as out:
            arrays = known._asdict() | {"names": known.names.ends}
            np.savez(out, letters=np.frombuffer(known.names.letters, np.uint8), **arrays)
    return known


def _cached(path: Path) -> TarIndex | None:
    """None where there is none, or not a whole one: it is made anew then."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            rest = [arrays[name] for name in TarIndex._fields[1:]]
            return TarIndex(Names(arrays["letters"].tobytes(), arrays["names"]), *rest)
    except Exception:  # whatever a damaged archive makes of itself
        return None


def _read(file: StoredFile) -> TarIndex:
    names: list[bytes] = []
    numbers = {field: array("q") for field in TarIndex._fields[1:]}
    keys = array("Q")
    current = ""  # key of the last picture
    waiting = ("", 0, 0)  # a label that came before its picture: key, offset, size
    for member in _members(file):
        parts = _KEY.fullmatch(member.name)
        if member.isdir() or not parts:
            continue
        key, ending = parts[1], parts[2].lower()
        if ending == "cls":
            waiting = (key, member.offset_data, member.size)
            if key == current:
                numbers["label_offsets"][-1], numbers["label_sizes"][-1] = waiting[1:]
        elif b"." + ending.encode("utf-8", "surrogateescape") in IMAGE_ENDINGS:
            if member.size > LARGEST_MEMBER:
                limit = f"the limit is {LARGEST_MEMBER / 2**20:.0f} MiB"
                raise _bad(file, member.name, f"it is {member.size / 2**20:,.0f} MiB large, and {limit}")
            current = key
            names.append(_letters(member.name))
            keys.append(int.from_bytes(hashlib.blake2b(_letters(key), digest_size=8).digest(), "little"))
            label = waiting[1:] if waiting[0] == key else (0, 0)
            for column, value in zip(numbers.values(), (member.offset_data, member.size, *label), strict=True):
                column.append(value)
    index = TarIndex(Names.of(names), *(np.array(column, np.int64) for column in numbers.values()))
    _check_keys(file, index, np.array(keys))
    return index


def _check_keys(file: StoredFile, index: TarIndex, keys: np.ndarray) -> None:
    order = keys.argsort(kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if len(again):
        name = index.names[int(again.min())].decode("utf-8", "surrogateescape")
        raise _bad(file, name, "another picture of the shard has the same key, so one of them would be lost")


def _members(file: StoredFile) -> Iterator[tarfile.TarInfo]:
    """All members, each looked at for what a shard must not hold."""
    name = ""
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
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
    block = read_range(file, end, _BLOCK)
    if len(block) < _BLOCK:
        raise _broken(file, name, "the shard is truncated: the mark of its end is missing")
    if any(block):
        raise _broken(file, name, f"what follows at byte {end:,} is not a header")


def _check(file: StoredFile, member: tarfile.TarInfo) -> None:
    if not (member.isreg() or member.isdir()) or member.issparse():
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
