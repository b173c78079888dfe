"""A repository on the Hub as it is before and after publishing: who asks, what is there, and is it what was sent?

Nothing here changes anything on the Hub. The Hub's client waits without end for most of its answers and reports many
troubles in the same words; `Hub` bounds the waits, asks again where that may help, and says what happened. No text
holds a token.
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from maehub.errors import CheckpointError, HubError, IntegrityError, UsageError
from maehub.files import byte_text
from maehub.hub import LONGEST_WAIT, PASSING, TRIES, digest, hub_constants, no_login, scrub
from maehub.hub import endpoint as hub_address
from maehub.version import __version__

logger = logging.getLogger("maehub")
Answer = TypeVar("Answer")
UNTOUCHED = "nothing was published"
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")


class LocalFile(NamedTuple):
    """A file that is to be published, and what it was found to be; it must stay so until it is."""

    path: Path
    size: int  # bytes
    sha256: str


class RemoteFile(NamedTuple):
    """What the Hub states about a file; it has one of the two hashes."""

    size: int  # bytes
    sha256: str  # of a large file, 64 hexadecimal digits; empty for others
    git: str  # of a small file, the sha1 that git counts with, 40 hexadecimal digits; empty for others


class Remote(NamedTuple):
    """A repository as it is now, and who looked."""

    repo_id: str
    user: str
    exists: bool
    private: bool | None  # None where there is no repository
    revision: str  # the branch that was asked for
    has_revision: bool  # False where the branch is still to be made: the rest is of the main branch then
    commit: str  # the head, 40 hexadecimal digits; empty where there is no repository
    files: dict[str, RemoteFile]
    licence: str  # what the card states there, empty where it states none


def look(
    repo_id: str,
    *,
    revision: str = "main",
    pull_request: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Remote:
    """A repository before anything is hashed or sent to it, and whether the token may write there.

    Args:
        repo_id: ``user/name``; it need not exist.
        revision: the branch that is to be written; it need not exist.
        pull_request: the writing is to be proposed only, which needs no right to write there.
        token: a token of the Hub; None is that of the login, or $HF_TOKEN.
        endpoint: address of the Hub; None is $HF_ENDPOINT, else the Hub's own.

    Raises:
        UsageError: not a name of a repository, or ``revision`` is no branch.
        HubError: no token, or one that may not write there, or no answer.
        CheckpointError: the file that keeps the login cannot be read.
    """
    hub = Hub(repo_id, token, endpoint)
    try:
        identity = hub.ask("the question whose token it is", hub.api.whoami)
    except HubError as error:
        if status_of(error) != 401:
            raise
        raise HubError(
            f"{hub.host} does not accept the token (HTTP 401): it was revoked, or belongs to another Hub\n"
            f"nothing was sent; `hf auth login` takes another, from {hub.endpoint}/settings/tokens"
        ) from error.__cause__
    user = str(identity.get("name", "?"))
    access = (identity.get("auth") or {}).get("accessToken") or {}
    whose = f"the token {hub.hide(str(access.get('displayName') or ''))!r} of {user}"
    if access.get("role") == "read":
        raise hub.no_right(f"{whose} may only read")
    found = state(hub, revision)._replace(user=user)
    if not found.exists:
        _check_owner(hub, identity, access, whose)
    elif not pull_request:
        _check_writing(hub, whose)
    return found


def verify_remote(
    repo_id: str,
    commit: str,
    files: Mapping[str, LocalFile],
    *,
    token: str | None = None,
    endpoint: str | None = None,
) -> None:
    """Compare what the Hub states about each file at a commit with the files that were to be there.

    Raises:
        IntegrityError: a file is missing or another one; the text names each.
        HubError: the Hub does not say.
    """
    hub = Hub(repo_id, token, endpoint)
    safe = f"the commit {commit[:12]} was made; whether it holds the right bytes is not known"
    listed = hub.ask(
        f"reading {repo_id}@{commit[:12]} back",
        lambda: hub.api.get_paths_info(repo_id, list(files), revision=commit),
        safe,
    )
    stated = {one.path: _stated(one) for one in listed if hasattr(one, "blob_id")}
    other = [name for name, file in files.items() if not same(file, stated.get(name))]
    wrong = [f"{name}: {_difference(files[name], stated.get(name))}" for name in other]
    if wrong:
        rest = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise IntegrityError(
            f"{repo_id}@{commit[:12]} on {hub.host} does not hold what was sent: {'; '.join(wrong[:3])}{rest}\n"
            "the files here are unchanged; nobody should load that commit: run this again, and tell the Hub if it stays"
        )


def same(file: LocalFile, stated: RemoteFile | None) -> bool:
    """Whether a file on the Hub has the bytes of one here."""
    if stated is None or stated.size != file.size:
        return False
    if stated.sha256:
        return stated.sha256 == file.sha256
    try:
        found = digest(file.path, "git")
    except OSError as error:
        raise unreadable(file.path, error) from error
    return (found.sha256, found.other) == (file.sha256, stated.git)


def state(hub: "Hub", revision: str) -> Remote:
    """What is in a repository at the head of a branch; `Remote.user` stays empty."""
    from huggingface_hub import errors

    if _FULL_COMMIT.fullmatch(revision):
        raise UsageError(f"{revision} is a commit, and a commit is never changed: give a branch to publish to")
    nothing = Remote(hub.repo_id, "", False, None, revision, True, "", {}, "")
    branch = "main"
    try:
        if revision != "main":
            refs = hub.ask("the question for the branches", lambda: hub.api.list_repo_refs(hub.repo_id))
            if revision in [tag.name for tag in refs.tags]:
                raise UsageError(f"{revision!r} is a tag of {hub.repo_id}, which stays where it is: give a branch")
            branch = revision if revision.startswith("refs/pr/") else "main"
            branch = revision if revision in [one.name for one in refs.branches] else branch
        info = hub.ask(f"the look at {hub.repo_id}", lambda: hub.info(branch))
    except HubError as error:
        missing = isinstance(error.__cause__, errors.RepositoryNotFoundError)
        if missing and not isinstance(error.__cause__, errors.GatedRepoError):
            return nothing
        raise
    commit = str(info.sha or "")
    if not _FULL_COMMIT.fullmatch(commit):
        raise HubError(f"{hub.host} does not answer like a Hub for {hub.repo_id}: no commit is stated\n{UNTOUCHED}")
    licence = getattr(info.card_data, "license", None) or ""
    return nothing._replace(
        exists=True,
        private=bool(info.private),
        has_revision=branch == revision,
        commit=commit,
        files={one.rfilename: _stated(one) for one in info.siblings or []},
        licence=", ".join(licence) if isinstance(licence, list) else str(licence),
    )


def check_name(repo_id: str) -> None:
    """Refuse what cannot be ``user/name``, by a UsageError; nothing is asked."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id[:100]!r} cannot be a repository: {scrub(error)}") from error
    if "/" not in repo_id:
        raise UsageError(f"{repo_id!r} names no owner: write it as user/name")


