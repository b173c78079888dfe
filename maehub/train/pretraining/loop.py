"""Pretraining a masked autoencoder: one visible loop, for one process and for many."""

import contextlib
import copy
import math
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import maehub.train.engine as engine
from maehub.data import StepKeys, batches_of, check_shared_memory, worker_count
from maehub.errors import EXIT_DONE, UsageError, log
from maehub.hub import Located
from maehub.images import Augmentation, jitter
from maehub.models import AutoencoderConfig, MaskedAutoencoder, autocast, settled_precision
from maehub.train.engine import Group, RunLog, Stop
from maehub.train.pretraining.config import PretrainConfig, batch_size_of
from maehub.train.pretraining.holdout import split_data
from maehub.train.pretraining.network import build_network, find_weights, kept_patches, views_fit
from maehub.train.pretraining.objective import Objective, TokenizerFunction, fit_components, store_components
from maehub.train.pretraining.validation import Validation, tell_start
from maehub.train.pretraining.views import Batch, Crops, View, validation_batch
from maehub.train.reports import update_report
from maehub.weights import save

_PCA_PICTURES = 1000  # pictures that the components of patches are fitted on


class PretrainResult(NamedTuple):
    """How a run ended."""

    run: Path
    step: int
    exit_code: int


def pretrain(config: PretrainConfig, *, tokenizer: TokenizerFunction | None = None) -> PretrainResult:
    """Pretrain a masked autoencoder, in this process or, started by torchrun, in many.

    The run folder gets ``config.json``, ``run.json`` (state), ``metrics.jsonl`` (one object a step), ``pictures/``,
    ``checkpoints/``, at the end ``model/``, a model folder that `maehub.load` reads, and ``report.html``.

    Args:
        tokenizer: with ``target="tokens"``, what gives the tokens of pictures (B, C, H, W) in [0, 1] as (B, N)
            integers below its attribute ``vocabulary``; None takes ViT's 512 mean colours.

    Returns:
        `PretrainResult`; its exit code is 0 when all steps are done, 75 after SIGTERM, SIGUSR1 or the time limit and
        130 after Ctrl-C, both with a checkpoint to ``resume`` from.

    Raises:
        UsageError: a setting that cannot be, or a run folder in use.
        DataError: no pictures, one that cannot be read, or on ``resume`` others than before.
        DivergedError: a loss or a gradient is not finite; a checkpoint of the step before it is kept.
        CheckpointError: a checkpoint cannot be written or read.
        DistributedError: a process failed, hangs or disagrees.
        KeyboardInterrupt: a second stop signal came before the step was done.
    """
    deadline = time.monotonic() + 60 * config.time_limit if config.time_limit else None
    parted, joined = contextlib.ExitStack(), engine.joined(config.device, config.timeout)
    with parted, joined as group, engine.deterministic(config.deterministic):
        config = replace(config, precision=settled_precision(config.precision, group.device))
        with group.together("setting up"):
            if group.is_main:
                engine.check_run_folder(config.out, resume=config.resume, overwrite=config.overwrite)
            job = _Job(config, group, tokenizer)
        logged = RunLog(config.out, job.batch_size, is_main=group.is_main)
        # until the group has parted: torchrun sends a signal to all when the first has ended
        stop = parted.enter_context(engine.stop_requests(deadline))
        with logged as run:
            return _train(config, group, job, run, stop)


