"""Checkpoints of a run as its processes write and find them together."""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maehub.errors import CheckpointError, DataError, DistributedError, DivergedError, IntegrityError, UsageError, log
from maehub.files import check_free, read_json
from maehub.train.engine.checkpoint import Progress, is_sharded, load_checkpoint, newest_checkpoint, save_checkpoint
from maehub.train.engine.distributed import Group
from maehub.train.engine.environment import code_digest
from maehub.train.engine.preemption import Stop
from maehub.train.engine.run_log import RunLog, last_good_step, run_state
from maehub.version import __version__

# What may be another when a run is resumed: it changes nothing that is computed, or only how fast.
_FREE = {
    *("out", "data", "resume", "overwrite", "allow_data_change", "quiet", "device", "workers", "cache"),
    *("checkpoint_every", "checkpoint_activations", "deterministic", "fsdp", "keep", "knn", "skip_twins"),
    *("micro_batch", "tensorboard", "time_limit", "timeout", "validate_every"),
    "epochs",  # its steps count
}

_GRACE = 30  # seconds between torchrun's SIGTERM and its SIGKILL


@dataclass
class Checkpoints:
    """Those of a run: found again, written when they are due, and one that cannot be written is borne."""

    group: Group
    run: RunLog
    stop: Stop
    _: KW_ONLY
    model: nn.Module
    optimizer: torch.optim.Optimizer
    start: Progress
    """Where the run begins. Its micro-batch is what the run computes at once."""
    steps: int
    every: int
    """Steps between two."""
    keep: int
    shard: bool
    """Whether weights are spread, where there are several processes."""
    _failed: bool = field(default=False, init=False)
    _first_weights: list[float] | None = field(default=None, init=False)  # sums of them, where the run began here

    def __post_init__(self) -> None:
        self._first_weights = _sums(self.model)

    def resume(self, data: str, micro_batch: int | None, *, allow_data_change: bool) -> int:
        """Put the newest valid checkpoint back; the step where the run goes on: 0 if there was never one.

        Rank 0 chooses, and every process reads.

        Args:
            data: name of the pictures, for an error.
            micro_batch: what the user wants; otherwise as many processes go on with what they had, for equal sums.
        """
        run, group = self.run.folder, self.group
        with group.together("looking for a checkpoint"):
            found = newest_checkpoint(run) if group.is_main else None
            if group.is_main and not (found and self._ends_at(found[1].step)):
                check_version(run)
        found = group.first(found, "the newest checkpoint")
        if found is None:
            with group.together("looking for a checkpoint"):
                if group.is_main and (last := last_good_step(run)):
                    raise CheckpointError(
                        f"the checkpoints of {run} are gone: run.json names step {last} as the last good one. Nothing "
                        f"was changed. Put them back into {run / 'checkpoints'}, or start anew in another folder"
                    )
            if group.is_main:
                log.warning("%s has no checkpoint: starting at step 0", run)
            return 0
        folder, before = found
        with group.together("reading the checkpoint"):
            _check_same(run, data, before, self.start, allow_data_change=allow_data_change)
            if not folder.is_dir():
                raise DistributedError(
                    f"rank {group.rank} on {socket.gethostname()} does not see {Path(folder).absolute()}, which rank 0 "
                    "chose. Nothing was changed. All hosts need the run folder on a filesystem that they share."
                )
            if is_sharded(folder):
                from maehub.train.engine.sharded import load_shards  # here, since its format takes a second to import

                load_shards(folder, self.model, self.optimizer, group)
            else:
                load_checkpoint(folder, self.model, self.optimizer, spread=self.shard and group.size > 1)
        if group.is_main:
            log.info("resumed %s", folder)
            if before.processes != group.size:
                log.info(
                    "it was written by %d processes; the samples stay the same, sums may round another way",
                    before.processes,
                )
        self._first_weights = None
        if before.processes == group.size and before.micro_batch and not micro_batch:
            self.start = replace(self.start, micro_batch=before.micro_batch)
        return before.step

    def is_complete(self, step: int) -> bool:
        """Whether nothing is left to do, which is then said."""
        if self._ends_at(step):
            log.info("%s is already at step %d: nothing to do", self.run.folder, step)
        return self._ends_at(step)

    def _ends_at(self, step: int) -> bool:
        return step == self.steps and run_state(self.run.folder) == "completed"

    def after_step(self, step: int, stop_signal: int) -> int:
        """Save if one is due; the exit code to stop with now, 0 to go on.

        Args:
            stop_signal: see `maehub.train.engine.steps.stop_after`.
        """
        last = step == self.steps
        if last and self._first_weights is not None:
            with self.group.together("looking at the weights"):
                if _sums(self.model) == self._first_weights:
                    raise DivergedError(
                        f"after {step} steps all weights are those of the start: nothing was learned, and nothing is "
                        "exported. Look at the rate and the losses in metrics.jsonl; --base-lr may be far too small"
                    )
        if last or stop_signal or step % self.every == 0:
            with self.run.paused():
                self.save(step, must=last or bool(stop_signal))
        return 0 if last else stop_signal

    def save(self, step: int, *, must: bool) -> None:
        """A checkpoint of this step.

        Args:
            must: no other will follow, so it has to succeed. Otherwise a first failure is only said.
        """
        begun = time.monotonic()
        progress = replace(self.start, step=step)
        try:
            if self.shard and self.group.size > 1:
                from maehub.train.engine.sharded import save_shards

                save_shards(self.run.folder, self.model, self.optimizer, progress, self.keep, self.group)
            else:
                with self.group.together(f"saving step {step}"):
                    if self.group.is_main:
                        save_checkpoint(self.run.folder, self.model, self.optimizer, progress, self.keep)
        except CheckpointError as error:
            if must or self._failed:
                raise
            self._failed = True
            if self.group.is_main:
                log.warning("%s\nThe run goes on and tries again in %d steps.", error, self.every)
            return
        self._failed = False
        self.run.saved(step)
        self._warn_if_slow(time.monotonic() - begun)

    def _warn_if_slow(self, seconds: float) -> None:
        first, self.stop.ending = not self.stop.ending, seconds
        if first and seconds > 0.7 * _GRACE and self.group.is_main:
            log.warning(
                "a checkpoint takes %.0f s, and torchrun kills %d s after a SIGTERM: stop by SIGUSR1 ahead of time, or "
                "by --time-limit",
                seconds,
                _GRACE,
            )


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, a folder that is not free, no run to go on with or another version's, none to delete."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return check_free(folder, overwrite, ())
    is_run = run_state(folder) is not None
    if (resume or overwrite) and not is_run:
        raise UsageError(f"{folder} is no run folder, so nothing in it is touched; choose another --out")
    if not resume and not overwrite:
        remedy = "go on with it by --resume, or replace it by --overwrite" if is_run else "choose another --out"
        raise UsageError(f"{folder} exists and is not empty; {remedy}")
    if resume and run_state(folder) != "completed":
        check_version(folder)
    return None


