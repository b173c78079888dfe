"""The run folder: who may write it, how the run stands, and one line of metrics a step."""

import contextlib
import fcntl
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from maehub.errors import EXIT_INTERRUPTED, DivergedError, MaehubError, UsageError
from maehub.files import atomic_write, write_error

_CONFIG, _STATE, _METRICS = "config.json", "run.json", "metrics.jsonl"
_OURS = (_CONFIG, _STATE, "checkpoints", "pictures", "model")  # beside the metrics, what a new run replaces
_LOG_EVERY = 20  # steps between reads of the loss: each read waits for the device


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, a folder that is not free, no run to go on with, or no run to delete.

    Raises:
        UsageError: the text says which flag helps.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    is_run = run_state(folder) is not None
    if (resume or overwrite) and not is_run:
        raise UsageError(f"{folder} is no run folder, so nothing in it is touched; choose another --out")
    if not resume and not overwrite:
        remedy = "go on with it by --resume, or replace it by --overwrite" if is_run else "choose another --out"
        raise UsageError(f"{folder} exists and is not empty; {remedy}")


def run_state(folder: Path) -> str | None:
    """How a run stands: running, completed, preempted, diverged or failed. None where there is no run.

    A run that was killed is still called running.
    """
    try:
        facts = json.loads((folder / _STATE).read_bytes())
        return str(facts["state"]) if "last_good_step" in facts else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


class _Step(NamedTuple):
    number: int
    loss: Tensor
    rate: float


class RunLog:
    """The record of one run; a context manager that keeps other processes out of the run folder.

    Nothing that is in the folder changes before `begin`. An error that ends the block is written to ``run.json``.

    Raises:
        UsageError: another process writes the folder.
        CheckpointError: it cannot be written.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self.last_saved: int | None = None
        self._waiting: list[_Step] = []
        self._bar: tqdm[Any] | None = None  # from `begin` on
        self._clock = 0.0

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
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
        if self._bar is not None:
            self._bar.close()
            if error is not None:
                self._fail(error)
        with contextlib.suppress(OSError):
            self._metrics.close()

    def begin(
        self, config: Mapping[str, Any], *, first_step: int, steps: int, overwrite: bool = False, hide_bar: bool = False
    ) -> None:
        """Write what the run is told, and drop the metrics of steps that will be done again."""
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
        self.last_saved = first_step or None
        self._write_state("running", None)
        with atomic_write(self.folder / _CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=1, default=str) + "\n")
        self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=hide_bar or None)
        self.restart_clock()

    def log(self, step: int, loss: Tensor, rate: float) -> None:
        """Remember a step that is done; written every few steps, since reading the loss waits for the device."""
        self._waiting.append(_Step(step, loss, rate))
        if len(self._waiting) == _LOG_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is remembered, one line a step; a loss that is not finite as null.

        Raises:
            DivergedError: a loss is not finite.
            CheckpointError: the disk is full.
        """
        if not self._waiting:
            return
        steps, self._waiting = self._waiting, []
        losses = torch.stack([step.loss for step in steps]).tolist()
        speed = round(len(losses) * self.batch_size / (time.perf_counter() - self._clock), 1)
        for step, loss in zip(steps, losses, strict=True):
            self.note(step.number, loss=loss, lr=step.rate, images_per_second=speed)
        self.restart_clock()
        if self._bar is not None:
            self._bar.update(len(losses))
            self._bar.set_postfix(loss=f"{losses[-1]:.4f}", images_per_second=speed, refresh=False)
        bad = [step.number for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            raise DivergedError(
                f"the loss of step {bad[0]} is not finite. {self._kept()} Try a lower --base-lr, or --precision fp32."
            )

    def note(self, step: int, **values: float) -> None:
        """Write one object to metrics.jsonl."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._metrics.write(json.dumps({"step": step} | finite).encode() + b"\n")
            self._metrics.flush()
        except OSError as error:
            raise write_error(self.folder / _METRICS, error) from error

    def restart_clock(self) -> None:
        """What was done since the last step does not count as time of the next one."""
        self._clock = time.perf_counter()

    def saved(self, step: int) -> None:
        """A checkpoint of this step is on the disk."""
        self.last_saved = step
        self._write_state("running", None)

    def finish(self, state: str, exit_code: int) -> None:
        """The run ends here, and not by an error."""
        self.flush()
        self._write_state(state, exit_code)

    def _fail(self, error: BaseException) -> None:
        # The disk may be full or the device lost; the error that ends the run must not be hidden by another.
        with contextlib.suppress(Exception):
            self.flush()
        with contextlib.suppress(Exception):
            if isinstance(error, MaehubError):
                state = "diverged" if isinstance(error, DivergedError) else "failed"
                self._write_state(state, error.exit_code, str(error))
            elif isinstance(error, KeyboardInterrupt):
                self._write_state("failed", EXIT_INTERRUPTED, f"stopped within a step. {self._kept()}")
            else:
                self._write_state("failed", MaehubError.exit_code, repr(error))

    def _kept(self) -> str:
        if self.last_saved is None:
            return "No checkpoint was written yet."
        return f"The checkpoint of step {self.last_saved} is kept."

    def _write_state(self, state: str, exit_code: int | None, reason: str = "") -> None:
        facts = {"state": state, "exit_code": exit_code, "last_good_step": self.last_saved, "reason": reason}
        with atomic_write(self.folder / _STATE) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n")

    def _drop_lines(self, last: int) -> None:
        """Cut the metrics off after a step, and a line that was not finished."""
        self._metrics.seek(0)
        end = 0
        for line in self._metrics:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > last:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        self._metrics.truncate(end)
