"""Pretraining a masked autoencoder: one visible loop, for one process and for many."""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maehub.data import StepKeys, batches_of, check_shared_memory, worker_count
from maehub.errors import EXIT_DONE, UsageError
from maehub.images import jitter
from maehub.models import MaskedAutoencoder
from maehub.train.engine import (
    Group,
    Progress,
    RunLog,
    Saver,
    Stop,
    accumulating,
    adamw,
    agreed,
    autocast,
    batch_words,
    check_run_folder,
    code_digest,
    describe_environment,
    deterministic,
    find_micro_batch,
    fixed_settings,
    gathered,
    gradient_norm,
    guarded_step,
    joined,
    learning_rate,
    next_batch,
    parts,
    peak_rate,
    rescuing,
    resumed,
    run_state,
    set_rates,
    stop_requests,
    within_memory,
    wrapped,
)
from maehub.train.pretraining.config import PretrainConfig
from maehub.train.pretraining.holdout import Split, split_data
from maehub.train.pretraining.network import build_network, find_weights, kept_patches, view_of, views_fit
from maehub.train.pretraining.objective import Objective, fit_components, store_components
from maehub.train.pretraining.validation import Validation, tell_start
from maehub.train.pretraining.views import Crops, View, validation_batch
from maehub.train.reports import update_report
from maehub.version import __version__
from maehub.weights import save

log = logging.getLogger("maehub")

Tokenizer = Callable[[Tensor], Tensor]
"""Pictures (B, C, H, W) in [0, 1] to (B, N) integers, one a patch; ``vocabulary`` is how many there are."""

_PCA_PICTURES = 1000  # pictures that the components of patches are fitted on


class PretrainResult(NamedTuple):
    """How a run ended."""

    run: Path
    step: int
    exit_code: int


def pretrain(config: PretrainConfig, *, tokenizer: Tokenizer | None = None) -> PretrainResult:
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
    with joined(config.device, config.timeout) as group, deterministic(config.deterministic):
        with group.together("setting up"):
            if group.leads:
                check_run_folder(config.out, resume=config.resume, overwrite=config.overwrite)
            job = _set_up(config, group, tokenizer)
        logged = RunLog(config.out, config.batch_size, leads=group.leads)
        with logged as run, stop_requests(deadline) as stop:
            return _train(config, group, job, run, stop)


@dataclass
class _Job:
    """What a run is made of."""

    model: MaskedAutoencoder  # what is saved
    objective: Objective  # the model with its target: what is differentiated
    objective_of: Callable[[MaskedAutoencoder], Objective]  # the same for a copy of the model
    module: nn.Module  # the objective, wrapped for this machine: what is called
    optimizer: torch.optim.Optimizer
    view: View
    split: Split
    validation: Validation | None  # on rank 0
    steps: int
    start: Progress
    precision: contextlib.AbstractContextManager[Any]


