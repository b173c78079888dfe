"""Files that are whole or not there: atomic writing, hashing, free space."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from maehub.errors import CheckpointError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RENAME = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; when the block ends without an error, it becomes ``path``.

    The bytes are on the disk before the name is, and the name is before this returns, so after a power cut there is
    the old file or the whole new one. The mode is what the umask says. On any error the temporary file is removed and
    the old file stays; an error of the block itself passes through, unless the disk was full.

    Raises:
        CheckpointError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            # A new name, so the mode follows the umask; what a library makes of it in the block may not.
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = os.stat(temporary).st_mode & 0o777
        except OSError as error:
            raise write_error(target, error) from error
        try:
            yield temporary
        except Exception as error:
            if is_disk_full(error):
                raise write_error(target, error) from error
            raise
        try:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, target)
            sync_folder(target.parent)
        except OSError as error:
            raise write_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_error(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """The error to raise, from ``error``, where ``path`` could not be written."""
    safe = "What was there before is unchanged."
    if is_disk_full(error):
        free = _megabytes(_free_bytes(Path(path).parent))
        return CheckpointError(f"{path} cannot be written: the disk is full, {free} free. {safe} Free some space.")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if getattr(error, "errno", None) in _NO_RENAME:
        reason += "; this file system cannot rename, as buckets mounted as folders cannot: choose a folder on a disk"
    return CheckpointError(f"{path} cannot be written: {reason}. {safe}")


def is_disk_full(error: Exception) -> bool:
    """No space or no quota left. Libraries in other languages hand the reason on only in their text."""
    return getattr(error, "errno", None) in _NO_ROOM or any(os.strerror(code) in str(error) for code in _NO_ROOM)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems cannot
            raise
    finally:
        os.close(handle)


def free_space_guard(path: str | os.PathLike[str], needed_bytes: int) -> None:
    """Refuse before the work what will not fit on the disk.

    Args:
        path: the file or folder to be written; it need not exist yet.
        needed_bytes: how much will be written.

    Raises:
        CheckpointError: less than that is free; the text names both numbers.
    """
    folder = Path(path)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = _free_bytes(folder)
    if free < needed_bytes:
        raise CheckpointError(
            f"{path} needs {_megabytes(needed_bytes)}, and {_megabytes(free)} are free in {folder}. "
            "Nothing was written. Free some space or choose another folder."
        )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
