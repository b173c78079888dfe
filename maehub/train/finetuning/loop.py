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
from maehub.data import Labelled, StepKeys, batches_of, inner_split, split_labelled, worker_count
from maehub.errors import EXIT_DONE, DataError, UsageError, log
from maehub.images import Augmentation
from maehub.models import Encoder
from maehub.train.engine import Group, RunLog, Stop
from maehub.train.evaluation import Scores, score
from maehub.train.finetuning.classifier import Objective, class_weights
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.head_start import HeadStart, put_head, solve_head
from maehub.train.finetuning.measuring import Outcome, export, logits_of, look_for_twins, show
from maehub.train.finetuning.mixing import Mixing, seeded_torch, step_seed
from maehub.train.finetuning.network import Classifier, build_classifier, find_weights, open_network, optimizer_of
from maehub.train.finetuning.recipes import Facts, Settings, describe, lasting, settle
from maehub.train.finetuning.views import LabelledBatch, LabelledCrops, TrainTransform, policy_of
from maehub.train.networks import Backbone
from maehub.train.reports import update_report

_VALIDATIONS = 10  # measurements of a run


class FinetuneResult(NamedTuple):
    """How a run ended. ``scores`` are those of what was kept, on the held-out pictures; None before the last step."""

    run: Path
    step: int
    exit_code: int
    scores: Scores | None
    probe: Scores | None = None
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
    deadline = time.monotonic() + 60 * config.time_limit if config.time_limit else None
    parted, joined = contextlib.ExitStack(), engine.joined(config.device, config.timeout)
    with parted, joined as group, engine.deterministic(config.deterministic):
        with group.together("setting up"):
            if group.is_main:
                engine.check_run_folder(config.out, resume=config.resume, overwrite=config.overwrite)
            job = _Job(config, group)
        logged = RunLog(config.out, job.settings.batch_size, is_main=group.is_main)
        # until the group has parted: torchrun sends a signal to all when the first has ended
        stop = parted.enter_context(engine.stop_requests(deadline))
        with logged as run:
            return _train(config, group, job, run, stop)


class _Job:
    """What a run is made of: everything before the first step. Nothing is written."""

    def __init__(self, config: FinetuneConfig, group: Group) -> None:
        files = group.host_first(lambda: find_weights(config.model), "downloading the weights")
        split = group.host_first(
            lambda: split_labelled(
                config.data, seed=config.seed, share=config.val_share, group=config.group, label=config.label
            ),
            "looking for pictures",
        )
        self.split = split
        self.training = split.training  # what is trained on
        self.held: Labelled | None = None  # what says whether the network or its probe is kept
        classes, many = len(split.training.classes), split.training.multi_label
        size: Any = {"image_size": config.image_size, "channels": config.channels}
        self.open = partial(open_network, config.model, files, **size, seed=config.seed)
        asked: Any = {"blocks": config.blocks, "pool": config.pool, "seed": config.seed}
        self.build = lambda backbone: build_classifier(backbone, self.settings, split.training, group, **asked)
        backbone = self.open()
        self.settings: Settings
        self.facts, self.settings = _settled(config, backbone, split.training, group)
        self.probe = self._solve_head(config, backbone, group) if self.settings.head_start == "probe" else None
        if self.probe and self.probe.pool:
            self.settings = replace(self.settings, pool=self.probe.pool)
        settings, classifier = self.settings, self.build(backbone)
        self.classifier = classifier
        if self.probe:
            put_head(classifier.network, self.probe.fitted, self.probe.spread)
        derived = {"classes": classes, "epochs": config.epochs} | lasting(settings)
        pictures = hashlib.sha256()
        for side in (split.training, split.testing):
            pictures.update(side.samples.digest().encode() + np.ascontiguousarray(side.labels).tobytes())
        pictures.update("\0".join(split.training.classes).encode())
        start = engine.agreed_start(group, asdict(config), derived, pictures.hexdigest())
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
        objective = Objective(classifier.network, weights if many else None, multi_label=many).to(group.device)
        self.mixing = Mixing(settings, classifier.preprocess, group.device, None if many else weights)
        micro = _micro_batch(config, objective, classifier, settings, classes, group)
        self.start = replace(start, micro_batch=micro)
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
        augmentation = Augmentation("random-crop", config.crop_scale, config.hflip, config.vflip, config.rot90)
        policy = policy_of(settings.randaugment, classifier.preprocess)
        self.transform = TrainTransform(classifier.preprocess, augmentation, policy)
        self.optimizer = optimizer_of(classifier, settings)
        self.precision = engine.autocast(config.precision, group.device)

    def _solve_head(self, config: FinetuneConfig, backbone: Backbone, group: Group) -> HeadStart:
        """Solve the probe, and hold out what chooses; the settings of the run become those of what is left."""
        whole = self.split.training
        inner = inner_split(whole, seed=config.seed)
        self.training, self.held = map(whole.take, inner)
        self.facts, self.settings = _settled(config, backbone, self.training, group)
        classifier = self.build(backbone)
        classifier.network.to(group.device)
        ours = isinstance(backbone.module, Encoder) and backbone.parts == ("cls", "mean")
        return solve_head(
            classifier,
            self.split,
            inner,
            group,
            engine.autocast(config.precision, group.device),
            both=ours and self.settings.head == "linear" and config.pool is None,
            workers=config.workers,
            seed=config.seed,
        )


