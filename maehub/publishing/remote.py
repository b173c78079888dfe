"""A repository on the Hub before and after publishing: who asks, what is there, may it be written, is it what was sent?

Nothing here changes anything on the Hub. The Hub's client waits without end for most of its answers; `Hub` bounds the
waits, asks again where that may help, and says what is safe. No text holds a token.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from maehub.errors import CheckpointError, HubError, IntegrityError, UsageError, first_names
from maehub.files import byte_text
from maehub.hub import LIBRARY, bound, file_hashes, host_of, hub_constants, no_login, retry, root, scrub, status_of, why
from maehub.hub import endpoint as hub_address

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
    """A repository as it is now."""

    exists: bool
    private: bool | None  # None where there is no repository
    revision: str  # the branch that was asked for
    has_revision: bool  # False where the branch is still to be made: the rest is of the main branch then
    commit: str  # the head, 40 hexadecimal digits; empty where there is no repository
    files: dict[str, RemoteFile]
    licence: str  # what the card states there, empty where it states none


def look(hub: "Hub", *, revision: str = "main", pull_request: bool = False) -> Remote:
    """A repository before anything is hashed or sent to it, and whether the token may write there.

    Neither ``user/name`` nor the branch ``revision`` need exist. A ``pull_request`` needs no right to write there. A
    UsageError says that this names no branch, a HubError that there is no answer, or that the token may not write.
    """
    from huggingface_hub import errors

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
    remote = state(hub, revision)
    if not remote.exists:
        _check_owner(hub, identity, access, whose)
    elif not pull_request:
        try:
            hub.ask("the question what the token may do", lambda: hub.api.auth_check(hub.repo_id, write=True))
        except HubError as error:
            cause, status = error.__cause__, status_of(error)
            if status in (401, 403) or isinstance(cause, errors.RepositoryNotFoundError):
                raise hub.no_right(f"{whose} may not write there (HTTP {status})") from cause
            if status != 404:  # a mirror that does not know the question: the upload will tell
                raise
    return remote


def verify_remote(hub: "Hub", commit: str, files: Mapping[str, LocalFile]) -> None:
    """Compare what the Hub states about each file at a commit with the files that were to be there.

    An IntegrityError names each that is missing or another one; a HubError says that the Hub does not tell.
    """
    listed = hub.ask(
        f"reading {hub.repo_id}@{commit[:12]} back",
        lambda: hub.api.get_paths_info(hub.repo_id, list(files), revision=commit),
        safe=f"the commit {commit[:12]} was made; whether it holds the right bytes is not known",
    )
    there = {one.path: _stated(one) for one in listed if hasattr(one, "blob_id")}
    wrong = []
    for name, file in files.items():
        if (stated := there.get(name)) is None:
            wrong.append(f"{name}: it is not there")
        elif stated.size != file.size:
            wrong.append(f"{name}: {stated.size} B there, {byte_text(file.size)} ({file.size} B) here")
        elif not same(file, stated):
            here = f"{file.sha256[:12]} here" if stated.sha256 else "another here"
            wrong.append(f"{name}: its hash is {(stated.sha256 or stated.git)[:12]} there, {here}")
    if wrong:
        raise IntegrityError(
            f"{hub.repo_id}@{commit[:12]} on {hub.host} does not hold what was sent: {first_names(wrong, 3, '; ')}\n"
            "the files here are unchanged; nobody should load that commit: run this again, and tell the Hub if it stays"
        )


def same(file: LocalFile, stated: RemoteFile | None) -> bool:
    """Whether a file on the Hub has the bytes of one here."""
    if stated is None or stated.size != file.size:
        return False
    if stated.sha256:
        return stated.sha256 == file.sha256
    try:
        hashes = file_hashes(file.path, "git")
    except OSError as error:
        raise unreadable(file.path, error) from error
    return (hashes.sha256, hashes.other) == (file.sha256, stated.git)


def state(hub: "Hub", revision: str) -> Remote:
    """What is in a repository at the head of a branch."""
    from huggingface_hub import errors

    if _FULL_COMMIT.fullmatch(revision):
        raise UsageError(f"{revision} is a commit, and a commit is never changed: give a branch to publish to")
    nothing = Remote(False, None, revision, True, "", {}, "")
    branch = "main"
    try:
        if revision != "main":
            refs = hub.ask("the question for the branches", lambda: hub.api.list_repo_refs(hub.repo_id))
            if revision in [tag.name for tag in refs.tags]:
                raise UsageError(f"{revision!r} is a tag of {hub.repo_id}, which stays where it is: give a branch")
            branch = revision if revision.startswith("refs/pr/") else "main"
            branch = revision if revision in [one.name for one in refs.branches] else branch
        facts = partial(hub.api.model_info, hub.repo_id, revision=branch, files_metadata=True, timeout=hub.patience)
        info = hub.ask(f"the look at {hub.repo_id}", facts)
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
    """The Hub's client for one repository and one token: waits that end, second tries, errors in words.

    The token is by default that of the login, or $HF_TOKEN. A UsageError says that ``repo_id`` names no repository, a
    HubError that there is no token, a CheckpointError that the file that keeps the login cannot be read.
    """

    def __init__(self, repo_id: str, token: str | None = None) -> None:
        constants = hub_constants()
        from huggingface_hub import HfApi, get_token

        check_name(repo_id)
        self.repo_id = repo_id
        self.endpoint = hub_address()
        self.host = host_of(self.endpoint)
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
        self.api = HfApi(self.endpoint, self.token, **LIBRARY)

    def ask(self, doing: str, call: Callable[[], Answer], safe: str = UNTOUCHED) -> Answer:
        """The answer to a question that may be asked again; a HubError says what it was for, and what is safe."""
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        def bounded() -> Answer:
            with self.bounded(self.patience):
                return bound(call, self.host)

        try:
            return retry(bounded, lambda _: f"{doing}: {self.host} did not deliver, asking again")
        except HubError:
            raise
        except (httpx.HTTPError, OSError, ValueError, LookupError) as error:
            raise self.trouble(error, doing, safe) from error

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

        cause, status = root(error), status_of(error)
        advice = "check the network, then run this again"
        if status is not None:
            said = getattr(cause, "server_message", None)
            reason = why(error, self.host) + (f": {scrub(said)}" if said else "")
            advice = "the fault is there; run this again later" if status >= 500 else "look at what it says"
            if status in (401, 403):
                advice = f"see what the token may do at {self.endpoint}/settings/tokens; `hf auth login` takes another"
            if status == 429:
                advice = "it limits requests: wait, then run this again"
        elif "Offline" in type(cause).__name__:
            reason, advice = "HF_HUB_OFFLINE is set", "unset it where there is a network"
        elif isinstance(cause, httpx.TimeoutException | httpx.ConnectError):
            reason = why(cause, self.host)
        elif isinstance(cause, httpx.HTTPError):
            reason = f"the connection to {self.host} broke: {scrub(cause)}"
        elif isinstance(cause, OSError | RuntimeError):  # of the Xet transfer, which has no kinds of its own
            reason = f"the transfer stopped: {scrub(cause)}"
            advice = f"{advice}; HF_HUB_DISABLE_XET=1 sends without Xet"
        else:
            reason = f"{self.host} does not answer like a Hub: {scrub(cause)}"
        return HubError(self.hide(f"{doing} failed: {reason}\n{safe}; {advice}"))

    def no_right(self, why: str) -> HubError:
        """The error to raise where the token is known and may not write."""
        return HubError(
            f"{why}, so it cannot publish to {self.repo_id} on {self.host}; nothing was sent\n"
            f"make one that may at {self.endpoint}/settings/tokens, then `hf auth login` or set HF_TOKEN"
        )

    def hide(self, text: str) -> str:
        """A text without the token."""
        return text.replace(self.token, "(hidden)")


def check_conditions(hub: Hub, remote: Remote, *, parent: str | None, private: bool | None, pull_request: bool) -> None:
    """Refuse what cannot be done with a repository as it is, known from one look; nothing is asked."""
    if pull_request and not remote.exists:
        raise UsageError(f"there is no repository {hub.repo_id} on {hub.host} that a pull request could be made to")
    if pull_request and remote.revision != "main":
        raise UsageError(f"a pull request goes to the main branch, not to {remote.revision!r}: leave one of them out")
    if remote.exists and private is not None and remote.private is not private:
        now, asked = ("private", "public") if remote.private else ("public", "private")
        raise UsageError(
            f"{hub.repo_id} on {hub.host} is {now}, and {asked} was asked for; {UNTOUCHED}\n"
            f"publish it as it is, change it at {hub.endpoint}/{hub.repo_id}/settings, or take another name"
        )
    if parent is None:
        return
    if not re.fullmatch(r"[0-9a-f]{6,40}", parent):
        raise UsageError(f"{parent[:60]!r} is no commit: give at least 6 of its hexadecimal digits")
    if not remote.exists:
        raise UsageError(f"there is no repository {hub.repo_id} on {hub.host}, so {parent[:12]} cannot be its head")
    if not remote.commit.startswith(parent):
        raise moved(hub, remote.revision, parent, remote.commit)


def moved(hub: Hub, revision: str, before: str, now: str) -> HubError:
    """The error to raise where the head is not the one that was looked at."""
    return HubError(
        f"remote changed: {before[:12]} -> {now[:12] or 'unknown'}, the head of {hub.repo_id} on {hub.host}\n"
        f"{UNTOUCHED} and nothing there was overwritten\n"
        f"look at it, {hub.endpoint}/{hub.repo_id}/commits/{revision}, then re-run with --parent {now or 'its head'}"
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error to raise, from ``error``, where a file of the model cannot be read."""
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}; {UNTOUCHED}")


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


def _stated(one: Any) -> RemoteFile:
    """What the client found out about a file; without a size and a hash, which no file equals, if it was not told."""
    large = one.lfs.sha256 if one.lfs else ""
    return RemoteFile(int(one.size or 0), large, "" if large else str(one.blob_id or ""))
