"""A segmenter in the loop of fine-tuning: everything before the first step, what is measured, drawn and exported."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import maehub.train.engine as engine
from maehub.data import Labelled, StepKeys, split_label_maps
from maehub.dense import Segmenter, SegmenterConfig, save_segmenter
from maehub.errors import UsageError, log
from maehub.figures import save_figure
from maehub.files import atomic_write
from maehub.hub import Located
from maehub.images import upright_size
from maehub.models import Encoder
from maehub.train.engine import Group, RunLog
from maehub.train.evaluation import MapScores, measured_maps, score_maps, sheet_of
from maehub.train.finetuning.config import FinetuneConfig
from maehub.train.finetuning.fitting import fitted_micro_batch, seconds_a_step
from maehub.train.finetuning.job import VALIDATIONS, Job, tell_pictures
from maehub.train.finetuning.maps.network import MapObjective, build_segmenter, parameter_groups, solve_decoder
from maehub.train.finetuning.maps.recipes import (
    MapFacts,
    MapSettings,
    describe,
    lasting,
    settle,
    short_side_of,
    window_of,
)
from maehub.train.finetuning.maps.views import MapBatch, MapCrops, MapTransform
from maehub.train.finetuning.measuring import Outcome
from maehub.train.finetuning.network import find_weights, open_network
from maehub.train.finetuning.recipes import stored_settings
from maehub.train.networks import pair

_SHOWN = 4  # pictures of a sheet
_LOOKED_AT = 32  # held-out pictures that are measured before the end
_SIZES = 500  # pictures whose sizes say how they are looked at
_TIMED = 4  # pictures


class MapJob(Job):
    """A segmenter."""

    tells_start = True

    def __init__(self, config: FinetuneConfig, group: Group, begun: float) -> None:
        super().__init__(config, group)
        if config.model.removeprefix("untrained/").startswith("timm/"):
            raise UsageError(f"--task segment takes an encoder of maehub, and {config.model} is a network of timm")
        files = group.host_first(lambda: find_weights(config.model), "downloading the weights")
        find = partial(split_label_maps, config.data, seed=config.seed, share=config.val_share, group=config.group)
        split = group.first(find() if group.is_main else None, "looking for pictures")  # which reads every map
        assert split is not None
        self.split = split
        self.training = self.split.training
        stored = group.first(stored_settings(config) if group.is_main else {}, "the settings of the run")
        encoder, short_side = self._encoder(config, files)
        shape = encoder.config
        facts = MapFacts(shape.width, shape.depth, len(self.training), not config.model.startswith("untrained/"))
        self.settings: MapSettings = settle(config.recipe, facts, _asked(config))
        settings = self.settings
        if settings.batch_size % group.size:
            raise UsageError(f"--batch-size {settings.batch_size} must be a multiple of {group.size} processes")
        assert self.training.maps is not None
        shape_of: Any = {name: getattr(settings, name) for name in ("layers", "width", "norm", "attention")}
        described = SegmenterConfig(
            self.training.maps.classes,
            settings.decoder,
            auxiliary=settings.side_loss > 0,
            short_side=short_side,
            **shape_of,
        )
        network = build_segmenter(encoder, described, settings, config.seed)
        turned: Any = {"hflip": config.hflip, "vflip": config.vflip, "rot90": config.rot90}
        views = partial(MapTransform, encoder.preprocess, short_side)
        self.transform = views(settings.resize, settings.most_of_one, **turned, colours=settings.colours)
        self.clock = self.clock_from(begun)
        if settings.head_start == "probe" and not stored:
            plain = views((1.0, 1.0), hflip=False, colours=False)
            solve_decoder(network, MapCrops(self.training, plain, cache=False), group, self.precision, config.seed)
        derived = {"classes": list(self.training.classes), "window": list(shape.size), "short_side": short_side}
        start = engine.agreed_start(group, asdict(config), derived | lasting(settings), self.digest())
        self.keep(network, settings.ema)
        self.segmenter = network
        objective = MapObjective(network, settings.side_loss).to(group.device)
        made = partial(_blank, encoder, group.device)
        whole = settings.norm == "batch" and settings.decoder == "upernet"
        asked = settings.batch_size if whole else config.micro_batch  # batch statistics are of the whole batch
        size = "{}×{}".format(*shape.size)
        part, shard = settings.batch_size // group.size, config.fsdp
        micro = fitted_micro_batch(asked, objective, made, part, group, config.precision, size, shard=shard)
        self.start = replace(start, micro_batch=micro)
        if self.clock.minutes is not None:
            planned = replace(settings, steps=stored["steps"], epochs=stored["epochs"]) if stored else None
            self.settings = planned or self._fitted(objective, made, micro)
        self.wrap(objective)
        groups = parameter_groups(network, settings)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)

    def _encoder(self, config: FinetuneConfig, files: Located | None) -> tuple[Encoder, int | None]:
        """The encoder with the window as its native size, and the shorter side that pictures are scaled to."""
        samples, count = self.training.samples, len(self.training)
        some = np.linspace(0, count - 1, min(count, _SIZES)).round().astype(int).tolist()
        sides = [min(upright_size(samples.source(index))) for index in some]
        asked: Any = {"image_size": config.image_size, "channels": config.channels, "seed": config.seed}
        encoder = open_network(config.model, files, **asked, classes=0).module
        assert isinstance(encoder, Encoder)
        patch, size, middle = encoder.config.patch_size, pair(config.image_size), int(np.median(sides))
        if size is None:
            small = config.recipe == "auto" and self.group.device.type == "cpu"
            size = (window_of(patch, middle, small=small),) * 2
        if config.rot90 and len({*np.atleast_1d(size)}) > 1:
            raise UsageError("--rot90 needs square windows")
        encoder = encoder.resized(size)
        short = config.short_side
        if short is None and (short := short_side_of(min(encoder.config.size), middle)) and self.group.is_main:
            log.warning(
                "pictures are scaled to a shorter side of %d pixels, and the middle one of them has %d: --short-side 0 "
                "keeps details, and takes longer; so does a larger --image-size, what is seen at once",
                short,
                middle,
            )
        return encoder.requires_grad_(False), short or None

    def _fitted(self, objective: nn.Module, made: Any, micro: int) -> MapSettings:
        """With as many steps as there is time for."""
        settings, config = self.settings, self.config
        with self.group.together("measuring the speed"):
            if self.group.is_main:
                crops, batch = MapCrops(self.training, self.transform, cache=False), settings.batch_size
                keys = StepKeys(self.training.samples, batch, config.seed, 0, 1, 1, self.group.rank, self.group.size)
                common: Any = (micro, self.group, config.precision, config.workers)
                seconds = seconds_a_step(objective, made, batch, crops, next(iter(keys)), *common)
                tested = len(self.split.testing)
                started, some = time.monotonic(), range(min(tested, _TIMED))
                list(measured_maps(self.segmenter, self.split.testing, some, self.precision))
                picture = (time.monotonic() - started) / len(some)
                beside = picture * (tested + VALIDATIONS * min(tested, _LOOKED_AT))
                settings = self.clock.fitted(settings, len(self.training), seconds, beside)
        return self.group.first(settings, "the length of the run")

    def rate(self, step: int) -> float:
        if self.settings.falls == "cosine":
            return super().rate(step)
        settings = self.settings
        peak = engine.peak_rate(settings.base_lr, settings.batch_size)
        return engine.linear_rate(step, settings.steps, peak, settings.warmup)

    def crops(self) -> Dataset[MapBatch]:
        return MapCrops(self.training, self.transform, self.config.cache)  # type: ignore[return-value]

    def inputs(self, part: MapBatch, seed: int) -> tuple[Tensor, Tensor]:
        return self.transform.preprocess.normalise(part.pixels), part.targets.long()

    def validate(self, run: RunLog, step: int, single: nn.Module | None) -> MapScores | None:
        """Scores, in rank 0; before the end of up to 32 pictures."""
        testing, last = self.split.testing, step == self.settings.steps
        places = np.argsort([testing.samples.sample_id(index) for index in range(len(testing))])
        if not last:
            places = places[:_LOOKED_AT]
        mine = places[self.group.rank :: self.group.size] if self.empty is None else places
        rows: list[tuple[int, np.ndarray]] = []
        shown: list[tuple[int, np.ndarray]] = []
        worst: list[tuple[float, int, np.ndarray]] = []
        with self.group.together("measuring"):
            if single is not None:
                assert isinstance(single, Segmenter)
                for index, predicted, table in measured_maps(single, testing, mine, self.precision):
                    rows.append((index, table))
                    if index in places[:_SHOWN]:
                        shown.append((index, predicted))
                    right = float(np.trace(table) / max(1, table.sum()))
                    worst = sorted([*worst, (right, index, predicted)], key=lambda one: one[:2])[:_SHOWN]
        parts = [part for part in self.group.all((rows, shown, worst), "measuring") if part[0]]
        with self.group.together("drawing what was measured"):
            if not self.group.is_main or single is None:
                return None
            tables = dict(row for part in parts for row in part[0])
            scores = _scores(testing, tables)
            same = _scores(testing, {index: tables[index] for index in places[:_LOOKED_AT].tolist()})  # at every step
            run.note(step, val_miou=same.miou, val_pixel_accuracy=same.pixel_accuracy)
            of = "the held-out pictures" if len(tables) == len(testing) else f"{len(tables)} of the held-out pictures"
            log.info("step %d: mIoU %.1f %%, %.1f %% of the pixels right, on %s", step, scores.miou,
                     scores.pixel_accuracy, of)  # fmt: skip
            folder = run.folder / "pictures"
            folder.mkdir(exist_ok=True)
            some = sorted(one for part in parts for one in part[1])
            assert isinstance(single, Segmenter)
            save_figure(sheet_of(single, testing, some), folder / f"step-{step}.png")
            if last:
                ranked = sorted((one for part in parts for one in part[2]), key=lambda one: one[:2])[:_SHOWN]
                drawn = [(index, predicted) for _, index, predicted in ranked]
                save_figure(sheet_of(single, testing, drawn), folder / "mistakes.png")
            return scores

    def export(self, run: RunLog) -> Outcome:
        network = self.single()
        scores = self.validate(run, self.settings.steps, network)
        with self.group.together("exporting the model"):
            if network is None or scores is None:
                return Outcome()
            assert isinstance(network, Segmenter)
            facts = {
                "task": "segment",
                "trained_from": self.config.model,
                "recipe": asdict(self.settings),
                "training_pictures": len(self.training),
                "split": "made by seed" if self.split.made else "as given",
                "scores": scores.to_dict(),
            }
            text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
            with atomic_write(run.folder / "scores.json") as temporary:
                temporary.write_text(text)
            save_segmenter(network.eval(), run.folder / "model", card=self._card(scores), overwrite=True)
            with atomic_write(run.folder / "model" / "metrics.json") as temporary:
                temporary.write_text(text)
        return Outcome(scores)

    def _card(self, scores: MapScores) -> str:
        """What the model card says of training and of what was measured; no names of files."""
        settings, made = self.settings, "a split by seed" if self.split.made else "a split that was given"
        return (
            f"A segmenter of {len(self.training.classes)} classes ({settings.decoder} decoder), fine-tuned from "
            f"{self.config.model} by the recipe `{settings.recipe}` on {len(self.training):,} pictures with label "
            f"maps: {settings.steps:,} steps of {settings.batch_size}. `maehub.load_segmenter` loads it; `maehub.load` "
            f"and timm load its encoder.\n\n{scores.in_words} on {scores.n:,} held-out pictures, {made}, measured at "
            "the last step."
        )

    def announce(self, micro: int) -> None:
        training, group = self.training, self.group
        what = f"{len(training.classes)} classes of pixels"
        tell_pictures(self.split, len(training), what, self.config.model, self.network, group, self.config.precision)
        window, short = self.segmenter.encoder.config.size, self.segmenter.config.short_side
        own = "pictures keep their own size" if short is None else f"pictures are scaled to a shorter side of {short}"
        log.info("windows of %d×%d pixels; %s", *window, own)
        log.info("%s", describe(self.settings, engine.batch_words(self.settings.batch_size, micro, group)))


def _asked(config: FinetuneConfig) -> dict[str, Any]:
    """What of a recipe the user decides; what segmentation has no use for is refused."""
    unfit = ("pool", "label", "mixup", "cutmix", "smoothing", "erasing", "randaugment", "crop_scale")
    for name in unfit:
        if getattr(config, name) is not None:
            raise UsageError(f"{engine.option(name)} is for classes of pictures, and --task segment tells every pixel")
    if config.class_weights != "none":
        raise UsageError("--class-weights is for classes of pictures, and --task segment tells every pixel")
    names = [name for name in MapSettings.__dataclass_fields__ if name != "recipe"]
    given = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _scores(testing: Labelled, tables: Mapping[int, np.ndarray]) -> MapScores:
    """Of some pictures, by their places."""
    some = sorted(tables)
    groups = None if testing.groups is None else testing.groups[some]
    return score_maps([tables[index] for index in some], testing.classes, groups)


def _blank(encoder: Encoder, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W), zeros, and targets (count, H, W) of the first class."""
    height, width = encoder.config.size
    images = torch.zeros(count, encoder.config.channels, height, width, device=device)
    return images, torch.zeros(count, height, width, dtype=torch.long, device=device)
