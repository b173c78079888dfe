"""One file from one source, verified: out of the cache, or over the network.

The Hub's client compares lengths alone, so every download is verified here, and one that does not verify is removed
and downloaded once more.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from maehub.errors import HubError, IntegrityError, UsageError
from maehub.files import cache_folder, expand
from maehub.hub.cache import LOCK_TIMEOUT, bring, held, repo_folder
from maehub.hub.catalog import Source
from maehub.hub.client import Stated, ask_hub, get_from_url, hub_constants
from maehub.hub.disk_space import Wanted
from maehub.hub.verification import Differs, check, discard, expected_bytes, expected_here, stated_hash

logger = logging.getLogger("maehub")

PathLike = str | os.PathLike[str]
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """A verified file, and where it came from. What does not apply is empty."""

    name: str  # catalog name or Hub id
    path: Path
    format: Literal["safetensors", "pickle"]
    sha256: str
    config: Path | None = None  # config.json of a Hub repository
    repo: str = ""
    filename: str = ""
    revision: str = ""  # commit, 40 digits
    url: str = ""
    licence: str = ""
    dialect: str = ""  # a hint from the catalog


class Place(NamedTuple):
    """Where files lie, and how they are taken from there."""

    hub: Path  # the cache of the Hub's client
    own: Path  # maehub's own: stamps, and files from addresses
    offline: bool
    verify: bool  # hash even what has an unchanged stamp
    patience: float  # seconds to wait for another process's lock, at most


def place_of(cache_dir: PathLike | None, offline: bool, verify: bool, lock_timeout: float = LOCK_TIMEOUT) -> Place:
    """The caches of this machine, or those below ``cache_dir``; offline also where $HF_HUB_OFFLINE says so."""
    if not 0 <= lock_timeout < float("inf"):
        raise UsageError(f"lock_timeout is seconds to wait, 0 or more, not {lock_timeout}; 0 does not wait at all")
    constants = hub_constants()
    hub = expand(cache_dir or constants.HF_HUB_CACHE)
    return Place(hub, cache_folder(cache_dir), offline or bool(constants.HF_HUB_OFFLINE), verify, lock_timeout)


def from_here(name: str, source: Source, place: Place) -> Fetched | None:
    """A verified file without any network, or None. Where a network may help, what is damaged is removed."""
    path = cached_path(source, place)
    if path is None:
        if source.kind == "package":
            raise IntegrityError(f"{source.filename} is missing from the installed maehub; install the package again")
        return None
    try:
        return _found(name, source, path, check(path, expected_here(source, path, place.own), place.own, place.verify))
    except Differs as difference:
        report = _mismatch(name, path, difference, "the file")
        if source.kind == "package":
            raise IntegrityError(f"{report}\ninstall maehub again") from None
        if place.offline:
            raise IntegrityError(
                f"{report}\nnothing of it was loaded; delete it, then `maehub download {name}` where there is a network"
            ) from None
        logger.warning("%s; removed, fetching it again", report)
        discard(path, place.own)
        return None


def from_there(name: str, source: Source, place: Place) -> Fetched:
    """Download and verify; what does not verify is removed, and downloaded once more."""
    if source.kind != "hub" and (found := from_here(name, source, place)):
        return found  # an address has no revision to ask for
    wanted = Wanted(name, source.url or f"{source.repo} {source.filename}")
    for last in (False, True):
        if source.kind == "url":
            path, expected = _url_path(source, place), expected_bytes(source, "")
            with held(place.own / "locks" / f"{path.name}.lock", wanted, place.patience):
                if not path.is_file():  # another process may have brought it meanwhile
                    get_from_url(source.url, path, wanted)
        else:
            stated = ask_hub(source.repo, source.filename, source.revision or "main", wanted)
            _check_pin(source, stated, wanted)
            asked = (source.repo, source.filename, source.revision or "main")
            path = bring(*asked, stated, place.hub, wanted, place.patience)
            expected = expected_bytes(source, stated_hash(path) or stated.etag)
        try:
            return _found(name, source, path, check(path, expected, place.own, place.verify))
        except Differs as difference:
            report = _mismatch(name, path, difference, source.where())
            discard(path, place.own)
            if last:
                raise IntegrityError(
                    f"{report}\nit was downloaded twice and removed; nothing of it was loaded\n"
                    f"a proxy or mirror may alter files: try another network, then `maehub download {name}`"
                ) from None
            logger.warning("%s; removed, fetching it once more", report)
    raise AssertionError("both tries return or raise")


def _check_pin(source: Source, stated: Stated, wanted: Wanted) -> None:
    """The Hub must state the commit and the hash that the catalog has."""
    commit = source.revision if COMMIT.fullmatch(source.revision) else source.commit
    if not stated.commit.startswith(commit):
        raise IntegrityError(
            f"the Hub answers with commit {stated.commit[:12]} of {wanted}, but {commit[:12]} was asked for\n"
            "nothing was downloaded; a mirror may be wrong: check HF_ENDPOINT"
        )
    if len(stated.etag) == 64 and not stated.etag.startswith(source.sha256):
        raise IntegrityError(
            f"the Hub states sha256 {stated.etag[:12]} for {wanted}, but the catalog has {source.sha256[:12]}\n"
            "nothing was downloaded; the file was replaced, or a mirror is wrong: update maehub or check HF_ENDPOINT"
        )


def cached_path(source: Source, place: Place) -> Path | None:
    """Where a source's file lies on this machine, None if it does not. Reads the Hub's cache without its client."""
    if source.kind == "package":
        path = Path(__file__).parents[1] / source.filename
    elif source.kind == "url":
        path = _url_path(source, place)
    else:
        folder, commit = repo_folder(place.hub, source.repo), source.revision or "main"
        if not COMMIT.fullmatch(commit):
            reference = folder / "refs" / commit
            commit = reference.read_text().strip() if reference.is_file() else ""
        if not commit or not commit.startswith(source.commit):
            return None
        path = folder / "snapshots" / commit / source.filename
    return path if path.is_file() else None


def _url_path(source: Source, place: Place) -> Path:
    address = urlsplit(source.url)
    return place.own / "files" / address.netloc.replace(":", "_") / address.path.lstrip("/")


def _found(name: str, source: Source, path: Path, sha256: str) -> Fetched:
    depth = len(PurePosixPath(source.filename).parts)
    return Fetched(
        name=name,
        path=path,
        format=source.format,
        sha256=sha256,
        repo=source.repo,
        filename=source.filename,
        revision=path.parents[depth - 1].name if source.kind == "hub" else "",
        url=source.url,
        dialect=source.dialect,
    )


def _mismatch(name: str, path: Path, difference: Differs, what: str) -> str:
    expected, found, by = difference.args
    return f"{name}: {what} is damaged: {by} has hash {expected[:12]}, the bytes have {found[:12]} ({path})"


def not_here(name: str, source: Source, place: Place) -> HubError:
    """The error of an offline run that lacks a file."""
    what = source.url or f"{source.repo} {source.filename}"
    folder = place.hub if source.kind == "hub" else place.own
    return HubError(
        f"{name} is not on this machine, and this run is offline: {what} is not in {folder}\n"
        f"run `maehub download {name}` where there is a network, with the same HF_HOME and MAEHUB_CACHE"
    )
