"""Stopping a run from outside, between two steps."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from maehub.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


@dataclass
class Stop:
    """Whether a stop was asked for; it may change at any moment, so read it once a step."""

    signalled: int | None = None
    """75 after SIGTERM or SIGUSR1, 130 after Ctrl-C, None before."""
    deadline: float | None = None
    """When the run must have ended, on the clock of `time.monotonic`."""
    ending: float = 0.0
    """Seconds that the last save took: what must be left for another one."""

    @property
    def exit_code(self) -> int | None:
        """What to stop with after this step; None to go on."""
        if self.signalled is None and self.deadline is not None:
            return EXIT_PREEMPTED if time.monotonic() + 2 * self.ending + 5 > self.deadline else None
        return self.signalled


@contextlib.contextmanager
def stop_requests(deadline: float | None = None) -> Iterator[Stop]:
    """Turn the first stop signal into a `Stop` for the end of the step; a second one stops at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    stop = Stop(deadline=deadline)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: FrameType | None) -> None:
        if stop.signalled is not None:
            raise KeyboardInterrupt
        stop.signalled = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
