"""Root ignores permissions, so tests of what may not be read or written give its rights up for a moment."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_NOBODY = 65534


def _can_give_up() -> bool:
    """Whether this is root, and nobody exists here: in a user namespace of its own there may be root alone."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return False
    ranges = [[int(number) for number in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= _NOBODY < first + count for first, _, count in ranges)


needs_root = pytest.mark.skipif(not _can_give_up(), reason="gives up root's rights for a moment")


def let_enter(*paths: Path) -> None:
    """Let everyone enter pytest's folders down to these."""
    for path in paths:
        for folder in (path, *path.parents):
            if "pytest-" in str(folder):
                folder.chmod(0o755)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights."""
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
