"""Pretraining a masked autoencoder: one process, one visible loop."""

import contextlib
import json
import logging
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from maehub.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.encoder import PRESETS
from maehub.errors import EXIT_DONE, DataError, UsageError
from maehub.figures import grid as figure_grid
from maehub.figures import reconstruct
from maehub.files import atomic_write
from maehub.hub import load_autoencoder, usable_device
from maehub.images import Preprocess
from maehub.locating import locate
from maehub.sources import Samples, find_images
from maehub.train.checkpoint import Progress, check_converging, load_checkpoint, newest_checkpoint, save_checkpoint
from maehub.train.config import PretrainConfig
from maehub.train.data import Batch, StepKeys, View, training_batches, validation_batch, worker_count
from maehub.train.log import RunLog, check_run_folder, run_state
from maehub.train.optim import adamw, learning_rate
from maehub.train.stopping import stop_requests
from maehub.weights import save

log = logging.getLogger("maehub")

# decoder (width, depth, heads) of a preset; He et al. 2021 use one for all sizes
_DECODERS = {"vit-nano": (160, 5, 5)}
_PAPER_DECODER = (512, 8, 16)
_WHOLE_PICTURE = {"vit-nano"}  # presets whose evaluation crops nothing off
_VALIDATION_CROPS = 256
_SHOWN_PICTURES = 4


