"""Publishing files as one commit: all of them or none, never over somebody else's work, never twice.

    hub = Hub("user/name")
    remote = look(hub)                                    # who may write there, and what is there
    done = commit(hub, files, remote=remote, message="…")  # uploads, then one commit on top of what was seen
    verify_remote(hub, done.commit, files)                # what the Hub holds now

The large files go ahead and change nothing that anybody sees; the commit comes last, names the head that was looked at
as its parent, and is refused by the Hub if the head has moved. Where its answer is lost, the head is read before
anything is sent again.
"""

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from maehub.errors import HubError, IntegrityError, MaehubError, UsageError, log
from maehub.hub import PASSING, UPLOAD_SILENCE, causes, retry, scrub, status_of
from maehub.publishing.remote import UNTOUCHED, Hub, LocalFile, Remote, moved, same, state, unreadable

_IN_MEMORY = 4_000_000  # bytes; smaller files are read once and sent as they were then


class Committed(NamedTuple):
    """What was published."""

    repo_id: str
    commit: str  # 40 hexadecimal digits; of what was there already if all files were
    url: str  # the files at that commit
    pull_request_url: str | None
    uploaded: tuple[str, ...]  # names of the files in the commit
    unchanged: tuple[str, ...]  # names of files that the Hub had already


def commit(
    hub: Hub,
    files: Mapping[str, LocalFile],
    *,
    remote: Remote,
    private: bool | None = None,
    pull_request: bool = False,
    message: str,
    progress: bool = True,
) -> Committed:
    """Publish files in one commit; makes the repository and the branch where they are missing. Nothing is deleted.

    The commit goes on top of ``remote``, as `look` found the repository and branch and `check_conditions` let it pass,
    or nowhere. ``private`` says who may see a repository that is made, by default what its owner's settings say.
    ``message`` is the first line.

    Nothing is published where a file here changed meanwhile (IntegrityError) or cannot be read (CheckpointError). After
    a refusal or no answer a HubError says what is there.
    """
    fresh = {name: file for name, file in files.items() if not same(file, remote.files.get(name))}
    known = tuple(name for name in files if name not in fresh)
    operations = [_operation(name, file) for name, file in fresh.items()]
    if not remote.exists:
        remote = _create(hub, remote.revision, private)
    if not remote.has_revision:
        hub.ask(
            f"making the branch {remote.revision} of {hub.repo_id}",
            lambda: hub.api.create_branch(hub.repo_id, branch=remote.revision, revision=remote.commit, exist_ok=True),
        )
    made, request = remote.commit, None
    if fresh:
        with _quiet_client(progress):
            _upload(hub, operations, fresh, remote.revision, pull_request)
            if pull_request:
                made, request = _propose(hub, operations, fresh, remote, message)
            else:
                made = _send(hub, operations, fresh, remote, message)
    else:
        log.info("%s: all %d files are on %s already, nothing was sent", hub.repo_id, len(files), hub.host)
    return Committed(hub.repo_id, made, f"{hub.endpoint}/{hub.repo_id}/tree/{made}", request, tuple(fresh), known)


def _create(hub: Hub, revision: str, private: bool | None) -> Remote:
    """Make the repository: as it is then. One that somebody else made in between is not taken."""
    lost = False

    def create() -> None:
        nonlocal lost
        try:
            hub.api.create_repo(hub.repo_id, private=private, exist_ok=lost)
        except Exception:
            lost = True  # it may have been made, and only the answer did not come
            raise

    try:
        hub.ask(f"making {hub.repo_id}", create)
    except HubError as error:
        if status_of(error) != 409:
            raise
        raise HubError(
            f"{hub.repo_id} on {hub.host} exists, and did not a moment ago, or this token cannot see it\n"
            f"{UNTOUCHED}; look at {hub.endpoint}/{hub.repo_id}, then run this again or take another name"
        ) from error.__cause__
    made = state(hub, revision)
    if not made.exists or (private is not None and made.private is not private):
        raise HubError(
            f"{hub.repo_id} was made on {hub.host}, and is not there as it was asked for; no file was published\n"
            f"look at {hub.endpoint}/{hub.repo_id}/settings, then run this again"
        )
    log.info("%s: made, %s", hub.repo_id, "private" if made.private else "public")
    return made


