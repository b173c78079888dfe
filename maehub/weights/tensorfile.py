"""One safetensors file: read strictly and memory-mapped, written reproducibly.

The format is eight bytes of header length, a JSON header, and the tensors' bytes without gaps. The safetensors package
reads the tensors; the pass over the header here is stricter than its own (a key given twice, a file without tensors)
and says in words what a file is that is no safetensors file at all.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maehub.errors import IntegrityError, UsageError
from maehub.files import check_regular

MAX_HEADER_BYTES = 10_000_000  # the format allows ten times more; the largest model published has 60 kB
_MAX_DIMENSIONS = 16
_MOST_TENSORS = 20_000  # the largest published network has two thousand
_LONGEST_NAME = 1000

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# first bytes of what people find under the name .safetensors, and what to do about it
_KINDS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"),
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive; unpack it first"),
    (b"PK\x03\x04", "is a PyTorch pickle (a zip archive); convert it once with `maehub convert FILE -o FOLDER`"),
    (
        (b"\x80\x02", b"\x80\x04", b"\x80\x05"),
        "is a Python pickle; convert it once with `maehub convert FILE -o FOLDER`",
    ),
    (b"\x89HDF\r\n", "is an HDF5 file; only safetensors files are read"),
    (b"<", "is an HTML or XML page, which a server may send instead of a file; download it again"),
    (b"{", "is JSON text, perhaps a server's error message; download it again"),
)


class TensorEntry(NamedTuple):
    """One tensor as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes after the header
    end: int


class Header(NamedTuple):
    """What a safetensors file says it holds."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


class TensorFile(NamedTuple):
    """The tensors of a file, memory-mapped: a page is read when it is first touched."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read and check the header alone; nothing is allocated for the tensors."""
    try:
        check_regular(path, UsageError)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or start[8:9] != b"{" or length > min(size - 8, MAX_HEADER_BYTES):
                _refuse(path, _kind(start, size, length))
            file.seek(8)
            text = file.read(length)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"there is no file {path}") from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise IntegrityError(f"{path} cannot be read: its header is nested too deeply") from error
    except ValueError as error:  # JSON, UTF-8, too many digits, duplicates
        raise IntegrityError(f"{path} cannot be read: its header is not well-formed: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        _refuse(path, "cannot be read: the metadata in its header are not text")
    check_names(path, header)
    tensors = {name: _entry(path, name, value) for name, value in header.items()}
    _check_ranges(path, tensors, size - 8 - length)
    return Header(tensors, metadata)


def read_tensors(path: str | Path) -> TensorFile:
    """Read a safetensors file, memory-mapped.

    The tensors stay valid when the file is replaced or deleted (as every writer here does), not when another program
    overwrites its bytes in place.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    return TensorFile(tensors, header.metadata)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a new safetensors file and flush it to the disk; the same content always gives the same bytes.

    The safetensors package writes metadata in random order and needs every tensor at once, so the file is put together
    here, one tensor at a time, of any device and layout. ``dtype`` is that of the floating tensors on disk, None keeps
    theirs. What comes back is the sha256 of the file, hexadecimal.
    """
    dtypes = {name: dtype if dtype and tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))  # the widest first keeps all aligned
    header = header_bytes({name: (dtypes[name], tensors[name].shape) for name in order}, metadata or {})
    digest = hashlib.sha256(header)
    with open(path, "xb") as file:
        file.write(header)
        for name in order:
            flat = tensors[name].detach().to("cpu", dtypes[name]).contiguous().reshape(-1)
            values = flat.view(torch.uint8).numpy().data
            digest.update(values)
            file.write(values)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of tensors of these dtypes and shapes, which follow in this order without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_names(path: str | Path, names: Collection[str]) -> None:
    """Refuse more tensors than any network has, and names whose prefixes would be stripped for minutes."""
    if len(names) > _MOST_TENSORS:
        _refuse(path, f"holds {len(names):,} tensors, more than any network of vision has")
    if long := next((name for name in names if len(name) > _LONGEST_NAME), None):
        _refuse(path, f"has a tensor with a name of {len(long):,} letters, {_short(long)}")


def _refuse(path: str | Path, why: str) -> NoReturn:
    raise IntegrityError(f"{path} {why}")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "…")


def _kind(start: bytes, size: int, length: int) -> str:
    """What a file is that does not begin as a safetensors file does."""
    if not size:
        return "is empty (0 bytes); download or copy it again"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, kind in _KINDS:
        if text.startswith(magic) and not (magic == b"{" and size > 1_000_000):
            return kind
    if start[8:9] == b"{" and length > MAX_HEADER_BYTES:
        return f"claims a header of {length:,} bytes, over the limit of {MAX_HEADER_BYTES:,}; it is damaged or hostile"
    if start[8:9] == b"{":
        return f"ends after {size:,} bytes, inside its header of {length:,}; download or copy it again"
    return "is not a safetensors file; only .safetensors files are read here"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {_short(twice)} is given twice")
    return values


def _entry(path: str | Path, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"cannot be read: the header entry of {_short(name)} is not dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        _refuse(path, f"cannot be read: {_short(name)} has the unknown dtype {str(value['dtype'])[:40]!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        _refuse(path, f"cannot be read: {_short(name)} has an impossible shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(path, f"cannot be read: {_short(name)} has impossible data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        _refuse(path, f"cannot be read: {_short(name)} has {end - begin} bytes, which its shape and dtype do not make")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_ranges(path: str | Path, tensors: dict[str, TensorEntry], data_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    if not tensors:
        _refuse(path, "holds no tensors")
    place = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            problem = "overlaps the one before it" if entry.begin < place else "leaves a hole before it"
            _refuse(path, f"cannot be read: {_short(name)} {problem}")
        place = entry.end
    if place != data_bytes:
        problem = f"is cut off: {data_bytes:,} of {place:,} bytes of tensors are there"
        if place < data_bytes:
            problem = f"has {data_bytes - place:,} bytes after its last tensor"
        _refuse(path, f"{problem}; download or copy it again")
