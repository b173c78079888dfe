"""What the loop of fine-tuning runs: a network with its data, measured and exported in its own way."""

import copy
import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import maehub.train.engine as engine
from maehub.data import Labelled, LabelledSplit, StepKeys, inner_split, split_labelled
from maehub.errors import log
from maehub.images import Augmentation
from maehub.models import Encoder, autocast
from maehub.train.engine import Group, Progress, RunLog
from maehub.train.evaluation import AnyScores, LinearFit, score_of
from maehub.train.finetuning.classifier import Objective, class_weights
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.fitting import MINUTES, Clock, blank, micro_batch_of, seconds_a_step
from maehub.train.finetuning.head_start import HeadStart, look_early, put_head, solve_again, solve_head
from maehub.train.finetuning.measuring import Outcome, export, logits_of, show
from maehub.train.finetuning.mixing import Mixing
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

VALIDATIONS = 10  # measurements of a run


class Job(ABC):
    """What a run is made of: everything before the first step, where nothing is written, and what the loop asks of it.

    Attributes:
        split: the pictures; ``training`` are those of it that are trained on.
        settings: the recipe as it was settled; the loop reads length, batch, rate and schedule.
        start: step 0 of the run, with its micro-batch.
        kept: what checkpoints hold: the network, and the average of its weights.
        measured: what is measured and exported.
        module: what is called and differentiated.
        empty: the network without weights, where they are spread over processes that then gather them.
    """

    split: LabelledSplit
    training: Labelled
    settings: Any
    start: Progress
    optimizer: torch.optim.Optimizer
    tells_start: ClassVar[bool] = False
    """Whether step 0 is measured too."""

    def __init__(self, config: FinetuneConfig, group: Group) -> None:
        self.config = config
        self.group = group
        self.precision = autocast(config.precision, group.device)

    def clock_from(self, begun: float) -> Clock:
        """What limits the length of the run, which began then: what was asked for, and ``auto`` on a CPU."""
        config = self.config
        limited = self.settings.recipe == "auto" and self.group.device.type == "cpu"
        minutes = MINUTES if limited and not (config.steps or config.epochs) else None
        return Clock(config.minutes or minutes, begun, asked=config.minutes is not None)

    def keep(self, network: nn.Module, ema: float) -> None:
        """Take a network to be trained, and the average of its weights with that decay, 0 for none."""
        self.network = network.to(self.group.device).train()
        self.spreads = self.config.fsdp and self.group.size > 1
        self.empty = copy.deepcopy(network).to("meta") if self.spreads else None
        self.average: Any = None  # timm's ModelEmaV3, or None
        self.kept = self.measured = network
        if ema:
            from timm.utils.model_ema import ModelEmaV3

            self.average = ModelEmaV3(network, decay=ema)
            self.measured = self.average.module.requires_grad_(False)
            self.kept = nn.ModuleDict({"network": network, "average": self.measured})

    def wrap(self, objective: nn.Module) -> None:
        """Put around the objective, the network with its loss, what the machine asks for."""
        config, group = self.config, self.group
        self.module = engine.wrapped(
            objective,
            group,
            config.precision,
            compile=config.compile,
            fsdp=config.fsdp,
            checkpoint_activations=config.checkpoint_activations,
        )
        if self.average is not None and self.spreads:
            engine.shard(self.measured, group, config.precision)

    def single(self) -> nn.Module | None:
        """What is measured, as one process can call it; see `engine.single_network`."""
        return engine.single_network(self.measured, self.empty, self.group)

    def digest(self) -> str:
        """sha256 of all pictures, their labels and the names of classes."""
        pictures = hashlib.sha256()
        for side in (self.split.training, self.split.testing):
            pictures.update(side.samples.digest().encode() + np.ascontiguousarray(side.labels).tobytes())
            pictures.update(b"" if side.maps is None else side.maps.files.digest().encode())
            pictures.update(b"" if side.objects is None else side.objects.digest().encode())
        pictures.update("\0".join(self.split.training.classes).encode())
        return pictures.hexdigest()

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        settings = self.settings
        peak = engine.peak_rate(settings.base_lr, settings.batch_size)
        return engine.learning_rate(step, settings.steps, peak, settings.warmup, settings.floor)

    @abstractmethod
    def crops(self) -> Dataset[Any]:
        """What gives the batch of a step for its keys."""

    @abstractmethod
    def inputs(self, part: Any, seed: int) -> tuple[Tensor, Tensor]:
        """Images and targets for `module`, of a part of a batch that is on the device."""

    @abstractmethod
    def validate(self, run: RunLog, step: int, single: nn.Module | None) -> Any:
        """Measure on the held-out pictures, and draw some of them."""

    def look_early(self, single: nn.Module | None) -> None:
        """Say, a tenth of the way on, what looks wrong."""
        return

    @abstractmethod
    def export(self, run: RunLog) -> Outcome:
        """Measure for the last time, and write the scores and the model."""

    @abstractmethod
    def announce(self, micro: int) -> None:
        """Say what is trained on what."""