def _operation(name: str, file: LocalFile) -> Any:
    """The addition of a file, as the client wants it; small ones are read now."""
    from huggingface_hub import CommitOperationAdd

    try:
        content = file.path.read_bytes() if file.size <= _IN_MEMORY else None
        operation = CommitOperationAdd(name, file.path if content is None else content)
    except OSError as error:
        raise unreadable(file.path, error) from error
    except ValueError as error:  # its word for a file that is not there, and for names that it refuses
        raise UsageError(f"{name!r} cannot be published: {scrub(error)}") from error
    if content is not None and hashlib.sha256(content).hexdigest() != file.sha256:
        raise _changed(name)
    return operation


def _upload(hub: Hub, operations: list[Any], files: Mapping[str, LocalFile], revision: str, proposed: bool) -> None:
    """Send the contents of large files ahead; the client tries again by itself where a connection breaks.

    One large file at a time, so that all of it happens in this thread and Ctrl-C ends it at once.
    """
    small = [one for one in operations if isinstance(one.path_or_fileobj, bytes)]
    large = [one for one in operations if not isinstance(one.path_or_fileobj, bytes)]
    safe = f"{UNTOUCHED}, since the commit comes last; what has arrived is not sent again"
    for batch in ([small] if small else []) + [[one] for one in large]:
        what = f"{len(batch)} small files" if batch is small else batch[0].path_in_repo
        try:
            with hub.bounded(UPLOAD_SILENCE):
                hub.api.preupload_lfs_files(
                    hub.repo_id,
                    batch,
                    revision=revision,
                    create_pr=proposed,
                    free_memory=False,
                    gitignore_content="",  # what is in the repository leaves none of these files out
                )
        except Exception as error:  # the transfer libraries have kinds of their own
            local = next((one for one in causes(error) if isinstance(one, OSError) and one.filename), None)
            if local is not None:
                raise unreadable(Path(str(local.filename)), local) from error
            raise hub.trouble(error, f"sending {what} to {hub.repo_id}", safe) from error
    for one in large:
        if one.upload_info.sha256.hex() != files[one.path_in_repo].sha256:
            raise _changed(one.path_in_repo)


def _send(hub: Hub, operations: list[Any], files: Mapping[str, LocalFile], remote: Remote, message: str) -> str:
    """The commit, on top of the head that was looked at: its 40 digits.

    An answer that did not come is never taken for a commit that was not made: the head decides. Sending it again can
    not make a second one, since the head is its parent no longer once the first is there.
    """
    lost = False

    def send() -> str:
        nonlocal lost
        try:
            return str(_create_commit(hub, operations, remote, message, proposed=False).oid)
        except Exception as error:
            status = status_of(error)
            if status is not None and status not in PASSING and not (status == 412 and lost):
                raise _refused(hub, error, remote) from error
            lost = True
            if made := _arrived(hub, files, remote, error):
                log.info("%s: the answer was lost, the commit was made: %s", hub.repo_id, made[:12])
                return made
            raise

    again = f"{hub.repo_id}: the commit was not made, sending it again"
    try:
        return retry(send, lambda _: again, passes=lambda error: not isinstance(error, MaehubError))
    except MaehubError:
        raise
    except Exception as error:
        raise HubError(
            f"{_first_line(hub, error, 'commit')}\n{UNTOUCHED}: the head of {hub.repo_id} is still "
            f"{remote.commit[:12]}, and the files were sent\n"
            "running this again is safe: it looks at the head first, and sends no file twice"
        ) from error


def _arrived(hub: Hub, files: Mapping[str, LocalFile], remote: Remote, error: Exception) -> str:
    """The head, if it holds the files; empty if it is the one that was looked at."""
    try:
        now = state(hub, remote.revision)
    except HubError as unknown:
        raise HubError(
            f"{_first_line(hub, error, 'commit')}\n"
            f"whether it was made is not known, since {hub.host} does not tell its head any more\n"
            f"either all {len(files)} files are in {hub.repo_id} or none; the contents of the large ones were sent\n"
            "running this again is safe: it looks at the head first, and a commit that was made is not made again"
        ) from unknown
    if now.commit == remote.commit:
        return ""
    if all(same(file, now.files.get(name)) for name, file in files.items()):
        return now.commit
    raise moved(hub, remote.revision, remote.commit, now.commit) from error