def _set_up(config: PretrainConfig, group: Group, tokenizer: Tokenizer | None) -> _Job:
    """Everything before the first step; nothing is written."""
    if config.batch_size % (group.size * config.masks_per_image):
        raise UsageError(
            f"--batch-size {config.batch_size} counts the views of all processes: it must be a multiple of "
            f"{group.size} processes times {config.masks_per_image} masks of a picture"
        )
    found = find_weights(config) if group.local_leads else None  # one process of each host downloads
    group.all(None, "downloading the weights")
    if not group.local_leads:
        found = find_weights(config)
    model = build_network(config, found, _vocabulary(tokenizer))
    view, device = view_of(config, model.config), group.device
    kept = kept_patches(view)
    first = split_data(config.data, config.holdout, config.group) if group.local_leads else None
    group.all(None, "looking for pictures")  # what the first finds out about shards is kept for the others
    split = first or split_data(config.data, config.holdout, config.group)
    views = len(split.training) * config.masks_per_image
    steps = config.steps or math.ceil((config.epochs or 0) * views / config.batch_size)
    if model.config.target == "pca" and not model.decoder.components.isfinite().all():
        _fit_pca(model, split, view, config, group)
    settings = fixed_settings(config, {"steps": steps})
    start = Progress(0, settings, split.training.digest(), group.size)
    group.agree(
        {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
        | {"the code of maehub": code_digest(), "maehub": __version__, "torch": torch.__version__}
        | {"the data": start.data}
    )
    preprocess = replace(model.preprocess, size=view.size)
    model = model.to(device).train()
    objective_of = partial(
        Objective,
        preprocess=preprocess,
        loss_on=config.loss_on,
        predict_share=config.predict_share,
        corruption=config.corruption,
        kept=kept,
        tokenizer=tokenizer,
    )
    objective = objective_of(model)
    validation = None
    if group.leads:
        validation = Validation(config, objective, view, split.heldout or split.training, split.heldout)
    precision = autocast(config, device)
    fits = views_fit(config, objective, model.config, view, kept, group)
    micro = find_micro_batch(config, config.batch_size // group.size, group, fits, f"{view.size[0]}×{view.size[1]}")
    module = wrapped(objective, config, group)
    optimizer = adamw(model, config.weight_decay)
    start = replace(start, micro_batch=micro)
    return _Job(model, objective, objective_of, module, optimizer, view, split, validation, steps, start, precision)


def _train(config: PretrainConfig, group: Group, job: _Job, run: RunLog, stop: Stop) -> PretrainResult:
    """The loop."""
    steps, device, peak = job.steps, group.device, peak_rate(config.base_lr, config.batch_size)
    at = resumed(config, group, job.model, job.optimizer, job.start) if config.resume else job.start
    if at.step == steps and run_state(config.out) == "completed":
        log.info("%s is already at step %d: nothing to do", config.out, steps)
        return PretrainResult(config.out, steps, EXIT_DONE)
    micro = at.micro_batch if at.processes == group.size and at.micro_batch and not config.micro_batch else None
    micro = micro or job.start.micro_batch
    workers = worker_count(config.workers, group.local_size)
    views = config.batch_size // group.size
    with group.together("setting up"):
        check_shared_memory(job.view.batch_bytes(views), views, workers)
    if group.leads:
        _announce(config, group, job, peak, micro)
    facts = asdict(config) | {
        "steps": steps,
        "target": job.model.config.target,
        "environment": describe_environment(group),
    }
    run.begin(
        facts,
        first_step=at.step,
        steps=steps,
        overwrite=config.overwrite,
        hide_bar=config.quiet,
        tensorboard=config.tensorboard,
    )
    if at.step == 0:
        _look(config, group, job, run, 0)
    keys = StepKeys(
        job.split.training,
        config.batch_size,
        config.seed,
        at.step,
        steps,
        config.masks_per_image,
        group.rank,
        group.size,
    )
    parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    bad = torch.zeros((), device=device)  # 1 from the first update on that is not finite
    saver = Saver(config, group, run, stop, job.model, job.optimizer, replace(job.start, micro_batch=micro))
    crops = Crops(job.split.training, job.view, config.cache)
    loading = batches_of(crops, keys, workers=workers, pin=device.type == "cuda")
    with (
        loading as batches,
        rescuing(keys, job.split.training, run, saver, partial(update_report, run, PretrainConfig)),
    ):
        for step in range(at.step, steps):
            group.step = step + 1
            batch, said = next_batch(batches, group, run, stop)
            rate = learning_rate(step, steps, peak, config.warmup)
            set_rates(job.optimizer, rate)

            loss = torch.zeros((), device=device)
            with group.waiting("the gradients"), within_memory(micro, device):
                for part, last in parts(batch, micro):
                    pixels, masked, seeds, factors = part.to(device)
                    if factors.shape[1]:
                        pixels = jitter(pixels, factors)
                    with accumulating(job.module, last=last):
                        with job.precision:
                            share = job.module(pixels, masked, seeds) * (len(masked) / len(batch.masked))
                        share.backward()
                    loss += share.detach()
                norm = gradient_norm(parameters)
                loss, bad = agreed(loss, norm, bad, group)
            if config.clip_grad:
                nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)
            guarded_step(job.optimizer, bad)
            job.optimizer.zero_grad(set_to_none=True)

            done, stopping = step + 1, said or (stop.exit_code if group.size == 1 else None)
            run.log(done, torch.stack([loss, norm, bad]), rate)
            looking = done % config.validate_every == 0 or done == steps
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
                update_report(run, PretrainConfig)
                return PretrainResult(config.out, done, stopping)

    return _finished(config, group, job, run)


def _look(config: PretrainConfig, group: Group, job: _Job, run: RunLog, step: int) -> None:
    """Validate, and draw."""
    with group.together("validating"):
        still = _still(job, group)
        if still is None or job.validation is None:
            return
        numbers = job.validation.measure(still, job.precision)
        if numbers:
            run.note(step, **numbers)
        if step:
            job.validation.draw(still.model, run.folder / "pictures" / f"step-{step}.png")
        else:
            tell_start(numbers, config.from_)


def _still(job: _Job, group: Group) -> Objective | None:
    """The objective as rank 0 can call it alone: a copy, where the weights are spread over all processes."""
    if not any(hasattr(parameter, "full_tensor") for parameter in job.model.parameters()):
        return job.objective if group.leads else None
    weights = gathered(job.model)
    if not group.leads:
        return None
    with torch.device("meta"):
        model = MaskedAutoencoder(job.model.config, job.model.preprocess)
    model.load_state_dict(weights, assign=True)
    model.encoder.origin = job.model.encoder.origin
    return job.objective_of(model.to(group.device))


def _finished(config: PretrainConfig, group: Group, job: _Job, run: RunLog) -> PretrainResult:
    """Export the model and write the report."""
    with group.together("exporting the model"):
        still = _still(job, group)
        if still is not None:
            save(still.model.eval(), run.folder / "model", overwrite=True)
    run.finish("completed", EXIT_DONE)
    update_report(run, PretrainConfig)
    return PretrainResult(config.out, job.steps, EXIT_DONE)


def _announce(config: PretrainConfig, group: Group, job: _Job, peak: float, micro: int) -> None:
    held = f", {len(job.split.heldout)} held out" if job.split.heldout is not None else ""
    log.info(
        "%d pictures%s, %d steps of %s, lr %.3g, on %s",
        len(job.split.training),
        held,
        job.steps,
        batch_words(config.batch_size, micro, group),
        peak,
        group.device,
    )


def _vocabulary(tokenizer: Tokenizer | None) -> int:
    """How many tokens a caller's tokenizer knows; 0 without one."""
    if tokenizer is None:
        return 0
    vocabulary = getattr(tokenizer, "vocabulary", None)
    if type(vocabulary) is not int or vocabulary < 1:
        raise UsageError(f"a tokenizer needs an attribute vocabulary, a positive int, not {vocabulary!r}")
    return vocabulary


def _fit_pca(model: MaskedAutoencoder, split: Split, view: View, config: PretrainConfig, group: Group) -> None:
    """Give the decoder the principal components of patches of some training pictures, the same in every process."""
    count = min(len(split.training), _PCA_PICTURES)
    sample = validation_batch(split.training, view, count, config.seed)
    found = fit_components(sample.pixels, model.preprocess, view.patch_size, config.pca_components)
    store_components(model, group.first(found, "the principal components"))
