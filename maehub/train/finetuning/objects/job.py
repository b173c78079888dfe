"""A detector in the loop of fine-tuning: everything before the first step, what is measured, drawn and exported."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import maehub.train.engine as engine
from maehub.data import LabelledSplit, ObjectLabels, coco_masks, split_objects
from maehub.dense import Detections, Detector, DetectorConfig, Target, save_detector
from maehub.errors import UsageError, log
from maehub.hub import Located
from maehub.interop import level_strides
from maehub.models import Encoder
from maehub.train.evaluation import ObjectScores, measured_objects, objects_sheet, score_objects, share_right
from maehub.train.finetuning.classifier import drop_paths
from maehub.train.finetuning.dense_job import DenseJob, Measured, dense_groups, in_groups, train_blocks
from maehub.train.finetuning.maps.views import DenseTransform
from maehub.train.finetuning.objects.recipes import (
    ObjectFacts,
    ObjectSettings,
    anchor_of,
    is_fitted,
    settle,
    window_of,
)
from maehub.train.finetuning.objects.views import ObjectBatch, ObjectCrops, Targets


class ObjectObjective(nn.Module):
    """A detector and its losses."""

    def __init__(self, network: Detector) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, targets: Targets) -> Tensor:
        """Images (B, C, H, W) and what they show to the sum of the losses, a mean over images, () float32."""
        training = self.network.training
        self.network.train()  # torchvision's heads give losses in no other mode
        try:
            return self.network.losses(images, targets)
        finally:
            self.network.train(training)


class ObjectJob(DenseJob):
    """A detector, which draws masks where every object of the training pictures has an outline."""

    task, what = "detect", "every object"

    def find_split(self) -> LabelledSplit:
        config = self.config
        coco_masks()  # or it would be missed when there is something to measure
        if config.head_start == "probe":
            raise UsageError("--head-start probe is for linear heads, and a detector's are not")
        if config.compile:
            raise UsageError(
                "--compile is for networks whose work is the same for every picture, not for --task detect"
            )
        return split_objects(config.data, seed=config.seed, share=config.val_share, group=config.group)

    def prepare(self, files: Located | None) -> None:
        config, group, objects = self.config, self.group, self.training.objects
        assert objects is not None
        masks = objects.masked and self.split.testing.objects is not None and self.split.testing.objects.masked
        encoder, short_side, fitted = self._encoder(files)
        shape = encoder.config
        facts = ObjectFacts(shape.width, shape.depth, len(self.training), group.device.type)
        self.settings: ObjectSettings = settle(config.recipe, facts, self.asked(ObjectSettings))
        settings = self.settings
        parts: Any = {
            name: getattr(settings, name) for name in ("width", "convolutions", "hidden", "proposals", "attention")
        }
        described = DetectorConfig(objects.classes, masks, fitted=fitted, short_side=short_side, **parts)
        self.masks = masks
        anchor = self._anchor(objects, described, encoder) if settings.recipe == "auto" else described.anchor
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            network = Detector(encoder, replace(described, anchor=anchor))
        network.regions.draw(settings.regions)
        encoder = network.encoder
        train_blocks(encoder, settings.blocks, last=shape.depth - 1, normed=False)
        drop_paths(list(encoder.blocks), settings.drop_path)
        turned: Any = {"hflip": config.hflip, "vflip": config.vflip, "rot90": config.rot90}
        self.transform = DenseTransform(
            encoder.preprocess, short_side, settings.resize, **turned, colours=settings.colours, fitted=fitted
        )
        self.ready(
            network,
            ObjectObjective(network),
            partial(_blank, network, group.device),
            partial(dense_groups, network, settings),
            {"short_side": short_side, "anchor": anchor, "masks": masks} | settings.lasting,
            window=shape.size,
        )

    def _encoder(self, files: Located | None) -> tuple[Encoder, int | None, bool]:
        """The encoder with the window as its native size, and how pictures are scaled: to which shorter side, or into
        one window."""
        config = self.config
        longest = int(np.median(self.some_sizes().max(axis=1)))
        small = config.recipe == "auto" and self.group.device.type == "cpu"
        encoder = self.open_encoder(files, lambda patch: window_of(patch, longest, 2 * patch, small=small))
        if config.short_side is not None:
            return encoder, config.short_side or None, False
        window, objects = min(encoder.config.size), self.training.objects
        assert objects is not None
        sides = np.concatenate([np.sqrt(np.prod(row.boxes[:, 2:] - row.boxes[:, :2], axis=1)) for row in objects.rows])
        fitted = is_fitted(window, longest, float(np.quantile(sides, 0.1)))
        if fitted and longest > window and self.group.is_main:
            log.warning(
                "pictures are scaled into one window of %d×%d pixels, and the longer side of the middle one of them "
                "has %d: --short-side 0 keeps small objects, and takes longer; so does a larger --image-size",
                *encoder.config.size,
                longest,
            )
        return encoder, None, fitted

    def _anchor(self, objects: ObjectLabels, described: DetectorConfig, encoder: Encoder) -> float:
        """By the sizes of the objects as they are seen."""
        seen, window = [], encoder.config.size
        for row in objects.rows:
            sides = (row.boxes[:, 2:] - row.boxes[:, :2])[~row.ignored]
            seen.append(np.sqrt(sides.prod(axis=1)) * described.inner_size(row.size, window)[0] / row.size[0])
        return anchor_of(np.concatenate(seen), level_strides(encoder.config.patch_size)[0])

    def rate(self, step: int) -> float:
        settings = self.settings
        if not settings.falls:
            return super().rate(step)
        peak = engine.peak_rate(settings.base_lr, settings.batch_size)
        rise = max(1.0, settings.warmup * settings.steps)
        return (
            peak * min(1.0, (step + 1) / rise) * 0.1 ** sum(step >= share * settings.steps for share in settings.falls)
        )

    def crops(self) -> Dataset[ObjectBatch]:
        return ObjectCrops(self.training, self.transform, self.masks, self.config.cache)

    def inputs(self, part: ObjectBatch, seed: int) -> tuple[Tensor, Any]:
        return self.transform.preprocess.normalise(part.pixels), part.targets

    def measured_rows(self, single: nn.Module, places: Iterable[int]) -> Iterator[Measured]:
        testing = self.split.testing
        assert isinstance(single, Detector)
        assert testing.objects is not None
        for index, found in measured_objects(single, testing, places, self.precision):
            yield Measured(index, found, found, share_right(testing.objects.rows[index], found))

    def scored(self, rows: Mapping[int, Detections]) -> ObjectScores:
        some, testing = sorted(rows), self.split.testing
        assert testing.objects is not None
        truth = [testing.objects.rows[index] for index in some]
        return score_objects(truth, [rows[index] for index in some], testing.objects.classes, in_groups(testing, some))

    def curves(self, scores: ObjectScores) -> dict[str, float]:
        return {"val_ap": scores.ap, "val_ap50": scores.ap50}

    def sheet(self, single: nn.Module, shown: list[tuple[int, Detections]]) -> Image.Image:
        assert isinstance(single, Detector)
        return objects_sheet(single, self.split.testing, shown)

    def save(self, network: Any, folder: Path, card: str) -> None:
        save_detector(network, folder, card=card, overwrite=True)

    def card(self) -> str:
        settings = self.settings
        what = "boxes and masks" if self.masks else "boxes"
        return (
            f"A detector of {len(self.training.classes)} classes ({what}), fine-tuned from {self.config.model} by the "
            f"recipe `{settings.recipe}` on {len(self.training):,} pictures: {settings.steps:,} steps of "
            f"{settings.batch_size}. `maehub.load_detector` loads it; `maehub.load` and timm load its encoder."
        )

    def announced(self) -> tuple[str, str, str]:
        assert isinstance(self.model, Detector)
        assert self.training.objects is not None
        config, count = self.model.config, sum(map(len, self.training.objects.rows))
        classes, masks = len(self.training.classes), "with" if self.masks else "without"
        how = "pictures keep their own size" if config.short_side is None else f"shorter side {config.short_side}"
        how = "each picture is scaled into one" if config.fitted else how
        return f"{count:,} objects of {classes} classes, {masks} masks,", how, self.settings.describe()


def _blank(model: Detector, device: torch.device, count: int) -> tuple[Tensor, Targets]:
    """Images (count, C, H, W), zeros, with one object each that is all of it."""
    height, width = model.encoder.config.size
    images = torch.zeros(count, model.encoder.config.channels, height, width, device=device)
    box, label = (
        torch.tensor([[0.0, 0.0, width, height]], device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    mask = torch.ones(1, height, width, dtype=torch.uint8, device=device) if model.config.masks else None
    return images, Targets(Target(box, label, mask, seed) for seed in range(count))
