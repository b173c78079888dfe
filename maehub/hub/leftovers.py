"""What downloads that were killed left in the caches, and how to be rid of it.

A download that ends in any other way removes its own; nothing here is ever taken for a whole file.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maehub.errors import CheckpointError
from maehub.files import byte_text
from maehub.hub.cache import STAGING
from maehub.hub.downloading import PathLike, Place, place_of

AGE = 3600  # seconds without a write after which no download is at work on a file any more

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as `maehub.files.atomic_write` names them


class Leftover(NamedTuple):
    """A file, or the folder of one download."""

    path: Path
    size: int  # bytes


class Cleaned(NamedTuple):
    """What was removed, or would be, and what is too young for that."""

    removed: list[Leftover]
    kept: list[Leftover]
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON; sizes in bytes."""
        removed, kept = ([{"path": str(path), "bytes": size} for path, size in some] for some in (self[0], self[1]))
        return {"removed": removed, "bytes": _total(self.removed), "kept": kept, "dry_run": self.dry_run}

    def describe(self) -> str:
        """For a person: a line for each, and the sum."""
        lines = [f"{byte_text(size):>8}  {path}" for path, size in self.removed]
        count = f"{len(self.removed)} leftover{'' if len(self.removed) == 1 else 's'}"
        verb = "would remove" if self.dry_run else "removed"
        lines.append(f"{verb} {count}, {byte_text(_total(self.removed))}" if self.removed else "nothing to remove")
        if self.kept:
            lines.append(f"kept {len(self.kept)} written to within the last hour, {byte_text(_total(self.kept))}")
        return "\n".join(lines)


def clean_cache(cache_dir: PathLike | None = None, *, dry_run: bool = False) -> Cleaned:
    """Remove what killed downloads left, unless something was written to it within the last hour.

    These are ``*.incomplete`` files of the Hub's client, by whichever library they were begun, and maehub's own folders
    and temporary files. Whole files, stamps and locks stay.

    Args:
        cache_dir: as in `maehub.hub.fetching.fetch`.
        dry_run: only look.

    Raises:
        CheckpointError: something cannot be removed; the rest was.
    """
    removed, kept, stuck = [], [], []
    for path in sorted(_candidates(place_of(cache_dir, offline=True, verify=False))):
        try:
            size, written = _state(path)
            if time.time() - written <= AGE:
                kept.append(Leftover(path, size))
                continue
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(Leftover(path, size))
        except FileNotFoundError:  # its download ended just now
            continue
        except OSError as error:
            stuck.append(f"{path} cannot be removed: {error.strerror}")
    if stuck:
        raise CheckpointError(
            "\n".join(stuck[:3])
            + (f"\n… and {len(stuck) - 3} more" if len(stuck) > 3 else "")
            + f"\n{len(removed)} others were removed, {byte_text(_total(removed))}; run this as the user who owns these"
        )
    return Cleaned(removed, kept, dry_run)


def _candidates(place: Place) -> Iterator[Path]:
    """Everything that only an unfinished download makes. Links are not followed, and snapshots not looked into."""
    found = [
        *place.hub.glob("*--*/blobs/*.incomplete"),
        *place.hub.glob(f"*--*/{STAGING}*"),
        *(path for path in place.own.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)),
    ]
    return (path for path in found if not path.is_symlink() and (path.is_file() or path.name.startswith(STAGING)))


def _state(path: Path) -> tuple[int, float]:
    """Bytes, and when something in it was last written, in seconds since 1970."""
    files = [path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)]
    states = [one.lstat() for one in files]
    size = sum(state.st_size for one, state in zip(files, states, strict=True) if not one.is_dir())
    return size, max(state.st_mtime for state in states)


def _total(some: list[Leftover]) -> int:
    return sum(one.size for one in some)
