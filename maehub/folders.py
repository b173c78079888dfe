"""A folder that appears whole or not at all."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maehub.errors import CheckpointError, IntegrityError, MaehubError, UsageError
from maehub.files import sync_folder

_MOST_WORDS = 1_000_000  # bytes
_MAX_JSON_BYTES = 10_000_000  # a configuration with labels for 20,000 classes has a tenth of it


@contextmanager
def whole_folder(folder: str | Path, *, overwrite: bool, members: Collection[str]) -> Iterator[Path]:
    """Write a folder beside its place and rename it when it is finished; an error leaves nothing behind.

    Args:
        folder: must not exist or be empty, unless ``overwrite``.
        overwrite: replace a folder that holds one of ``members``. Everything else in it is kept.
        members: the names that make such a folder.

    Yields:
        The folder to write into.

    Raises:
        UsageError: the folder is in use.
        CheckpointError: the disk is full or cannot be written; what was there is untouched.
    """
    check_free(folder, overwrite, members)
    place = Path(os.path.realpath(folder))
    staging = _beside(place)
    try:
        staging.mkdir(parents=True)
        yield staging
        _commit(staging, place, members)
    except OSError as error:
        if isinstance(error, MaehubError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or choose another disk" if full else "choose a folder that can be written"
        reason = error.strerror or error
        raise CheckpointError(
            f"{folder} cannot be written: {reason}; what was there before is untouched; {remedy}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(folder: str | Path, overwrite: bool, members: Collection[str]) -> None:
    """Refuse a folder that is in use, before any work; arguments and errors as in `whole_folder`."""
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UsageError(
            f"{folder} exists and is not empty; choose another folder or replace it (--overwrite, overwrite=True)"
        )
    if not any((folder / name).is_file() for name in members):
        raise UsageError(f"{folder} holds none of {', '.join(members)}, so it is not overwritten; choose another one")


def write_text(path: Path, text: str) -> None:
    """A small new file, flushed to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A small new JSON file, for people to read too."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        IntegrityError: it is none.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise IntegrityError(f"{path} is no configuration: it has {path.stat().st_size:,} bytes")
        value = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{path} is no well-formed JSON: {error}") from error
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_words(path: Path) -> str:
    """A small text that a person wrote.

    Raises:
        UsageError: there is no such file, it is no text, or a megabyte or more.
    """
    try:
        if path.stat().st_size >= _MOST_WORDS:
            raise UsageError(f"{path} is too long for a page: it has {path.stat().st_size:,} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")


def _commit(staging: Path, place: Path, members: Collection[str]) -> None:
    if not place.exists():
        os.replace(staging, place)
    else:
        old = _beside(place)
        os.replace(place, old)
        try:
            os.replace(staging, place)
        except OSError:
            os.replace(old, place)
            raise
        for entry in old.iterdir():
            if entry.name not in members:
                os.replace(entry, place / entry.name)
        shutil.rmtree(old)
    sync_folder(place.parent)
