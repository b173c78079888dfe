"""The Hub's cache on this machine: where a file lies in it, and how one gets there whole, whoever else is at work.

A lock only saves downloading twice. On some file systems everyone is given it, on others it outlives the process that
took it. So the wait for it ends, and what is right does not depend on it: every download goes into a folder of its own
beside its place, and is moved there by one rename when it is whole.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from maehub.errors import MaehubError
from maehub.hub.client import Stated, get_from_hub, hub_constants
from maehub.hub.disk_space import Wanted, check_room, disk_trouble

logger = logging.getLogger("maehub")

LOCK_TIMEOUT = 60.0  # seconds
STAGING = ".maehub-"  # begins the name of a download's own folder

_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Downloads of models. See https://bford.info/cachedir/\n"


def repo_folder(cache: Path, repo: str) -> Path:
    """Where the Hub's client keeps a repository."""
    return cache / f"models--{repo.replace('/', '--')}"


def bring(
    repo: str, filename: str, revision: str, stated: Stated, cache: Path, wanted: Wanted, patience: float
) -> Path:
    """A file of a repository in the Hub's cache, downloaded if it is not there: its path.

    Args:
        repo, filename, revision: what was asked for.
        stated: what the Hub answered; the file is taken at this commit.
        cache: the cache of the Hub's client.
        wanted: for texts.
        patience: the longest wait for another process's lock, in seconds.

    Raises:
        HubError, IntegrityError: as `maehub.hub.client.get_from_hub`.
        CheckpointError: the disk is full, or the cache may not be written.
    """
    folder = repo_folder(cache, repo)
    path = folder / "snapshots" / stated.commit / filename
    if not path.is_file():
        lock = cache / ".locks" / folder.name / f"{stated.etag}.lock"  # the client's own
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with held(lock, wanted, patience), _staging(folder) as own:
                if not path.is_file():  # another process may have brought it meanwhile
                    _fill(folder, path, own, repo, filename, stated, wanted)
            _tag(cache)
        except MaehubError:
            raise
        except OSError as error:
            raise disk_trouble(error, cache, wanted, stated.size) from error
    if revision != stated.commit:
        _note(folder, revision, stated.commit)
    return path


@contextlib.contextmanager
def held(lock: Path, wanted: Wanted, patience: float) -> Iterator[None]:
    """Hold a lock file, or, after ``patience`` seconds or where it cannot be locked, go on without it."""
    hub_constants()
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    with contextlib.ExitStack() as stack:

        def taken(seconds: float) -> bool:
            try:
                stack.enter_context(WeakFileLock(lock, timeout=max(seconds, 0.01)))  # at 0 it does not even try
            except TimeoutError:
                return False
            return True

        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            if not taken(0):
                logger.info("%s: waiting at most %g s for %s, held%s", wanted, patience, lock, _holder(lock))
                if not patience or not taken(patience):
                    logger.warning(
                        "%s: after %g s, %s is still held%s; going on without it, which may download the file twice\n"
                        "if no such process is at work any more, delete the lock file",
                        *(wanted, patience, lock, _holder(lock)),
                    )
        except OSError as error:  # it may lie where nothing can be written, or belong to another user
            logger.debug("%s cannot be locked: %s", lock, error)
        yield


def _holder(lock: Path) -> str:
    """Who holds a lock, where that can be seen: `` by process 12``, or nothing."""
    with contextlib.suppress(OSError, ValueError):  # it is not Linux
        status = lock.stat()
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, where = line.split()[:6]
            if kind in ("FLOCK", "POSIX") and where == place and process.isdigit() and process != "0":
                return f" by process {process}"
    with contextlib.suppress(OSError):  # where the file's being there is the lock, its owner wrote who it is
        words = lock.read_text(errors="replace").split()
        if words and words[0].isdigit():
            return f" by process {words[0]}" + (f" on {words[1]}" if len(words) > 1 else "")
    return ""


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder of one's own, gone afterwards."""
    own = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _fill(folder: Path, path: Path, own: Path, repo: str, filename: str, stated: Stated, wanted: Wanted) -> None:
    """Bring the bytes to ``blobs``, named by their hash, and a link to them to ``path``, as the client does."""
    blob, link = folder / "blobs" / stated.etag, own / "link"
    for place in (blob.parent, path.parent):
        place.mkdir(parents=True, exist_ok=True)
    if not _linked(link, os.path.relpath(blob, path.parent)):
        blob = path  # the file itself lies there
    if not blob.is_file():
        check_room(folder, stated.size, wanted)
        whole = get_from_hub(repo, filename, stated.commit, own / "download", wanted, stated.size)
        os.replace(whole, blob)
    if blob != path:
        os.replace(link, path)


def _linked(link: Path, target: str) -> bool:
    """Make a link, unless the file system has none or the user wants none."""
    if getattr(hub_constants(), "HF_HUB_DISABLE_SYMLINKS", False):
        return False
    try:
        link.symlink_to(target)
    except OSError:
        return False
    return True


def _note(folder: Path, revision: str, commit: str) -> None:
    """Remember which commit a branch or tag is at; where that cannot be written, a run offline does not know it."""
    reference = folder / "refs" / revision
    try:
        if not reference.is_file() or reference.read_text().strip() != commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            with _staging(folder) as own:
                (own / "ref").write_text(commit)
                os.replace(own / "ref", reference)
    except OSError as error:
        logger.info("that %s is at commit %s cannot be noted in %s: %s", revision, commit[:12], folder, error.strerror)


def _tag(cache: Path) -> None:
    """Tell backup tools that this is a cache, as the client does."""
    with contextlib.suppress(OSError), (cache / "CACHEDIR.TAG").open("x") as tag:
        tag.write(_TAG)
