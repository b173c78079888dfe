"""The caches on this machine: where a file lies, how one gets there whole whoever else is at work, and cache cleanup.

A lock only saves downloading twice. On some file systems everyone is given it, on others it outlives the process that
took it. So the wait for it ends, and what is right does not depend on it: every download goes into a folder of its own
beside its place, and is moved there by one rename when it is whole. What a killed download leaves is never taken for a
whole file; the next one of that repository removes it, or `clean_cache`.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maehub.errors import CheckpointError, MaehubError, UsageError, first_names, log
from maehub.files import byte_text, cache_folder, expand, is_left, own_folder
from maehub.hub.client import DownloadLabel, RemoteMetadata, check_disk_space, disk_trouble, get_from_hub, hub_constants

PathLike = str | os.PathLike[str]

LOCK_TIMEOUT = 60.0  # seconds
_OWN = "maehub-download"
STAGING = ".maehub-"  # begins the name of a download's own folder
AGE = 3600  # seconds without a write after which no download is at work on a file any more

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8,}\.tmp")  # as `maehub.files.atomic_write` names them
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Downloads of models. See https://bford.info/cachedir/\n"


class CachePaths(NamedTuple):
    """Where files lie, and how they are taken from there."""

    hub: Path  # the cache of the Hub's client
    own: Path  # maehub's own: stamps, and files from addresses
    offline: bool
    verify: bool  # hash even what has an unchanged stamp
    lock_timeout: float  # seconds to wait for another process's lock, at most


def cache_paths(
    cache_dir: PathLike | None = None, offline: bool = False, verify: bool = False, lock_timeout: float = LOCK_TIMEOUT
) -> CachePaths:
    """The caches of this machine, or those below ``cache_dir``; offline also where $HF_HUB_OFFLINE says so."""
    if not 0 <= lock_timeout < float("inf"):
        raise UsageError(f"lock_timeout is seconds to wait, 0 or more, not {lock_timeout}; 0 does not wait at all")
    constants = hub_constants()
    hub = expand(cache_dir or constants.HF_HUB_CACHE)
    return CachePaths(hub, cache_folder(cache_dir), offline or bool(constants.HF_HUB_OFFLINE), verify, lock_timeout)


def repo_folder(cache: Path, repo: str) -> Path:
    """Where the Hub's client keeps a repository; its own function for this takes 0.4 s to import."""
    return cache / f"models--{repo.replace('/', '--')}"


def fetch_to_cache(
    repo: str, filename: str, revision: str, stated: RemoteMetadata, paths: CachePaths, label: DownloadLabel
) -> Path:
    """A file of a repository in the Hub's cache, downloaded at the stated commit if it is not there: its path.

    Errors are those of `maehub.hub.client.get_from_hub`; CheckpointError also where the cache may not be written.
    """
    cache, folder = paths.hub, repo_folder(paths.hub, repo)
    path = folder / "snapshots" / stated.commit / filename
    if not path.is_file():
        lock = cache / ".locks" / folder.name / f"{stated.etag}.lock"  # the client's own
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(lock, label, paths.lock_timeout), own_folder(folder / _OWN, 0o700) as own:
                if not path.is_file():  # another process may have brought it meanwhile
                    _fill(path, own, repo, filename, stated, label)
            with contextlib.suppress(OSError), (cache / "CACHEDIR.TAG").open("x") as tag:
                tag.write(_TAG)  # tells backup tools that this is a cache, as the client does
        except MaehubError:
            raise
        except OSError as error:
            raise disk_trouble(error, cache, label, stated.size) from error
    if revision != stated.commit:
        _note(folder, revision, stated.commit)
    return path


@contextlib.contextmanager
def file_lock(lock: Path, label: DownloadLabel, timeout: float) -> Iterator[None]:
    """Hold a lock file, or, after ``timeout`` seconds or where it cannot be locked, go on without it."""
    hub_constants()
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(WeakFileLock(lock, timeout=0.01))  # at 0 it does not even try
            except TimeoutError:
                log.info("%s: waiting at most %g s for %s, held%s", label, timeout, lock, _holder(lock))
                stack.enter_context(WeakFileLock(lock, timeout=timeout or 0.01))
        except TimeoutError:
            log.warning(
                "%s: after %g s, %s is still held%s; going on without it, which may download the file twice\n"
                "if no such process is at work any more, delete the lock file",
                *(label, timeout, lock, _holder(lock)),
            )
        except OSError as error:  # it may lie where nothing can be written, or belong to another user
            log.debug("%s cannot be locked: %s", lock, error)
        yield