class Hub:
    """The Hub's client for one repository and one token: waits that end, second tries, errors in words."""

    def __init__(self, repo_id: str, token: str | None, endpoint: str | None) -> None:
        constants = hub_constants()
        from huggingface_hub import HfApi, get_token

        check_name(repo_id)
        self.repo_id = repo_id
        self.endpoint = (endpoint or hub_address()).rstrip("/")
        self.host = urlsplit(self.endpoint).netloc.rpartition("@")[2] or self.endpoint
        self.patience = float(constants.HF_HUB_ETAG_TIMEOUT)  # seconds without an answer to a question
        try:
            self.token = token or get_token() or ""
        except OSError as error:
            raise no_login(error) from error
        login = f"run `hf auth login` or set HF_TOKEN, with a token that may write: {self.endpoint}/settings/tokens"
        if not self.token:
            raise HubError(f"there is no token for {self.host}, and publishing to {repo_id} needs one\n{login}")
        if not re.fullmatch(r"[!-~]+", self.token):  # the client's own error would show it
            raise HubError(f"the token for {self.host} has a blank or a letter that no token has\n{login}")
        self.api = HfApi(self.endpoint, self.token, library_name="maehub", library_version=__version__)

    def ask(self, doing: str, call: Callable[[], Answer], safe: str = UNTOUCHED) -> Answer:
        """The answer to a question that may be asked more than once.

        Args:
            doing: what it is for, for texts.
            call: asks.
            safe: what is known to be so if there is no answer.

        Raises:
            HubError: none came, or a refusal.
        """
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        waited = 0.0
        for attempt in range(1, TRIES + 1):
            try:
                with self.bounded(self.patience):
                    return call()
            except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
                pause = pause_after(error, attempt)
                if not _may_pass(error) or attempt == TRIES or waited + pause > LONGEST_WAIT:
                    raise self.trouble(error, doing, safe) from error
                logger.warning("%s: %s did not deliver, asking again in %g s", doing, self.host, pause)
            time.sleep(pause)
            waited += pause
        raise AssertionError("the last try returns or raises")

    def info(self, revision: str) -> Any:
        """The Hub's facts about the repository at a revision, with those of its files."""
        return self.api.model_info(self.repo_id, revision=revision, files_metadata=True, timeout=self.patience)

    @contextlib.contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Let the client wait that long for the next byte, unless the user has given it a limit of its own."""
        from huggingface_hub.utils import get_session, httpx  # type: ignore[attr-defined]

        session = get_session()
        before = session.timeout
        if before == httpx.Timeout(None):
            session.timeout = httpx.Timeout(seconds)
        try:
            yield
        finally:
            session.timeout = before

    def trouble(self, error: BaseException, doing: str, safe: str = UNTOUCHED) -> HubError:
        """The error to raise, from ``error``: what was done, why it failed, what is safe, what to do next."""
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        reason, status = root(error), status_of(error)
        advice = "check the network, then run this again"
        if status is not None:
            told = getattr(reason, "server_message", None)
            said = scrub(told) if told else ""
            why = f"{self.host} answered with HTTP {status}{': ' if said else ''}{said}"
            advice = "the fault is there; run this again later" if status >= 500 else "look at what it says"
            if status in (401, 403):
                advice = f"see what the token may do at {self.endpoint}/settings/tokens; `hf auth login` takes another"
            if status == 429:
                advice = "it limits requests: wait, then run this again"
        elif "Offline" in type(reason).__name__:
            why, advice = "HF_HUB_OFFLINE is set", "unset it where there is a network"
        elif isinstance(reason, httpx.TimeoutException):
            why = f"no data for {_limit(reason):g} s from {self.host}"
        elif isinstance(reason, httpx.ConnectError):
            system = re.search(r"\[Errno -?\d+\] [\w ]+", str(reason))
            why = f"{self.host} cannot be reached: {system[0] if system else scrub(reason)}"
        elif isinstance(reason, httpx.HTTPError):
            why = f"the connection to {self.host} broke: {scrub(reason)}"
        elif isinstance(reason, OSError | RuntimeError):  # of the Xet transfer, which has no kinds of its own
            why, advice = f"the transfer stopped: {scrub(reason)}", f"{advice}; HF_HUB_DISABLE_XET=1 sends without Xet"
        else:
            why = f"{self.host} does not answer like a Hub: {scrub(reason)}"
        return HubError(self.hide(f"{doing} failed: {why}\n{safe}; {advice}"))

    def no_right(self, why: str) -> HubError:
        """The error to raise where the token is known and may not write."""
        return HubError(
            f"{why}, so it cannot publish to {self.repo_id} on {self.host}; nothing was sent\n"
            f"make one that may at {self.endpoint}/settings/tokens, then `hf auth login` or set HF_TOKEN"
        )

    def hide(self, text: str) -> str:
        """A text without the token."""
        return text.replace(self.token, "(hidden)")


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


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error tells of; None where there was no answer."""
    answer = getattr(root(error), "response", None)
    return int(answer.status_code) if answer is not None else None