class ClassifierJob(Job):
    """A classifier, or the regression of numbers."""

    def __init__(self, config: FinetuneConfig, group: Group, begun: float) -> None:
        super().__init__(config, group)
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
        self.clock = self.clock_from(begun)
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
        task = config.task if split.training.numeric else None  # as runs of 0.1 have it
        told = asdict(config) | {"recipe": recipe, "task": task}
        start = engine.agreed_start(group, told, derived, self.digest())
        self.keep(classifier.network, settings.ema)
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
        self.wrap(objective)
        self.optimizer = optimizer_of(classifier, settings)

    def _fitted(self, config: FinetuneConfig, objective: Objective, micro: int, group: Group) -> Settings:
        """With as many steps as there is time for."""
        settings, training, shape = self.settings, self.training, self.classifier.preprocess
        with group.together("measuring the speed"):
            if group.is_main:
                crops = LabelledCrops(training, self.transform, cache=False)
                batch = settings.batch_size
                keys = StepKeys(training.samples, batch, config.seed, 0, 1, 1, group.rank, group.size)
                made = partial(blank, preprocess=shape, classes=len(training.classes), device=group.device)
                common: Any = (micro, group, config.precision, config.workers)
                seconds = seconds_a_step(objective, made, batch, crops, next(iter(keys)), *common)
                picture = self.clock.picture or seconds / batch / 3
                beside = picture * (2 * len(self.split.training) + (VALIDATIONS + 1) * len(self.split.testing))
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

    def crops(self) -> Dataset[LabelledBatch]:
        return LabelledCrops(self.training, self.transform, self.config.cache)  # type: ignore[return-value]

    def inputs(self, part: LabelledBatch, seed: int) -> tuple[Tensor, Tensor]:
        return self.mixing(part, seed)

    def look_early(self, single: nn.Module | None) -> None:
        if self.probe is None:
            return
        whole = self.split.training
        logits, _ = self._solve_again(single)
        if logits is not None:
            look_early(self.probe, logits, whole.labels[self.inner[1]], whole.classes, self.settings.base_lr)

    def _solve_again(self, single: nn.Module | None) -> tuple[np.ndarray | None, LinearFit]:
        assert self.probe is not None
        common = (self.classifier.preprocess, self.group, self.precision, self.config.workers)
        alone = self.empty is not None
        return solve_again(self.probe, single, self.split.training, self.inner, *common, alone=alone)

    def validate(self, run: RunLog, step: int, single: nn.Module | None) -> tuple[AnyScores, np.ndarray] | None:
        """Scores and logits, in rank 0."""
        with self.group.together("measuring"):
            testing, preprocess = self.split.testing, self.classifier.preprocess
            common = (self.group, self.precision, self.config.workers)
            logits = logits_of(single, testing.samples, preprocess, *common, alone=self.empty is not None)
            if logits is None:
                return None
            scores = score_of(logits, testing.labels, testing.classes, testing.groups)
            names = ("loss", "top1", "top5", "mean_average_precision")
            told = {f"val_{name}": getattr(scores, name, None) for name in names}
            word, headline = scores.headline
            told |= {"val_r2": headline.value if testing.numeric else None}
            run.note(step, **{name: value for name, value in told.items() if value is not None})
            log.info("step %d: %s %.1f %% on the held-out pictures", step, word, headline.value)
            last = step == self.settings.steps
            show(logits, scores, testing, preprocess.channels, run.folder / "pictures", step, last=last)
            return scores, logits

    def export(self, run: RunLog) -> Outcome:
        """Of the network and its probe the better one is kept."""
        network, split, chosen = self.single(), self.split, None
        if self.probe:
            chosen, fit = self._solve_again(network)
            if network is not None:
                put_head(network, fit)
        measured = self.validate(run, self.settings.steps, network)
        with self.group.together("exporting the model"):
            if network is None or measured is None:
                return Outcome()
            outcome = Outcome(measured[0])
            if self.probe and chosen is not None:
                truth = split.training.labels[self.inner[1]]
                outcome = self.probe.against(*measured, chosen, truth, split.testing)
                if outcome.kept == "probe":
                    network = self.build(self.open()).network
                    put_head(network, self.probe.whole)
                    channels = self.classifier.preprocess.channels
                    at = (split.testing, channels, run.folder / "pictures", self.settings.steps)
                    assert outcome.probe is not None
                    show(self.probe.testing, outcome.probe, *at, last=True)
            export(run.folder, self.config.model, self.settings, network, outcome, split)
        return outcome

    def announce(self, micro: int) -> None:
        training, group = self.training, self.group
        what = f"{len(training.classes)} {'numbers' if training.numeric else 'classes'}"
        tell_pictures(self.split, len(training), what, self.config.model, self.network, group, self.config.precision)
        batch = engine.batch_words(self.settings.batch_size, micro, group)
        log.info("%s", describe(self.settings, self.facts, batch))


def tell_pictures(
    split: LabelledSplit, trained: int, what: str, model: str, network: nn.Module, group: Group, precision: str
) -> None:
    """Say how many pictures of what there are to train and to measure on, and how much of which network is trained."""
    how = "split by --seed" if split.made else "as given"
    if split.groups:
        how += ", {} and {} groups".format(*split.groups)
    log.info(
        "%d pictures of %s to train on, %d to measure on (%s); %s, %d of %d parameters trained, on %s in %s",
        trained,
        what,
        len(split.testing),
        how,
        model,
        sum(p.numel() for p in network.parameters() if p.requires_grad),
        sum(p.numel() for p in network.parameters()),
        group.device,
        precision,
    )