def check_version(run: Path) -> None:
    """Refuse to go on with a run that another minor version of maehub started."""
    try:
        config = read_json(run / "config.json")
        started, kind = str(config["environment"]["maehub"]), config.get("kind")
    except (IntegrityError, TypeError, KeyError):
        return  # nobody knows which
    theirs, ours = (version.split(".")[:2] for version in (started, __version__))
    if theirs == ours:
        return
    line = "`maehub finetune … -m RUN`" if kind == "finetune" else "`maehub pretrain … --from RUN`"
    again = f"start a new run from its weights: {line}" if (run / "model").is_dir() else "start a new run"
    raise UsageError(
        f"maehub {started} started {run}, and this is {__version__}. Its code computes otherwise, so what follows "
        "would not be of the same run. Nothing was changed. Finish it with that version, "
        f'`pip install "maehub=={".".join(theirs)}.*"`, or {again}.'
    )


def agreed_start(group: Group, settings: Mapping[str, Any], derived: Mapping[str, Any], data: str) -> Progress:
    """Step 0 of a run, with what must be the same when it is resumed, after all processes agreed on it: its settings by
    name, what is derived from them, and the digest of the data."""
    fixed = {name: value for name, value in settings.items() if name not in _FREE} | dict(derived)
    fixed = json.loads(json.dumps(fixed))  # as a checkpoint gives it back
    group.agree(
        {f"--{name.replace('_', '-')}": value for name, value in fixed.items()}
        | {"the code of maehub": code_digest(), "maehub": __version__, "torch": torch.__version__}
        | {"the data": data}
    )
    return Progress(0, fixed, data, group.size)


def _check_same(run: Path, data: str, before: Progress, now: Progress, *, allow_data_change: bool) -> None:
    """Refuse what would make another run of it."""
    changed = [
        f"{name} {before.config.get(name)} → {now.config.get(name)}"
        for name in sorted(before.config | now.config)
        if before.config.get(name) != now.config.get(name)
        and (name, before.config.get(name)) != ("precision", "auto")  # of 0.1, which did not say what it took
    ]
    if changed:
        raise UsageError(
            f"{run} was started with other settings: {'; '.join(changed)}. Nothing was changed. "
            "Resume with the same ones, or choose another --out."
        )
    if before.data != now.data and not allow_data_change:
        raise DataError(
            f"the pictures in {data} are not those that {run} was started with: names or sizes differ. "
            "Nothing was changed. Put them back, or accept it by --allow-data-change."
        )


def _sums(model: nn.Module) -> list[float]:
    """Of each trained tensor, or this process's part: equal only if no number in it has changed, but by chance."""
    parts = [getattr(p, "_local_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    return [value.sum(dtype=torch.float64).item() for part in parts for value in (part, part.square())]
