"""Fine-tuning an encoder as a classifier, and probing it: one visible loop, for one process and for many."""

import contextlib
import copy
import hashlib
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import maehub.train.engine as engine
from maehub.data import StepKeys, batches_of, inner_split, split_labelled, worker_count
from maehub.errors import EXIT_DONE, log
from maehub.images import Augmentation
from maehub.models import Encoder, autocast, settled_precision
from maehub.train.engine import Group, RunLog, Stop
from maehub.train.evaluation import AnyScores, score_of
from maehub.train.finetuning.classifier import Objective, class_weights
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.fitting import MINUTES, Clock, micro_batch_of, seconds_a_step
from maehub.train.finetuning.head_start import HeadStart, look_early, put_head, solve_again, solve_head
from maehub.train.finetuning.measuring import Outcome, export, logits_of, look_for_twins, show
from maehub.train.finetuning.mixing import Mixing, seeded_torch, step_seed
from maehub.train.finetuning.network import build_classifier, find_weights, open_network, optimizer_of
from maehub.train.finetuning.recipes import (
    Settings,
    can_begin_as_probe,
    describe,
    has_classes,
    lasting,
    settled,
    stored_settings,
)
from maehub.train.finetuning.views import LabelledBatch, LabelledCrops, TrainTransform, policy_of
from maehub.train.networks import Backbone
from maehub.train.reports import update_report

_VALIDATIONS = 10  # measurements of a run


class FinetuneResult(NamedTuple):
    """How a run ended. ``scores`` are those of what was kept, on the held-out pictures; None before the last step."""

    run: Path
    step: int
    exit_code: int
    scores: AnyScores | None
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
            job = _Job(config, group, begun)
        logged = RunLog(config.out, job.settings.batch_size, is_main=group.is_main)
        # until the group has parted: torchrun sends a signal to all when the first has ended
        stop = parted.enter_context(engine.stop_requests(deadline))
        with logged as run:
            return _train(config, group, job, run, stop)


