"""Talking to the Hub and to other addresses: one file at a time, bounded waits, and errors that say what happened.

The Hub's client reports many different troubles in the same words. Here every one becomes a `HubError` of its own with
the status, the host and what to do next. No text holds a token or the signed part of an address.
"""

import errno
import logging
import os
import re
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

from maehub.errors import CheckpointError, HubError, IntegrityError, MaehubError
from maehub.files import atomic_write, byte_text, is_disk_full
from maehub.hub.disk_space import NoRoom, Wanted, check_room, disk_trouble, no_login
from maehub.version import __version__

if TYPE_CHECKING:
    import requests

logger = logging.getLogger("maehub")

TRIES = 4
LONGEST_WAIT = 60  # seconds; a server that asks for more is taken at its word and the run ends
SILENCE = 10  # seconds without a byte after which an address counts as dead
_CHUNK = 65_536  # bytes; what a broken connection loses at most
PASSING = {408, 429, 500, 502, 503, 504}  # statuses after which the same question may be answered
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO}
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_PLAIN = re.compile(r"\w[\w.+-]{0,127}")  # of commits and hashes, which become names in the cache
_LIBRARY: dict[str, Any] = {"library_name": "maehub", "library_version": __version__}


class NotThere(HubError):
    """The place answered that it does not have, or does not give, what was asked for."""


class NoFile(NotThere):
    """The repository is there and can be read, the file is not in it."""


class Unreachable(HubError):
    """The place did not answer, or not in a usable way; a copy on this machine may do."""


class Stated(NamedTuple):
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
    return constants


def endpoint() -> str:
    """The Hub's address: $HF_ENDPOINT as it is now, else what the client was imported with."""
    return (os.environ.get("HF_ENDPOINT") or str(hub_constants().ENDPOINT)).rstrip("/")


def ask_hub(repo: str, filename: str, revision: str, wanted: Wanted) -> Stated:
    """What the Hub states about a file; asks again where that may help, honouring Retry-After.

    Raises:
        NotThere: no such repository, revision or file, or no access to it.
        Unreachable: no answer, or a server error that stays.
        IntegrityError: the answer leads from https to http.
    """
    constants = hub_constants()
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    url = hf_hub_url(repo, filename, revision=revision, endpoint=endpoint())
    waited = 0.0
    for attempt in range(1, TRIES + 1):
        try:
            found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, endpoint=endpoint(), **_LIBRARY)
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            pause = _pause(status, error.response.headers, attempt)
            if status not in PASSING or attempt == TRIES or waited + pause > LONGEST_WAIT:
                raise _refused(error, repo, filename, revision, wanted) from error
        except httpx.RemoteProtocolError as error:
            pause = attempt
            if attempt == TRIES:
                raise _silent(error, url, wanted) from error
        except (httpx.HTTPError, OSError) as error:  # no network, no such host, a proxy's refusal, silence
            if isinstance(error, OSError) and error.filename:
                raise no_login(error) from error
            raise _silent(error, url, wanted) from error
        else:
            break
        logger.warning("%s: %s did not deliver, asking again in %g s", wanted, _host(url), pause)
        time.sleep(pause)
        waited += pause
    no_downgrade(url, found.location, wanted)
    if not _PLAIN.fullmatch(found.commit_hash or "") or not _PLAIN.fullmatch(found.etag or ""):
        raise Unreachable(
            f"{_host(url)} does not answer like a Hub for {wanted}: no commit or hash is stated\n"
            "a proxy or a login page may answer in its place; check HF_ENDPOINT and the network, then try again"
        )
    return Stated(str(found.commit_hash), str(found.etag), found.size)