def _holder(lock: Path) -> str:
    """Who holds a lock, where that can be seen: `` by process 12``, or nothing."""
    with contextlib.suppress(OSError, ValueError):  # it is not Linux
        status = lock.stat()
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, where = line.split()[:6]
            if kind in ("FLOCK", "POSIX") and where == device and process.isdigit() and process != "0":
                return f" by process {process}"
    with contextlib.suppress(OSError):  # where the file's being there is the lock, its owner wrote who it is
        words = lock.read_text(errors="replace").split()
        if words and words[0].isdigit():
            return f" by process {words[0]}" + (f" on {words[1]}" if len(words) > 1 else "")
    return ""


def _fill(path: Path, own: Path, repo: str, filename: str, stated: RemoteMetadata, label: DownloadLabel) -> None:
    """Bring the bytes to ``blobs``, named by their hash, and a link to them to ``path``, as the client does."""
    folder = own.parent
    blob, link = folder / "blobs" / stated.etag, own / "link"
    for parent in (blob.parent, path.parent):
        parent.mkdir(parents=True, exist_ok=True)
    try:
        linked = not getattr(hub_constants(), "HF_HUB_DISABLE_SYMLINKS", False)
        if linked:
            link.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:  # the file system has none
        linked = False
    target = blob if linked else path  # without a link the file itself lies there
    if not target.is_file():
        check_disk_space(folder, stated.size, label)
        os.replace(get_from_hub(repo, filename, stated.commit, own / "download", label, stated.size), target)
    if linked:
        os.replace(link, path)


def _note(folder: Path, revision: str, commit: str) -> None:
    """Remember which commit a branch or tag is at; where that cannot be written, a run offline does not know it."""
    reference = folder / "refs" / revision
    try:
        if not reference.is_file() or reference.read_text().strip() != commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            with own_folder(folder / _OWN, 0o700) as own:
                (own / "ref").write_text(commit)
                os.replace(own / "ref", reference)
    except OSError as error:
        log.info("that %s is at commit %s cannot be noted in %s: %s", revision, commit[:12], folder, error.strerror)


class Cleaned(NamedTuple):
    """What was removed, or would be, and what is too young for that: files or folders of one download, with bytes."""

    removed: list[tuple[Path, int]]
    kept: list[tuple[Path, int]]
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        removed, kept = ([{"path": str(path), "bytes": size} for path, size in some] for some in (self[0], self[1]))
        return {"removed": removed, "bytes": _total(self.removed), "kept": kept, "dry_run": self.dry_run}

    def describe(self) -> str:
        """For a person: a line for each, and the sum."""
        lines = [f"{byte_text(size):>8}  {path}" for path, size in self.removed]
        count = f"{len(self.removed)} leftover{'' if len(self.removed) == 1 else 's'}"
        verb = "would remove" if self.dry_run else "removed"
        lines.append(f"{verb} {count}, {byte_text(_total(self.removed))}" if self.removed else "nothing to remove")
        if self.kept:
            lines.append(f"kept {len(self.kept)} written to within the last hour, {byte_text(_total(self.kept))}")
        return "\n".join(lines)


def clean_cache(cache_dir: PathLike | None = None, *, dry_run: bool = False) -> Cleaned:
    """Remove what killed downloads left, unless something was written to it within the last hour.

    These are ``*.incomplete`` files of the Hub's client, by whichever library they were begun, and maehub's own folders
    and temporary files. Whole files, stamps and locks stay. A ``dry_run`` only looks.
    """
    removed, kept, stuck = [], [], []
    for path in sorted(_candidates(cache_paths(cache_dir, offline=True, verify=False))):
        try:
            files = [path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)]
            states = [one.lstat() for one in files]
            size = sum(state.st_size for one, state in zip(files, states, strict=True) if not one.is_dir())
            written = max(state.st_mtime for state in states)  # seconds since 1970
            if time.time() - written <= AGE and not is_left(path):
                kept.append((path, size))
                continue
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append((path, size))
        except FileNotFoundError:  # its download ended just now
            continue
        except OSError as error:
            stuck.append(f"{path} cannot be removed: {error.strerror}")
    if stuck:
        raise CheckpointError(
            first_names(stuck, 3, "\n")
            + f"\n{len(removed)} others were removed, {byte_text(_total(removed))}; run this as the user who owns these"
        )
    return Cleaned(removed, kept, dry_run)


def _candidates(paths: CachePaths) -> Iterator[Path]:
    """Everything that only an unfinished download makes. Links are not followed, and snapshots not looked into."""
    candidates = [
        *paths.hub.glob("*--*/blobs/*.incomplete"),
        *paths.hub.glob(f"*--*/{STAGING}*"),
        *(path for path in paths.own.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)),
    ]
    return (path for path in candidates if not path.is_symlink() and (path.is_file() or path.name.startswith(STAGING)))


def _total(some: list[tuple[Path, int]]) -> int:
    return sum(size for _, size in some)
