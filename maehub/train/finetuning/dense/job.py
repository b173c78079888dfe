"""What segmenters and detectors have in common in the loop: windows, clock, measuring picture by picture, export."""

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import maehub.train.engine as engine
from maehub.data import LabelledSplit, StepKeys, split_label_maps, split_objects
from maehub.dense import DenseEncoder, Detector, Segmenter, save_detector, save_segmenter
from maehub.errors import UsageError, log
from maehub.figures import save_figure
from maehub.files import atomic_write
from maehub.hub import Located
from maehub.images import upright_size
from maehub.models import Encoder
from maehub.train.engine import Group, RunLog
from maehub.train.evaluation import Measured, Measuring, worst
from maehub.train.finetuning.classifier import drop_paths
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.fitting import fitted_micro_batch, seconds_a_step
from maehub.train.finetuning.job import VALIDATIONS, Job, tell_pictures
from maehub.train.finetuning.measuring import Outcome
from maehub.train.finetuning.network import find_weights, open_network
from maehub.train.finetuning.recipes import stored_settings
from maehub.train.networks import pair

SHOWN = 4  # pictures of a sheet
_MEASURING, _FEWEST = 0.15, 4  # share of the time that may go into measuring before the end; pictures at least
_SIZES = 500  # pictures whose sizes say how they are looked at
_TIMED = 4  # pictures
_UNFIT = ("pool", "label", "mixup", "cutmix", "smoothing", "erasing", "randaugment", "crop_scale")

_Dense = TypeVar("_Dense", Segmenter, Detector)


