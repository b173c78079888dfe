"""A detector in the loop of fine-tuning: its losses, and how its window and anchors follow from the pictures."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import maehub.train.engine as engine
from maehub.data import LabelledSplit, ObjectLabels, coco_masks
from maehub.dense import Detector, DetectorConfig, Target
from maehub.errors import UsageError, log
from maehub.hub import Located
from maehub.interop import level_strides
from maehub.models import Encoder
from maehub.train.evaluation import ObjectMeasuring, ObjectScores
from maehub.train.finetuning.dense.job import DenseJob, built
from maehub.train.finetuning.dense.recipes import (
    DenseFacts,
    ObjectSettings,
    anchor_of,
    is_fitted,
    object_window,
    settle_objects,
)
from maehub.train.finetuning.dense.views import DenseTransform, ObjectCrops, Targets
from maehub.train.finetuning.views import LabelledBatch, LabelledCrops


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

    task, kind, what, measuring = "detect", "detector", "every object", ObjectMeasuring()

    def find_split(self) -> LabelledSplit:
        config = self.config
        coco_masks()  # or it would be missed when there is something to measure
        if config.head_start == "probe":
            raise UsageError("--head-start probe is for linear heads, and a detector's are not")
        if config.compile:
            raise UsageError(
                "--compile is for networks whose work is the same for every picture, not for --task detect"
            )
        return super().find_split()

    def prepare(self, files: Located | None) -> None:
        config, objects = self.config, self.training.objects
        assert objects is not None
        masks = objects.masked and self.split.testing.objects is not None and self.split.testing.objects.masked
        encoder, short_side, fitted = self._encoder(files)
        shape = encoder.config
        facts = DenseFacts(shape.width, shape.depth, len(self.training), self.trained, self.group.device.type)
        self.settings: ObjectSettings = settle_objects(config.recipe, facts, self.asked(ObjectSettings))
        settings = self.settings
        parts: Any = {
            name: getattr(settings, name) for name in ("width", "convolutions", "hidden", "proposals", "attention")
        }
        described = DetectorConfig(objects.classes, masks, fitted=fitted, short_side=short_side, **parts)
        self.masks = masks
        anchor = self._anchor(objects, described, encoder) if settings.recipe == "auto" else described.anchor
        network = built(
            partial(Detector, encoder, replace(described, anchor=anchor)), settings, config.seed, normed=False
        )
        network.regions.draw(settings.regions)
        self.transform = DenseTransform(
            encoder.preprocess, short_side, settings.resize, **self.turned, colours=settings.colours, fitted=fitted
        )
        derived = {"short_side": short_side, "anchor": anchor, "masks": masks} | settings.lasting
        self.ready(network, ObjectObjective(network), derived)

    def _encoder(self, files: Located | None) -> tuple[Encoder, int | None, bool]:
        """The encoder with the window as its native size, and how pictures are scaled: to which shorter side, or into
        one window."""
        config = self.config
        longest = int(np.median(self.some_sizes().max(axis=1)))
        small = config.recipe == "auto" and self.group.device.type == "cpu"
        encoder = self.open_encoder(files, lambda patch: object_window(patch, longest, small=small))
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

    def crops(self) -> LabelledCrops:
        return ObjectCrops(self.training, self.transform, self.masks, self.config.cache)

    def inputs(self, part: LabelledBatch, seed: int) -> tuple[Tensor, Any]:
        return self.transform.preprocess.normalise(part.pixels), part.targets

    def curves(self, scores: ObjectScores) -> dict[str, float]:
        return {"val_ap": scores.ap, "val_ap50": scores.ap50}

    def blank(self, count: int) -> Targets:
        """One object each that is all of the image."""
        (height, width), device = self.window, self.group.device
        box = torch.tensor([[0.0, 0.0, width, height]], device=device)
        label = torch.zeros(1, dtype=torch.long, device=device)
        mask = torch.ones(1, height, width, dtype=torch.uint8, device=device) if self.masks else None
        return Targets(Target(box, label, mask, seed) for seed in range(count))

    def described(self) -> tuple[str, str, str]:
        return "boxes and masks" if self.masks else "boxes", "pictures", "maehub.load_detector"

    def announced(self) -> tuple[str, str]:
        assert isinstance(self.model, Detector)
        assert self.training.objects is not None
        config, count = self.model.config, sum(map(len, self.training.objects.rows))
        classes, masks = len(self.training.classes), "with" if self.masks else "without"
        how = "pictures keep their own size" if config.short_side is None else f"shorter side {config.short_side}"
        how = "each picture is scaled into one" if config.fitted else how
        return f"{count:,} objects of {classes} classes, {masks} masks,", how