def _propose(
    hub: Hub, operations: list[Any], files: Mapping[str, LocalFile], remote: Remote, message: str
) -> tuple[str, str]:
    """A pull request of one commit: its 40 digits, and its page. Sent once, since no parent keeps out a second."""
    before = {one.ref for one in _requests(hub)}
    try:
        made = _create_commit(hub, operations, remote, message, proposed=True)
        return made.oid, str(made.pr_url)
    except Exception as error:
        status = status_of(error)
        if status is not None and status not in PASSING:
            raise _refused(hub, error, remote) from error
        page = f"{hub.endpoint}/{hub.repo_id}/discussions"
        try:
            for one in _requests(hub):
                stated = state(hub, one.ref).files if one.ref not in before else {}
                if stated and all(same(file, stated.get(name)) for name, file in files.items()):
                    return one.target_commit, f"{page}/{one.ref.rpartition('/')[2]}"
        except HubError as unknown:
            log.debug("no pull requests of %s: %s", hub.repo_id, unknown)
        raise HubError(
            f"{_first_line(hub, error, 'pull request')}\n"
            "whether it was opened is not known; the branch itself is unchanged\n"
            f"look at {page} before running this again, which would open another"
        ) from error


def _requests(hub: Hub) -> list[Any]:
    listed = partial(hub.api.list_repo_refs, hub.repo_id, include_pull_requests=True)
    return hub.ask("the question for pull requests", listed).pull_requests or []


def _create_commit(hub: Hub, operations: list[Any], remote: Remote, message: str, proposed: bool) -> Any:
    """One request; the client tries none of its parts again."""
    with hub.bounded(UPLOAD_SILENCE):
        return hub.api.create_commit(
            hub.repo_id,
            operations,
            commit_message=message,
            revision=remote.revision,
            create_pr=proposed,
            parent_commit=remote.commit,
        )


def _refused(hub: Hub, error: Exception, remote: Remote) -> HubError:
    """The error to raise, from ``error``, where the Hub answered that it made no commit."""
    if status_of(error) == 412:
        try:
            now = state(hub, remote.revision).commit
        except HubError as unknown:
            log.debug("no head of %s: %s", hub.repo_id, unknown)
            now = ""
        return moved(hub, remote.revision, remote.commit, now)
    if "metadata in README" in str(error):
        return HubError(f"{hub.host} refuses the head of the card: {scrub(error)}\n{UNTOUCHED}")
    return hub.trouble(error, f"the commit to {hub.repo_id}", UNTOUCHED)


def _first_line(hub: Hub, error: Exception, what: str) -> str:
    return str(hub.trouble(error, f"the {what} to {hub.repo_id}")).split("\n")[0]


def _changed(name: str) -> IntegrityError:
    return IntegrityError(
        f"{name} is no longer what was checked: it was changed while it was published\n"
        f"{UNTOUCHED}; run this again when nothing writes to the folder"
    )


@contextlib.contextmanager
def _quiet_client(progress: bool) -> Iterator[None]:
    """What the client says on the way, without signed addresses; its warnings as lines of the log.

    Its bars stay off where they are not wanted; what the environment says about them stays.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        httpx,
    )

    def scrubbed(record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage()), ()
        return True

    with contextlib.ExitStack() as stack:
        if not progress and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled():
            disable_progress_bars()
            stack.callback(enable_progress_bars)
        for speaker in (*logging.getLogger("huggingface_hub").handlers, logging.getLogger(httpx.__name__)):
            speaker.addFilter(scrubbed)
            stack.callback(speaker.removeFilter, scrubbed)
        told = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of the client's own ways
        try:
            yield
        finally:
            for one in told:
                log.warning("%s", scrub(str(one.message)))
