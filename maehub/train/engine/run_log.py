"""The run folder: who may write it, how the run stands, and one line of metrics a step."""

import contextlib
import fcntl
import json
import math
import os
import resource
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from maehub import errors
from maehub.errors import CheckpointError, DivergedError, MaehubError, UsageError, log
from maehub.files import atomic_write, check_regular, json_or_nothing, write_error

LOG_EVERY = 16
"""Steps between reads of the loss, each of which waits for the device."""

_CONFIG, _STATE, _METRICS, _DIVERGED = "config.json", "run.json", "metrics.jsonl", "diverged.json"
# beside the metrics, what a new run replaces
_OURS = (
    *(_CONFIG, _STATE, _DIVERGED, "checkpoints", "pictures", "model", "tensorboard", "report.html"),
    *("scores.json", "twins.csv"),
)
_SPIKE_WINDOW, _SPIKE = 64, 3.0  # a loss this many times the median of so many before it is worth a word
_BAR = "{percentage:3.0f} % {bar:12} step {n_fmt}/{total_fmt}{postfix} · {remaining} left"


def last_good_step(folder: Path) -> int:
    """The last step that a run says it saved; 0 where it says none."""
    step = json_or_nothing(folder / _STATE).get("last_good_step")
    return step if type(step) is int else 0


def run_state(folder: Path) -> str | None:
    """How a run stands: running, completed, preempted, diverged or failed. None where there is no run.

    A run that was killed is still called running.
    """
    facts = json_or_nothing(folder / _STATE)
    return str(facts["state"]) if {"state", "last_good_step"} <= facts.keys() else None


