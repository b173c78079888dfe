"""Room for a download on this machine's disk, and what to say where the disk refuses."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from maehub.errors import CheckpointError
from maehub.files import byte_text, is_disk_full


class Wanted(NamedTuple):
    """What is being fetched, for texts: a catalog name or Hub id, and the file."""

    name: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file})"


class NoRoom(CheckpointError):
    """The disk below a cache is full, or the cache may not be written."""


def check_room(folder: Path, needed: int | None, wanted: Wanted) -> None:
    """Refuse before the download what will not fit; where its size is unknown, nothing can be said.

    Args:
        folder: where it is to be kept; it need not exist yet.
        needed: bytes still to come.

    Raises:
        NoRoom: less than that is free; the text names both numbers.
    """
    if needed is not None and _free(folder) < needed:
        raise _full(folder, needed, wanted, "nothing was downloaded")


def disk_trouble(error: Exception, folder: Path, wanted: Wanted, size: int | None) -> NoRoom:
    """The error to raise, from ``error``, where a download cannot be written below ``folder``."""
    if is_disk_full(error):
        return _full(folder, size, wanted, "the part that had come was removed")
    reason = getattr(error, "strerror", None) or error
    return NoRoom(
        f"{wanted} cannot be written below {folder}: {reason}\n"
        "nothing half is kept; set HF_HOME (MAEHUB_CACHE for official files) to a folder that can be written, or give\n"
        f"one to `maehub download {wanted.name} --cache-dir FOLDER` (cache_dir= in Python)"
    )


def no_login(error: OSError) -> CheckpointError:
    """The error to raise, from ``error``, where the file that keeps a login may not be read."""
    return CheckpointError(
        f"{error.filename} cannot be read: {error.strerror}; the Hub's client looks there for a login\n"
        "set HF_HOME to a folder of your own, or HF_TOKEN_PATH to a file of your own"
    )


def _full(folder: Path, needed: int | None, wanted: Wanted, kept: str) -> NoRoom:
    return NoRoom(
        f"{wanted} needs {byte_text(needed)}, {byte_text(_free(folder))} free at {folder}\n"
        f"{kept}; free some space (`maehub cache clean` removes what killed downloads left), or take another disk:\n"
        f"set HF_HOME (MAEHUB_CACHE for official files), or `maehub download {wanted.name} --cache-dir FOLDER`"
    )


def _free(folder: Path) -> int:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(os.fspath(folder)).free
