"""Files from plain addresses: resumed where a connection broke, and never a page in their place."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urljoin, urlsplit

from maehub.errors import HubError, IntegrityError
from maehub.files import atomic_write, byte_text
from maehub.hub import client
from maehub.hub.deadlines import CHUNK, Unreachable, bound
from maehub.version import __version__

if TYPE_CHECKING:
    import requests

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def get_from_url(url: str, target: Path, label: client.DownloadLabel) -> None:
    """Download to a temporary file beside ``target`` and leave it at ``target`` once it is whole.

    Errors are those of `maehub.hub.client.get_from_hub`; IntegrityError also for a page instead of a file.
    """
    import requests

    if urlsplit(url).scheme != "https" and urlsplit(url).hostname not in _LOOPBACK:
        raise IntegrityError(f"{label}: {url.partition('?')[0]} is not https, so what comes from it cannot be trusted")
    try:
        with atomic_write(target, True) as temporary, requests.Session() as session, temporary.open("wb") as file:
            _stream(session, url, file, label)
    except (HubError, client.NoDiskSpace):
        raise
    except OSError as error:
        raise client.local_trouble(error, target.parent, label, 0, None) from error


def _stream(session: "requests.Session", url: str, file: BinaryIO, label: client.DownloadLabel) -> None:
    """The body of an address into an open file; goes on where a connection broke if the server can."""
    import requests

    total, tries, received = None, 0, 0

    def receive() -> None:
        nonlocal total, tries, received
        tries += 1
        headers = {"User-Agent": f"maehub/{__version__}", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={file.tell()}-"} if file.tell() else {}
        with session.get(url, headers=headers, stream=True, timeout=(client.SILENCE, client.SILENCE)) as answer:
            for step in (*answer.history, answer):
                client.no_downgrade(url, urljoin(step.url, step.headers.get("Location", step.url)), label)
            if answer.status_code not in (200, 206):  # an interim answer too, which the client takes for the whole
                raise requests.HTTPError(response=answer)
            total = _prepare(answer, file, label)
            for size in _take_body(answer, file, total, label):
                received += size

    def broke(error: Exception) -> bool:
        silent = isinstance(error, requests.ConnectionError | requests.Timeout)
        return isinstance(error, requests.exceptions.ChunkedEncodingError) or (silent and file.tell() > 0)

    def passes(error: Exception) -> bool:  # where nothing ever came, there is no use in asking on
        return broke(error) if (status := client.status_of(error)) is None else status in client.PASSING

    def reason(error: Exception) -> str:
        if (status := client.status_of(error)) is not None:
            return f"HTTP {status}"
        verb = "broke" if isinstance(error, requests.exceptions.ChunkedEncodingError) else "went silent"
        return f"the connection {verb} at {byte_text(file.tell())} of {byte_text(total)}"

    try:
        ask = partial(bound, receive, client.host_of(url), f" for {label}", lambda: received)
        client.retry(ask, lambda error: f"{label}: {reason(error)}, trying {client.host_of(url)} again", passes)
    except requests.RequestException as error:
        status = client.status_of(error)
        if status in (401, 403, 404, 410):
            place = url.partition("?")[0]
            raise client.NotThere(f"{place} is not there (HTTP {status}), so {label} cannot be had from it") from error
        if broke(error) or (status in client.PASSING and tries == client.TRIES):
            said = f"download of {label} from {client.host_of(url)} failed after {tries} tries: {reason(error)}"
        elif status is not None:
            said = client.why(error, client.host_of(url), f" for {label}")
        elif isinstance(error, requests.ConnectionError | requests.Timeout):
            raise client.no_answer(error, url, label) from error
        else:
            raise
        raise Unreachable(f"{said}\nnothing half is kept; try again later") from error


def _prepare(answer: "requests.Response", file: BinaryIO, label: client.DownloadLabel) -> int | None:
    """Set the file to where the answer's bytes belong, behind what is there or at the start: its whole size."""
    if "text/html" in answer.headers.get("Content-Type", ""):
        raise IntegrityError(
            f"got {byte_text(len(answer.content))} of HTML from {client.host_of(answer.url)} instead of {label}\n"
            "nothing is kept; a proxy or a login page answers in its place: sign in to the network, then try again"
        )
    if answer.status_code != 206:
        file.seek(0)
        file.truncate()
    length = answer.headers.get("Content-Length")
    if not length:
        return None
    client.check_disk_space(Path(file.name).parent, int(length), label)
    return file.tell() + int(length)


def _take_body(
    answer: "requests.Response", file: BinaryIO, total: int | None, label: client.DownloadLabel
) -> Iterator[int]:
    """Write what comes, and say how many bytes, a piece at a time."""
    from tqdm import tqdm

    with tqdm(desc=label.file, total=total, initial=file.tell(), unit="B", unit_scale=True, disable=None) as bar:
        for chunk in answer.iter_content(CHUNK):
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                os.truncate(file.fileno(), 0)  # it is given up, and what it took is free again
                raise client.disk_trouble(error, Path(file.name).parent, label, total) from error
            bar.update(len(chunk))
            yield len(chunk)
