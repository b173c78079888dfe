"""Every error that maehub raises on purpose, and the exit code that the command line gives it.

    MaehubError (Exception)        1
    ├── UsageError (ValueError)    2   a wrong argument, name, flag or combination
    │   └── MissingDependencyError (ImportError)   2   an optional package is not installed
    ├── HubError (OSError)         3   the network, the Hub, or a file that it does not have
    ├── IntegrityError (ValueError) 4  bytes that are not what they should be, or a file that is not safe to read
    ├── DataError (ValueError)     5   a picture or a data set that cannot be used
    ├── CheckpointError (OSError)  6   a run folder, a checkpoint or the disk below it
    ├── DivergedError (ArithmeticError) 7   training produced NaN or infinity
    └── DistributedError (RuntimeError) 8   a rank failed, hangs or disagrees

The text of an error says what failed (path, address, step), why, what is still safe, and what to do next. The cause is
kept in ``__cause__``. Exit codes that are no errors: 0 done, 9 finished with skipped items, 75 preempted but resumable,
130 interrupted by Ctrl-C.
"""

import logging
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_SKIPPED = 9
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130

log = logging.getLogger("maehub")
"""Where everything is said that is no result and no error."""


class MaehubError(Exception):
    """Base of every error that maehub raises on purpose."""

    exit_code = 1
    told_by: int | None = None
    """Of an error that all processes of a run raise, the rank that tells it; None where every process has its own."""


class UsageError(MaehubError, ValueError):
    """A wrong argument, name, flag or combination of them."""

    exit_code = 2


class MissingDependencyError(UsageError, ImportError):
    """An optional package is not installed; the text says what to install."""


class HubError(MaehubError, OSError):
    """The network failed, the Hub refused, or it does not have what was asked for."""

    exit_code = 3


class IntegrityError(MaehubError, ValueError):
    """Bytes that are not what they should be, or a file that is not safe to read."""

    exit_code = 4


class DataError(MaehubError, ValueError):
    """A picture, a mask or a folder of pictures that cannot be used."""

    exit_code = 5


class CheckpointError(MaehubError, OSError):
    """A run folder or a checkpoint is broken, or the disk below it is full or read-only."""

    exit_code = 6


class DivergedError(MaehubError, ArithmeticError):
    """Training produced a loss or a gradient that is not finite, or left every weight as it was."""

    exit_code = 7


class DistributedError(MaehubError, RuntimeError):
    """A rank failed, does not answer, or disagrees with the others."""

    exit_code = 8


def first_names(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of some names or lines of an error, and how many more there are; empty if there are none."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + rest


SPACES = "\n\t\xa0"
"""What lays out a text of several lines."""


def visible(text: str, keep: str = "") -> str:
    """Text in which what cannot be seen, such as control codes of a terminal, but ``keep``, is written as in Python."""
    return "".join(sign if sign.isprintable() or sign in keep else ascii(sign)[1:-1] for sign in text)
