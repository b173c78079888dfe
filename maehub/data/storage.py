"""Byte ranges of files, on this machine or behind an address such as s3://bucket/file.

Addresses go through fsspec. A connection belongs to the process that made it, so a forked one makes its own.
"""

import contextlib
import functools
import glob
import importlib
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from maehub.errors import DataError, MaehubError, MissingDependencyError, UsageError
from maehub.images import printable

# Kept open by a process, since opening is what a network filesystem is slow at; the rest is for pipes and libraries.
_MAY_OPEN, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
_OPEN_FILES = 64 if _MAY_OPEN == resource.RLIM_INFINITY else min(64, _MAY_OPEN // 8)
_REQUESTS = 16  # under way at once
_STAMPS = ("ETag", "etag", "md5", "content_md5", "mtime", "LastModified", "last_modified", "created")

Given = TypeVar("Given")
Made = TypeVar("Made")


class StoredFile(NamedTuple):
    """A file as it was when it was looked at."""

    path: str  # or address
    size: int  # bytes
    stamp: str  # another one after each change; empty where the storage has none


def is_remote(path: str) -> bool:
    """Whether it is an address rather than a path."""
    return "://" in path


def stored_file(path: str) -> StoredFile:
    """Look at a file."""
    with reading(path):
        if is_remote(path):
            info = _filesystem(path).info(path)
            stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
            return StoredFile(path, int(info["size"]), stamp)
        facts = os.stat(path)
    if not os.path.isfile(path):
        raise DataError(f"{printable(path)} is not a regular file")
    return StoredFile(path, facts.st_size, f"{facts.st_mtime_ns}-{facts.st_ino}")


def read_range(file: StoredFile, start: int, size: int) -> bytes:
    """``size`` bytes from ``start`` on; fewer where the file ends."""
    end = min(start + size, file.size)
    if start >= end:  # some servers refuse to give nothing
        return b""
    with reading(file.path):
        if is_remote(file.path):
            return bytes(_filesystem(file.path).cat_file(file.path, start=start, end=end))
        # No position is shared, so threads and forked processes may use one handle.
        handle, data = _opened(file), b""
        while start + len(data) < end and (more := os.pread(handle.number, end - start - len(data), start + len(data))):
            data += more
        return data


def matching(pattern: str) -> list[str]:
    """Files that a pattern with * and ? names, sorted; ** stands for folders at any depth."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    with reading(pattern):
        filesystem = _filesystem(pattern)
        return sorted(filesystem.unstrip_protocol(path) for path in filesystem.glob(pattern))


def at_once(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """The results of a function that waits for the network, in order."""
    threads = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="maehub-storage")
    try:
        yield from threads.map(function, items)
    finally:
        threads.shutdown(cancel_futures=True)


class _Handle:
    """An open file that is closed when nobody holds it: another thread may still read what the cache let go."""

    def __init__(self, file: StoredFile) -> None:
        self.number = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = functools.lru_cache(_OPEN_FILES)(_Handle)


def _filesystem(path: str) -> Any:
    return _connected(path.split("://")[0], os.getpid())


@functools.lru_cache(maxsize=16)
def _connected(protocol: str, _process: int) -> Any:
    try:
        return importlib.import_module("fsspec").filesystem(protocol)
    except ImportError as error:
        raise MissingDependencyError(
            f"{protocol}:// addresses need a package that is not installed: pip install 'maehub[data]' ({error})"
        ) from error
    except ValueError as error:
        raise UsageError(f"{protocol}:// is not a kind of address that fsspec knows: {error}") from error


@contextlib.contextmanager
def reading(path: str | bytes, fails: str = "cannot be read") -> Iterator[None]:
    """Put the path into whatever fails: protocols and pyarrow have errors of their own, which share no base."""
    try:
        yield
    except MaehubError:
        raise
    except Exception as error:
        reason = str(error.strerror if isinstance(error, OSError) and error.strerror else error).strip().split("\n")[0]
        raise DataError(f"{printable(path)} {fails}: {reason or type(error).__name__}") from error