class DenseJob(Job):
    """A network that tells more of a picture than a class.

    Attributes:
        model: the network itself.
        transform: how pictures are looked at in training.
        window: (height, width) that it sees at once, in pixels.
    """

    task: ClassVar[str]
    kind: ClassVar[str]
    """Of the model: ``segmenter``, or ``detector``."""
    what: ClassVar[str]
    """What it tells, in words: ``--task segment tells every pixel``."""
    measuring: ClassVar[Measuring]
    tells_start = True

    def __init__(self, config: FinetuneConfig, group: Group, begun: float) -> None:
        super().__init__(config, group)
        self.begun = begun
        self._refuse_unfit()
        files = group.host_first(lambda: find_weights(config.model), "downloading the weights")
        split = group.first(self.find_split() if group.is_main else None, "looking for pictures")  # which reads all
        assert split is not None
        self.split: LabelledSplit = split
        self.training = split.training
        self.stored = group.first(stored_settings(config) if group.is_main else {}, "the settings of the run")
        self.trained = not config.model.startswith("untrained/")
        self.prepare(files)

    def find_split(self) -> LabelledSplit:
        """Pictures to train and to measure on."""
        config, find = self.config, split_label_maps if self.task == "segment" else split_objects
        return find(config.data, seed=config.seed, share=config.val_share, group=config.group)

    @abstractmethod
    def prepare(self, files: Located | None) -> None:
        """Build the network and everything that is trained; ends with `ready`."""

    @abstractmethod
    def blank(self, count: int) -> Any:
        """Targets of so many images, of no meaning."""

    @abstractmethod
    def curves(self, scores: Any) -> dict[str, float]:
        """What is drawn over the steps, by its name."""

    def _refuse_unfit(self) -> None:
        config = self.config
        if config.model.removeprefix("untrained/").startswith("timm/"):
            raise UsageError(f"--task {self.task} takes an encoder of maehub, and {config.model} is a network of timm")
        for name in _UNFIT:
            if getattr(config, name) is not None:
                raise UsageError(
                    f"{engine.option(name)} is for classes of pictures, and --task {self.task} tells {self.what}"
                )
        if config.class_weights != "none":
            raise UsageError(f"--class-weights is for classes of pictures, and --task {self.task} tells {self.what}")

    @property
    def turned(self) -> dict[str, Any]:
        """How pictures may be turned in training."""
        return {name: getattr(self.config, name) for name in ("hflip", "vflip", "rot90")}

    def asked(self, settings: type) -> dict[str, Any]:
        """What of a recipe the user decides."""
        names = [name for name in settings.__dataclass_fields__ if name != "recipe"]  # type: ignore[attr-defined]
        given = {name: getattr(self.config, name, None) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def some_sizes(self) -> np.ndarray:
        """(n, 2) height and width of up to 500 training pictures."""
        samples, count = self.training.samples, len(self.training)
        some = np.linspace(0, count - 1, min(count, _SIZES)).round().astype(int).tolist()
        return np.array([upright_size(samples.source(index)) for index in some])

    def open_encoder(self, files: Located | None, window: Callable[[int], int]) -> Encoder:
        """The encoder with the window as its native size: that of --image-size, or what the patch says."""
        config = self.config
        asked: Any = {"image_size": config.image_size, "channels": config.channels, "seed": config.seed}
        encoder = open_network(config.model, files, **asked, classes=0).module
        assert isinstance(encoder, Encoder)
        size = pair(config.image_size) or window(encoder.config.patch_size)
        size = (size, size) if isinstance(size, int) else size
        if config.rot90 and size[0] != size[1]:
            raise UsageError("--rot90 needs square windows")
        return encoder.resized(size).requires_grad_(False)

    def ready(
        self, model: Segmenter | Detector, objective: nn.Module, derived: dict[str, Any], *, whole: bool = False
    ) -> None:
        """Take a network with its loss: agree on the start, and fit it to memory and time.

        ``whole``: a batch is never computed in parts. ``derived``: what must be the same on resume.
        """
        config, group, settings, window = self.config, self.group, self.settings, model.encoder.config.size
        if settings.batch_size % group.size:
            raise UsageError(f"--batch-size {settings.batch_size} must be a multiple of {group.size} processes")
        derived = {"classes": list(self.training.classes), "window": list(window)} | derived
        start = engine.agreed_start(group, asdict(config), derived, self.digest())
        self.model, self.window = model, window
        self.keep(model, settings.ema)
        objective.to(group.device)

        def made(count: int) -> tuple[Tensor, Any]:
            """Images (count, C, H, W), zeros, and targets of no meaning."""
            images = torch.zeros(count, model.encoder.config.channels, *window, device=group.device)
            return images, self.blank(count)

        asked, part = settings.batch_size if whole else config.micro_batch, settings.batch_size // group.size
        size, shard = "{}×{}".format(*window), config.fsdp
        micro = fitted_micro_batch(asked, objective, made, part, group, config.precision, size, shard=shard)
        self.start = replace(start, micro_batch=micro)
        self.clock = self.clock_from(self.begun)
        if self.clock.minutes is not None:
            stored = self.stored
            names = ("steps", "epochs", "looked_at")
            planned = replace(settings, **{name: stored[name] for name in names}) if stored else None
            self.settings = planned or self._fitted(objective, made, micro)
        self.wrap(objective)
        self.optimizer = torch.optim.AdamW(dense_groups(model, settings), lr=0.0, betas=(0.9, 0.999), fused=True)

    def _fitted(self, objective: nn.Module, made: Any, micro: int) -> Any:
        """The settings with as many steps as there is time for."""
        settings, config = self.settings, self.config
        with self.group.together("measuring the speed"):
            if self.group.is_main:
                crops, batch = self.crops(), settings.batch_size
                keys = StepKeys(self.training.samples, batch, config.seed, 0, 1, 1, self.group.rank, self.group.size)
                common: Any = (micro, self.group, config.precision, config.workers)
                seconds = seconds_a_step(objective, made, batch, crops, next(iter(keys)), *common)
                tested = len(self.split.testing)
                started, some = time.monotonic(), range(min(tested, _TIMED))
                list(self.measuring.each(self.model, self.split.testing, some, self.precision))
                picture = (time.monotonic() - started) / len(some)
                looked = int(_MEASURING * self.clock.left / (VALIDATIONS * picture))
                settings = replace(settings, looked_at=max(_FEWEST, min(settings.looked_at, tested, looked)))
                beside = picture * (tested + VALIDATIONS * min(tested, settings.looked_at))
                settings = self.clock.fitted(settings, len(self.training), seconds, beside)
        return self.group.first(settings, "the length of the run")

    def validate(self, run: RunLog, step: int, single: nn.Module | None) -> Any:
        """Scores, in rank 0; before the end of up to 32 pictures."""
        testing, last = self.split.testing, step == self.settings.steps
        places = np.argsort([testing.samples.sample_id(index) for index in range(len(testing))])
        told = testing.labels[places].any(axis=1)
        places = np.concatenate([places[told][:1], np.delete(places, told.argmax())])  # one at least shows something
        first = places[: self.settings.looked_at].tolist()
        if not last:
            places = places[: self.settings.looked_at]
        mine = places[self.group.rank :: self.group.size] if self.empty is None else places
        rows: dict[int, Any] = {}
        shown: list[Measured] = []
        wrong: list[Measured] = []
        with self.group.together("measuring"):
            if single is not None:
                for one in self.measuring.each(single, testing, mine.tolist(), self.precision):
                    rows[one.place] = one.row
                    if one.place in first[:SHOWN]:
                        shown.append(one)
                    wrong = worst([*wrong, one], SHOWN)
        parts = [part for part in self.group.all((rows, shown, wrong), "measuring") if part[0]]
        with self.group.together("drawing what was measured"):
            if not self.group.is_main or single is None:
                return None
            found = {place: row for part in parts for place, row in part[0].items()}
            scores = self._scored(found, found)
            same = self._scored(found, first)  # at every step
            run.note(step, **self.curves(same))
            of = "the held-out pictures" if len(found) == len(testing) else f"{len(found)} of the held-out pictures"
            log.info("step %d: %s on %s", step, scores.in_words, of)
            folder = run.folder / "pictures"
            folder.mkdir(exist_ok=True)
            some = sorted((one for part in parts for one in part[1]), key=lambda one: one.place)
            save_figure(self.measuring.sheet(single, testing, some), folder / f"step-{step}.png")
            if last:
                ranked = worst((one for part in parts for one in part[2]), SHOWN)
                save_figure(self.measuring.sheet(single, testing, ranked), folder / "mistakes.png")
            return scores

    def _scored(self, rows: Mapping[int, Any], places: Iterable[int]) -> Any:
        """Scores of some held-out pictures."""
        some = sorted(places)
        return self.measuring.scored(self.split.testing.take(np.array(some)), [rows[index] for index in some])

    def export(self, run: RunLog) -> Outcome:
        network = self.single()
        scores = self.validate(run, self.settings.steps, network)
        with self.group.together("exporting the model"):
            if network is None or scores is None:
                return Outcome()
            facts = {
                "task": self.task,
                "trained_from": self.config.model,
                "recipe": asdict(self.settings),
                "training_pictures": len(self.training),
                "split": "made by seed" if self.split.made else "as given",
                "scores": scores.to_dict(),
            }
            text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
            with atomic_write(run.folder / "scores.json") as temporary:
                temporary.write_text(text)
            made = "a split by seed" if self.split.made else "a split that was given"
            told = f"{scores.in_words} on {scores.n:,} held-out pictures, {made}, measured at the last step."
            save: Any = save_segmenter if isinstance(network, Segmenter) else save_detector
            save(network.eval(), run.folder / "model", card=f"{self.card()}\n\n{told}", overwrite=True)
            with atomic_write(run.folder / "model" / "metrics.json") as temporary:
                temporary.write_text(text)
        return Outcome(scores)

    def card(self) -> str:
        """What the model card says of training; no names of files."""
        settings, (parts, pictures, loader) = self.settings, self.described()
        return (
            f"A {self.kind} of {len(self.training.classes)} classes ({parts}), fine-tuned from {self.config.model} by "
            f"the recipe `{settings.recipe}` on {len(self.training):,} {pictures}: {settings.steps:,} steps of "
            f"{settings.batch_size}. `{loader}` loads it; `maehub.load` and timm load its encoder."
        )

    @abstractmethod
    def described(self) -> tuple[str, str, str]:
        """What the model has, and what it was trained on, in words; and the function that loads it."""

    @abstractmethod
    def announced(self) -> tuple[str, str]:
        """What there is to tell, in words, and how pictures are scaled."""

    def announce(self, micro: int) -> None:
        group, (what, scaled) = self.group, self.announced()
        tell_pictures(
            self.split, len(self.training), what, self.config.model, self.network, group, self.config.precision
        )
        log.info("windows of %d×%d pixels; %s", *self.window, scaled)
        log.info(self.settings.describe(), engine.batch_words(self.settings.batch_size, micro, group))


def built(make: Callable[[], _Dense], settings: Any, seed: int, *, last: int | None = None, normed: bool) -> _Dense:
    """A network on the CPU with fresh parts, of whose encoder trains what `train_blocks` says."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = make()
    encoder = model.encoder
    train_blocks(encoder, settings.blocks, last=encoder.config.depth - 1 if last is None else last, normed=normed)
    drop_paths(list(encoder.blocks), settings.drop_path)
    return model


def train_blocks(encoder: Encoder, blocks: float | None, *, last: int, normed: bool) -> None:
    """Train the last so many blocks, None for the whole encoder with its positions, as published; never those behind
    the block ``last``, which nothing sees, nor a final norm that is not used."""
    depth = encoder.config.depth
    first = 0 if blocks is None else depth - int(blocks)
    if first < 0 or blocks == 0.5:
        raise UsageError(f"--blocks {blocks:g} must be whole blocks of the {depth} of the network")
    encoder.requires_grad_(blocks is None)
    encoder.final_norm.requires_grad_(normed and blocks != 0)
    if isinstance(encoder, DenseEncoder) and not encoder.attending.cls:
        encoder.cls_token.requires_grad_(False)
    for number, block in enumerate(encoder.blocks):
        block.requires_grad_(first <= number <= last)


def dense_groups(model: Segmenter | Detector, settings: Any) -> list[dict[str, Any]]:
    """Groups of the encoder's parameters by layers, and those of all others, which have the whole rate and no decay on
    vectors."""
    encoder = model.encoder
    groups = engine.decayed_groups(encoder, encoder.config.depth, settings.weight_decay, settings.layer_decay)
    own = {id(parameter) for parameter in encoder.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    for decays in (True, False):
        some = [parameter for parameter in rest if (parameter.ndim > 1) == decays]
        groups.append({"params": some, "lr_scale": 1.0, "weight_decay": settings.weight_decay if decays else 0.0})
    return [group for group in groups if group["params"]]
