"""Pretraining a masked autoencoder: one process, one visible loop."""

import contextlib
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from maehub.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.encoder import PRESETS
from maehub.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED, DivergedError, MaehubError, UsageError
from maehub.figures import grid as figure_grid
from maehub.figures import reconstruct
from maehub.files import atomic_write
from maehub.hub import load_autoencoder
from maehub.images import Preprocess
from maehub.masking import kept_count
from maehub.opening import open_image
from maehub.sources import Samples, find_images
from maehub.train.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from maehub.train.config import PretrainConfig
from maehub.train.data import Batch, StepKeys, View, training_loader, validation_batch, worker_count
from maehub.train.optim import adamw, learning_rate
from maehub.weights import save

log = logging.getLogger("maehub")

# decoder (width, depth, heads) of a preset; He et al. 2021 use one for all sizes
_DECODERS = {"vit-nano": (160, 5, 5)}
_PAPER_DECODER = (512, 8, 16)
_WHOLE_PICTURE = {"vit-nano"}  # presets whose evaluation crops nothing off
_LOG_EVERY = 20  # steps between reads of the loss: each read waits for the device
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
        `PretrainResult`; its exit code is 0 when all steps are done, 75 after SIGTERM and 130 after Ctrl-C, both with
        a checkpoint to ``resume`` from.

    Raises:
        UsageError: a setting that cannot be, or a run folder in use.
        DataError: no pictures, or one that cannot be read.
        DivergedError: the loss is not finite; the last checkpoint is kept.
        CheckpointError: a checkpoint cannot be written or read.
    """
    device = _device(config.device)
    training, validation = _split(config.data)
    torch.manual_seed(config.seed)
    model = _model(config).to(device).train()
    view = _view(config, model.config)
    steps = config.steps or math.ceil((config.epochs or 0) * len(training) / config.batch_size)
    kept = kept_count(view.grid[0] * view.grid[1], config.mask_ratio)
    if config.strategy == "grid":
        kept = ((view.grid[0] + 1) // 2) * ((view.grid[1] + 1) // 2)

    _prepare_folder(config)
    optimizer = adamw(model, config.weight_decay)
    identity = Progress(0, _config_key(config, steps), training.digest())
    first_step = _resume(config, model, optimizer, identity) if config.resume else 0
    preprocess = replace(model.preprocess, size=view.size)
    fixed = validation_batch(validation, view, _VALIDATION_CROPS, config.seed) if validation else None

    loss_of = torch.compile(model.loss) if config.compile else model.loss
    autocast = _autocast(config, device)
    peak = config.base_lr * config.batch_size / 256
    keys = StepKeys(training, config.batch_size, config.seed, first_step, steps)
    workers = worker_count(config.workers)
    loader = training_loader(training, view, keys, workers=workers, cache=config.cache, pin=device.type == "cuda")
    run = _Run(config.out, first_step, config.batch_size, hide_bar=config.quiet, steps=steps)

    with run, _stop_requests() as stop:
        log.info("%d pictures, %d steps of %d, lr %.3g, on %s", len(training), steps, config.batch_size, peak, device)
        step = first_step
        for step, batch in enumerate(loader, start=first_step):
            rate = learning_rate(step, steps, peak, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate

            images = preprocess.normalise(batch.pixels.to(device, non_blocking=True))
            with autocast:
                loss = loss_of(images, batch.masked.to(device, non_blocking=True), kept=kept)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.log(step, loss.detach(), rate)

            done, last = step + 1, step + 1 == steps or bool(stop)
            if fixed and (done % config.validate_every == 0 or last):
                run.note(done, val_loss=_validate(model, preprocess, fixed, kept, autocast, device))
                _draw(model, validation, preprocess, config, run.folder / "pictures" / f"step-{done}.png")
            if done % config.checkpoint_every == 0 or last:
                run.flush()  # raises on a loss that is not finite, before anything is saved
                save_checkpoint(run.folder, model, optimizer, replace(identity, step=done))
                run.saved(done)
            if stop:
                run.finish("preempted", stop[0])
                return PretrainResult(run.folder, done, stop[0])

        model.eval()
        save(model, run.folder / "model", overwrite=True)
        run.finish("completed", EXIT_DONE)
    return PretrainResult(run.folder, steps, EXIT_DONE)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _split(data: Path) -> tuple[Samples, Samples | None]:
    """Training and validation pictures of a folder."""
    if (data / "train").is_dir() and (data / "val").is_dir():
        return find_images(data / "train"), find_images(data / "val")
    return find_images(data), None


def _model(config: PretrainConfig) -> MaskedAutoencoder:
    """A fresh autoencoder of a preset, or one with weights."""
    if config.from_:
        if config.decoder_width or config.decoder_depth or config.decoder_heads:
            raise UsageError("--from brings its decoder: leave --decoder-width, --decoder-depth and --decoder-heads")
        model = load_autoencoder(config.from_, image_size=config.image_size, target=config.target)
        return model
    if config.model not in PRESETS:
        raise UsageError(f"--model {config.model} is not one of {', '.join(PRESETS)}; --from names weights")
    encoder = PRESETS[config.model]
    if config.image_size:
        encoder = replace(encoder, image_size=config.image_size)
    width, depth, heads = _DECODERS.get(config.model, _PAPER_DECODER)
    network = AutoencoderConfig(
        encoder,
        config.decoder_width or width,
        depth if config.decoder_depth is None else config.decoder_depth,
        config.decoder_heads or heads,
        config.target or "normalised_pixels",
        config.mask_tokens,
    )
    preprocess = Preprocess.evaluation(encoder.size, encoder.channels, encoder.patch_size)
    if config.model in _WHOLE_PICTURE:
        preprocess = replace(preprocess, crop_fraction=1.0)
    return MaskedAutoencoder(network, preprocess)


def _view(config: PretrainConfig, model: AutoencoderConfig) -> View:
    network = model.encoder
    return View(
        network.size, network.patch_size, network.channels, config.crop_scale, config.strategy, config.mask_ratio
    )


def _autocast(config: PretrainConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" or (config.precision == "auto" and capable):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _prepare_folder(config: PretrainConfig) -> None:
    """Refuse a folder in use before any work, or make it ready."""
    used = config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir()))
    if used and config.overwrite and (config.out / "config.json").is_file():
        shutil.rmtree(config.out)
    elif used and config.overwrite:
        raise UsageError(f"{config.out} is no run folder, so it is not deleted; choose another --out")
    elif used and not config.resume:
        raise UsageError(f"{config.out} exists; go on with it by --resume, or delete it by --overwrite")
    config.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.out / "config.json") as temporary:
        temporary.write_text(json.dumps(asdict(config), indent=1, default=str) + "\n")


def _config_key(config: PretrainConfig, steps: int) -> str:
    """What must be the same when a run is resumed, as one line of JSON."""
    free = {
        "out",
        "data",
        "resume",
        "overwrite",
        "quiet",
        "workers",
        "cache",
        "device",
        "checkpoint_every",
        "validate_every",
    }
    fixed = {name: value for name, value in asdict(config).items() if name not in free}
    return json.dumps(fixed | {"steps": steps, "epochs": None}, sort_keys=True)


def _resume(
    config: PretrainConfig, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, identity: Progress
) -> int:
    """Put the newest checkpoint back; the step to go on from."""
    found = newest_checkpoint(config.out)
    if found is None:
        log.warning("%s has no checkpoint yet: starting at step 0", config.out)
        return 0
    folder, progress = found
    if progress.config != identity.config:
        before, now = json.loads(progress.config), json.loads(identity.config)
        changed = [f"{name} {before.get(name)} → {now.get(name)}" for name in now if before.get(name) != now.get(name)]
        raise UsageError(f"{config.out} was started with other settings: {'; '.join(changed)}. Nothing was changed.")
    if progress.data != identity.data:
        raise UsageError(f"the pictures in {config.data} are not those that {config.out} was started with")
    load_checkpoint(folder, model, optimizer)
    log.info("resumed %s", folder)
    return progress.step


@torch.no_grad()
def _validate(
    model: MaskedAutoencoder,
    preprocess: Preprocess,
    batch: Batch,
    kept: int,
    autocast: contextlib.AbstractContextManager[Any],
    device: torch.device,
) -> float:
    """Loss on fixed pictures with fixed masks."""
    with autocast:
        loss = model.loss(preprocess.normalise(batch.pixels.to(device)), batch.masked.to(device), kept=kept)
    return loss.item()


def _draw(
    model: MaskedAutoencoder, samples: Samples | None, preprocess: Preprocess, config: PretrainConfig, path: Path
) -> None:
    """Reconstructions of a few validation pictures."""
    assert samples is not None
    path.parent.mkdir(exist_ok=True)
    chosen = sorted(range(len(samples)), key=samples.sample_id)[:_SHOWN_PICTURES]
    pictures = [open_image(samples.path(index)) for index in chosen]
    panels = [
        reconstruct(
            model,
            picture,
            strategy=config.strategy,
            mask_ratio=config.mask_ratio,
            seed=config.seed,
            preprocess=preprocess,
        )
        for picture in pictures
    ]
    with atomic_write(path) as temporary:
        figure_grid(panels).save(temporary, format="png")


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects the exit code of a stop asked for by signal, acted on at the end of a step; a second one acts now."""
    stop: list[int] = []

    def ask(number: int, _: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    """The run folder's record: metrics, state and the progress bar."""

    folder: Path
    first_step: int
    batch_size: int
    steps: int
    hide_bar: bool
    last_saved: int | None = None
    waiting: list[tuple[int, Tensor, float]] = field(default_factory=list)

    def __enter__(self) -> "_Run":
        self.metrics = self.folder / "metrics.jsonl"
        _drop_lines(self.metrics, self.first_step)
        self.file = self.metrics.open("a")
        self.last_saved = self.first_step or None
        self.clock = time.perf_counter()
        self.bar = tqdm(total=self.steps, initial=self.first_step, unit="step", disable=self.hide_bar or None)
        self._state("running", None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self.bar.close()
        self.file.close()
        if isinstance(error, MaehubError):
            self._state("diverged" if isinstance(error, DivergedError) else "failed", error.exit_code, str(error))
        elif error is not None:
            self._state("failed", 1, repr(error))

    def log(self, step: int, loss: Tensor, rate: float) -> None:
        """Remember a step; written every few steps, since reading the loss waits for the device."""
        self.waiting.append((step, loss, rate))
        if len(self.waiting) == _LOG_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is remembered, one line a step.

        Raises:
            DivergedError: a loss is not finite; its line is written.
        """
        if not self.waiting:
            return
        losses = torch.stack([loss for _, loss, _ in self.waiting]).tolist()
        now = time.perf_counter()
        speed = round(len(losses) * self.batch_size / (now - self.clock), 1)
        self.clock = now
        for (step, _, rate), loss in zip(self.waiting, losses, strict=True):
            self.note(step + 1, loss=loss, lr=rate, images_per_second=speed)
        self.bar.update(len(losses))
        self.bar.set_postfix(loss=f"{losses[-1]:.4f}", images_per_second=speed, refresh=False)
        bad = [entry[0] for entry, loss in zip(self.waiting, losses, strict=True) if not math.isfinite(loss)]
        self.waiting.clear()
        if bad:
            raise DivergedError(
                f"the loss at step {bad[0] + 1} is not finite. The last checkpoint is step {self.last_saved or 'none'} "
                "and stays. Try a lower --base-lr, or --precision fp32."
            )

    def note(self, step: int, **values: float) -> None:
        """Write one object to metrics.jsonl."""
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()

    def saved(self, step: int) -> None:
        self.last_saved = step
        self._state("running", None)

    def finish(self, state: str, code: int) -> None:
        self.flush()
        self._state(state, code)

    def _state(self, state: str, code: int | None, reason: str = "") -> None:
        facts = {"state": state, "exit_code": code, "last_good_step": self.last_saved, "reason": reason}
        with atomic_write(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n")


def _drop_lines(path: Path, last: int) -> None:
    """Keep the metrics up to a step, so that a resumed run has no line twice."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= last))
