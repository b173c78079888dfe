"""Processes that decode pictures to find out whether that works and what is in them.

Each is a fresh Python that imports numpy and Pillow alone. One picture is handed over at a time, as a path or as
bytes, so a decoder that crashes is known by its picture, and only that one is lost.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from typing import IO, Any, BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image

from maehub.errors import DataError, UsageError
from maehub.images import MAX_PIXELS, ImagePath, decode, decoder_of

_WAITING = 4  # pictures a process that are fetched beside it: those behind an address take their time
_SILENCE = 300.0  # seconds until a process that gives nothing counts as hanging
_REQUEST = struct.Struct("<BQ")  # 1 for the bytes of a file, 0 for a path; how many follow
_START = "import sys; sys.path[:] = sys.argv[1:]; from maehub.data.examination import serve; serve()"
_BITS = {"1": 1, "I": 32, "F": 32}  # of a channel, by Pillow's mode; all others have 8, or 16 where the mode says so


class Finding(NamedTuple):
    """What is known about one picture."""

    reason: str = ""  # why it cannot be read; empty if it can, and the rest is meaningful
    format: str = ""  # JPEG, PNG, …
    mode: str = ""  # of Pillow: L, RGB, I;16, …
    bits: int = 8  # of a channel
    width: int = 0  # pixels, upright
    height: int = 0
    low: float = 0.0  # least and greatest value in the file
    high: float = 0.0
    mean: tuple[float, ...] = ()
    """Of each channel, 1 or 3, in [0, 1], as the picture is read for training: 8 bits, transparency over white."""
    square: tuple[float, ...] = ()
    """Mean of the squares, likewise."""


def examine(picture: ImagePath | BinaryIO, statistics: bool) -> Finding:
    """Decode a whole picture, as `maehub.images.decoding.open_image` does.

    Args:
        picture: a path or a binary file.
        statistics: whether to fill in the values, too.
    """
    try:
        image = decode(picture, None, MAX_PIXELS).image
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(picture, "rb")) if isinstance(picture, ImagePath) else picture
            file.seek(0)
            head = file.read(16)
            file.seek(0)
            raw = decoder_of(head)(file)
            facts = Finding("", raw.format or "", raw.mode, _bits(raw.mode), image.width, image.height)
            return _with_values(facts, image, raw) if statistics else facts
    except DataError as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause or error)
        return Finding(reason or type(cause).__name__)


def _bits(mode: str) -> int:
    return 16 if mode.startswith("I;16") else _BITS.get(mode, 8)


def _with_values(facts: Finding, image: Image.Image, raw: Image.Image) -> Finding:
    """``image`` is ``raw`` in mode L or RGB, of 8 bits."""
    counts = np.array(image.histogram(), np.float64).reshape(-1, 256)  # exact, and cheaper than the pixels
    share = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    used = counts.sum(axis=0).nonzero()[0]
    low, high = float(used[0]), float(used[-1])
    if facts.bits > 8:
        values = np.asarray(raw)
        low, high = float(values.min()), float(values.max())
    mean, square = (tuple((share @ powers).tolist()) for powers in (levels, levels**2))
    return facts._replace(low=low, high=high, mean=mean, square=square)


class Examiners:
    """Examines pictures in ``workers`` processes, or in this one with 0. A context manager."""

    def __init__(self, workers: int, *, statistics: bool) -> None:
        self.workers = workers
        self.statistics = statistics
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._closing = False

    def __enter__(self) -> Self:
        if self.workers:
            self._threads = ThreadPoolExecutor(self.workers * _WAITING, thread_name_prefix="maehub-examiner")
            try:
                for _ in range(self.workers):
                    self._start()
            except BaseException as error:
                self.__exit__()
                if isinstance(error, OSError):
                    raise UsageError(f"a process cannot be started: {error.strerror}. Use fewer workers") from error
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        for process in list(self._processes):
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process in list(self._processes):
            self._end(process)

    def findings(self, pictures: Iterator[Callable[[], ImagePath | BinaryIO]]) -> Iterator[Finding]:
        """One finding a picture, in order.

        Args:
            pictures: functions that give a path or a binary file, or raise DataError; they are called in threads.

        Raises:
            DataError: a process hangs.
        """
        if self._threads is None:
            for picture in pictures:
                yield self._examined(picture)
            return
        waiting: deque[Future[Finding]] = deque()
        while True:
            for picture in itertools.islice(pictures, 2 * self.workers * _WAITING - len(waiting)):
                waiting.append(self._threads.submit(self._examined, picture))
            if not waiting:
                return
            try:
                yield waiting.popleft().result(timeout=_SILENCE)
            except TimeoutError as error:
                raise DataError(
                    f"no picture was decoded for {_SILENCE:.0f} s; check the disk or the network they are on"
                ) from error

    def _examined(self, picture: Callable[[], ImagePath | BinaryIO]) -> Finding:
        try:
            given = picture()
        except DataError as error:
            return Finding(str(error))
        if self._threads is None:
            return examine(given, self.statistics)
        process = self._idle.get()
        try:
            finding = _asked(process, given)
        except (EOFError, OSError):
            if self._closing:
                return Finding("not examined")
            code = process.wait()
            self._end(process)
            process = self._start(idle=False)
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            finding = Finding(f"the process that decoded it died {how}")
        finally:
            self._idle.put(process)
        return finding

    def _start(self, idle: bool = True) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-P", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; they end with us
        )
        self._processes.add(process)
        with contextlib.suppress(OSError):  # if it is dead already, the first picture says so
            _stream(process.stdin).write(bytes([self.statistics]))
            _stream(process.stdin).flush()
        if idle:
            self._idle.put(process)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _stream(stream).close()
        process.wait()
        self._processes.discard(process)


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _asked(process: subprocess.Popen[bytes], picture: ImagePath | BinaryIO) -> Finding:
    is_path = isinstance(picture, ImagePath)
    payload = os.fsencode(picture) if isinstance(picture, ImagePath) else picture.read()
    request = _stream(process.stdin)
    request.write(_REQUEST.pack(not is_path, len(payload)))
    request.write(payload)
    request.flush()
    answer = _stream(process.stdout).readline()
    if not answer.endswith(b"\n"):
        raise EOFError
    values: dict[str, Any] = json.loads(answer)
    return Finding(**values | {name: tuple(values[name]) for name in ("mean", "square")})


def serve() -> None:
    """What such a process does until its input ends."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the replies
    statistics = requests.read(1) == b"\1"
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        in_memory, length = _REQUEST.unpack(header)
        payload = requests.read(length)
        finding = examine(BytesIO(payload) if in_memory else payload, statistics)
        replies.write(json.dumps(finding._asdict()).encode() + b"\n")
        replies.flush()
