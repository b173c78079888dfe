"""Fine-tuning an encoder as a classifier, and probing it: one visible loop, for one process and for many."""

import contextlib
import copy
import hashlib
import logging
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.data import MOST_LOOKED_AT, LabelledSplit, StepKeys, batches_of, find_twins, split_labelled, worker_count
from maehub.errors import EXIT_DONE, DataError, UsageError
from maehub.hub import Located
from maehub.images import Augmentation
from maehub.train.engine import (
    Group,
    Progress,
    RunLog,
    Saver,
    Stop,
    accumulating,
    agreed,
    autocast,
    batch_words,
    check_run_folder,
    code_digest,
    describe_environment,
    deterministic,
    find_micro_batch,
    fixed_settings,
    gradient_norm,
    guarded_step,
    joined,
    learning_rate,
    next_batch,
    parts,
    peak_rate,
    pictures_fit,
    rescuing,
    resumed,
    run_state,
    set_rates,
    stop_requests,
    within_memory,
    wrapped,
)
from maehub.train.evaluation import Scores
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.measuring import Measured, export, logits_of, show, single_network
from maehub.train.finetuning.mixing import Mixing, seeded_torch, step_seed
from maehub.train.finetuning.network import Fitted, Trainee, find_weights_of, trainee_of
from maehub.train.finetuning.recipes import Facts, Settings, describe, lasting, settle
from maehub.train.finetuning.views import LabelledCrops, Sight, policy_of
from maehub.train.reports import update_report
from maehub.version import __version__

log = logging.getLogger("maehub")

_LOOKS = 10  # measurements of a run


class FinetuneResult(NamedTuple):
    """How a run ended. ``scores`` are those of the last step on the held-out pictures; None before it."""

    run: Path
    step: int
    exit_code: int
    scores: Scores | None


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
    deadline = time.monotonic() + 60 * config.time_limit if config.time_limit else None
    with joined(config.device, config.timeout) as group, deterministic(config.deterministic):
        with group.together("setting up"):
            if group.leads:
                check_run_folder(config.out, resume=config.resume, overwrite=config.overwrite)
            job = _set_up(config, group)
        logged = RunLog(config.out, job.settings.batch_size, leads=group.leads)
        with logged as run, stop_requests(deadline) as stop:
            return _train(config, group, job, run, stop)