class _Job:
    """What a run is made of: everything before the first step. Nothing is written."""

    def __init__(self, config: FinetuneConfig, group: Group, begun: float) -> None:
        files = group.host_first(lambda: find_weights(config.model), "downloading the weights")
        split = group.host_first(
            lambda: split_labelled(
                config.data,
                seed=config.seed,
                share=config.val_share,
                group=config.group,
                label=config.label,
                numeric=config.task == "regression",
            ),
            "looking for pictures",
        )
        self.split = split
        self.training = split.training  # what is trained on
        # places in the training pictures to train on, and of those that say whether the network or its probe is kept
        self.inner = np.arange(len(split.training)), np.arange(0)
        classes, many = len(split.training.classes), split.training.multi_label
        size: Any = {"image_size": config.image_size, "channels": config.channels}
        self.open = partial(open_network, config.model, files, **size, seed=config.seed)
        asked: Any = {"pool": config.pool, "seed": config.seed}
        self.build = lambda backbone: build_classifier(backbone, self.settings, split.training, group, **asked)
        backbone = self.open()
        self.settings: Settings
        recipe = config.recipe
        stored = group.first(stored_settings(config) if group.is_main else {}, "the settings of the run")
        config = replace(config, recipe=stored.get("recipe", config.recipe)) if config.recipe == "auto" else config
        self.facts, self.settings = settled(
            config, backbone, split.training, group, probed=can_begin_as_probe(config, split.training, group)
        )
        limited = self.settings.recipe == "auto" and group.device.type == "cpu" and not (config.steps or config.epochs)
        self.clock = Clock(config.minutes or (MINUTES if limited else None), begun, asked=config.minutes is not None)
        self.probe = self._solve_head(config, backbone, group) if self.settings.head_start == "probe" else None
        if self.probe and self.probe.pool:
            self.settings = replace(self.settings, pool=self.probe.pool)
        settings, classifier = self.settings, self.build(backbone)
        labels, unit = split.training.labels, None
        if split.training.numeric:
            unit = torch.from_numpy(np.stack([labels.mean(axis=0), labels.std(axis=0)])).float()
        self.classifier = classifier
        if self.probe:
            put_head(classifier.network, self.probe.fitted, self.probe.spread, group, unit)
        derived = {"classes": classes, "epochs": config.epochs, "crop_scale": settings.crop_scale} | lasting(settings)
        pictures = hashlib.sha256()
        for side in (split.training, split.testing):
            pictures.update(side.samples.digest().encode() + np.ascontiguousarray(side.labels).tobytes())
        pictures.update("\0".join(split.training.classes).encode())
        task = config.task if split.training.numeric else None  # as runs of 0.1 have it
        told = asdict(config) | {"recipe": recipe, "task": task}
        start = engine.agreed_start(group, told, derived, pictures.hexdigest())
        classifier.network.to(group.device).train()
        spreads = config.fsdp and group.size > 1
        # the network without weights, where they are spread over processes that then gather them
        self.empty = copy.deepcopy(classifier.network).to("meta") if spreads else None
        self.average: Any = None  # timm's ModelEmaV3, or None
        self.kept = classifier.network  # what checkpoints hold: the network, and the average of its weights
        self.measured = classifier.network  # what is measured and exported
        if settings.ema:
            from timm.utils.model_ema import ModelEmaV3

            self.average = ModelEmaV3(classifier.network, decay=settings.ema)
            self.measured = self.average.module.requires_grad_(False)
            self.kept = nn.ModuleDict({"network": classifier.network, "average": self.measured})
        weights = class_weights(self.training.labels, classes) if config.class_weights == "balanced" else None
        objective = Objective(
            classifier.network, weights if many else None, multi_label=many, unit=None if unit is None else unit[1]
        )
        objective.to(group.device)
        self.mixing = Mixing(settings, classifier.preprocess, group.device, None if many else weights)
        micro = micro_batch_of(
            config.micro_batch,
            objective,
            classifier.preprocess,
            settings,
            classes,
            group,
            config.precision,
            shard=config.fsdp,
        )
        self.start = replace(start, micro_batch=micro)
        augmentation = Augmentation("random-crop", settings.crop_scale, config.hflip, config.vflip, config.rot90)
        policy = policy_of(settings.randaugment, classifier.preprocess)
        self.transform = TrainTransform(classifier.preprocess, augmentation, policy)
        if self.clock.minutes is not None:
            planned = replace(settings, steps=stored["steps"], epochs=stored["epochs"]) if stored else None
            self.settings = planned or self._fitted(config, objective, micro, group)
        self.module = engine.wrapped(  # what is called and differentiated
            objective,
            group,
            config.precision,
            compile=config.compile,
            fsdp=config.fsdp,
            checkpoint_activations=config.checkpoint_activations,
        )
        if self.average is not None and spreads:
            engine.shard(self.measured, group, config.precision)
        self.optimizer = optimizer_of(classifier, settings)
        self.precision = autocast(config.precision, group.device)

    def _fitted(self, config: FinetuneConfig, objective: Objective, micro: int, group: Group) -> Settings:
        """With as many steps as there is time for."""
        settings, training, shape = self.settings, self.training, self.classifier.preprocess
        with group.together("measuring the speed"):
            if group.is_main:
                crops = LabelledCrops(training, self.transform, cache=False)
                batch = settings.batch_size
                keys = StepKeys(training.samples, batch, config.seed, 0, 1, 1, group.rank, group.size)
                seconds = seconds_a_step(
                    objective, shape, batch, crops, next(iter(keys)), micro, group, config.precision, config.workers
                )
                picture = self.clock.picture or seconds / batch / 3
                beside = picture * (2 * len(self.split.training) + (_VALIDATIONS + 1) * len(self.split.testing))
                settings = self.clock.fitted(settings, len(training), seconds, beside)
        return group.first(settings, "the length of the run")

    def _solve_head(self, config: FinetuneConfig, backbone: Backbone, group: Group) -> HeadStart:
        """Solve the probe, and hold out what chooses; the settings of the run become those of what is left."""
        whole = self.split.training
        self.inner = inner_split(whole, seed=config.seed)
        self.training = whole.take(self.inner[0])
        self.facts, self.settings = settled(config, backbone, self.training, group, probed=True)
        classifier = self.build(backbone)
        classifier.network.to(group.device)
        ours = isinstance(backbone.module, Encoder) and backbone.parts == ("cls", "mean")
        own = self.settings.head == "linear" and has_classes(backbone, whole)
        return solve_head(
            classifier,
            self.split,
            self.inner,
            group,
            autocast(config.precision, group.device),
            both=ours and self.settings.head == "linear" and config.pool is None and not own,
            own=own,
            clock=self.clock,
            workers=config.workers,
            seed=config.seed,
        )


