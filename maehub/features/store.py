"""Unfinished features on the disk: what is computed is kept, and a second run goes on after it.

``OUT.partial/`` holds ``features.bin``, the finished rows as raw float32, ``commits.jsonl``, one line for each chunk of
samples whose rows are safely in it, and ``run.json``, what they are computed with. A chunk counts only if its samples,
their sizes included, are still the same.
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from maehub.errors import MaehubError, UsageError
from maehub.features.table import piece_rows
from maehub.files import atomic_write, write_error


class _Commit(NamedTuple):
    """A finished chunk."""

    chunk: int
    key: str  # a digest of its samples
    rows: int
    skipped: list[tuple[int, str]]  # index of each sample that could not be read, and why


class FeatureStore:
    """The folder ``OUT.partial/`` with rows for ``out``; a context manager that one process at a time can hold.

    ``run`` is what the rows depend on: those of another run are never mixed in, and are thrown away by ``overwrite``.
    """

    def __init__(self, out: Path, run: dict[str, Any], row_shape: tuple[int, ...], *, overwrite: bool) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.run = run
        self.row_shape = row_shape
        self.overwrite = overwrite
        self._commits: list[_Commit] = []
        self._row_bytes = 4 * math.prod(row_shape)
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files, self._errors():
            self.folder.mkdir(exist_ok=True)
            lock = files.enter_context(open(self.folder / "lock", "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"another process is writing {self.out}; wait for it, or name another file") from error
            except OSError:
                pass  # a filesystem without locks
            self._check_run()
            self._features = files.enter_context(open(self.folder / "features.bin", "a+b"))
            self._journal = files.enter_context(open(self.folder / "commits.jsonl", "a+b"))
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._files.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, MaehubError):
                raise
            raise write_error(self.out, error) from error

    def _check_run(self) -> None:
        """Refuse rows of another run, or throw them away."""
        description = self.folder / "run.json"
        text = json.dumps(self.run, sort_keys=True, indent=1)
        known = description.read_text() if description.is_file() else None
        if known not in (None, text) and not self.overwrite:
            raise UsageError(
                f"{self.folder} holds unfinished features that were made differently. "
                "Finish them with the same options, delete the folder, or overwrite"
            )
        if known != text:
            for name in ("commits.jsonl", "features.bin"):
                (self.folder / name).unlink(missing_ok=True)
            with atomic_write(description) as temporary:
                temporary.write_text(text)

    def resume(self, chunks: Iterator[tuple[range, str]], skip_bad: bool) -> int:
        """Keep the committed chunks from the first on whose samples are these, and say how many; drop what follows.

        ``chunks`` are the indices of the samples of each, and a digest of them. Without ``skip_bad`` a chunk that left
        a picture out does not count.
        """
        self._journal.seek(0)
        rows = journal_bytes = 0
        stored_bytes = os.fstat(self._features.fileno()).st_size
        for line, (chunk, key) in zip(self._journal, chunks, strict=False):
            try:
                commit = _Commit(**json.loads(line))
                skipped = dict(commit.skipped)
                whole = type(commit.rows) is int and commit.rows + len(skipped) == len(chunk)
                named = all(type(one) is int and one in chunk and type(why) is str for one, why in skipped.items())
            except (ValueError, TypeError, RecursionError):
                break  # half a line
            fits = whole and named and (rows + commit.rows) * self._row_bytes <= stored_bytes
            same = commit.chunk == len(self._commits) and commit.key == key
            if not (fits and same) or (commit.skipped and not skip_bad):
                break
            self._commits.append(commit)
            rows += commit.rows
            journal_bytes += len(line)
        self._features.truncate(rows * self._row_bytes)
        self._journal.truncate(journal_bytes)
        return len(self._commits)

    def append(self, key: str, rows: np.ndarray, skipped: dict[int, str]) -> None:
        """Commit the next chunk: the rows are on the disk before the line that says so."""
        commit = _Commit(len(self._commits), key, len(rows), list(skipped.items()))
        line = json.dumps(commit._asdict()).encode() + b"\n"
        with self._errors():
            for file, data in ((self._features, np.ascontiguousarray(rows, "<f4").data), (self._journal, line)):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._commits.append(commit)

    @property
    def rows(self) -> int:
        return sum(commit.rows for commit in self._commits)

    @property
    def skipped(self) -> dict[int, str]:
        """Why each sample that is left out could not be read."""
        return {index: reason for commit in self._commits for index, reason in commit.skipped}

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows, piece by piece, for `write_features`."""
        step = piece_rows(self.row_shape)
        with open(self.folder / "features.bin", "rb") as file:
            for start in range(0, self.rows, step):
                count = min(step, self.rows - start) * self._row_bytes // 4
                yield np.fromfile(file, "<f4", count).reshape(-1, *self.row_shape)