class _Job:
    """What a run is made of: everything before the first step. Nothing is written."""

    def __init__(self, config: PretrainConfig, group: Group, tokenizer: TokenizerFunction | None) -> None:
        vocabulary: Any = 0 if tokenizer is None else getattr(tokenizer, "vocabulary", None)
        if tokenizer is not None and (type(vocabulary) is not int or vocabulary < 1):
            raise UsageError(f"a tokenizer needs an attribute vocabulary, a positive int, not {vocabulary!r}")
        files = group.host_first(lambda: find_weights(config.from_), "downloading the weights")
        model = autoencoder_of(config, files, vocabulary)
        self.view = view_of(config, model.config)
        kept = kept_patches(self.view)
        split = group.host_first(lambda: split_data(config.data, config.holdout, config.group), "looking for pictures")
        self.split = split
        self.batch_size = batch_size_of(config, len(split.training), group.size)  # views, over all processes
        views = len(split.training) * config.masks_per_image
        self.steps = config.steps or math.ceil((config.epochs or 0) * views / self.batch_size)
        if model.config.target == "pca" and not model.decoder.components.isfinite().all():
            sample = validation_batch(split.training, self.view, min(len(split.training), _PCA_PICTURES), config.seed)
            components = fit_components(sample.pixels, model.preprocess, self.view.patch_size, config.pca_components)
            store_components(model, group.first(components, "the principal components"))  # the same in every process
        start = engine.agreed_start(group, asdict(config), {"steps": self.steps}, split.training.digest())
        preprocess = replace(model.preprocess, size=self.view.size)
        # the model without weights, where they are spread over all processes
        self.empty = copy.deepcopy(model).to("meta") if config.fsdp and group.size > 1 else None
        self.model = model.to(group.device).train()  # what is saved
        self.objective_of = partial(  # a model with its target
            Objective,
            preprocess=preprocess,
            loss_on=config.loss_on,
            predict_share=config.predict_share,
            corruption=config.corruption,
            kept=kept,
            tokenizer=tokenizer,
        )
        objective = self.objective_of(model).to(group.device)  # with the statistics that it normalises by
        self.validation = None
        if group.is_main:
            shown = split.heldout or split.training
            self.validation = Validation(
                objective, self.view, shown, split.heldout, seed=config.seed, labelled=config.knn
            )
        fits = views_fit(
            objective, self.view, group, config.precision, shard=config.fsdp, checkpoint=config.checkpoint_activations
        )
        size = f"{self.view.size[0]}×{self.view.size[1]}"
        micro = engine.find_micro_batch(self.batch_size // group.size, group, fits, size, asked=config.micro_batch)
        self.start = replace(start, micro_batch=micro)
        self.module = engine.wrapped(  # what is called and differentiated
            objective,
            group,
            config.precision,
            compile=config.compile,
            fsdp=config.fsdp,
            checkpoint_activations=config.checkpoint_activations,
        )
        self.optimizer = engine.adamw(model, config.weight_decay)
        self.precision = autocast(config.precision, group.device)


def autoencoder_of(config: PretrainConfig, files: Located | None, vocabulary: int = 0) -> MaskedAutoencoder:
    """The autoencoder that a run starts with; see `build_network`."""
    names = ("target", "decoder_width", "decoder_depth", "decoder_heads", "mask_tokens")
    return build_network(
        config.from_ or config.model,
        files,
        {name: getattr(config, name) for name in names if getattr(config, name) is not None},
        image_size=config.image_size,
        channels=config.channels,
        pca_components=config.pca_components,
        vocabulary=vocabulary,
        seed=config.seed,
    )


def view_of(config: PretrainConfig, network: AutoencoderConfig) -> View:
    """How a run looks at its pictures."""
    encoder = network.encoder
    if config.rot90 and encoder.size[0] != encoder.size[1]:
        raise UsageError(f"--rot90 needs square crops, and these are {encoder.size[0]}×{encoder.size[1]}")
    if config.corruption != (1.0, 0.0, 0.0) and network.mask_tokens != "encoder":
        raise UsageError("--corruption leaves patches for the encoder to see: it needs --mask-tokens encoder")
    if encoder.channels not in (1, 3):
        raise UsageError(f"pictures have 1 or 3 channels, and {config.from_} takes {encoder.channels}: say --channels")
    augmentation = Augmentation(
        config.augment, config.crop_scale, config.hflip, config.vflip, config.rot90, config.rotate
    )
    return View(encoder.size, encoder.patch_size, encoder.channels, augmentation, config.strategy, config.mask_ratio)


def _train(config: PretrainConfig, group: Group, job: _Job, run: RunLog, stop: Stop) -> PretrainResult:
    """The loop."""
    steps, device, peak = job.steps, group.device, engine.peak_rate(config.base_lr, job.batch_size)
    checkpoints = engine.Checkpoints(
        group,
        run,
        stop,
        model=job.model,
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
        return PretrainResult(config.out, steps, EXIT_DONE)
    micro = checkpoints.start.micro_batch
    workers = worker_count(config.workers, group.local_size)
    views = job.batch_size // group.size
    with group.together("setting up"):
        check_shared_memory(job.view.batch_bytes(views), views, workers)
    if group.is_main:
        _announce(config, group, job, peak, micro)
    facts = asdict(config) | {"steps": steps, "batch_size": job.batch_size, "target": job.model.config.target}
    facts |= {"environment": engine.describe_environment(group)}
    run.begin(facts, done, steps, overwrite=config.overwrite, hide_bar=config.quiet, tensorboard=config.tensorboard)
    if done == 0:
        _validate(config, group, job, run, 0)
    samples = job.split.training
    keys = StepKeys(samples, job.batch_size, config.seed, done, steps, config.masks_per_image, group.rank, group.size)
    crops = Crops(samples, job.view, config.cache)
    loading = batches_of(crops, keys, workers=workers, pin=device.type == "cuda")
    report = partial(update_report, run, PretrainConfig)
    parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    stop_signal, nonfinite = 0, torch.zeros((), device=device)  # 1 from the first update on that is not finite
    with loading as batches, engine.rescuing(keys, checkpoints, report):
        for step in range(done, steps):
            group.step = done = step + 1
            batch, stop_signal = engine.next_batch(batches, group, run, stop)
            rate = engine.learning_rate(step, steps, peak, config.warmup)
            engine.set_rates(job.optimizer, rate)

            with engine.step_errors(micro, group):
                loss = _forward_backward(job, batch, micro, device)
                norm = engine.gradient_norm(parameters)
                loss, nonfinite = engine.agreed(loss, norm, nonfinite, group)
            engine.update(job.optimizer, parameters, norm, nonfinite, config.clip_grad)

            stop_signal = engine.stop_after(stop_signal, group, stop)
            run.log(done, torch.stack([loss, norm, nonfinite]), rate)
            if done % config.validate_every == 0 or done == steps:
                with run.paused():
                    _validate(config, group, job, run, done)
            if stop_signal := checkpoints.after_step(done, stop_signal):
                break

    if not stop_signal:
        with group.together("exporting the model"):
            model = engine.single_network(job.model, job.empty, group)
            if group.is_main and model is not None:
                save(model.eval(), run.folder / "model", overwrite=True)
    run.finish(stop_signal)
    report()
    return PretrainResult(config.out, done, stop_signal)


def _forward_backward(job: _Job, batch: Batch, micro: int, device: torch.device) -> Tensor:
    """The loss of a batch, computed in parts that fit; the parameters have its gradient then."""
    loss = torch.zeros((), device=device)
    for part, last in engine.parts(batch, micro):
        pixels, masked, seeds, factors = part.to(device)
        if factors.shape[1]:
            pixels = jitter(pixels, factors)
        with engine.accumulating(job.module, last=last):
            with job.precision:
                share = job.module(pixels, masked, seeds) * (len(masked) / len(batch.masked))
            share.backward()
        loss += share.detach()
    return loss


def _validate(config: PretrainConfig, group: Group, job: _Job, run: RunLog, step: int) -> None:
    """Measure on held-out pictures, and draw."""
    with group.together("validating"):
        model = engine.single_network(job.model, job.empty, group)
        if model is None or job.validation is None:
            return
        numbers = job.validation.measure(job.objective_of(model).to(group.device), job.precision)
        if numbers:
            run.note(step, **numbers)
        if step:
            job.validation.draw(model, run.folder / "pictures" / f"step-{step}.png")
        else:
            tell_start(numbers, config.from_)


def _announce(config: PretrainConfig, group: Group, job: _Job, peak: float, micro: int) -> None:
    held = f", {len(job.split.heldout)} held out" if job.split.heldout is not None else ""
    log.info(
        "%d pictures%s, %d steps of %s, lr %.3g, on %s in %s",
        len(job.split.training),
        held,
        job.steps,
        engine.batch_words(job.batch_size, micro, group),
        peak,
        group.device,
        config.precision,
    )
