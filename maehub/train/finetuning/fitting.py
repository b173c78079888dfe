"""How a run is fitted to the machine before it starts: what is computed at once, and its length to the clock."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import maehub.train.engine as engine
from maehub.data import Key, worker_count
from maehub.errors import UsageError, log
from maehub.images import Preprocess
from maehub.models import Precision, autocast
from maehub.train.engine import Group
from maehub.train.finetuning.dense.recipes import DenseSettings, MapSettings, ObjectSettings
from maehub.train.finetuning.mixing import seeded_torch
from maehub.train.finetuning.recipes import Settings

MINUTES = 10.0
"""That ``auto`` may take on a CPU, where nothing else is said."""

Recipe = TypeVar("Recipe", Settings, MapSettings, ObjectSettings)
Made = Callable[[int], tuple[Tensor, Tensor]]
"""Gives so many images and targets, of no meaning."""

_MARGIN = 1.15  # of what is estimated: a machine is seldom left alone


def micro_batch_of(
    asked: int | None,
    objective: nn.Module,
    preprocess: Preprocess,
    settings: Settings,
    classes: int,
    group: Group,
    precision: Precision,
    *,
    shard: bool,
) -> int:
    """Pictures that a process computes at once, so that they fit into memory; ``asked`` if that is a number."""
    part, (height, width) = settings.batch_size // group.size, preprocess.size
    micro, multiple = min(asked or part, part), settings.mixed_at_once
    sizes = {micro, part % micro or micro}  # of the parts of a step
    if any(count % multiple for count in sizes):
        raise UsageError(
            f"--micro-batch {micro} of {part} leaves an odd number of pictures, and they are mixed in pairs"
        )
    if settings.head == "normed" or settings.head_start == "probe":
        multiple = 2
        if 1 in sizes:
            raise UsageError(
                f"batch normalisation needs two pictures at once, and with --batch-size {settings.batch_size} and "
                f"--micro-batch {micro} a part of a step has one"
            )

    made = partial(blank, preprocess=preprocess, classes=classes, device=group.device)
    size = f"{height}×{width}"
    return fitted_micro_batch(asked, objective, made, part, group, precision, size, shard=shard, multiple=multiple)


def fitted_micro_batch(
    asked: int | None,
    objective: nn.Module,
    made: Made,
    part: int,
    group: Group,
    precision: Precision,
    size: str,
    *,
    shard: bool,
    multiple: int = 1,
) -> int:
    """Of a process's ``part`` of a batch what it computes at once; the rest is as in `engine.find_micro_batch`."""
    objective.eval()  # blank pictures would change the running statistics of a normalised head
    with seeded_torch(0, group.device):
        fits = engine.pictures_fit(objective, made, group, precision, shard=shard)
        found = engine.find_micro_batch(part, group, fits, size, asked=asked, multiple=multiple)
    objective.train()
    return found


def blank(count: int, preprocess: Preprocess, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W) and targets (count, classes), zeros."""
    images = torch.zeros(count, preprocess.channels, *preprocess.size, device=device)
    return images, torch.zeros(count, classes, device=device)


class Clock:
    """What is left of the time that a run has, which began at ``begun`` by `time.monotonic`."""

    def __init__(self, minutes: float | None, begun: float, *, asked: bool = True) -> None:
        self.minutes = minutes
        self.asked = asked
        self.begun = begun
        self.picture = 0.0
        """Seconds in which a picture is read and its features are computed, in all processes together."""

    @property
    def left(self) -> float:
        """Seconds."""
        return math.inf if self.minutes is None else 60 * self.minutes - (time.monotonic() - self.begun)

    def has_time_for(self, pictures: int) -> None:
        """Refuse what has not even the time for the features of its pictures, where that time was asked for."""
        if self.picture * pictures > self.left and not self.asked:
            log.warning(
                "the features of %d pictures take about %s here, and a run on a CPU aims at %g minutes: it will be the "
                "probe alone; --minutes says how long a run may take",
                pictures,
                _words(pictures * self.picture),
                self.minutes,
            )
        elif self.picture * pictures > self.left:
            least = (pictures * self.picture + time.monotonic() - self.begun) / 60
            raise UsageError(
                f"--minutes {self.minutes:g} is too short for the features of {pictures:,} pictures, which take about "
                f"{_words(pictures * self.picture)} here: give --minutes {2 * least:.2g} or more. Nothing was written."
            )

    def fitted(self, settings: Recipe, training: int, step: float, beside: float) -> Recipe:
        """The settings with as many steps as there is time for, of ``step`` seconds; it says how long that takes.

        ``training`` is the number of pictures of an epoch, ``beside`` the seconds that measuring takes.
        """
        steps = min(settings.steps, max(0, int((self.left / _MARGIN - beside) / step)))
        if steps * settings.batch_size < training and steps < settings.steps:
            steps = 0
        if not steps and settings.head_start == "zero":
            raise UsageError(
                f"--minutes {self.minutes:g} is too short for one pass over {training:,} pictures, and a head that "
                "starts fresh leaves no probe to export: give it more. Nothing was written."
            )
        self._tell(settings, steps, steps * step + beside, training)
        return replace(settings, steps=steps, epochs=steps * settings.batch_size / training)

    def _tell(self, settings: Settings | DenseSettings, steps: int, seconds: float, training: int) -> None:
        if not steps:
            log.warning(
                "%g minutes are too short for one pass over %d pictures, so nothing is trained: the probe is exported. "
                "--minutes says how long a run may take",
                self.minutes,
                training,
            )
        elif steps < settings.steps:
            log.info(
                "%g minutes are enough for %d of %d steps, about %s from now; --minutes says how long a run may take",
                self.minutes,
                steps,
                settings.steps,
                _words(seconds),
            )
        else:
            log.info("it will take up to %s", _words(_MARGIN * seconds))


def seconds_a_step(
    objective: nn.Module,
    made: Made,
    batch: int,
    crops: Any,
    keys: list[Key],
    micro: int,
    group: Group,
    precision: Precision,
    workers: int | None,
) -> float:
    """How long a step of ``batch`` pictures takes: reading those of ``keys``, forward and backward of ``micro``."""
    start = time.monotonic()
    crops.__getitems__(keys)
    reading = (time.monotonic() - start) / max(1, worker_count(workers, group.local_size))
    objective.eval()
    spent = []
    for _ in range(2):  # the first also sets up
        start = time.monotonic()
        with autocast(precision, group.device):
            loss = objective(*made(micro))
        loss.backward()
        loss.item()
        spent.append(time.monotonic() - start)
    objective.zero_grad()
    objective.train()
    computing = min(spent) * batch / group.size / micro
    return computing + reading if group.device.type == "cpu" else max(computing, reading)


def _words(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{math.ceil(seconds / 60)} minutes"
