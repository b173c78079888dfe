"""Space for a download on this machine's disk, and what to say where the disk refuses."""

import shutil
from pathlib import Path
from typing import NamedTuple

from maehub.errors import CheckpointError
from maehub.files import byte_text, is_disk_full, nearest_folder


class DownloadLabel(NamedTuple):
    """What is being fetched, for texts: a catalog name or Hub id, and the file."""

    name: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file})"


class NoDiskSpace(CheckpointError):
    """The disk below a cache is full, or the cache may not be written."""


def check_disk_space(folder: Path, needed: int | None, label: DownloadLabel) -> None:
    """Refuse before the download what will not fit; where its size is unknown, nothing can be said.

    Args:
        folder: where it is to be kept; it need not exist yet.
        needed: bytes still to come.
        label: for the text, which names both numbers.
    """
    if needed is not None and _free(folder) < needed:
        raise _full(folder, needed, label, "nothing was downloaded")


def disk_trouble(error: Exception, folder: Path, label: DownloadLabel, size: int | None) -> NoDiskSpace:
    """The error to raise, from ``error``, where a download cannot be written below ``folder``."""
    if is_disk_full(error):
        return _full(folder, size, label, "the part that had come was removed")
    reason = getattr(error, "strerror", None) or error
    return NoDiskSpace(
        f"{label} cannot be written below {folder}: {reason}\n"
        "nothing half is kept; set HF_HOME (MAEHUB_CACHE for official files) to a folder that can be written, or give\n"
        f"one to `maehub download {label.name} --cache-dir FOLDER` (cache_dir= in Python)"
    )


def _full(folder: Path, needed: int | None, label: DownloadLabel, kept: str) -> NoDiskSpace:
    return NoDiskSpace(
        f"{label} needs {byte_text(needed)}, {byte_text(_free(folder))} free at {folder}\n"
        f"{kept}; free some space (`maehub cache clean` removes what killed downloads left), or take another disk:\n"
        f"set HF_HOME (MAEHUB_CACHE for official files), or `maehub download {label.name} --cache-dir FOLDER`"
    )


def _free(folder: Path) -> int:
    return shutil.disk_usage(nearest_folder(folder)).free
