"""Processes that read and decode pictures.

Each is a fresh Python that imports numpy and Pillow alone, so it starts in a fraction of a second, needs no guard in
the caller's script, shares no locks or GPU with it and no /dev/shm, and a decoder that crashes takes nothing along.
Pixels come back as bytes through a pipe; one thread here waits for each process.
"""

import contextlib
import itertools
import json
import os
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from typing import Self, cast

import numpy as np

from maehub.errors import DataError, UsageError
from maehub.images import Preprocess, printable, read_pixels

Reading = np.ndarray | DataError
"""Pixels (H, W, C) uint8, or why there are none."""

_AT_ONCE = 8  # pictures that a process is asked for in one message
_AHEAD = 3  # messages a process that are under way or finished and not yet taken
_SILENCE = 300.0  # seconds until a process that gives nothing counts as hanging
_REPLY = struct.Struct("<BIII")  # kind, then height, width, channels or length, 0, 0
_START = "import sys; sys.path[:] = sys.argv[1:]; from maehub.data.reading import serve; serve()"


def reader_count(workers: int | None, pictures: int) -> int:
    """How many processes to start: what the caller says, else as many as there are cores and work for them.

    Raises:
        UsageError: a negative number.
    """
    if workers is not None:
        if workers < 0:
            raise UsageError(f"workers must be 0 or more, not {workers}; 0 reads in this process")
        return min(workers, pictures)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, pictures // (4 * _AT_ONCE))


class Readers:
    """Reads pictures in ``workers`` processes, or in this one with 0. A context manager.

    Args:
        workers: number of processes.
        preprocess: its `Preprocess.pixels` is what is done to each picture.
        exact_decode: decode JPEGs at full size.
    """

    def __init__(self, workers: int, preprocess: Preprocess, *, exact_decode: bool = False) -> None:
        self.workers = workers
        self.preprocess = preprocess
        self.exact_decode = exact_decode
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.workers:
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="maehub-reader")
            order = {"preprocess": self.preprocess.to_dict(), "exact_decode": self.exact_decode}
            try:
                for _ in range(self.workers):
                    self._start(json.dumps(order).encode() + b"\n")
            except OSError as error:
                self.__exit__()
                raise UsageError(
                    f"reading process {len(self._processes) + 1} of {self.workers} cannot be started: "
                    f"{error.strerror}. Use fewer workers"
                ) from error
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    cast(BufferedReader, stream).close()
            process.wait()

    def read(self, paths: Iterable[bytes]) -> Iterator[Reading]:
        """One reading a path, in order.

        Raises:
            DataError: a process died or hangs; the text names the picture where it happened.
        """
        if self._threads is None:
            yield from (_reading(path, self.preprocess, self.exact_decode) for path in paths)
            return
        # Pictures of their own size may be large, so fewer wait.
        at_once = 1 if self.preprocess.resize == "native" else _AT_ONCE
        remaining = iter(paths)
        waiting: deque[Future[list[Reading]]] = deque()
        while True:
            while len(waiting) < self.workers * _AHEAD and (some := list(itertools.islice(remaining, at_once))):
                waiting.append(self._threads.submit(self._ask, some))
            if not waiting:
                return
            try:
                readings = waiting.popleft().result(timeout=_SILENCE)
            except TimeoutError as error:
                raise DataError(f"no picture was read for {_SILENCE:.0f} s; check the disk that they are on") from error
            yield from readings

    def _start(self, order: bytes) -> None:
        # Many threads in each of many processes would only be in each other's way.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-P", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; they end with us
        )
        self._processes.append(process)
        assert process.stdin is not None
        self._idle.put(process)
        with contextlib.suppress(OSError):  # if it is dead already, the first picture says so
            process.stdin.write(order)
            process.stdin.flush()

    def _ask(self, paths: list[bytes]) -> list[Reading]:
        """Have one process read some pictures; runs in a thread."""
        process = self._idle.get()
        assert process.stdin is not None
        replies = cast(BufferedReader, process.stdout)
        readings: list[Reading] = []
        try:
            request = b"".join(struct.pack("<I", len(path)) + path for path in paths)
            process.stdin.write(struct.pack("<I", len(paths)) + request)
            process.stdin.flush()
            while len(readings) < len(paths):
                readings.append(_received(replies))
        except (EOFError, OSError) as error:
            code = process.wait()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            raise DataError(
                f"a reading process died {how} at {printable(paths[len(readings)])}. "
                "If memory is short, use fewer workers; workers=0 shows whether it is the picture"
            ) from error
        finally:
            self._idle.put(process)  # a dead one too, or the other threads would wait for it
        return readings


def _received(replies: BufferedReader) -> Reading:
    header = replies.read(_REPLY.size)
    if len(header) < _REPLY.size:
        raise EOFError
    is_error, height, width, channels = _REPLY.unpack(header)
    if is_error:
        return DataError(replies.read(height).decode())
    pixels = np.empty((height, width, channels), np.uint8)
    if replies.readinto(pixels.data.cast("B")) < pixels.size:
        raise EOFError
    return pixels


def _reading(path: bytes, preprocess: Preprocess, exact_decode: bool) -> Reading:
    try:
        return read_pixels(path, preprocess, exact_decode=exact_decode)
    except DataError as error:
        return error


def serve() -> None:
    """What a reading process does until its input ends."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the replies
    order = json.loads(requests.readline())
    preprocess, exact_decode = Preprocess.from_dict(order["preprocess"]), order["exact_decode"]
    while count := requests.read(4):
        for _ in range(*struct.unpack("<I", count)):
            path = requests.read(*struct.unpack("<I", requests.read(4)))
            reading = _reading(path, preprocess, exact_decode)
            if isinstance(reading, DataError):
                text = str(reading).encode("utf-8", "backslashreplace")
                replies.writelines((_REPLY.pack(1, len(text), 0, 0), text))
            else:
                replies.writelines((_REPLY.pack(0, *reading.shape), reading.data.cast("B")))
            replies.flush()
