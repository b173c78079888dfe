"""What must hold of a repository before anything is built for it or sent to it: known from one look."""

import re

from maehub.errors import HubError, UsageError
from maehub.publishing.remote import UNTOUCHED, Hub, Remote


def check_conditions(
    hub: Hub, remote: Remote, *, revision: str, parent: str | None, private: bool | None, pull_request: bool
) -> None:
    """Refuse what cannot be done with a repository as it is; nothing is asked.

    Args:
        hub: who publishes, and where.
        remote: the repository as it was found.
        revision, parent, private, pull_request: as in `maehub.publishing.committing.commit`.

    Raises:
        UsageError: another repository or branch was looked at, or it has the other visibility.
        HubError: the head is not the one that the caller expects.
    """
    if (remote.repo_id, remote.revision) != (hub.repo_id, revision):
        raise UsageError(f"{remote.repo_id}, {remote.revision} was looked at, not {hub.repo_id}, {revision}")
    if pull_request and not remote.exists:
        raise UsageError(f"there is no repository {hub.repo_id} on {hub.host} that a pull request could be made to")
    if pull_request and revision != "main":
        raise UsageError(f"a pull request goes to the main branch, not to {revision!r}: leave one of the two out")
    if remote.exists and private is not None and remote.private is not private:
        now, asked = ("private", "public") if remote.private else ("public", "private")
        raise UsageError(
            f"{hub.repo_id} on {hub.host} is {now}, and {asked} was asked for; {UNTOUCHED}\n"
            f"publish it as it is, change it at {hub.endpoint}/{hub.repo_id}/settings, or take another name"
        )
    if parent is not None:
        _check_parent(hub, remote, parent)


def _check_parent(hub: Hub, remote: Remote, parent: str) -> None:
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