class _Terminal:
    """A stream as long as somebody reads it: one that went away must not end the run, nor keep tqdm's lock."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RunLog:
    """The record of one run; a context manager that keeps other processes out of the run folder.

    Nothing that is in the folder changes before `begin`. An error that ends the block is written to ``run.json``. Of
    the processes of a run one ``is_main`` and writes; the others only look at the numbers, to end where it ends.
    """

    def __init__(self, folder: Path, batch_size: int, *, is_main: bool = True) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self.is_main = is_main
        self.last_saved: int | None = None
        self.nonfinite_step: int | None = None
        self.idle = 0.0  # seconds of waiting for pictures since the clock was started
        self._begun = False
        self._above = contextlib.ExitStack()
        self._waiting: list[tuple[int, Tensor, float]] = []  # what `log` is given
        self._recent: deque[float] = deque(maxlen=_SPIKE_WINDOW)
        self._spiked = False
        self._bar: tqdm[Any] | None = None  # from `begin` on
        self._boards: Any = None  # TensorBoard's writer
        self._clock = 0.0
        self._memory = 0.0  # GB, the most that was in use on the device, or on the CPU by this process

    def __enter__(self) -> Self:
        if not self.is_main:
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / _METRICS).exists():
                check_regular(self.folder / _METRICS, CheckpointError)
            self._metrics = open(self.folder / _METRICS, "a+b")
        except OSError as error:
            raise write_error(self.folder, error) from error
        try:
            # Not flock: reading processes would inherit it and hold it for seconds after a kill.
            fcntl.lockf(self._metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._metrics.close()
            raise UsageError(
                f"another process is training in {self.folder}; wait for it, or choose another --out"
            ) from error
        except OSError:
            pass  # a filesystem without locks
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        self._above.close()
        if self._begun and error is not None:
            self.failed(error)
        if self._boards is not None:
            with contextlib.suppress(Exception):
                self._boards.close()
        if self.is_main:
            with contextlib.suppress(OSError):
                self._metrics.close()

    def begin(
        self,
        config: Mapping[str, Any],
        first_step: int,
        steps: int,
        *,
        overwrite: bool = False,
        hide_bar: bool = False,
        tensorboard: bool = False,
    ) -> None:
        """Write what the run is told, and drop the metrics of steps that will be done again."""
        self.last_saved = first_step or None
        self.restart_clock()
        if not self.is_main:
            return
        try:
            for name in _OURS if overwrite else ():
                path = self.folder / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            self._drop_lines(first_step)
        except OSError as error:
            raise write_error(self.folder, error) from error
        self._write_state("running", None)
        self._begun = True
        for name in {"model", "from_"} & config.keys():  # elsewhere a path may look like a Hub id
            if "/" in str(config[name]) and os.path.exists(str(config[name])):
                config = {**config, name: os.path.abspath(str(config[name]))}
        with atomic_write(self.folder / _CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=1, default=str) + "\n")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._boards = SummaryWriter(self.folder / "tensorboard", purge_step=first_step + 1)
            except ImportError as error:
                raise errors.MissingDependencyError(
                    '--tensorboard needs TensorBoard: pip install "maehub[log]"'
                ) from error
            except Exception as error:  # not of files alone
                log.warning("TensorBoard's files cannot be written: %s; the run goes on", error)
        self._above.enter_context(logging_redirect_tqdm())  # what is said meanwhile stands above the line
        self._bar = self._above.enter_context(
            tqdm(
                total=steps,
                initial=first_step,
                unit="step",
                disable=True if hide_bar or sys.stderr is None else None,
                dynamic_ncols=True,
                bar_format=_BAR,
                file=_Terminal(sys.stderr),
            )
        )

    def log(self, step: int, numbers: Tensor, rate: float) -> None:
        """Remember a step that is done, 1 for the first, and its learning rate.

        It is written every few steps, since reading its numbers waits for the device: (3,) float32, the loss, the norm
        of the gradient, and 1 if the update was bad and skipped.
        """
        self._waiting.append((step, numbers, rate))
        if len(self._waiting) == LOG_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is remembered, one line a step; a number that is not finite as null."""
        if not self._waiting:
            return
        steps, self._waiting = self._waiting, []
        rows = torch.stack([numbers for _, numbers, _ in steps]).tolist()
        seconds = time.perf_counter() - self._clock
        speed, wait = round(len(rows) * self.batch_size / seconds, 1), round(min(1.0, self.idle / seconds), 4)
        device = steps[0][1].device
        on_cpu = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else on_cpu
        self._memory = max(self._memory, round(used / 1e9, 3))
        first = next((index for index, (_, _, flag) in enumerate(rows) if flag), len(rows))
        for (step, _, rate), (loss, norm, _) in zip(steps[: first + 1], rows[: first + 1], strict=True):
            self.note(
                step,
                loss=loss,
                lr=rate,
                images_per_second=speed,
                data_wait=wait,
                grad_norm=norm,
                memory_gb=self._memory,
            )
        self.restart_clock()
        if self._bar is not None:
            words = f"loss {rows[-1][0]:.4f} · lr {steps[-1][2]:.2e} · {speed:,.0f} images/s"
            words += f" · data wait {100 * wait:.0f} % · {self._memory:.1f} GB"
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update(len(rows))
        if first < len(rows):
            number = self.nonfinite_step = steps[first][0]
            diverged = DivergedError(
                f"the loss or the gradient of step {number} is not finite. The update was skipped, and the weights are "
                f"those of step {number - 1}. {self.kept()} Its samples are in {_DIVERGED}. "
                "Try a lower --base-lr, --clip-grad 1 or --precision fp32 in a new run."
            )
            diverged.told_by = 0
            raise diverged
        for (step, _, _), (loss, _, _) in zip(steps, rows, strict=True):  # say once where it jumps, though it is finite
            usual = statistics.median(self._recent) if len(self._recent) == _SPIKE_WINDOW else math.inf
            if loss > _SPIKE * usual and not self._spiked:
                self._spiked = True
                log.warning("the loss of step %d is %.3g, usually %.3g: a lower --base-lr?", step, loss, usual)
            self._recent.append(loss)

    def note(self, step: int, **values: float) -> None:
        """Write one object to metrics.jsonl."""
        if not self.is_main:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            for name, value in finite.items():
                if value is not None and self._boards is not None:
                    self._boards.add_scalar(name, value, step)
        except Exception as error:  # whatever it is, the metrics are in our own file
            log.warning("TensorBoard's files cannot be written any more: %s; the run goes on", error)
            self._boards = None
        try:
            self._metrics.write(json.dumps({"step": step} | finite).encode() + b"\n")
            self._metrics.flush()
        except OSError as error:
            raise write_error(self.folder / _METRICS, error) from error

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Write what is remembered, and do something whose time is not that of a step."""
        self.flush()
        yield
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last step does not count as time of the next one."""
        self._clock, self.idle = time.perf_counter(), 0.0

    def saved(self, step: int) -> None:
        """A checkpoint of this step is on the disk."""
        self.last_saved = step
        self._write_state("running", None)

    def finish(self, exit_code: int) -> None:
        """The run ends here, and not by an error: all steps are done, or it was told to stop."""
        self.flush()
        self._write_state("preempted" if exit_code else "completed", exit_code)

    def dump(self, step: int, facts: Mapping[str, Any]) -> None:
        """Write down what is known of a bad step."""
        if self.is_main:
            with contextlib.suppress(CheckpointError), atomic_write(self.folder / _DIVERGED) as temporary:
                temporary.write_text(json.dumps({"step": step, **facts}, indent=1) + "\n")

    def failed(self, error: BaseException) -> None:
        """The run ends by an error, which ``run.json`` will tell."""
        # The disk may be full or the device lost; the error that ends the run must not be hidden by another.
        with contextlib.suppress(Exception):
            self.flush()
        with contextlib.suppress(Exception):
            if isinstance(error, MaehubError):
                finite = not isinstance(error, DivergedError) or self.nonfinite_step is None
                state = "failed" if finite else "diverged"
                self._write_state(state, error.exit_code, str(error))
            elif isinstance(error, KeyboardInterrupt):
                self._write_state("failed", errors.EXIT_INTERRUPTED, f"stopped within a step. {self.kept()}")
            else:
                self._write_state("failed", MaehubError.exit_code, repr(error))

    def kept(self) -> str:
        """Which checkpoint there is, in a sentence."""
        if self.last_saved is None:
            return "No checkpoint was written yet."
        return f"The checkpoint of step {self.last_saved} is kept."

    def _write_state(self, state: str, exit_code: int | None, reason: str = "") -> None:
        if not self.is_main:
            return
        facts = {"state": state, "exit_code": exit_code, "last_good_step": self.last_saved, "reason": reason}
        with atomic_write(self.folder / _STATE) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n")

    def _drop_lines(self, last: int) -> None:
        """Cut the metrics off after a step, and a line that was not finished."""
        self._metrics.seek(0)
        end = 0
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            for line in self._metrics:
                if not line.endswith(b"\n") or json.loads(line)["step"] > last:
                    break
                end += len(line)
        self._metrics.truncate(end)