class Objective(nn.Module):
    """A classifier and its loss: soft-target cross-entropy, or binary cross-entropy of each label."""

    def __init__(self, network: nn.Module, positive: Tensor | None, *, multi_label: bool) -> None:
        super().__init__()
        self.network = network
        self.multi_label = multi_label
        self.positive: Tensor | None
        self.register_buffer("positive", positive, persistent=False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images (B, C, H, W) and targets (B, classes) to the mean loss, () float32."""
        logits = self.network(images).float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.positive)
        return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()


@dataclass
class _Job:
    """What a run is made of."""

    trainee: Trainee
    kept: nn.Module  # what checkpoints hold: the network, and the average of its weights
    average: Any  # timm's ModelEmaV3, or None
    empty: nn.Module | None  # the network without weights, where they are spread over processes that then gather them
    objective: Objective
    module: nn.Module  # the objective, wrapped for this machine: what is called
    optimizer: torch.optim.Optimizer
    mixing: Mixing
    sight: Sight
    split: LabelledSplit
    facts: Facts
    settings: Settings
    start: Progress
    precision: contextlib.AbstractContextManager[Any]

    @property
    def measured(self) -> nn.Module:
        """The network that is measured and exported."""
        return self.average.module if self.average is not None else self.trainee.network


def _set_up(config: FinetuneConfig, group: Group) -> _Job:
    """Everything before the first step; nothing is written."""
    found = find_weights_of(config) if group.local_leads else None  # one process of each host downloads
    group.all(None, "downloading the weights")
    found = found or find_weights_of(config)
    first = _split(config) if group.local_leads else None
    group.all(None, "looking for pictures")  # what the first finds out about shards is kept for the others
    split = first or _split(config)
    classes, labels = split.training.classes, split.training.labels
    trainee, facts, settings = _fitted_trainee(config, found, split, group)
    fixed = fixed_settings(config, {"classes": len(classes), "epochs": config.epochs} | lasting(settings))
    start = Progress(0, fixed, _digest(split), group.size)
    group.agree(
        {f"--{name.replace('_', '-')}": value for name, value in fixed.items()}
        | {"the code of maehub": code_digest(), "maehub": __version__, "torch": torch.__version__}
        | {"the data": start.data}
    )
    trainee.network.to(group.device).train()
    spreads = config.fsdp and group.size > 1
    empty = copy.deepcopy(trainee.network).to("meta") if spreads else None
    average, kept = None, trainee.network
    if settings.ema:
        from timm.utils.model_ema import ModelEmaV3

        average = ModelEmaV3(trainee.network, decay=settings.ema)
        average.module.requires_grad_(False)
        kept = nn.ModuleDict({"network": trainee.network, "average": average.module})
    many = split.training.multi_label
    weights = _balanced(labels, len(classes)) if config.class_weights == "balanced" else None
    objective = Objective(trainee.network, weights if many else None, multi_label=many).to(group.device)
    mixing = Mixing(settings, trainee.preprocess, group.device, None if many else weights)
    micro = _micro_batch(config, objective, trainee, settings, len(classes), group)
    module = wrapped(objective, config, group)
    if average is not None and spreads:
        wrapped(average.module, replace(config, compile=False, checkpoint_activations=False), group)
    return _Job(
        trainee,
        kept,
        average,
        empty,
        objective,
        module,
        _optimizer(trainee, settings),
        mixing,
        Sight(trainee.preprocess, _augmentation(config), policy_of(settings.randaugment, trainee.preprocess)),
        split,
        facts,
        settings,
        replace(start, micro_batch=micro),
        autocast(config, group.device),
    )


def _train(config: FinetuneConfig, group: Group, job: _Job, run: RunLog, stop: Stop) -> FinetuneResult:
    """The loop."""
    settings, device = job.settings, group.device
    steps, peak = settings.steps, peak_rate(settings.base_lr, settings.batch_size)
    at = resumed(config, group, job.kept, job.optimizer, job.start) if config.resume else job.start
    if at.step == steps and run_state(config.out) == "completed":
        log.info("%s is already at step %d: nothing to do", config.out, steps)
        return FinetuneResult(config.out, steps, EXIT_DONE, None)
    micro = at.micro_batch if at.processes == group.size and at.micro_batch and not config.micro_batch else None
    micro = micro or job.start.micro_batch
    if group.leads:
        _announce(config, group, job, micro)
    facts = asdict(config) | {"kind": "finetune", "settings": asdict(settings)}
    facts |= {"classes": list(job.split.training.classes), "environment": describe_environment(group)}
    run.begin(
        facts,
        first_step=at.step,
        steps=steps,
        overwrite=config.overwrite,
        hide_bar=config.quiet,
        tensorboard=config.tensorboard,
    )
    with group.together("looking for twins"):
        if group.leads:
            _look_for_twins(config, job.split, run)
    samples = job.split.training.samples
    keys = StepKeys(samples, settings.batch_size, config.seed, at.step, steps, 1, group.rank, group.size)
    parameters = [parameter for parameter in job.trainee.network.parameters() if parameter.requires_grad]
    bad = torch.zeros((), device=device)  # 1 from the first update on that is not finite
    saver = Saver(config, group, run, stop, job.kept, job.optimizer, replace(job.start, micro_batch=micro))
    looks = config.validate_every or max(1, steps // _LOOKS)
    crops = LabelledCrops(job.split.training, job.sight, config.cache)
    workers = worker_count(config.workers, group.local_size)
    loading = batches_of(crops, keys, workers=workers, pin=device.type == "cuda")
    with loading as batches, rescuing(keys, samples, run, saver, partial(update_report, run, FinetuneConfig)):
        for step in range(at.step, steps):
            group.step = step + 1
            batch, said = next_batch(batches, group, run, stop)
            rate = learning_rate(step, steps, peak, settings.warmup, settings.floor)
            set_rates(job.optimizer, rate)

            seed = step_seed(config.seed, step, group.rank)
            loss = torch.zeros((), device=device)
            with group.waiting("the gradients"), within_memory(micro, device), seeded_torch(seed, device):
                for number, (part, last) in enumerate(parts(batch, micro)):
                    images, targets = job.mixing(part.to(device), seed + number)
                    with accumulating(job.module, last=last):
                        with job.precision:
                            share = job.module(images, targets) * (len(targets) / len(batch.targets))
                        share.backward()
                    loss += share.detach()
                norm = gradient_norm(parameters)
                loss, bad = agreed(loss, norm, bad, group)
            if config.clip_grad:
                nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)
            guarded_step(job.optimizer, bad)
            job.optimizer.zero_grad(set_to_none=True)
            if job.average is not None:
                job.average.update(job.trainee.network)

            done, stopping = step + 1, said or (stop.exit_code if group.size == 1 else None)
            run.log(done, torch.stack([loss, norm, bad]), rate)
            looking = done % looks == 0 and done < steps
            saving = done % config.checkpoint_every == 0 or done == steps or stopping
            if looking or saving:
                run.flush()
                if looking:
                    _look(config, group, job, run, done)
                if saving:
                    saver.save(done, must=bool(stopping) or done == steps)
                run.restart_clock()
            if stopping and done < steps:
                run.finish("preempted", stopping)
                update_report(run, FinetuneConfig)
                return FinetuneResult(config.out, done, stopping, None)

    return _finished(config, group, job, run)


def _look(config: FinetuneConfig, group: Group, job: _Job, run: RunLog, step: int) -> Measured | None:
    """Measure on the held-out pictures, and draw some of them; the numbers are in rank 0."""
    with group.together("measuring"):
        testing = job.split.testing
        logits = logits_of(
            job.measured, job.empty, testing.samples, job.trainee.preprocess, group, job.precision, config.workers
        )
        if logits is None:
            return None
        measured = Measured.of(logits, testing)
        run.note(step, **measured.numbers())
        log.info("step %d: top-1 %.1f %% on the held-out pictures", step, measured.scores.top1)
        last, channels = step == job.settings.steps, job.trainee.preprocess.channels
        show(measured, testing, channels, run.folder / "pictures", step, last=last)
        return measured


def _finished(config: FinetuneConfig, group: Group, job: _Job, run: RunLog) -> FinetuneResult:
    """Measure, export the model and write the report."""
    steps = job.settings.steps
    measured = _look(config, group, job, run, steps)
    with group.together("exporting the model"):
        network = single_network(job.measured, job.empty, group)
        if network is not None and measured is not None:
            export(run.folder, config.model, job.settings, network, measured, job.split)
    run.finish("completed", EXIT_DONE)
    update_report(run, FinetuneConfig)
    return FinetuneResult(config.out, steps, EXIT_DONE, measured.scores if measured else None)


def _split(config: FinetuneConfig) -> LabelledSplit:
    return split_labelled(config.data, seed=config.seed, share=config.val_share, group=config.group, label=config.label)


def _fitted_trainee(config: FinetuneConfig, found: Located | None, split: LabelledSplit, group: Group) -> Fitted:
    """The network, and the recipe fitted to it and to the data."""
    training = split.training
    trainee, facts, settings = trainee_of(config, found, training, group)
    size, even = settings.batch_size, 2 if settings.mixup or settings.cutmix else 1
    if size % (group.size * even):
        if config.batch_size is not None:
            raise UsageError(
                f"--batch-size {size} must be a multiple of {group.size * even}: {group.size} processes"
                + (", each with an even number of pictures to mix" if even == 2 else "")
            )
        settings = settle(replace(config, batch_size=-(-size // (group.size * even)) * group.size * even), facts)
    if settings.optimizer == "lars" and len(training) < 2 * group.size:
        raise DataError(f"batch normalisation needs at least two pictures, and {config.data} has {len(training)}")
    return Fitted(trainee, facts, settings)


def _digest(split: LabelledSplit) -> str:
    """Of pictures and labels on both sides."""
    hasher = hashlib.sha256()
    for side in (split.training, split.testing):
        hasher.update(side.samples.digest().encode() + np.ascontiguousarray(side.labels).tobytes())
    hasher.update("\0".join(split.training.classes).encode())
    return hasher.hexdigest()


def _balanced(labels: np.ndarray, classes: int) -> Tensor:
    """(classes,) float32. What makes every class count alike; of several labels, how much more a present one counts."""
    if labels.ndim == 2:
        present = labels.sum(axis=0)
        return torch.from_numpy(((len(labels) - present) / np.maximum(present, 1)).astype(np.float32))
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy((len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32))


def _augmentation(config: FinetuneConfig) -> Augmentation:
    return Augmentation("random-crop", config.crop_scale, config.hflip, config.vflip, config.rot90)


def _optimizer(trainee: Trainee, settings: Settings) -> torch.optim.Optimizer:
    groups = trainee.groups(settings.weight_decay, settings.layer_decay)
    if settings.optimizer == "lars":
        from timm.optim.lars import Lars

        # As published, rates of matrices are adapted although there is no weight decay; those of vectors are not.
        adapted = [group | {"always_adapt": group["params"][0].ndim > 1} for group in groups if group["params"]]
        return Lars(adapted, lr=0.0, momentum=0.9, trust_coeff=0.001)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


def _micro_batch(
    config: FinetuneConfig, objective: Objective, trainee: Trainee, settings: Settings, classes: int, group: Group
) -> int:
    height, width = trainee.preprocess.size

    def blank(count: int) -> tuple[Tensor, Tensor]:
        shape = (count, trainee.preprocess.channels, height, width)
        return torch.zeros(shape, device=group.device), torch.zeros(count, classes, device=group.device)

    even = 2 if settings.mixup or settings.cutmix else 1
    with seeded_torch(0, group.device):
        fits = pictures_fit(config, objective, blank, group)
        part = settings.batch_size // group.size
        return find_micro_batch(config, part, group, fits, f"{height}×{width}", even)


def _look_for_twins(config: FinetuneConfig, split: LabelledSplit, run: RunLog) -> None:
    """Say which held-out pictures are in training too, and write them down."""
    few = len(split.training) + len(split.testing) <= MOST_LOOKED_AT
    if config.skip_twins or config.resume or not few:
        return
    twins = find_twins(split.training, split.testing, workers=config.workers, progress=not config.quiet)
    if twins.exact or twins.near:
        twins.save(run.folder / "twins.csv")
        log.warning("%s See %s.", twins.describe(), run.folder / "twins.csv")


def _announce(config: FinetuneConfig, group: Group, job: _Job, micro: int) -> None:
    training, testing = job.split.training, job.split.testing
    how = "split by --seed" if job.split.made else "as given"
    if job.split.groups:
        how += ", {} and {} groups".format(*job.split.groups)
    log.info(
        "%d pictures of %d classes to train on, %d to measure on (%s); %s, %d of %d parameters trained, on %s",
        len(training),
        len(training.classes),
        len(testing),
        how,
        config.model,
        sum(p.numel() for p in job.trainee.network.parameters() if p.requires_grad),
        sum(p.numel() for p in job.trainee.network.parameters()),
        group.device,
    )
    log.info("%s", describe(job.settings, job.facts, batch_words(job.settings.batch_size, micro, group)))