class PretrainResult(NamedTuple):
    """How a run ended."""

    run: Path
    step: int
    exit_code: int


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pretrain a masked autoencoder.

    The run folder gets ``config.json``, ``run.json`` (state), ``metrics.jsonl`` (one object a step), ``pictures/``,
    ``checkpoints/`` and at the end ``model/``, a model folder that `maehub.load` reads.

    Returns:
        `PretrainResult`; its exit code is 0 when all steps are done, 75 after SIGTERM or SIGUSR1 and 130 after Ctrl-C,
        both with a checkpoint to ``resume`` from.

    Raises:
        UsageError: a setting that cannot be, or a run folder in use.
        DataError: no pictures, one that cannot be read, or on ``resume`` others than before.
        DivergedError: a loss or a weight is not finite; the last checkpoint is kept.
        CheckpointError: a checkpoint cannot be written or read.
        KeyboardInterrupt: a second stop signal came before the step was done.
    """
    check_run_folder(config.out, resume=config.resume, overwrite=config.overwrite)
    model = _model(config)
    view = _view(config, model.config)
    kept = _kept(view)
    device = usable_device(config.device)
    training, validation = _split(config.data)
    steps = config.steps or math.ceil((config.epochs or 0) * len(training) / config.batch_size)
    preprocess = replace(model.preprocess, size=view.size)
    fixed = validation_batch(validation, view, _VALIDATION_CROPS, config.seed) if validation else None
    shown = validation or training

    model = model.to(device).train()
    optimizer = adamw(model, config.weight_decay)
    loss_of = torch.compile(model.loss) if config.compile else model.loss
    autocast = _autocast(config, device)
    peak = config.base_lr * config.batch_size / 256
    start = Progress(0, _settings(config, steps), training.digest())

    with RunLog(config.out, config.batch_size) as run, stop_requests() as stop:
        first_step = _resume(config, model, optimizer, start) if config.resume else 0
        if first_step == steps and run_state(config.out) == "completed":
            log.info("%s is already at step %d: nothing to do", config.out, steps)
            return PretrainResult(config.out, steps, EXIT_DONE)
        run.begin(asdict(config), first_step=first_step, steps=steps, overwrite=config.overwrite, hide_bar=config.quiet)
        log.info("%d pictures, %d steps of %d, lr %.3g, on %s", len(training), steps, config.batch_size, peak, device)
        keys = StepKeys(training, config.batch_size, config.seed, first_step, steps)
        workers, pin = worker_count(config.workers), device.type == "cuda"
        with training_batches(training, view, keys, workers=workers, cache=config.cache, pin=pin) as batches:
            for step, batch in enumerate(batches, start=first_step):
                rate = learning_rate(step, steps, peak, config.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate

                images = preprocess.normalise(batch.pixels.to(device, non_blocking=True))
                with autocast:
                    loss = loss_of(images, batch.masked.to(device, non_blocking=True), kept=kept)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                done, stopping = step + 1, stop.exit_code
                run.log(done, loss.detach(), rate)
                drawing = done % config.validate_every == 0 or done == steps
                saving = done % config.checkpoint_every == 0 or done == steps or stopping
                if drawing or saving:
                    run.flush()
                    check_converging(model.state_dict(), f"the weights after step {done}")
                    if drawing:
                        _draw(model, shown, preprocess, config, run.folder / "pictures" / f"step-{done}.png")
                    if drawing and fixed:
                        run.note(done, val_loss=_validate(model, preprocess, fixed, kept, autocast, config.batch_size))
                    if saving:
                        save_checkpoint(run.folder, model, optimizer, replace(start, step=done))
                        run.saved(done)
                    run.restart_clock()
                if stopping and done < steps:
                    run.finish("preempted", stopping)
                    return PretrainResult(config.out, done, stopping)

        save(model.eval(), run.folder / "model", overwrite=True)
        run.finish("completed", EXIT_DONE)
    return PretrainResult(config.out, steps, EXIT_DONE)


def _model(config: PretrainConfig) -> MaskedAutoencoder:
    """A fresh autoencoder of a preset, or one with weights; on the CPU."""
    if config.from_:
        found = locate(config.from_, "pretrain")  # of vit-b the one on normalised pixels, not the one that draws
        model = load_autoencoder(found, image_size=config.image_size, target=config.target)
        if model.config.target == "unknown":
            raise UsageError(f"what {config.from_} was trained to predict is unknown: say it by --target")
        return model
    if config.model not in PRESETS:
        raise UsageError(f"--model {config.model} is not one of {', '.join(PRESETS)}; --from names weights")
    encoder = PRESETS[config.model]
    if config.image_size:
        if config.image_size % encoder.patch_size:
            raise UsageError(f"--image-size must be a multiple of {encoder.patch_size}, not {config.image_size}")
        encoder = replace(encoder, image_size=config.image_size)
    width, depth, heads = _DECODERS.get(config.model, _PAPER_DECODER)
    network = AutoencoderConfig(
        encoder,
        config.decoder_width or width,
        depth if config.decoder_depth is None else config.decoder_depth,
        config.decoder_heads or heads,
        config.target or "normalised_pixels",
        config.mask_tokens or "decoder",
    )
    preprocess = Preprocess.evaluation(encoder.size, encoder.channels, encoder.patch_size)
    if config.model in _WHOLE_PICTURE:
        preprocess = replace(preprocess, crop_fraction=1.0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        return MaskedAutoencoder(network, preprocess)


def _view(config: PretrainConfig, network: AutoencoderConfig) -> View:
    encoder = network.encoder
    return View(
        encoder.size, encoder.patch_size, encoder.channels, config.crop_scale, config.strategy, config.mask_ratio
    )


def _kept(view: View) -> int:
    """How many patches every mask of a view leaves visible."""
    masked = view.masks([0])
    if not masked.any():
        raise UsageError(f"--mask-ratio {view.mask_ratio} hides none of {masked.shape[1]} patches: take a higher one")
    return int((~masked).sum())


def _split(data: Path) -> tuple[Samples, Samples | None]:
    """Training and validation pictures of a folder."""
    if (data / "train").is_dir() and (data / "val").is_dir():
        return find_images(data / "train"), find_images(data / "val")
    return find_images(data), None


def _autocast(config: PretrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" or (config.precision == "auto" and capable):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


# What may be another when a run is resumed: it changes nothing that is computed, or only how fast.
_FREE = {"out", "data", "resume", "overwrite", "allow_data_change", "quiet", "device", "workers", "cache"} | {
    "checkpoint_every",
    "validate_every",
    "epochs",  # its steps count
}


def _settings(config: PretrainConfig, steps: int) -> dict[str, Any]:
    """What must be the same when a run is resumed, as JSON gives it back."""
    fixed = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return json.loads(json.dumps(fixed | {"steps": steps}))


def _resume(config: PretrainConfig, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, now: Progress) -> int:
    """Put the newest checkpoint back; the step to go on from."""
    found = newest_checkpoint(config.out)
    if found is None:
        log.warning("%s has no checkpoint: starting at step 0", config.out)
        return 0
    folder, before = found
    names = sorted(before.config | now.config)
    changed = [
        f"{name} {before.config.get(name)} → {now.config.get(name)}"
        for name in names
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
    load_checkpoint(folder, model, optimizer)
    log.info("resumed %s", folder)
    return before.step


@torch.no_grad()
def _validate(
    model: MaskedAutoencoder,
    preprocess: Preprocess,
    batch: Batch,
    kept: int,
    autocast: contextlib.AbstractContextManager[Any],
    at_once: int,
) -> float:
    """Mean loss on fixed crops with fixed masks."""
    device = next(model.parameters()).device
    total = 0.0
    for pixels, masked in zip(batch.pixels.split(at_once), batch.masked.split(at_once), strict=True):
        with autocast:
            loss = model.loss(preprocess.normalise(pixels.to(device)), masked.to(device), kept=kept)
        total += loss.item() * len(pixels)
    return total / len(batch.pixels)


def _draw(
    model: MaskedAutoencoder, samples: Samples, preprocess: Preprocess, config: PretrainConfig, path: Path
) -> None:
    """Reconstructions of a few pictures, always the same."""
    chosen = sorted(range(len(samples)), key=samples.sample_id)[:_SHOWN_PICTURES]
    panels = [
        reconstruct(
            model,
            os.fsdecode(samples.path(index)),
            strategy=config.strategy,
            mask_ratio=config.mask_ratio,
            seed=config.seed,
            preprocess=preprocess,
        )
        for index in chosen
    ]
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        figure_grid(panels).save(temporary, format="png")
