"""Files that are whole or not there: atomic writing, hashing, free space."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from maehub.errors import SPACES, CheckpointError, IntegrityError, MaehubError, UsageError, visible

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OWN = re.compile(r"\..*\.([0-9a-f]{16})([0-7][0-9a-f]{7})[0-9a-f]{8}\.\w+")  # see `_beside`
_NO_RENAME = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a formula of a spreadsheet begins with."""
SEGMENTER = "segmenter.json"
"""The file in a model folder that says that it holds a segmenter."""
DETECTOR = "detector.json"
"""The same of a detector."""
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~#@]|:(?=//)|(?<=www)\.")
_MOST_WORDS = 1_000_000  # bytes
_MAX_JSON_BYTES = 10_000_000  # a configuration with labels for 20,000 classes has a tenth of it


@contextmanager
def atomic_write(path: str | os.PathLike[str], parents: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same folder; when the block ends without an error, it becomes ``path``.

    The bytes are on the disk before the name is, and the name is before this returns, so after a power cut there is
    the old file or the whole new one. The mode is what the umask says. On any error the temporary file is removed and
    the old file stays; an error of the block itself passes through, unless the disk was full. What a process that was
    killed left of its own write to ``path`` is removed. ``parents`` makes the folder where there is none.
    """
    target = Path(path)
    temporary = _beside(target, "tmp")
    try:
        with suppress(OSError):
            for rest in _left(target, "tmp"):
                rest.unlink()
        try:
            if parents:
                target.parent.mkdir(parents=True, exist_ok=True)
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
        with suppress(OSError):
            os.unlink(temporary)


def write_error(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """The error to raise, from ``error``, where ``path`` could not be written."""
    reason, remedy = getattr(error, "strerror", None) or str(error), "Choose a folder that can be written."
    if is_disk_full(error):
        reason, remedy = f"the disk is full, {_megabytes(free_bytes(path))} free", "Free some space."
    elif getattr(error, "errno", None) in _NO_RENAME:
        reason += "; this file system cannot rename, as buckets mounted as folders cannot"
        remedy = "Choose a folder on a disk."
    return CheckpointError(f"{path} cannot be written: {reason}. What was there before is unchanged. {remedy}")


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
    """Refuse before the work what will not fit on the disk of a file or folder, which need not exist yet."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise CheckpointError(
            f"{path} needs {_megabytes(needed_bytes)}, and {_megabytes(free)} are free there. "
            "Nothing was written. Free some space or choose another folder."
        )


def free_bytes(path: str | os.PathLike[str]) -> int:
    """What is free on the disk of a file or folder, which need not exist yet."""
    folder = Path(path)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def byte_text(size: float | None) -> str:
    """Bytes for a person: 343 MB."""
    if size is None:
        return "an unknown size"
    return f"{size:.0f} B" if size < 1000 else f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:,.0f} MB"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """maehub's own cache: ``cache_dir``/maehub, or $MAEHUB_CACHE, or maehub in the user's cache folder.

    It holds stamps and the files that are downloaded from addresses; what comes from the Hub lies in the Hub's cache.
    """
    if cache_dir is not None:
        return expand(cache_dir) / "maehub"
    if own := os.environ.get("MAEHUB_CACHE"):
        return expand(own)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maehub"


def expand(path: str | os.PathLike[str]) -> Path:
    """``~`` as the user's home; where nobody knows one, as for a user without an account, it is / as in containers."""
    text = os.path.expanduser(path)
    return Path("/", text[2:]) if text.startswith("~/") else Path(text)


@contextmanager
def whole_folder(folder: str | Path, *, overwrite: bool, members: Collection[str]) -> Iterator[Path]:
    """Write into the folder given, beside its place; it is renamed when it is finished, an error leaves nothing behind.

    ``folder`` must not exist or be empty, unless ``overwrite`` says to replace one that holds one of ``members``, the
    names that make such a folder. Everything else in it is kept.
    """
    place = Path(os.path.realpath(folder))
    try:
        for old in _left(place, "old"):
            _put_back(old, place, members)
        check_free(folder, overwrite, members)
        with own_folder(place) as staging:
            yield staging
            _commit(staging, place, members)
    except OSError as error:
        if isinstance(error, MaehubError):
            raise
        full, safe = is_disk_full(error), "what was there before is untouched"
        remedy = "free some space or choose another disk" if full else "choose a folder that can be written"
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}; {safe}; {remedy}") from error


