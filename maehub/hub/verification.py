"""Is a downloaded file, byte for byte, what it should be?

Its hash is compared with the one in the catalog if there is one, otherwise with the one that the Hub states. A file
that was hashed once is not hashed again as long as its size, time and inode stay the same: a stamp in maehub's own
cache folder keeps them, which makes loading a verified 2.5 GB file take no longer than mapping it.
"""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from maehub.files import atomic_write
from maehub.hub.catalog import Source, Want

logger = logging.getLogger("maehub")

_CHUNK = 1 << 20  # bytes read at once


class Digests(NamedTuple):
    """Hashes of one file, hexadecimal, and the state that the file had before it was read."""

    sha256: str
    other: str  # the hash that was asked for beside it; empty where none was
    state: list[int]


class Expected(NamedTuple):
    """Hashes to compare with, each perhaps only a beginning; all empty where nothing is known."""

    sha256: str = ""
    md5: str = ""
    git: str = ""
    by: str = "nothing"


class Differs(Exception):
    """The bytes of a file are not the expected ones; args: what was expected, what was found."""


def digest(path: Path, other: Literal["md5", "git", None] = None) -> Digests:
    """Read a file once and hash it: sha256, and beside it md5, or sha1 as git counts it."""
    state, hashes = file_state(path), [hashlib.sha256()]
    if other == "md5":
        hashes.append(hashlib.md5(usedforsecurity=False))
    elif other == "git":
        hashes.append(hashlib.sha1(b"blob %d\0" % state[0], usedforsecurity=False))
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for one in hashes:
                one.update(chunk)
    return Digests(hashes[0].hexdigest(), hashes[1].hexdigest() if other else "", state)


def file_state(path: Path) -> list[int]:
    """[bytes, modification time in ns, inode]: what an unchanged file keeps."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def read_stamp(path: Path, cache: Path) -> str:
    """The recorded sha256 of a file that did not change since; empty where there is none."""
    record = _record(path, cache)
    return str(record["sha256"]) if record and record["state"] == file_state(path) else ""


def recorded_hash(path: Path, cache: Path) -> str:
    """The sha256 that was recorded for a path, even if the file changed since; empty where there is none."""
    record = _record(path, cache)
    return str(record["sha256"]) if record else ""


def write_stamp(path: Path, cache: Path, digests: Digests) -> None:
    """Record a hash. A cache that cannot be written costs another hash at the next load, no more."""
    _write(path, cache, {"path": os.path.realpath(path), "state": digests.state, "sha256": digests.sha256})


def _write(path: Path, cache: Path, record: dict[str, object]) -> None:
    try:
        place = _place(path, cache)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as temporary:
            temporary.write_text(json.dumps(record))
    except OSError as error:
        logger.debug("no stamp for %s: %s", path, error)


def known_finite(path: Path, cache: Path, part: Want) -> bool:
    """Whether the tensors of a part of a file that did not change since were found free of NaN and infinity."""
    record = _record(path, cache)
    return bool(record and record.get("finite") in (part, "autoencoder") and record["state"] == file_state(path))


def mark_finite(path: Path, cache: Path, part: Want) -> None:
    """Record that, in the stamp of an unchanged file; without one nothing is recorded."""
    record = _record(path, cache)
    if record and record["state"] == file_state(path) and not known_finite(path, cache, part):
        _write(path, cache, record | {"finite": part})


def remove_stamp(path: Path, cache: Path) -> None:
    """Forget what was recorded for a path."""
    try:
        _place(path, cache).unlink(missing_ok=True)
    except OSError as error:
        logger.debug("stamp of %s stays: %s", path, error)


def check(path: Path, expected: Expected, cache: Path, afresh: bool = False) -> str:
    """The sha256 of a file that is as expected; hashes only what has no unchanged stamp.

    Raises:
        Differs: it is not.
    """
    known = "" if afresh else read_stamp(path, cache)
    if known and known.startswith(expected.sha256):
        return known
    digests = digest(path, "md5" if expected.md5 else "git" if expected.git else None)
    if not digests.sha256.startswith(expected.sha256):
        raise Differs(expected.sha256, digests.sha256, expected.by)
    if not digests.other.startswith(expected.md5 or expected.git):
        raise Differs(expected.md5 or expected.git, digests.other, expected.by)
    write_stamp(path, cache, digests)
    return digests.sha256


def expected_bytes(source: Source | None, etag: str) -> Expected:
    """What a file's bytes are compared with: the catalog if it says anything, else what the Hub states."""
    if source and (source.sha256 or source.md5):
        return Expected(source.sha256, "" if source.sha256 else source.md5, "", "the catalog")
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        return Expected(sha256=etag, by="the Hub")
    return Expected(git=etag, by="the Hub") if re.fullmatch(r"[0-9a-f]{40}", etag) else Expected()


def expected_here(source: Source, path: Path, cache: Path) -> Expected:
    """The same for a file that was downloaded before: its own first hash, where nobody else states one."""
    expected = expected_bytes(source, stated_hash(path))
    if expected == Expected() and (first := recorded_hash(path, cache)):
        return Expected(sha256=first, by="the first download")
    return expected


def stated_hash(path: Path) -> str:
    """The hash that the Hub stated for a file in its cache, which is the name of what the snapshot links to."""
    blob = _blob(path)
    return blob.name if blob and blob.parent.name == "blobs" else ""


def _blob(path: Path) -> Path | None:
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None


def discard(path: Path, cache: Path) -> None:
    """Remove a file, what it links to, and its stamp, so that nothing takes it for whole again."""
    remove_stamp(path, cache)
    for one in {Path(os.path.realpath(path)), _blob(path) or path, path}:
        one.unlink(missing_ok=True)


def _place(path: Path, cache: Path) -> Path:
    return cache / "stamps" / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]}.json"


def _record(path: Path, cache: Path) -> dict[str, object] | None:
    try:
        record = json.loads(_place(path, cache).read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("sha256"), str) and isinstance(record.get("state"), list)
    return record if whole and record.get("path") == os.path.realpath(path) else None
