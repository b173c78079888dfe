"""Talking to the Hub and to other servers, down and up: tries that end, bounded waits, errors that say what happened.

The Hub's client reports many different troubles in the same words. Here every one becomes a `HubError` of its own with
the status, the host and what to do next. No text holds a token or the signed part of an address.
"""

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from maehub.errors import CheckpointError, HubError, IntegrityError, MaehubError, first_names, log
from maehub.files import byte_text, free_bytes, is_disk_full
from maehub.hub.deadlines import CHUNK, Answer, Unreachable, bound
from maehub.version import __version__

TRIES = 4
LONGEST_WAIT = 60  # seconds; a server that asks for more is taken at its word and the run ends
SILENCE = 10  # seconds without a byte after which an address counts as dead
UPLOAD_SILENCE = 60  # seconds without a byte after which an upload or a commit counts as lost
PASSING = {408, 429, 500, 502, 503, 504}  # statuses after which the same question may be answered
LIBRARY: dict[str, Any] = {"library_name": "maehub", "library_version": __version__}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO}
_PLAIN = re.compile(r"\w[\w.+-]{0,127}")  # of commits and hashes, which become names in the cache


class DownloadLabel(NamedTuple):
    """What is being fetched, for texts: a catalog name or Hub id, and the file."""

    name: str
    file: str

    def __str__(self) -> str:
        return f"{self.name} ({self.file})"


class NotThere(HubError):
    """The place answered that it does not have, or does not give, what was asked for."""


class NoFile(NotThere):
    """The repository is there and can be read, the file is not in it."""


class NoDiskSpace(CheckpointError):
    """The disk below a cache is full, or the cache may not be written."""


class RemoteMetadata(NamedTuple):
    """What the Hub says about a file before sending it."""

    commit: str
    etag: str  # sha256 of a large file, git's sha1 of a small one
    size: int | None


def hub_constants() -> ModuleType:
    """The constants of the Hub's client, imported at first use.

    The client reads its settings when it is imported. It is told then that nothing about this machine is to be sent
    along, unless the user has set HF_HUB_DISABLE_TELEMETRY; the environment is left as it was.
    """
    own = "HF_HUB_DISABLE_TELEMETRY" not in os.environ
    if own:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from huggingface_hub import constants
    finally:
        if own:
            del os.environ["HF_HUB_DISABLE_TELEMETRY"]
    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, CHUNK)  # how often it says what has come
    return constants


def endpoint() -> str:
    """The Hub's address: $HF_ENDPOINT as it is now, else what the client was imported with."""
    return (os.environ.get("HF_ENDPOINT") or str(hub_constants().ENDPOINT)).rstrip("/")


def host_of(url: str) -> str:
    """The host and port of an address, without a login."""
    return urlsplit(url).netloc.rpartition("@")[2] or url


def may_pass(error: Exception) -> bool:
    """Whether the same question may be answered a moment later: not if nobody ever answered."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if (status := status_of(error)) is not None:
        return status in PASSING
    broke = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
    return broke and not isinstance(error, httpx.ConnectError)


def retry(
    call: Callable[[], Answer], tell: Callable[[Exception], str], passes: Callable[[Exception], bool] = may_pass
) -> Answer:
    """The answer to what may be asked more than once, honouring Retry-After; the last error where there is none.

    ``tell`` says for the log what is done after an error; the pause is added.
    """
    waited = 0.0
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            asked = _asked_wait(error)
            pause = float(attempt if asked is None else asked)
            if not passes(error) or attempt == TRIES or waited + pause > LONGEST_WAIT:
                raise
            log.warning("%s in %g s", tell(error), pause)
        time.sleep(pause)
        waited += pause
    raise AssertionError("the last try returns or raises")


def _asked_wait(error: BaseException) -> int | None:
    """The seconds that a server asks for in Retry-After; None where it does not."""
    asked = str(getattr(_answer(error), "headers", {}).get("Retry-After", "")).strip()
    return int(asked) if asked.isdigit() else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    below: BaseException | None = error
    while below is not None:
        yield below
        below = below.__cause__


def root(error: BaseException) -> BaseException:
    """The answer or the broken connection below what the client makes of it."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return next((one for one in causes(error) if isinstance(one, httpx.HTTPError)), error)


