"""What every training loop does around a step: the next batch, its parts, whether the numbers are finite, the end."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from maehub.data import StepKeys
from maehub.errors import CheckpointError, DataError, DivergedError
from maehub.train.engine.distributed import Group
from maehub.train.engine.preemption import Stop
from maehub.train.engine.resume import Checkpoints
from maehub.train.engine.run_log import RunLog

Read = TypeVar("Read")
Parts = TypeVar("Parts", bound=tuple[Tensor, ...])


def next_batch(batches: Iterator[Read], group: Group, run: RunLog, stop: Stop) -> tuple[Read, int]:
    """The batch of a step, and the exit code to stop with after it, the same in every process (0: go on)."""
    begun = time.perf_counter()
    batch, failure = None, None
    try:
        batch = next(batches)
    except (DataError, RuntimeError) as error:  # of many processes, the others must hear of it before they wait
        failure = error
    run.idle += time.perf_counter() - begun
    stop_signal, failed = group.exchange(stop.exit_code, failure is not None)
    if failed:
        with group.together("reading pictures"):
            if failure is not None:
                raise failure
    assert batch is not None
    return batch, stop_signal


def stop_after(agreed: int, group: Group, stop: Stop) -> int:
    """The exit code to stop with after this step, 0 to go on: what all agreed on at its beginning; one process, which
    has nobody to agree with, also hears what came since."""
    return agreed if group.size > 1 else stop.exit_code or 0


def parts(batch: Parts, size: int) -> Iterator[tuple[Parts, bool]]:
    """Micro-batches of a named tuple of tensors, and whether each is the last, which may be smaller."""
    kind: Any = type(batch)
    split = [kind(*part) for part in zip(*(field.split(size) for field in batch), strict=True)]
    return ((part, number == len(split)) for number, part in enumerate(split, start=1))


@contextlib.contextmanager
def step_errors(views: int, group: Group) -> Iterator[None]:
    """Say who is lost where a process does not come, and what helps where memory runs out in a step that computes so
    many ``views`` at once."""
    with group.waiting("the gradients"):
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
            if not known:
                raise
            raise CheckpointError(
                f"the memory of {group.device} ran out with {views} views at once. Checkpoints are kept. Resume with a "
                "smaller --micro-batch, which changes no result but the rounding, or with --checkpoint-activations or "
                "--fsdp."
            ) from error


def agreed(loss: Tensor, norm: Tensor, nonfinite: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The loss of the global batch, and 1 if it or the gradient is not finite anywhere, now or before."""
    both = torch.stack([loss / group.size, (~torch.isfinite(loss + norm)).float()])
    if group.size > 1:
        dist.all_reduce(both, group=group.step_group)
    return both[0], torch.maximum(nonfinite, (both[1] > 0).float())


@contextlib.contextmanager
def rescuing(keys: StepKeys, checkpoints: Checkpoints, report: Callable[[], None]) -> Iterator[None]:
    """Where an update was bad, write down its samples, and keep the weights: they are those of the step before."""
    run = checkpoints.run
    try:
        yield
    except DivergedError as error:
        if run.nonfinite_step is None:
            raise
        step = run.nonfinite_step
        if step > 1 and run.last_saved != step - 1:
            before = run.kept()
            with contextlib.suppress(CheckpointError):  # the first error tells more
                checkpoints.save(step - 1, must=True)
            error.args = (str(error).replace(before, run.kept()),)
        batch = next(iter(replace(keys, first_step=step - 1, steps=step, rank=0, size=1)))
        names = [keys.samples.where(key.sample) for key in batch]
        run.dump(step, {"reason": str(error), "samples": names, "crop_seeds": [key.crop for key in batch]})
        run.failed(error)
        report()
        raise


def batch_words(batch_size: int, micro: int, group: Group) -> str:
    """A global batch as it is computed: ``1024 (8 processes of 128, 2 micro-batches of 64)``."""
    part = batch_size // group.size
    how = [f"{group.size} processes of {part}"] if group.size > 1 else []
    if part > micro:
        how.append(f"{-(-part // micro)} micro-batches of {micro}")
    return f"{batch_size}" + (f" ({', '.join(how)})" if how else "")