def get_from_hub(repo: str, filename: str, commit: str, folder: Path, wanted: Wanted, size: int | None) -> Path:
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

    url = f"{endpoint()}/{repo}"
    try:
        path = hf_hub_download(
            *(repo, filename),
            revision=commit,
            local_dir=folder,
            cache_dir=folder,  # what lies in the cache is not to be copied
            endpoint=endpoint(),
            tqdm_class=CountingBar,
            **_LIBRARY,
        )
    except errors.HfHubHTTPError as error:
        raise _refused(error, repo, filename, commit, wanted) from error
    except errors.LocalEntryNotFoundError as error:  # the client's word for any trouble with its first question
        cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refused(cause, repo, filename, commit, wanted) from error
        raise _silent(cause, url, wanted) from error
    except httpx.HTTPError as error:
        raise _silent(error, url, wanted, f"{byte_text(received)} of {byte_text(size)} had come") from error
    except OSError as error:
        raise _local_trouble(error, folder.parent, wanted, received, size) from error
    except (ValueError, RuntimeError, errors.XetDownloadError) as error:  # a name it refuses; the Xet transfer
        if is_disk_full(error):
            raise disk_trouble(error, folder.parent, wanted, size) from error
        raise HubError(f"{wanted} could not be downloaded from {_host(url)}: {scrub(error)}") from error
    return Path(path)


def list_hub_files(repo: str, revision: str) -> list[str]:
    """Names in a repository, empty where they cannot be had: for texts and choices, never for paths.

    Raises:
        IntegrityError: a name that would leave the folder.
    """
    hub_constants()
    from huggingface_hub import HfApi

    try:
        names = list(HfApi(endpoint=endpoint(), **_LIBRARY).list_repo_files(repo, revision=revision))
    except Exception as error:  # the answer that led here is the one to report
        logger.debug("no file list of %s: %s", repo, scrub(error))
        return []
    for name in names:
        check_filename(name, repo)
    return names


def check_filename(name: str, repo: str) -> None:
    """Refuse a name in a repository that could lead out of the folder it is meant for."""
    parts = name.split("/")
    bad = not name or len(name) > 512 or re.search(r"[\x00-\x1f\x7f\\:]", name) is not None
    if bad or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError(
            f"{repo} names a file {name[:80]!r}, which could be written outside its folder; nothing was downloaded\n"
            "tell the owner of the repository; do not use it"
        )


def get_from_url(url: str, target: Path, wanted: Wanted) -> None:
    """Download to a temporary file beside ``target`` and leave it at ``target`` once it is whole.

    Raises:
        NotThere, Unreachable: as `ask_hub`.
        IntegrityError: a page instead of a file, or a way from https to http.
        CheckpointError: the disk is full or cannot be written.
    """
    import requests

    if urlsplit(url).scheme != "https" and urlsplit(url).hostname not in _LOOPBACK:
        raise IntegrityError(f"{wanted}: {_plain(url)} is not https, so what comes from it cannot be trusted")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary, requests.Session() as session, temporary.open("wb") as file:
            _stream(session, url, file, wanted)
    except (HubError, NoRoom):
        raise
    except OSError as error:
        raise _local_trouble(error, target.parent, wanted, 0, None) from error


def _stream(session: "requests.Session", url: str, file: BinaryIO, wanted: Wanted) -> None:
    """The body of an address into an open file; goes on where a connection broke if the server can."""
    import requests

    waited, total, reason = 0.0, None, ""
    for attempt in range(1, TRIES + 1):
        have, pause = file.tell(), float(attempt)
        headers = {"User-Agent": f"maehub/{__version__}", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}
        try:
            with session.get(url, headers=headers, stream=True, timeout=(SILENCE, SILENCE)) as answer:
                for step in (*answer.history, answer):
                    no_downgrade(url, urljoin(step.url, step.headers.get("Location", step.url)), wanted)
                if answer.status_code < 400:
                    total = _prepare(answer, file, wanted)
                    _take_body(answer, file, total, wanted)
                    return
                reason, pause = f"HTTP {answer.status_code}", _pause(answer.status_code, answer.headers, attempt)
                if answer.status_code not in PASSING or waited + pause > LONGEST_WAIT:
                    raise _no_file(answer, url, wanted)
        except (requests.ConnectionError, requests.Timeout) as error:
            if not file.tell():  # it never answered: no use in asking on
                raise _silent(error, url, wanted) from error
            reason = f"the connection went silent at {byte_text(file.tell())} of {byte_text(total)}"
        except requests.exceptions.ChunkedEncodingError:
            reason = f"the connection broke at {byte_text(file.tell())} of {byte_text(total)}"
        if attempt < TRIES:
            logger.warning("%s: %s, trying %s again in %g s", wanted, reason, _host(url), pause)
            time.sleep(pause)
            waited += pause
    raise Unreachable(
        f"download of {wanted} from {_host(url)} failed after {TRIES} tries: {reason}\n"
        "nothing half is kept; try again later"
    )


