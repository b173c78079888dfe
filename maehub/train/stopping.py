"""Stopping a run from outside, between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from maehub.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


@dataclass
class Stop:
    """Whether a stop was asked for; it may change at any moment, so read it once a step."""

    exit_code: int | None = None
    """75 after SIGTERM or SIGUSR1, 130 after Ctrl-C, None before."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turn the first stop signal into a `Stop` for the end of the step; a second one stops at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.

    Raises:
        KeyboardInterrupt: the second signal.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: FrameType | None) -> None:
        if stop.exit_code is not None:
            raise KeyboardInterrupt
        stop.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