def asked_of(config: FinetuneConfig) -> dict[str, Any]:
    """What of a recipe the user decides."""
    given = {name: getattr(config, name, None) for name in Settings.__dataclass_fields__ if name != "recipe"}
    return {name: value for name, value in given.items() if value is not None}


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
                    _validate(config, group, job, run, done)
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


def _validate(
    config: FinetuneConfig, group: Group, job: _Job, run: RunLog, step: int
) -> tuple[Scores, np.ndarray] | None:
    """Measure on the held-out pictures, and draw some of them: scores and logits, in rank 0."""
    with group.together("measuring"):
        testing = job.split.testing
        preprocess, last = job.classifier.preprocess, step == job.settings.steps
        logits = logits_of(job.measured, job.empty, testing.samples, preprocess, group, job.precision, config.workers)
        if logits is None:
            return None
        scores = score(logits, testing.labels, testing.classes, testing.groups)
        numbers = {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5}
        numbers |= {"val_mean_average_precision": scores.mean_average_precision}
        run.note(step, **{name: value for name, value in numbers.items() if value is not None})
        log.info("step %d: top-1 %.1f %% on the held-out pictures", step, scores.top1)
        show(logits, scores, testing, preprocess.channels, run.folder / "pictures", step, last=last)
        return scores, logits


def _export(config: FinetuneConfig, group: Group, job: _Job, run: RunLog) -> Outcome:
    """Measure for the last time, keep the better of the network and its probe, and write the scores and the model."""
    measured = _validate(config, group, job, run, job.settings.steps)
    preprocess, held, chosen = job.classifier.preprocess, job.held, None
    if held is not None:
        chosen = logits_of(job.measured, job.empty, held.samples, preprocess, group, job.precision, config.workers)
    with group.together("exporting the model"):
        network = engine.single_network(job.measured, job.empty, group)
        if network is None or measured is None:
            return Outcome()
        outcome = Outcome(measured[0])
        if job.probe and held is not None and chosen is not None:
            outcome = job.probe.against(*measured, chosen, held.labels, job.split.testing)
            if outcome.kept == "probe":
                network = job.build(job.open()).network
                put_head(network, job.probe.whole)
                at = (job.split.testing, preprocess.channels, run.folder / "pictures", job.settings.steps)
                assert outcome.probe is not None
                show(job.probe.testing, outcome.probe, *at, last=True)
        export(run.folder, config.model, job.settings, network, outcome, job.split)
    return outcome


def _settled(config: FinetuneConfig, backbone: Backbone, training: Labelled, group: Group) -> tuple[Facts, Settings]:
    """The recipe, and what it was fitted to."""
    asked = asked_of(config)
    facts = Facts(
        width=backbone.width,
        depth=backbone.depth,
        trained=not config.model.startswith("untrained/"),
        size=max(backbone.preprocess.size),
        images=len(training),
        classes=len(training.classes),
        multi_label=training.multi_label,
    )
    settings = settle(config.recipe, facts, asked, config.model)
    if config.fsdp and settings.head != "linear":
        raise UsageError(f"--fsdp is for training a network, which --recipe {settings.recipe} freezes")
    size, even = settings.batch_size, settings.mixed_at_once
    if size % (group.size * even):
        if config.batch_size is not None:
            raise UsageError(
                f"--batch-size {size} must be a multiple of {group.size * even}: {group.size} processes"
                + (", each with an even number of pictures to mix" if even == 2 else "")
            )
        asked["batch_size"] = -(-size // (group.size * even)) * group.size * even
        settings = settle(config.recipe, facts, asked, config.model)
    if settings.optimizer == "lars" and len(training) < 2 * group.size:
        raise DataError(f"batch normalisation needs at least two pictures, and {config.data} has {len(training)}")
    return facts, settings


def _micro_batch(
    config: FinetuneConfig, objective: Objective, classifier: Classifier, settings: Settings, classes: int, group: Group
) -> int:
    channels, (height, width) = classifier.preprocess.channels, classifier.preprocess.size

    def blank(count: int) -> tuple[Tensor, Tensor]:
        images = torch.zeros(count, channels, height, width, device=group.device)
        return images, torch.zeros(count, classes, device=group.device)

    part, size = settings.batch_size // group.size, f"{height}×{width}"
    micro, multiple = min(config.micro_batch or part, part), settings.mixed_at_once
    sizes = {micro, part % micro or micro}  # of the parts of a step
    if any(count % multiple for count in sizes):
        raise UsageError(
            f"--micro-batch {micro} of {part} leaves an odd number of pictures, and they are mixed in pairs"
        )
    if settings.head == "normed":
        multiple = 2
        if 1 in sizes:
            raise UsageError(
                f"batch normalisation needs two pictures at once, and with --batch-size {settings.batch_size} and "
                f"--micro-batch {micro} a part of a step has one"
            )
    with seeded_torch(0, group.device):
        fits = engine.pictures_fit(objective, blank, group, config.precision, shard=config.fsdp)
        return engine.find_micro_batch(part, group, fits, size, asked=config.micro_batch, multiple=multiple)


def _announce(config: FinetuneConfig, group: Group, job: _Job, micro: int) -> None:
    training, testing = job.training, job.split.testing
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
        sum(p.numel() for p in job.classifier.network.parameters() if p.requires_grad),
        sum(p.numel() for p in job.classifier.network.parameters()),
        group.device,
    )
    log.info("%s", describe(job.settings, job.facts, engine.batch_words(job.settings.batch_size, micro, group)))