def pause_after(error: BaseException, attempt: int) -> float:
    """Seconds before the next try: what the server asks for in Retry-After, else one more each time."""
    answer = getattr(root(error), "response", None)
    asked = str(answer.headers.get("Retry-After", "")).strip() if answer is not None else ""
    return float(asked) if asked.isdigit() else float(attempt)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error to raise, from ``error``, where a file of the model cannot be read."""
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}; {UNTOUCHED}")


def _may_pass(error: BaseException) -> bool:
    """Whether the same question may be answered a moment later: not if nobody ever answered."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if (status := status_of(error)) is not None:
        return status in PASSING
    broke = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
    return broke and not isinstance(error, httpx.ConnectError)


def _limit(error: Any) -> float:
    """The wait that a timeout ended, in seconds."""
    limits = error.request.extensions.get("timeout", {})
    return float(limits.get("read") or 0)


def _check_owner(hub: Hub, identity: dict[str, Any], access: dict[str, Any], whose: str) -> None:
    """Refuse to make a repository where the token's owner has none."""
    owner = hub.repo_id.partition("/")[0]
    own = {str(identity.get("name")): "admin"}
    own |= {str(one.get("name")): str(one.get("roleInOrg", "write")) for one in identity.get("orgs") or []}
    if own.get(owner, "read") == "read":
        names = ", ".join(name for name, role in own.items() if role != "read")
        raise hub.no_right(f"{whose} may publish as {names}, not as {owner}")
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if not isinstance(scopes, list):  # a token that may all that its owner may
        return
    entities = [scope.get("entity") or {} for scope in scopes if "repo.write" in (scope.get("permissions") or [])]
    if owner not in [entity.get("name") for entity in entities]:
        raise hub.no_right(f"{whose} may not make repositories of {owner}")


def _check_writing(hub: Hub, whose: str) -> None:
    """Ask the Hub whether the token may write to a repository that exists."""
    from huggingface_hub import errors

    try:
        hub.ask("the question what the token may do", lambda: hub.api.auth_check(hub.repo_id, write=True))
    except HubError as error:
        cause = error.__cause__
        if status_of(error) in (401, 403) or isinstance(cause, errors.RepositoryNotFoundError):
            raise hub.no_right(f"{whose} may not write there (HTTP {status_of(error)})") from cause
        if status_of(error) != 404:  # a mirror that does not know the question: the upload will tell
            raise


def _stated(one: Any) -> RemoteFile:
    """What the client found out about a file; without a size and a hash, which no file equals, if it was not told."""
    large = one.lfs.sha256 if one.lfs else ""
    return RemoteFile(int(one.size or 0), large, "" if large else str(one.blob_id or ""))


def _difference(file: LocalFile, stated: RemoteFile | None) -> str:
    if stated is None:
        return "it is not there"
    if stated.size != file.size:
        return f"{stated.size} B there, {byte_text(file.size)} ({file.size} B) here"
    return f"its hash is {(stated.sha256 or stated.git)[:12]} there" + (
        f", {file.sha256[:12]} here" if stated.sha256 else ", another here"
    )
