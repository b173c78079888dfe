"""Checkpoints of a run as its processes write and find them together."""

import json
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maehub.errors import CheckpointError, DataError, DistributedError, UsageError
from maehub.train.engine.checkpoint import Progress, is_sharded, load_checkpoint, newest_checkpoint, save_checkpoint
from maehub.train.engine.distributed import Group
from maehub.train.engine.preemption import Stop
from maehub.train.engine.run_log import RunLog
from maehub.train.engine.settings import RunConfig
from maehub.train.engine.sharded import load_shards, load_whole, save_shards

log = logging.getLogger("maehub")

# What may be another when a run is resumed: it changes nothing that is computed, or only how fast.
_FREE = {"out", "data", "resume", "overwrite", "allow_data_change", "quiet", "device", "workers", "cache"} | {
    "checkpoint_every",
    "checkpoint_activations",
    "deterministic",
    "epochs",  # its steps count
    "fsdp",
    "keep",
    "knn",
    "skip_twins",
    "micro_batch",
    "tensorboard",
    "time_limit",
    "timeout",
    "validate_every",
}

_GRACE = 30  # seconds between torchrun's SIGTERM and its SIGKILL


@dataclass
class Saver:
    """Writes checkpoints, and bears one that cannot be written."""

    config: RunConfig
    group: Group
    run: RunLog
    stop: Stop
    model: nn.Module
    optimizer: torch.optim.Optimizer
    start: Progress
    _failed: bool = field(default=False, init=False)

    def save(self, step: int, *, must: bool) -> None:
        """A checkpoint of this step.

        Args:
            must: no other will follow, so it has to succeed. Otherwise a first failure is only said.

        Raises:
            CheckpointError: it cannot be written, and must be, or the one before could not be either.
        """
        begun = time.monotonic()
        progress = replace(self.start, step=step)
        try:
            if self.config.fsdp and self.group.size > 1:
                save_shards(self.run.folder, self.model, self.optimizer, progress, self.config.keep, self.group)
            else:
                with self.group.together(f"saving step {step}"):
                    if self.group.leads:
                        save_checkpoint(self.run.folder, self.model, self.optimizer, progress, self.config.keep)
        except CheckpointError as error:
            if must or self._failed:
                raise
            self._failed = True
            if self.group.leads:
                log.warning("%s\nThe run goes on and tries again in %d steps.", error, self.config.checkpoint_every)
            return
        self._failed = False
        self.run.saved(step)
        self._warn_if_slow(time.monotonic() - begun)

    def _warn_if_slow(self, seconds: float) -> None:
        first, self.stop.ending = not self.stop.ending, seconds
        if first and seconds > 0.7 * _GRACE and self.group.leads:
            log.warning(
                "a checkpoint takes %.0f s, and torchrun kills %d s after a SIGTERM: stop by SIGUSR1 ahead of time, or "
                "by --time-limit",
                seconds,
                _GRACE,
            )


def resumed(
    config: RunConfig, group: Group, model: nn.Module, optimizer: torch.optim.Optimizer, now: Progress
) -> Progress:
    """Put the newest valid checkpoint back; where the run goes on from: step 0 if there was never one.

    Rank 0 chooses, and every process reads.

    Raises:
        UsageError: the run was started with other settings.
        DataError: with other pictures.
        CheckpointError: none of the checkpoints is valid, or it is of another network.
        DistributedError: a process does not see the checkpoint.
    """
    with group.together("looking for a checkpoint"):
        found = newest_checkpoint(config.out) if group.leads else None
    found = group.first(found, "the newest checkpoint")
    if found is None:
        if group.leads:
            log.warning("%s has no checkpoint: starting at step 0", config.out)
        return now
    folder, before = found
    with group.together("reading the checkpoint"):
        _check_same(config, before, now)
        if not folder.is_dir():
            raise DistributedError(
                f"rank {group.rank} on {socket.gethostname()} does not see {Path(folder).absolute()}, which rank 0 "
                "chose. Nothing was changed. All hosts need the run folder on a filesystem that they share."
            )
        if is_sharded(folder):
            load_shards(folder, model, optimizer, group)
        elif config.fsdp and group.size > 1:
            load_whole(folder, model, optimizer)
        else:
            load_checkpoint(folder, model, optimizer)
    if group.leads:
        log.info("resumed %s", folder)
        if before.processes != group.size:
            log.info(
                "it was written by %d processes; the samples stay the same, sums may round another way",
                before.processes,
            )
    return before


def fixed_settings(config: RunConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is resumed, as JSON gives it back: settings, and what follows from them."""
    fixed = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return json.loads(json.dumps(fixed | dict(more)))


def _check_same(config: RunConfig, before: Progress, now: Progress) -> None:
    """Refuse what would make another run of it."""
    changed = [
        f"{name} {before.config.get(name)} → {now.config.get(name)}"
        for name in sorted(before.config | now.config)
        if before.config.get(name) != now.config.get(name)
    ]
    if changed:
        raise UsageError(
            f"{config.out} was started with other settings: {'; '.join(changed)}. Nothing was changed. "
            "Resume with the same ones, or choose another --out."
        )
    if before.data != now.data and not config.allow_data_change:
        raise DataError(
            f"the pictures in {config.data} are not those that {config.out} was started with: names or sizes differ. "
            "Nothing was changed. Put them back, or accept it by --allow-data-change."
        )
