"""Is a downloaded file, byte for byte, what it should be?

Its hash is compared with the one in the catalog if there is one, otherwise with the one that the Hub states. A file
that was hashed once is not hashed again as long as its size, time and inode stay the same: a stamp in maehub's own
cache folder keeps them, which makes loading a verified 2.5 GB file take no longer than mapping it.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from maehub.errors import log
from maehub.files import atomic_write
from maehub.hub.catalog import Source, Want

_CHUNK = 1 << 20  # bytes read at once


class FileHashes(NamedTuple):
    """Hashes of one file, hexadecimal, and the state that the file had before it was read."""

    sha256: str
    other: str  # the hash that was asked for beside it; empty where none was
    state: list[int]


class Expected(NamedTuple):
    """The hash to compare with, or its beginning; empty where nothing is known."""

    kind: Literal["sha256", "md5", "git"] = "sha256"
    begins: str = ""
    by: str = "nothing"


class Differs(Exception):
    """The bytes of a file are not the expected ones; the text has both hashes."""


def file_hashes(path: Path, other: Literal["md5", "git", None] = None) -> FileHashes:
    """Read a file once and hash it: sha256, and beside it md5, or sha1 as git counts it."""
    state, counts = file_state(path), [hashlib.sha256()]
    if other == "md5":
        counts.append(hashlib.md5(usedforsecurity=False))
    elif other == "git":
        counts.append(hashlib.sha1(b"blob %d\0" % state[0], usedforsecurity=False))
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            for one in counts:
                one.update(chunk)
    return FileHashes(counts[0].hexdigest(), counts[1].hexdigest() if other else "", state)


def file_state(path: Path) -> list[int]:
    """[bytes, modification time in ns, inode]: what an unchanged file keeps."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def read_stamp(path: Path, cache: Path, changed: bool = False) -> dict[str, Any]:
    """What was recorded of a file; empty where that is nothing, or where it changed since, unless ``changed``."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not there, or not whole
        record: dict[str, Any] = json.loads(_stamp(path, cache).read_bytes())
        same = record["path"] == os.path.realpath(path) and (changed or record["state"] == file_state(path))
        return record if same and isinstance(record["sha256"], str) else {}
    return {}


def _write(path: Path, cache: Path, record: dict[str, Any]) -> None:
    """Record what is known of a file. A cache that cannot be written costs another hash at the next load, no more."""
    try:
        with atomic_write(_stamp(path, cache), parents=True) as temporary:
            temporary.write_text(json.dumps(record))
    except OSError as error:
        log.debug("no stamp for %s: %s", path, error)


def known_finite(path: Path, cache: Path, part: Want) -> bool:
    """Whether the tensors of a part of a file that did not change since were found free of NaN and infinity."""
    return read_stamp(path, cache).get("finite") in (part, "autoencoder")


def mark_finite(path: Path, cache: Path, part: Want) -> None:
    """Record that, in the stamp of an unchanged file; without one nothing is recorded."""
    record = read_stamp(path, cache)
    if record and record.get("finite") not in (part, "autoencoder"):
        _write(path, cache, record | {"finite": part})


def check(path: Path, expected: Expected, cache: Path, afresh: bool = False) -> str:
    """The sha256 of a file that is as expected, or `Differs`; hashes only what has no unchanged stamp."""
    known = "" if afresh else str(read_stamp(path, cache).get("sha256", ""))
    if known and (expected.kind != "sha256" or known.startswith(expected.begins)):
        return known
    hashes = file_hashes(path, None if expected.kind == "sha256" else expected.kind)
    actual = hashes.other or hashes.sha256
    if not actual.startswith(expected.begins):
        raise Differs(f"{expected.by} has hash {expected.begins[:12]}, the bytes have {actual[:12]}")
    _write(path, cache, {"path": os.path.realpath(path), "state": hashes.state, "sha256": hashes.sha256})
    return hashes.sha256


def expected_bytes(source: Source | None, etag: str) -> Expected:
    """What a file's bytes are compared with: the catalog if it says anything, else what the Hub states."""
    if source and source.sha256:
        return Expected("sha256", source.sha256, "the catalog")
    if source and source.md5:
        return Expected("md5", source.md5, "the catalog")
    if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", etag):
        return Expected("sha256" if len(etag) == 64 else "git", etag, "the Hub")
    return Expected()


def expected_here(source: Source, path: Path, cache: Path) -> Expected:
    """The same for a file that was downloaded before: its own first hash, where nobody else states one."""
    expected = expected_bytes(source, stated_hash(path))
    if not expected.begins and (first := read_stamp(path, cache, changed=True).get("sha256")):
        return Expected("sha256", first, "the first download")
    return expected


def stated_hash(path: Path) -> str:
    """The hash that the Hub stated for a file in its cache, which is the name of what the snapshot links to."""
    blob = _blob(path)
    return blob.name if blob and blob.parent.name == "blobs" else ""


def _blob(path: Path) -> Path | None:
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else None


def discard(path: Path, cache: Path) -> None:
    """Remove a file of a cache, its blob there, and its stamp, so that nothing takes it for whole again.

    A link that leads out of the repository's folder is removed, and never what it leads to.
    """
    try:
        _stamp(path, cache).unlink(missing_ok=True)
    except OSError as error:
        log.debug("stamp of %s stays: %s", path, error)
    blobs = {parent / "blobs" for parent in path.parents if parent / "snapshots" in path.parents}
    blob = _blob(path)
    path.unlink(missing_ok=True)
    if blob and blob.parent in blobs:
        blob.unlink(missing_ok=True)


def _stamp(path: Path, cache: Path) -> Path:
    return cache / "stamps" / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]}.json"
