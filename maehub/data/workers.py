"""Processes that decode pictures: to pixels for a network, or to find out whether that works and what is in them.

Each is a fresh Python that imports numpy and Pillow alone, so it starts in a fraction of a second, needs no guard in
the caller's script, shares no locks or GPU with it and no /dev/shm, and a decoder that crashes takes nothing along.
Pictures go out as paths or as bytes and answers come back through pipes; threads here wait for the processes.
"""

import contextlib
import itertools
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader, BytesIO
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar, cast

import numpy as np
from PIL import Image

from maehub.errors import DataError, UsageError
from maehub.images import ImagePath, Preprocess, decode, limit_time, open_header, printable, read_pixels

Reading = np.ndarray | DataError
"""Pixels (H, W, C) uint8, or why there are none."""
_Process = subprocess.Popen[bytes]
_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")

_AT_ONCE = 8  # pictures that a process is asked for in one message, to read them
_AHEAD = 3  # messages a process that are under way or finished and not yet taken
_WAITING = 4  # pictures a process that are fetched beside it, to examine them: those behind an address take their time
_SILENCE = 300.0  # seconds until a process that gives nothing counts as hanging
_REQUEST = struct.Struct("<BQ")  # 1 for the bytes of a file, 0 for a path; how many follow
_START = "import sys; sys.path[:] = sys.argv[1:]; from maehub.data.workers import serve; serve()"
_TOO_LONG = "it takes too long to decode: more than 10 s, and 1 s for each megabyte and megapixel"
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
    warnings: tuple[str, ...] = ()
    """What is odd about the file, and harmless."""


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reader_count(workers: int | None, pictures: int) -> int:
    """How many processes to start: what the caller says, else as many as there are cores and work for them."""
    if workers is None:
        return min(core_count(), pictures // (4 * _AT_ONCE))
    if workers < 0:
        raise UsageError(f"workers must be 0 or more, not {workers}; 0 reads in this process")
    return min(workers, pictures)


class _Pool:
    """Processes of one kind, each of which is told an order first, see `serve`; a context manager.

    So many ``threads`` wait for each of them. With 0 ``workers`` the work is done in this process.
    """

    _done = "decoded"

    def __init__(self, workers: int, order: dict[str, Any], threads: int) -> None:
        self.workers = workers
        self._order = json.dumps(order).encode() + b"\n"
        self._processes: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, workers * threads), thread_name_prefix="maehub-data")
        self._closing = False

    def __enter__(self) -> Self:
        try:
            for _ in range(self.workers):
                self._idle.put(self._start())
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                called = f"reading process {len(self._processes) + 1} of {self.workers}"
                raise UsageError(f"{called} cannot be started: {error.strerror}. Use fewer workers") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            _end(process)

    def _start(self) -> _Process:
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
        with contextlib.suppress(OSError):  # if it is dead already, the first picture says so
            _send(process, self._order)
        return process

    def _again(self, dead: _Process) -> _Process:
        _end(dead)
        self._processes.remove(dead)
        return self._start()

    def _in_order(self, work: Callable[[_Asked], _Answer], items: Iterable[_Asked], ahead: int) -> Iterator[_Answer]:
        """What the threads make of the items, up to ``ahead`` of which are under way or not yet taken."""
        waiting: deque[Future[_Answer]] = deque()
        remaining = iter(items)
        while True:
            for item in itertools.islice(remaining, ahead - len(waiting)):
                waiting.append(self._threads.submit(work, item))
            if not waiting:
                return
            try:
                answer = waiting.popleft().result(timeout=_SILENCE)
            except TimeoutError as error:
                where = "check the disk or the network they are on"
                raise DataError(f"no picture was {self._done} for {_SILENCE:.0f} s; {where}") from error
            yield answer


class Readers(_Pool):
    """Reads pictures in ``workers`` processes, or in this one with 0, as `read_pixels` does. A context manager."""

    _done = "read"

    def __init__(self, workers: int, preprocess: Preprocess, *, exact_decode: bool = False) -> None:
        super().__init__(workers, {"preprocess": preprocess.to_dict(), "exact_decode": exact_decode}, threads=1)
        self.preprocess = preprocess
        self.exact_decode = exact_decode

    def read(self, paths: Iterable[bytes]) -> Iterator[Reading]:
        """One reading a path, in order."""
        if not self.workers:
            yield from (_reading(path, self.preprocess, self.exact_decode) for path in paths)
            return
        # Pictures of their own size may be large, so fewer wait.
        at_once = 1 if self.preprocess.resize == "native" else _AT_ONCE
        remaining = iter(paths)
        messages = iter(lambda: list(itertools.islice(remaining, at_once)), [])
        for readings in self._in_order(self._read, messages, self.workers * _AHEAD):
            yield from readings

    def _read(self, paths: list[bytes]) -> list[Reading]:
        process = self._idle.get()
        readings: list[Reading] = []
        try:
            _send(process, *(part for path in paths for part in (_REQUEST.pack(0, len(path)), path)))
            while len(readings) < len(paths):
                answer = _received(process)
                readings.append(DataError(answer["reason"]) if isinstance(answer, dict) else answer)
        except (EOFError, OSError) as error:
            path, how = printable(paths[len(readings)]), _how(process)
            if how is not _TOO_LONG or self._closing:
                raise DataError(
                    f"a reading process died {how} at {path}. "
                    "If memory is short, use fewer workers; workers=0 shows whether it is the picture"
                ) from error
            readings.append(DataError(f"{path} cannot be read: {how}"))
            process = self._again(process)
        finally:
            self._idle.put(process)  # a dead one too, or the other threads would wait for it
        return readings + (self._read(paths[len(readings) :]) if len(readings) < len(paths) else [])


