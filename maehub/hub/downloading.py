"""One file from one source, verified: out of the cache, or over the network.

The Hub's client compares lengths alone, so every download is verified here, and one that does not verify is removed
and downloaded once more.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from maehub.errors import HubError, IntegrityError, log
from maehub.hub.cache import CachePaths, fetch_to_cache, file_lock, repo_folder
from maehub.hub.catalog import Source
from maehub.hub.client import DownloadLabel, RemoteMetadata, remote_metadata
from maehub.hub.urls import get_from_url
from maehub.hub.verification import Differs, Expected, check, discard, expected_bytes, expected_here, stated_hash

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """A verified file, and where it came from. What does not apply is empty."""

    name: str  # catalog name or Hub id
    path: Path
    source: Source
    revision: str  # commit of a Hub repository, 40 digits
    sha256: str
    config: Path | None = None  # config.json of a Hub repository
    licence: str = ""


def from_here(name: str, source: Source, paths: CachePaths) -> Fetched | None:
    """A verified file without any network, or None. Where a network may help, what is damaged is removed."""
    path = cached_path(source, paths)
    if path is None:
        if source.kind == "package":
            raise IntegrityError(f"{source.filename} is missing from the installed maehub; install the package again")
        return None
    try:
        return _verified(name, source, path, expected_here(source, path, paths.own), paths)
    except Differs as difference:
        report = f"{name}: the file is damaged: {difference} ({path})"
        if source.kind == "package":
            raise IntegrityError(f"{report}\ninstall maehub again") from None
        if paths.offline:
            raise IntegrityError(
                f"{report}\nnothing of it was loaded; delete it, then `maehub download {name}` where there is a network"
            ) from None
        log.warning("%s; removed, fetching it again", report)
        discard(path, paths.own)
        return None


def from_there(name: str, source: Source, paths: CachePaths) -> Fetched:
    """Download and verify; what does not verify is removed, and downloaded once more."""
    if source.kind != "hub" and (fetched := from_here(name, source, paths)):
        return fetched  # an address has no revision to ask for
    label = DownloadLabel(name, source.url or f"{source.repo} {source.filename}")
    asked = (source.repo, source.filename, source.revision or "main")
    for last in (False, True):
        if source.kind == "url":
            path, etag = _url_path(source, paths), ""
            with file_lock(paths.own / "locks" / f"{path.name}.lock", label, paths.lock_timeout):
                if not path.is_file():  # another process may have brought it meanwhile
                    get_from_url(source.url, path, label)
        else:
            stated = remote_metadata(*asked, label)
            _check_pin(source, stated, label)
            path, etag = fetch_to_cache(*asked, stated, paths, label), stated.etag
        try:
            return _verified(name, source, path, expected_bytes(source, stated_hash(path) or etag), paths)
        except Differs as difference:
            report = f"{name}: {source.where()} is damaged: {difference} ({path})"
            discard(path, paths.own)
            if last:
                raise IntegrityError(
                    f"{report}\nit was downloaded twice and removed; nothing of it was loaded\n"
                    f"a proxy or mirror may alter files: try another network, then `maehub download {name}`"
                ) from None
            log.warning("%s; removed, fetching it once more", report)
    raise AssertionError("both tries return or raise")


def _verified(name: str, source: Source, path: Path, expected: Expected, paths: CachePaths) -> Fetched:
    """The file, or `Differs`."""
    snapshot = path.parents[source.filename.count("/")]
    revision = snapshot.name if source.kind == "hub" else ""
    return Fetched(name, path, source, revision, check(path, expected, paths.own, paths.verify))


def _check_pin(source: Source, stated: RemoteMetadata, label: DownloadLabel) -> None:
    """The Hub must state the commit and the hash that the catalog has."""
    commit = source.revision if COMMIT.fullmatch(source.revision) else source.commit
    if not stated.commit.startswith(commit):
        raise IntegrityError(
            f"the Hub answers with commit {stated.commit[:12]} of {label}, but {commit[:12]} was asked for\n"
            "nothing was downloaded; a mirror may be wrong: check HF_ENDPOINT"
        )
    if len(stated.etag) == 64 and not stated.etag.startswith(source.sha256):
        raise IntegrityError(
            f"the Hub states sha256 {stated.etag[:12]} for {label}, but the catalog has {source.sha256[:12]}\n"
            "nothing was downloaded; the file was replaced, or a mirror is wrong: update maehub or check HF_ENDPOINT"
        )


def cached_path(source: Source, paths: CachePaths) -> Path | None:
    """Where a source's file lies on this machine, None if it does not. Reads the Hub's cache without its client."""
    if source.kind == "package":
        path = Path(__file__).parents[1] / source.filename
    elif source.kind == "url":
        path = _url_path(source, paths)
    else:
        folder, commit = repo_folder(paths.hub, source.repo), source.revision or "main"
        if not COMMIT.fullmatch(commit):
            reference = folder / "refs" / commit
            commit = reference.read_text().strip() if reference.is_file() else ""
        if not commit or not commit.startswith(source.commit):
            return None
        path = folder / "snapshots" / commit / source.filename
    return path if path.is_file() else None


def _url_path(source: Source, paths: CachePaths) -> Path:
    address = urlsplit(source.url)
    return paths.own / "files" / address.netloc.replace(":", "_") / address.path.lstrip("/")


def not_here(name: str, source: Source, paths: CachePaths) -> HubError:
    """The error of an offline run that lacks a file."""
    what = source.url or f"{source.repo} {source.filename}"
    folder = paths.hub if source.kind == "hub" else paths.own
    return HubError(
        f"{name} is not on this machine, and this run is offline: {what} is not in {folder}\n"
        f"run `maehub download {name}` where there is a network, with the same HF_HOME and MAEHUB_CACHE"
    )