@contextmanager
def own_folder(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder beside ``target``, gone afterwards; what killed processes left of theirs goes before."""
    for rest in _left(target, "partial"):
        shutil.rmtree(rest, ignore_errors=True)
    folder = _beside(target, "partial")
    try:
        folder.mkdir(mode, parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_place(path: Path, overwrite: bool = True) -> None:
    """Refuse a path at which no file or folder can be made or, without ``overwrite``, one is; before any work."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist; make it first")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another file, or replace it with --overwrite (overwrite=True)")
    if not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def check_free(folder: str | Path, overwrite: bool, members: Collection[str]) -> None:
    """Refuse a folder that is in use, before any work; arguments and errors as in `whole_folder`."""
    folder = Path(folder)
    if missing := [place for place in (folder, *folder.parents) if not place.exists()]:
        return check_place(missing[-1])
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    if not overwrite:
        raise UsageError(
            f"{folder} exists and is not empty; choose another folder or replace it (--overwrite, overwrite=True)"
        )
    if not any((folder / name).is_file() for name in members):
        raise UsageError(f"{folder} holds none of {', '.join(members)}, so it is not overwritten; choose another one")


def write_text(path: Path, text: str) -> None:
    """A small new file, flushed to the disk; names that are no Unicode are written as in JSON."""
    with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A small new JSON file, for people to read too."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fill_template(template: Path, values: Mapping[str, Any]) -> str:
    """The text of a Jinja template, in which values are nothing but text: HTML and Markdown in them are escaped.

    A name that it uses and that has no value is an error.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    as_text = markdown_text if template.name.endswith(".md.jinja") else partial(visible, keep=SPACES)
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(["html.jinja"]),
        finalize=lambda value: as_text(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)


def markdown_text(text: str) -> str:
    """One line of Markdown that shows a text as it is, without elements, links, cells, codes of a terminal."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(re.sub(r"\s+", " ", text)))


def check_regular(path: str | os.PathLike[str], error: type[MaehubError] = IntegrityError) -> None:
    """Refuse what is no regular file: a pipe would block its reader, a device never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise error(f"{path} is not a file that can be read: it is no regular file")


def read_small(path: Path, error: type[MaehubError] = IntegrityError, most: int = _MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file that is not large; of anything else the error given."""
    try:
        check_regular(path, error)
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from problem
    if len(data) > most:
        raise error(f"{path} is too long: it has {path.stat().st_size:,} bytes, and at most {most:,} are read")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    data = read_small(path)
    try:
        value = json.loads(data)
    except (RecursionError, ValueError) as error:
        raise IntegrityError(f"{path} is no well-formed JSON: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def json_or_nothing(path: Path) -> dict[str, Any]:
    """The same; empty where there is none that can be read."""
    with suppress(IntegrityError):
        return read_json(path)
    return {}


def sheet_cells(cells: Iterable[Any]) -> list[Any]:
    """Cells for a .csv, none of which a spreadsheet takes for a formula: such a text gets an apostrophe before it."""
    return [f"'{cell}" if isinstance(cell, str) and cell.lstrip("'").startswith(FORMULA) else cell for cell in cells]


def read_words(path: Path) -> str:
    """A small text that a person wrote."""
    try:
        return read_small(path, UsageError, _MOST_WORDS).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8") from error


def is_left(path: Path) -> bool:
    """Whether the name is that of an unfinished write of ours whose process, of this machine, has ended."""
    match = _OWN.fullmatch(path.name)
    if not match or not match[1].startswith(_processes()):
        return False
    try:
        os.kill(int(match[2], 16), 0)
    except OSError as error:
        return error.errno == errno.ESRCH  # or it is another user's
    return False


def _beside(target: Path, ending: str) -> Path:
    """A new hidden name beside a target, which says whose process writes what."""
    return target.with_name(f".{target.name[:50]}.{_mark(target)}{os.getpid():08x}{secrets.token_hex(4)}.{ending}")


def _left(target: Path, ending: str) -> list[Path]:
    """What killed processes left of their writes to a target, and of those to no other."""
    return [path for path in target.parent.glob(f".*.{_mark(target)}*.{ending}") if is_left(path)]


def _mark(target: Path) -> str:
    return _processes() + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]


@cache
def _processes() -> str:
    """What tells apart machines, their starts and their containers: within one, a number means one process."""
    known = os.uname().nodename
    with suppress(OSError):
        known += Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def _commit(staging: Path, place: Path, members: Collection[str]) -> None:
    if not place.exists():
        os.replace(staging, place)
    else:
        old = _beside(place, "old")
        os.replace(place, old)
        try:
            os.replace(staging, place)
        finally:
            _put_back(old, place, members)
    sync_folder(place.parent)


def _put_back(old: Path, place: Path, members: Collection[str]) -> None:
    """After a folder was moved away to be replaced: back if nothing took its place, else what it had besides."""
    if not place.exists():
        os.replace(old, place)
        return
    for entry in old.iterdir():
        if entry.name not in members and not os.path.lexists(place / entry.name):
            os.replace(entry, place / entry.name)
    shutil.rmtree(old)


def is_segmenter(source: str | Path) -> bool:
    """Whether a folder holds a segmenter: a model folder, or a run folder with one."""
    return _holds(source, SEGMENTER)


def is_detector(source: str | Path) -> bool:
    """Whether a folder holds a detector: a model folder, or a run folder with one."""
    return _holds(source, DETECTOR)


def _holds(source: str | Path, name: str) -> bool:
    return (Path(source) / name).is_file() or (Path(source) / "model" / name).is_file()