def _prepare(answer: "requests.Response", file: BinaryIO, wanted: Wanted) -> int | None:
    """Set the file to where the answer's bytes belong, behind what is there or at the start: its whole size."""
    if "text/html" in answer.headers.get("Content-Type", ""):
        raise IntegrityError(
            f"got {byte_text(len(answer.content))} of HTML from {_host(answer.url)} instead of {wanted}\n"
            "nothing is kept; a proxy or a login page answers in its place: sign in to the network, then try again"
        )
    if answer.status_code != 206:
        file.seek(0)
        file.truncate()
    length = answer.headers.get("Content-Length")
    if not length:
        return None
    check_room(Path(file.name).parent, int(length), wanted)
    return file.tell() + int(length)


def _take_body(answer: "requests.Response", file: BinaryIO, total: int | None, wanted: Wanted) -> None:
    from tqdm import tqdm

    with tqdm(desc=wanted.file, total=total, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
        for chunk in answer.iter_content(_CHUNK):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                os.truncate(file.fileno(), 0)  # it is given up, and what it took is free again
                raise disk_trouble(error, Path(file.name).parent, wanted, total) from error
            bar.update(len(chunk))


def no_downgrade(start: str, end: str, wanted: Wanted) -> None:
    """Refuse a way that began with https and leads to http."""
    if urlsplit(start).scheme == "https" and urlsplit(urljoin(start, end)).scheme != "https":
        raise IntegrityError(
            f"{_host(start)} sends {wanted} on to {_host(end)} without encryption (https to http); nothing was loaded\n"
            "a proxy may rewrite addresses; try another network or another HF_ENDPOINT"
        )


def scrub(error: BaseException | str) -> str:
    """One line of an error's text, without tokens and the signed parts of addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(/[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
    return re.sub(r"\b(hf_|api_)\w{8,}|(?i:bearer)\s+[^\s)]+", "(hidden)", text)[:300]


def _pause(status: int, headers: Any, attempt: int) -> float:
    """Seconds before the next try: what the server asks for in Retry-After, else one more each time."""
    asked = str(headers.get("Retry-After", "")).strip()
    return float(asked) if asked.isdigit() else float(attempt)


def _refused(error: Any, repo: str, filename: str, revision: str, wanted: Wanted) -> HubError:
    """The Hub's answer in words of its own for each kind."""
    from huggingface_hub import errors

    status, host = error.response.status_code, _host(endpoint())
    page = f"{endpoint()}/{repo}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return NotThere(
            f"{repo} on {host} is gated (HTTP {status}): its owner must let you in before {wanted} can be downloaded\n"
            f"accept the terms at {page}, then run `hf auth login` or set HF_TOKEN"
        )
    if status == 401:
        return NotThere(
            f"{host} wants a login for {repo} (HTTP 401): it is private, or there is no such repository\n"
            f"check the name at {page}; if it is private, run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        known = ", ".join(_revisions(repo)) or "not to be had"
        return NotThere(f"{repo} on {host} has no revision {revision!r} (HTTP 404)\nknown revisions: {known}")
    if isinstance(error, errors.EntryNotFoundError):
        names = list_hub_files(repo, revision)
        known = ", ".join(names[:12]) + (" …" if len(names) > 12 else "") if names else "not to be had"
        return NoFile(f"{repo}@{revision[:12]} on {host} has no file {filename!r} (HTTP 404)\nits files: {known}")
    if status in (404, 410):
        return NotThere(f"there is no repository {repo} on {host} (HTTP {status})\ncheck the name; see {page}")
    if status == 429:
        asked = str(error.response.headers.get("Retry-After", "")).strip()
        told = f"; it asks to wait {asked} s" if asked.isdigit() else ""
        return Unreachable(f"{host} limits requests (HTTP 429) for {wanted}{told}\nwait, or log in: `hf auth login`")
    return Unreachable(
        f"{host} answered with HTTP {status} for {wanted}\nthe fault is there; nothing half is kept; try again later"
    )


def _no_file(answer: "requests.Response", url: str, wanted: Wanted) -> HubError:
    status = answer.status_code
    if status in (401, 403, 404, 410):
        return NotThere(f"{_plain(url)} is not there (HTTP {status}), so {wanted} cannot be had from it")
    return Unreachable(f"{_host(url)} answered with HTTP {status} for {wanted}\nnothing half is kept; try again later")


def _revisions(repo: str) -> list[str]:
    from huggingface_hub import HfApi

    try:
        refs = HfApi(endpoint=endpoint(), **_LIBRARY).list_repo_refs(repo)
    except Exception as error:  # the answer that led here is the one to report
        logger.debug("no revisions of %s: %s", repo, scrub(error))
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)][:12]