class Examiners(_Pool):
    """Examines pictures in ``workers`` processes, or in this one with 0. A context manager.

    One picture is handed over at a time, so a decoder that crashes is known by its picture, and only that one is lost.
    """

    def __init__(self, workers: int, *, statistics: bool) -> None:
        super().__init__(workers, {"statistics": statistics}, _WAITING)
        self.statistics = statistics

    def findings(self, pictures: Iterator[Callable[[], ImagePath | BinaryIO]]) -> Iterator[Finding]:
        """One finding a picture, in order; what gives a path or a file, or raises DataError, is called in threads."""
        if not self.workers:
            return map(self._examined, pictures)
        return self._in_order(self._examined, pictures, 2 * self.workers * _WAITING)

    def _examined(self, picture: Callable[[], ImagePath | BinaryIO]) -> Finding:
        try:
            given = picture()
        except DataError as error:
            return Finding(str(error))
        if not self.workers:
            return examine(given, self.statistics)
        in_memory, payload = (0, os.fsencode(given)) if isinstance(given, ImagePath) else (1, given.read())
        process = self._idle.get()
        try:
            _send(process, _REQUEST.pack(in_memory, len(payload)), payload)
            answer = cast(dict[str, Any], _received(process))
            return Finding(**answer | {name: tuple(answer[name]) for name in ("mean", "square", "warnings")})
        except (EOFError, OSError):
            if self._closing:
                return Finding("not examined")
            how = _how(process)
            process = self._again(process)
            return Finding(how if how is _TOO_LONG else f"the process that decoded it died {how}")
        finally:
            self._idle.put(process)


def _send(process: _Process, *parts: bytes) -> None:
    requests = cast(BinaryIO, process.stdin)
    requests.writelines(parts)
    requests.flush()


def _received(process: _Process) -> np.ndarray | dict[str, Any]:
    """The pixels of a picture, or what else is said of it."""
    answers = cast(BufferedReader, process.stdout)
    line = answers.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    if "shape" not in answer:
        return answer
    pixels = np.empty(answer["shape"], np.uint8)
    if answers.readinto(pixels.data.cast("B")) < pixels.size:
        raise EOFError
    return pixels


def _how(process: _Process) -> str:
    """How it died."""
    code = process.wait()
    if code == -signal.SIGPROF:
        return _TOO_LONG
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def _end(process: _Process) -> None:
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            cast(BinaryIO, stream).close()
    process.wait()


def serve() -> None:
    """What such a process does until its input ends."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    order = json.loads(requests.readline())
    preprocess = Preprocess.from_dict(order["preprocess"]) if "preprocess" in order else None
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        in_memory, length = _REQUEST.unpack(header)
        payload = requests.read(length)
        picture = BytesIO(payload) if in_memory else payload
        pixels: bytes | memoryview = b""
        with contextlib.suppress(OSError):  # of a path, of which decoding says more
            limit_time(length if in_memory else os.stat(payload).st_size)
        if preprocess is None:
            answer = examine(picture, order["statistics"])._asdict()
        elif isinstance(reading := _reading(picture, preprocess, order["exact_decode"]), DataError):
            answer = {"reason": str(reading)}
        else:
            answer, pixels = {"shape": reading.shape}, reading.data.cast("B")
        answers.writelines((json.dumps(answer).encode() + b"\n", pixels))
        answers.flush()


def _reading(picture: ImagePath | BinaryIO, preprocess: Preprocess, exact_decode: bool) -> Reading:
    try:
        return read_pixels(picture, preprocess, exact_decode=exact_decode)
    except DataError as error:
        return error


def examine(picture: ImagePath | BinaryIO, statistics: bool) -> Finding:
    """Decode a whole picture, as `maehub.images.decoding.open_image` does, and fill in its ``statistics``, too."""
    try:
        decoded = decode(picture)
        image = decoded.image
        with open(picture, "rb") if isinstance(picture, ImagePath) else contextlib.nullcontext(picture) as file:
            file.seek(0)
            raw, _ = open_header(file)
            bits = 16 if raw.mode.startswith("I;16") else _BITS.get(raw.mode, 8)
            facts = Finding("", raw.format or "", raw.mode, bits, image.width, image.height)
            return (_with_values(facts, image, raw) if statistics else facts)._replace(warnings=decoded.warnings)
    except DataError as error:
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause or error)
        return Finding(reason or type(cause).__name__)


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