def _train(config: FinetuneConfig, group: Group, job: _Job, run: RunLog, stop: Stop) -> FinetuneResult:
    """The loop."""
    settings, steps, device = job.settings, job.settings.steps, group.device
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
        _announce(config, group, job, micro)
    facts = asdict(config) | {"kind": "finetune", "settings": asdict(settings)}
    facts |= {"classes": list(job.split.training.classes), "environment": engine.describe_environment(group)}
    run.begin(facts, done, steps, overwrite=config.overwrite, hide_bar=config.quiet, tensorboard=config.tensorboard)
    with group.together("looking for twins"):
        if group.is_main and not config.resume and not config.skip_twins:
            look_for_twins(job.split, run.folder / "twins.csv", config.workers, progress=not config.quiet)
    samples = job.training.samples
    keys = StepKeys(samples, settings.batch_size, config.seed, done, steps, 1, group.rank, group.size)
    crops = LabelledCrops(job.training, job.transform, config.cache)
    workers = worker_count(config.workers, group.local_size)
    loading = batches_of(crops, keys, workers=workers, pin=device.type == "cuda")
    report = partial(update_report, run, FinetuneConfig)
    peak = engine.peak_rate(settings.base_lr, settings.batch_size)
    validate_every = config.validate_every or max(1, steps // _VALIDATIONS)
    parameters = [parameter for parameter in job.classifier.network.parameters() if parameter.requires_grad]
    stop_signal, nonfinite = 0, torch.zeros((), device=device)  # 1 from the first update on that is not finite
    with loading as batches, engine.rescuing(keys, checkpoints, report):
        for step in range(done, steps):
            group.step = done = step + 1
            batch, stop_signal = engine.next_batch(batches, group, run, stop)
            rate = engine.learning_rate(step, steps, peak, settings.warmup, settings.floor)
            engine.set_rates(job.optimizer, rate)

            with engine.step_errors(micro, group):
                loss = _forward_backward(job, batch, micro, step_seed(config.seed, step, group.rank), device)
                norm = engine.gradient_norm(parameters)
                loss, nonfinite = engine.agreed(loss, norm, nonfinite, group)
            engine.update(job.optimizer, parameters, norm, nonfinite, config.clip_grad)
            if job.average is not None:
                job.average.update(job.classifier.network)

            stop_signal = engine.stop_after(stop_signal, group, stop)
            run.log(done, torch.stack([loss, norm, nonfinite]), rate)
            if done % validate_every == 0 and done < steps:
                with run.paused():
                    single = engine.single_network(job.measured, job.empty, group)
                    _validate(config, group, job, run, done, single)
                    if job.probe and done - validate_every < steps / 10 <= done:
                        _look_early(config, group, job, single)
            if stop_signal := checkpoints.after_step(done, stop_signal):
                break

    outcome = Outcome() if stop_signal else _export(config, group, job, run)
    run.finish(stop_signal)
    report()
    return FinetuneResult(config.out, done, stop_signal, *outcome[:3])


def _forward_backward(job: _Job, batch: LabelledBatch, micro: int, seed: int, device: torch.device) -> Tensor:
    """The loss of a batch, computed in parts that fit; the parameters have its gradient then."""
    loss = torch.zeros((), device=device)
    with seeded_torch(seed, device):
        for number, (part, last) in enumerate(engine.parts(batch, micro)):
            images, targets = job.mixing(part.to(device), seed + number)
            with engine.accumulating(job.module, last=last):
                with job.precision:
                    share = job.module(images, targets) * (len(targets) / len(batch.targets))
                share.backward()
            loss += share.detach()
    return loss


def _look_early(config: FinetuneConfig, group: Group, job: _Job, single: nn.Module | None) -> None:
    whole, alone = job.split.training, job.empty is not None
    assert job.probe is not None
    common = (job.classifier.preprocess, group, job.precision, config.workers)
    logits, _ = solve_again(job.probe, single, whole, job.inner, *common, alone=alone)
    if logits is not None:
        look_early(job.probe, logits, whole.labels[job.inner[1]], whole.classes, job.settings.base_lr)


def _validate(
    config: FinetuneConfig, group: Group, job: _Job, run: RunLog, step: int, single: nn.Module | None
) -> tuple[AnyScores, np.ndarray] | None:
    """Measure on the held-out pictures, and draw some of them: scores and logits, in rank 0."""
    with group.together("measuring"):
        testing = job.split.testing
        preprocess, last = job.classifier.preprocess, step == job.settings.steps
        alone = job.empty is not None
        logits = logits_of(single, testing.samples, preprocess, group, job.precision, config.workers, alone=alone)
        if logits is None:
            return None
        scores = score_of(logits, testing.labels, testing.classes, testing.groups)
        names = ("loss", "top1", "top5", "mean_average_precision")
        told = {f"val_{name}": getattr(scores, name, None) for name in names}
        word, headline = scores.headline
        told |= {"val_r2": headline.value if testing.numeric else None}
        run.note(step, **{name: value for name, value in told.items() if value is not None})
        log.info("step %d: %s %.1f %% on the held-out pictures", step, word, headline.value)
        show(logits, scores, testing, preprocess.channels, run.folder / "pictures", step, last=last)
        return scores, logits


def _export(config: FinetuneConfig, group: Group, job: _Job, run: RunLog) -> Outcome:
    """Measure for the last time, keep the better of the network and its probe, and write the scores and the model."""
    network = engine.single_network(job.measured, job.empty, group)
    preprocess, whole, chosen = job.classifier.preprocess, job.split.training, None
    if job.probe:
        common = (preprocess, group, job.precision, config.workers)
        chosen, fit = solve_again(job.probe, network, whole, job.inner, *common, alone=job.empty is not None)
        if network is not None:
            put_head(network, fit)
    measured = _validate(config, group, job, run, job.settings.steps, network)
    with group.together("exporting the model"):
        if network is None or measured is None:
            return Outcome()
        outcome = Outcome(measured[0])
        if job.probe and chosen is not None:
            outcome = job.probe.against(*measured, chosen, whole.labels[job.inner[1]], job.split.testing)
            if outcome.kept == "probe":
                network = job.build(job.open()).network
                put_head(network, job.probe.whole)
                at = (job.split.testing, preprocess.channels, run.folder / "pictures", job.settings.steps)
                assert outcome.probe is not None
                show(job.probe.testing, outcome.probe, *at, last=True)
        export(run.folder, config.model, job.settings, network, outcome, job.split)
    return outcome


def _announce(config: FinetuneConfig, group: Group, job: _Job, micro: int) -> None:
    training, testing = job.training, job.split.testing
    how = "split by --seed" if job.split.made else "as given"
    if job.split.groups:
        how += ", {} and {} groups".format(*job.split.groups)
    log.info(
        "%d pictures of %d %s to train on, %d to measure on (%s); %s, %d of %d parameters trained, on %s in %s",
        len(training),
        len(training.classes),
        "numbers" if training.numeric else "classes",
        len(testing),
        how,
        config.model,
        sum(p.numel() for p in job.classifier.network.parameters() if p.requires_grad),
        sum(p.numel() for p in job.classifier.network.parameters()),
        group.device,
        config.precision,
    )
    log.info("%s", describe(job.settings, job.facts, engine.batch_words(job.settings.batch_size, micro, group)))