def _answer(error: BaseException) -> Any:
    answers = (getattr(one, "response", None) for one in causes(error))
    return next((answer for answer in answers if answer is not None), None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error tells of; None where there was no answer."""
    answer = _answer(error)
    return None if answer is None else int(answer.status_code)


def why(error: BaseException, host: str, about: str = "") -> str:
    """What came of a question: a status, nothing within a time, or the system's words."""
    if (status := status_of(error)) is not None:
        return f"{host} answered with HTTP {status}{about}"
    if "Timeout" in type(error).__name__:
        # of the question that timed out; requests, which asks plain addresses, does not keep it
        limits = getattr(getattr(error, "request", None), "extensions", {}).get("timeout", {})
        return f"no data for {float(limits.get('read') or SILENCE):g} s from {host}{about}"
    system = re.search(r"\[Errno -?\d+\] [\w ]+", str(error))  # the kernel's words, without the wrapping around them
    return f"{host} cannot be reached{about}: {system[0] if system else scrub(error)}"


def scrub(error: BaseException | str) -> str:
    """One line of an error's text, without tokens and the signed parts of addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(/[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
    return re.sub(r"\b(hf_|api_)\w{8,}|(?i:bearer)\s+[^\s)]+", "(hidden)", text)[:300]


def remote_metadata(repo: str, filename: str, revision: str, label: DownloadLabel) -> RemoteMetadata:
    """What the Hub states about a file: NotThere, Unreachable, or IntegrityError where it leads from https to http."""
    constants = hub_constants()
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    url = hf_hub_url(repo, filename, revision=revision, endpoint=endpoint())
    try:
        ask = partial(get_hf_file_metadata, url, timeout=constants.HF_HUB_ETAG_TIMEOUT, endpoint=endpoint(), **LIBRARY)
        stated = retry(
            lambda: bound(ask, host_of(url), f" for {label}"),
            lambda _: f"{label}: {host_of(url)} did not deliver, asking again",
        )
    except HubError:
        raise
    except (httpx.HTTPError, OSError) as error:  # no network, no such host, a proxy's refusal, silence
        if status_of(error) is not None:
            raise _refused(error, repo, filename, revision, label) from error
        if isinstance(error, OSError) and error.filename:
            raise no_login(error) from error
        raise no_answer(error, url, label) from error
    no_downgrade(url, stated.location, label)
    if not _PLAIN.fullmatch(stated.commit_hash or "") or not _PLAIN.fullmatch(stated.etag or ""):
        raise Unreachable(
            f"{host_of(url)} does not answer like a Hub for {label}: no commit or hash is stated\n"
            "a proxy or a login page may answer in its place; check HF_ENDPOINT and the network, then try again"
        )
    return RemoteMetadata(str(stated.commit_hash), str(stated.etag), stated.size)


def get_from_hub(repo: str, filename: str, commit: str, folder: Path, label: DownloadLabel, size: int | None) -> Path:
    """Download below ``folder``, which nobody else uses: the path there. The client retries within one call."""
    hub_constants()
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import httpx, tqdm  # type: ignore[attr-defined]

    received = 0

    class CountingBar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            nonlocal received
            received += int(n or 0)
            return super().update(n)

    ask = partial(
        hf_hub_download,
        *(repo, filename),
        revision=commit,
        local_dir=folder,
        cache_dir=folder,  # what lies in the cache is not to be copied
        endpoint=endpoint(),
        tqdm_class=CountingBar,
        **LIBRARY,
    )
    try:
        return Path(bound(ask, host_of(endpoint()), f" for {label}", lambda: received))
    except HubError:
        raise
    except (httpx.HTTPError, OSError, ValueError, RuntimeError, errors.XetDownloadError) as error:
        url, first = f"{endpoint()}/{repo}", isinstance(error, errors.LocalEntryNotFoundError)
        if status_of(error) is not None:
            raise _refused(root(error), repo, filename, commit, label) from error
        if first:  # the client's word for any trouble with its first question
            raise no_answer(error.__cause__ or error, url, label) from error
        if isinstance(error, httpx.HTTPError):
            progress = f"{byte_text(received)} of {byte_text(size)} had come"
            raise no_answer(error, url, label, progress) from error
        if isinstance(error, OSError):
            raise local_trouble(error, folder.parent, label, received, size) from error
        if is_disk_full(error):
            raise disk_trouble(error, folder.parent, label, size) from error
        raise HubError(f"{label} could not be downloaded from {host_of(url)}: {scrub(error)}") from error


def list_hub_files(repo: str, revision: str) -> list[str]:
    """Names in a repository, empty where they cannot be had: for texts and choices, never for paths.

    An IntegrityError is raised for a name that would leave the folder.
    """
    names = _listed(repo, lambda api: api.list_repo_files(repo, revision=revision))
    for name in names:
        check_filename(name, repo)
    return names


def _listed(repo: str, ask: Callable[[Any], Iterable[Any]]) -> list[Any]:
    hub_constants()
    from huggingface_hub import HfApi

    try:
        return bound(lambda: list(ask(HfApi(endpoint=endpoint(), **LIBRARY))), host_of(endpoint()))
    except Exception as error:  # the answer that led here is the one to report
        log.debug("no list of what is in %s: %s", repo, scrub(error))
        return []


def check_filename(name: str, repo: str) -> None:
    """Refuse a name in a repository that could lead out of the folder it is meant for."""
    parts = name.split("/")
    bad = not name or len(name) > 512 or re.search(r"[\x00-\x1f\x7f\\:]", name) is not None
    if bad or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError(
            f"{repo} names a file {name[:80]!r}, which could be written outside its folder; nothing was downloaded\n"
            "tell the owner of the repository; do not use it"
        )


def no_downgrade(start: str, end: str, label: DownloadLabel) -> None:
    """Refuse a way that began with https and leads to http."""
    if urlsplit(start).scheme == "https" and urlsplit(urljoin(start, end)).scheme != "https":
        raise IntegrityError(
            f"{host_of(start)} sends {label} on to {host_of(end)} without encryption (https to http); "
            "nothing was loaded\n"
            "a proxy may rewrite addresses; try another network or another HF_ENDPOINT"
        )


def no_login(error: OSError) -> CheckpointError:
    """The error to raise, from ``error``, where the file that keeps a login may not be read."""
    return CheckpointError(
        f"{error.filename} cannot be read: {error.strerror}; the Hub's client looks there for a login\n"
        "set HF_HOME to a folder of your own, or HF_TOKEN_PATH to a file of your own"
    )


def no_answer(error: BaseException, url: str, label: DownloadLabel, progress: str = "") -> HubError:
    """The error to raise, from ``error``, where a download got no answer, or none any more."""
    name, host, had = type(error).__name__, host_of(url), f"; {progress}" if progress else ""
    advice = f"nothing half is kept; check the network, or run `maehub download {label.name}` where there is one"
    if "Offline" in name:
        reason = f"{label} is not on this machine, and HF_HUB_OFFLINE is set"
    elif progress and "Timeout" not in name:
        reason = f"download of {label} from {host} stopped after repeated tries{had}: {scrub(error)}"
    else:
        reason = why(error, host, f" for {label}") + had
    return Unreachable(f"{reason}\n{advice}")


def _refused(error: Any, repo: str, filename: str, revision: str, label: DownloadLabel) -> HubError:
    """The Hub's answer in words of its own for each kind."""
    from huggingface_hub import errors

    status, host, page = status_of(error), host_of(endpoint()), f"{endpoint()}/{repo}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return NotThere(
            f"{repo} on {host} is gated (HTTP {status}): its owner must let you in before {label} can be downloaded\n"
            f"accept the terms at {page}, then run `hf auth login` or set HF_TOKEN"
        )
    if status == 401:
        return NotThere(
            f"{host} wants a login for {repo} (HTTP 401): it is private, or there is no such repository\n"
            f"check the name at {page}; if it is private, run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        answers = _listed(repo, lambda api: [api.list_repo_refs(repo)])
        names = [one.name for refs in answers for one in (*refs.branches, *refs.tags)]
        known = first_names(names, 12) or "not to be had"
        return NotThere(f"{repo} on {host} has no revision {revision!r} (HTTP 404)\nknown revisions: {known}")
    if isinstance(error, errors.EntryNotFoundError):
        known = first_names(list_hub_files(repo, revision), 12) or "not to be had"
        return NoFile(f"{repo}@{revision[:12]} on {host} has no file {filename!r} (HTTP 404)\nits files: {known}")
    if status in (404, 410):
        return NotThere(f"there is no repository {repo} on {host} (HTTP {status})\ncheck the name; see {page}")
    if status == 429:
        asked = _asked_wait(error)
        told = "" if asked is None else f"; it asks to wait {asked} s"
        return Unreachable(f"{host} limits requests (HTTP 429) for {label}{told}\nwait, or log in: `hf auth login`")
    return Unreachable(
        f"{why(error, host, f' for {label}')}\nthe fault is there; nothing half is kept; try again later"
    )


def local_trouble(error: OSError, folder: Path, label: DownloadLabel, received: int, size: int | None) -> MaehubError:
    """The error to raise, from ``error``, of a download: the disk, or a body of the wrong length."""
    cause = error.__cause__ if isinstance(error, CheckpointError) else error  # `atomic_write` has words of its own
    if isinstance(cause, OSError) and (is_disk_full(cause) or cause.errno in _NOT_WRITABLE):
        return disk_trouble(cause, folder, label, size)
    if size is not None and received != size:
        return IntegrityError(
            f"got {byte_text(received)} instead of {byte_text(size)} for {label}; nothing is kept\n"
            "a proxy or a login page (HTML) may answer in the server's place; sign in to the network, then try again"
        )
    return HubError(f"{label} could not be downloaded: {scrub(error)}\nnothing half is kept; try again")


def check_disk_space(folder: Path, needed: int | None, label: DownloadLabel) -> None:
    """Refuse before a download below ``folder`` what will not fit, in bytes; None where the size is unknown."""
    if needed is not None and free_bytes(folder) < needed:
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
        f"{label} needs {byte_text(needed)}, {byte_text(free_bytes(folder))} free at {folder}\n"
        f"{kept}; free some space (`maehub cache clean` removes what killed downloads left), or take another disk:\n"
        f"set HF_HOME (MAEHUB_CACHE for official files), or `maehub download {label.name} --cache-dir FOLDER`"
    )
