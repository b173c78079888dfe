"""Fine-tuning an encoder for a task, and probing it: one visible loop, for one process and for many."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import maehub.train.engine as engine
from maehub.data import StepKeys, batches_of, worker_count
from maehub.errors import EXIT_DONE
from maehub.models import settled_precision
from maehub.train.engine import Group, RunLog, Stop
from maehub.train.evaluation import AnyScores, MapScores, ObjectScores
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.job import VALIDATIONS, ClassifierJob, Job
from maehub.train.finetuning.measuring import Outcome, look_for_twins
from maehub.train.finetuning.mixing import seeded_torch, step_seed
from maehub.train.reports import update_report


class FinetuneResult(NamedTuple):
    """How a run ended. ``scores`` are those of what was kept, on the held-out pictures; None before the last step."""

    run: Path
    step: int
    exit_code: int
    scores: AnyScores | MapScores | ObjectScores | None
    probe: AnyScores | None = None
    """Of the probe that the head started as, fitted to all training pictures; None without one."""
    kept: Literal["finetuned", "probe"] = "finetuned"
    """Which of the two was exported: the better one on training pictures that were not trained on."""


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tune a classifier, in this process or, started by torchrun, in many.

    The run folder gets ``config.json``, ``run.json`` (state), ``metrics.jsonl`` (one object a step), ``pictures/``,
    ``checkpoints/``, and at the end ``scores.json``, ``report.html`` and ``model/``, a model folder that `maehub.load`
    and timm read. What is reported is measured at the last step: nothing is chosen on the held-out pictures.

    Returns:
        `FinetuneResult`; its exit code is 0 when all steps are done, 75 after SIGTERM, SIGUSR1 or the time limit and
        130 after Ctrl-C, both with a checkpoint to ``resume`` from.

    Raises:
        UsageError: a setting that cannot be, a run folder in use, or on ``resume`` other settings or classes.
        DataError: labels or a split that cannot be used, a picture that cannot be read, or other pictures on
            ``resume``.
        DivergedError: a loss or a gradient is not finite; a checkpoint of the step before it is kept.
        CheckpointError: a checkpoint cannot be written or read.
        DistributedError: a process failed, hangs or disagrees.
        KeyboardInterrupt: a second stop signal came before the step was done.
    """
    begun = time.monotonic()
    deadline = begun + 60 * config.time_limit if config.time_limit else None
    parted, joined = contextlib.ExitStack(), engine.joined(config.device, config.timeout)
    with parted, joined as group, engine.deterministic(config.deterministic):
        config = replace(config, precision=settled_precision(config.precision, group.device))
        with group.together("setting up"):
            if group.is_main:
                engine.check_run_folder(config.out, resume=config.resume, overwrite=config.overwrite)
            job = _job_of(config.task)(config, group, begun)
        logged = RunLog(config.out, job.settings.batch_size, is_main=group.is_main)
        # until the group has parted: torchrun sends a signal to all when the first has ended
        stop = parted.enter_context(engine.stop_requests(deadline))
        with logged as run:
            return _train(job, run, stop)


def _job_of(task: str) -> Callable[[FinetuneConfig, Group, float], Job]:
    """What a task trains; networks of pixels and objects are imported where they are wanted, which takes a while."""
    if task == "segment":
        from maehub.train.finetuning.dense.map_job import MapJob

        return MapJob
    if task == "detect":
        from maehub.train.finetuning.dense.object_job import ObjectJob

        return ObjectJob
    return ClassifierJob


def _train(job: Job, run: RunLog, stop: Stop) -> FinetuneResult:
    """The loop."""
    config, group, settings = job.config, job.group, job.settings
    steps, device = settings.steps, group.device
    checkpoints = engine.Checkpoints(
        group,
        run,
        stop,
        model=job.kept,
        optimizer=job.optimizer,
        start=job.start,
        steps=steps,
        every=config.checkpoint_every,
        keep=config.keep,
        shard=config.fsdp,
    )
    done = 0
    if config.resume:
        done = checkpoints.resume(config.data, config.micro_batch, allow_data_change=config.allow_data_change)
    if checkpoints.is_complete(done):
        return FinetuneResult(config.out, steps, EXIT_DONE, None)
    micro = checkpoints.start.micro_batch
    if group.is_main:
        job.announce(micro)
    facts = asdict(config) | {"kind": "finetune", "settings": asdict(settings)}
    facts |= {"classes": list(job.split.training.classes), "environment": engine.describe_environment(group)}
    run.begin(facts, done, steps, overwrite=config.overwrite, hide_bar=config.quiet, tensorboard=config.tensorboard)
    with group.together("looking for twins"):
        if group.is_main and not config.resume and not config.skip_twins:
            look_for_twins(job.split, run.folder / "twins.csv", config.workers, progress=not config.quiet)
    if job.tells_start and done == 0 and steps:
        job.validate(run, 0, job.single())
    samples = job.training.samples
    keys = StepKeys(samples, settings.batch_size, config.seed, done, steps, 1, group.rank, group.size)
    workers = worker_count(config.workers, group.local_size)
    loading = batches_of(job.crops(), keys, workers=workers, pin=device.type == "cuda")
    report = partial(update_report, run, FinetuneConfig)
    validate_every = config.validate_every or max(1, steps // VALIDATIONS)
    parameters = [parameter for parameter in job.network.parameters() if parameter.requires_grad]
    stop_signal, nonfinite = 0, torch.zeros((), device=device)  # 1 from the first update on that is not finite
    with loading as batches, engine.rescuing(keys, checkpoints, report):
        for step in range(done, steps):
            group.step = done = step + 1
            batch, stop_signal = engine.next_batch(batches, group, run, stop)
            rate = job.rate(step)
            engine.set_rates(job.optimizer, rate)

            with engine.step_errors(micro, group):
                loss = _forward_backward(job, batch, micro, step_seed(config.seed, step, group.rank), device)
                norm = engine.gradient_norm(parameters)
                loss, nonfinite = engine.agreed(loss, norm, nonfinite, group)
            engine.update(job.optimizer, parameters, norm, nonfinite, config.clip_grad)
            if job.average is not None:
                job.average.update(job.network)

            stop_signal = engine.stop_after(stop_signal, group, stop)
            run.log(done, torch.stack([loss, norm, nonfinite]), rate)
            if done % validate_every == 0 and done < steps:
                with run.paused():
                    single = job.single()
                    job.validate(run, done, single)
                    if done - validate_every < steps / 10 <= done:
                        job.look_early(single)
            if stop_signal := checkpoints.after_step(done, stop_signal):
                break

    outcome = Outcome() if stop_signal else job.export(run)
    run.finish(stop_signal)
    report()
    return FinetuneResult(config.out, done, stop_signal, *outcome[:3])


def _forward_backward(job: Job, batch: Any, micro: int, seed: int, device: torch.device) -> Tensor:
    """The loss of a batch, computed in parts that fit; the parameters have its gradient then."""
    loss, count = torch.zeros((), device=device), len(batch[0])
    with seeded_torch(seed, device):
        for number, (part, last) in enumerate(engine.parts(batch, micro)):
            images, targets = job.inputs(part.to(device), seed + number)
            with engine.accumulating(job.module, last=last):
                with job.precision:
                    share = job.module(images, targets) * (len(targets) / count)
                share.backward()
            loss += share.detach()
    return loss
