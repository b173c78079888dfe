"""A segmenter in the loop of fine-tuning: everything before the first step, what is measured, drawn and exported."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import maehub.train.engine as engine
from maehub.data import LabelledSplit, split_label_maps
from maehub.dense import Segmenter, SegmenterConfig, save_segmenter
from maehub.errors import log
from maehub.hub import Located
from maehub.models import Encoder
from maehub.train.evaluation import MapScores, measured_maps, score_maps, sheet_of
from maehub.train.finetuning.dense_job import DenseJob, Measured, dense_groups, in_groups
from maehub.train.finetuning.maps.network import MapObjective, build_segmenter, solve_decoder
from maehub.train.finetuning.maps.recipes import (
    MapFacts,
    MapSettings,
    settle,
    short_side_of,
    window_of,
)
from maehub.train.finetuning.maps.views import MapBatch, MapCrops, MapTransform


class MapJob(DenseJob):
    """A segmenter."""

    task, what = "segment", "every pixel"

    def find_split(self) -> LabelledSplit:
        config = self.config
        return split_label_maps(config.data, seed=config.seed, share=config.val_share, group=config.group)

    def prepare(self, files: Located | None) -> None:
        config, group, maps = self.config, self.group, self.training.maps
        assert maps is not None
        encoder, short_side = self._encoder(files)
        shape = encoder.config
        facts = MapFacts(shape.width, shape.depth, len(self.training), self.trained)
        self.settings: MapSettings = settle(config.recipe, facts, self.asked(MapSettings))
        settings = self.settings
        whole = settings.norm == "batch" and settings.decoder == "upernet"  # batch statistics are of the whole batch
        parts: Any = {name: getattr(settings, name) for name in ("layers", "width", "norm", "attention")}
        described = SegmenterConfig(
            maps.classes, settings.decoder, auxiliary=settings.side_loss > 0, short_side=short_side, **parts
        )
        network = build_segmenter(encoder, described, settings, config.seed)
        turned: Any = {"hflip": config.hflip, "vflip": config.vflip, "rot90": config.rot90}
        views = partial(MapTransform, encoder.preprocess, short_side)
        self.transform = views(settings.resize, **turned, colours=settings.colours, most_of_one=settings.most_of_one)
        if settings.head_start == "probe" and not self.stored:
            plain = views((1.0, 1.0), hflip=False, colours=False)
            solve_decoder(network, MapCrops(self.training, plain, cache=False), group, self.precision, config.seed)
        self.ready(
            network,
            MapObjective(network, settings.side_loss),
            partial(_blank, encoder, group.device),
            partial(dense_groups, network, settings),
            {"short_side": short_side} | settings.lasting,
            window=shape.size,
            whole=whole,
        )

    def _encoder(self, files: Located | None) -> tuple[Encoder, int | None]:
        """The encoder with the window as its native size, and the shorter side that pictures are scaled to."""
        config = self.config
        middle = int(np.median(self.some_sizes().min(axis=1)))
        small = config.recipe == "auto" and self.group.device.type == "cpu"
        encoder = self.open_encoder(files, lambda patch: window_of(patch, middle, small=small))
        short = config.short_side
        if short is None and (short := short_side_of(min(encoder.config.size), middle)) and self.group.is_main:
            log.warning(
                "pictures are scaled to a shorter side of %d pixels, and the middle one of them has %d: --short-side 0 "
                "keeps details, and takes longer; so does a larger --image-size, what is seen at once",
                short,
                middle,
            )
        return encoder, short or None

    def rate(self, step: int) -> float:
        if self.settings.falls == "cosine":
            return super().rate(step)
        settings = self.settings
        peak = engine.peak_rate(settings.base_lr, settings.batch_size)
        return engine.linear_rate(step, settings.steps, peak, settings.warmup)

    def crops(self) -> Dataset[MapBatch]:
        return MapCrops(self.training, self.transform, self.config.cache)

    def inputs(self, part: MapBatch, seed: int) -> tuple[Tensor, Tensor]:
        return self.transform.preprocess.normalise(part.pixels), part.targets.long()

    def measured_rows(self, single: nn.Module, places: Iterable[int]) -> Iterator[Measured]:
        assert isinstance(single, Segmenter)
        for index, predicted, table in measured_maps(single, self.split.testing, places, self.precision):
            yield Measured(index, predicted, table, float(np.trace(table) / max(1, table.sum())))

    def scored(self, rows: Mapping[int, np.ndarray]) -> MapScores:
        some, testing = sorted(rows), self.split.testing
        return score_maps([rows[index] for index in some], testing.classes, in_groups(testing, some))

    def curves(self, scores: MapScores) -> dict[str, float]:
        return {"val_miou": scores.miou, "val_pixel_accuracy": scores.pixel_accuracy}

    def sheet(self, single: nn.Module, shown: list[tuple[int, np.ndarray]]) -> Image.Image:
        assert isinstance(single, Segmenter)
        return sheet_of(single, self.split.testing, shown)

    def save(self, network: Any, folder: Path, card: str) -> None:
        save_segmenter(network, folder, card=card, overwrite=True)

    def card(self) -> str:
        settings = self.settings
        return (
            f"A segmenter of {len(self.training.classes)} classes ({settings.decoder} decoder), fine-tuned from "
            f"{self.config.model} by the recipe `{settings.recipe}` on {len(self.training):,} pictures with label "
            f"maps: {settings.steps:,} steps of {settings.batch_size}. `maehub.load_segmenter` loads it; `maehub.load` "
            "and timm load its encoder."
        )

    def announced(self) -> tuple[str, str, str]:
        assert isinstance(self.model, Segmenter)
        short = self.model.config.short_side
        own = "pictures keep their own size" if short is None else f"pictures are scaled to a shorter side of {short}"
        return f"{len(self.training.classes)} classes of pixels", own, self.settings.describe()


def _blank(encoder: Encoder, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W), zeros, and targets (count, H, W) of the first class."""
    height, width = encoder.config.size
    images = torch.zeros(count, encoder.config.channels, height, width, device=device)
    return images, torch.zeros(count, height, width, dtype=torch.long, device=device)