def _silent(error: BaseException, url: str, wanted: Wanted, progress: str = "") -> HubError:
    """No answer, or none any more."""
    name, host, had = type(error).__name__, _host(url), f"; {progress}" if progress else ""
    advice = f"nothing half is kept; check the network, or run `maehub download {wanted.name}` where there is one"
    if "Timeout" in name or isinstance(error, TimeoutError):
        limit = hub_constants().HF_HUB_DOWNLOAD_TIMEOUT if progress else hub_constants().HF_HUB_ETAG_TIMEOUT
        limit = SILENCE if "requests" in type(error).__module__ else limit
        return Unreachable(f"no data for {limit:g} s from {host} for {wanted}{had}\n{advice}")
    if "Offline" in name:
        return Unreachable(f"{wanted} is not on this machine, and HF_HUB_OFFLINE is set\n{advice}")
    if progress:
        return Unreachable(
            f"download of {wanted} from {host} stopped after repeated tries{had}: {scrub(error)}\n{advice}"
        )
    system = re.search(r"\[Errno -?\d+\] [\w ]+", str(error))  # the kernel's words, without the wrapping around them
    return Unreachable(f"{host} cannot be reached for {wanted}: {system[0] if system else scrub(error)}\n{advice}")


def _local_trouble(error: OSError, folder: Path, wanted: Wanted, received: int, size: int | None) -> MaehubError:
    """An OSError of a download: the disk, or a body of the wrong length."""
    cause = error.__cause__ if isinstance(error, CheckpointError) else error  # `atomic_write` has words of its own
    if isinstance(cause, OSError) and (is_disk_full(cause) or cause.errno in _NOT_WRITABLE):
        return disk_trouble(cause, folder, wanted, size)
    if size is not None and received != size:
        return IntegrityError(
            f"got {byte_text(received)} instead of {byte_text(size)} for {wanted}; nothing is kept\n"
            "a proxy or a login page (HTML) may answer in the server's place; sign in to the network, then try again"
        )
    return HubError(f"{wanted} could not be downloaded: {scrub(error)}\nnothing half is kept; try again")


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2] or url


def _plain(url: str) -> str:
    return url.partition("?")[0]
