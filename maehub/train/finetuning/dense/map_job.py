"""A segmenter in the loop of fine-tuning: its loss, and its start as the probe of single patches."""

import contextlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import maehub.train.engine as engine
from maehub.data import IGNORED, Key
from maehub.dense import LinearDecoder, Segmenter, SegmenterConfig
from maehub.errors import DataError, log
from maehub.hub import Located
from maehub.models import Encoder
from maehub.rng import sample_seed
from maehub.train.engine import Group
from maehub.train.evaluation import MapMeasuring, MapScores, best, fit_at, sweep
from maehub.train.finetuning.dense.job import DenseJob, built
from maehub.train.finetuning.dense.recipes import DenseFacts, MapSettings, map_window, settle_maps, short_side_of
from maehub.train.finetuning.dense.views import MapCrops, MapTransform
from maehub.train.finetuning.views import LabelledBatch, LabelledCrops

_PICTURES, _PATCHES = 400, 24_000  # that a probe is solved from, at most
_PURE = 0.9  # share of a patch's pixels that are of one class
_VIEW = 14  # of `sample_seed`


class MapObjective(nn.Module):
    """A segmenter and its loss: cross-entropy of every pixel, of the side head too.

    It is the sum over the pixels that have a class, divided by all of them, so that every crop has the same weight
    whatever is ignored in it, and a batch in parts the same gradient as a whole one.
    """

    def __init__(self, network: Segmenter, side_loss: float) -> None:
        super().__init__()
        self.network = network
        self.side_loss = side_loss

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Images (B, C, H, W) and places of classes (B, H, W) int64 to the mean loss, () float32."""
        scores, side = self.network.scores(images)
        loss = _cross_entropy(scores, targets)
        return loss if side is None else loss + self.side_loss * _cross_entropy(side, targets)


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    summed = F.cross_entropy(scores.float(), targets, ignore_index=IGNORED, reduction="sum")
    return summed / targets.numel()


class MapJob(DenseJob):
    """A segmenter."""

    task, kind, what, measuring = "segment", "segmenter", "every pixel", MapMeasuring()

    def prepare(self, files: Located | None) -> None:
        config, group, maps = self.config, self.group, self.training.maps
        assert maps is not None
        encoder, short_side = self._encoder(files)
        shape = encoder.config
        facts = DenseFacts(shape.width, shape.depth, len(self.training), self.trained)
        self.settings: MapSettings = settle_maps(config.recipe, facts, self.asked(MapSettings))
        settings = self.settings
        whole = settings.norm == "batch" and settings.decoder == "upernet"  # batch statistics are of the whole batch
        parts: Any = {name: getattr(settings, name) for name in ("layers", "width", "norm", "attention")}
        described = SegmenterConfig(
            maps.classes, settings.decoder, auxiliary=settings.side_loss > 0, short_side=short_side, **parts
        )
        network = build_segmenter(encoder, described, settings, config.seed)
        views = partial(MapTransform, encoder.preprocess, short_side)
        self.transform = views(
            settings.resize, **self.turned, colours=settings.colours, most_of_one=settings.most_of_one
        )
        if settings.head_start == "probe" and not self.stored:
            plain = views((1.0, 1.0), hflip=False, colours=False)
            solve_decoder(network, MapCrops(self.training, plain, cache=False), group, self.precision, config.seed)
        self.ready(
            network,
            MapObjective(network, settings.side_loss),
            {"short_side": short_side} | settings.lasting,
            whole=whole,
        )

    def _encoder(self, files: Located | None) -> tuple[Encoder, int | None]:
        """The encoder with the window as its native size, and the shorter side that pictures are scaled to."""
        config = self.config
        middle = int(np.median(self.some_sizes().min(axis=1)))
        small = config.recipe == "auto" and self.group.device.type == "cpu"
        encoder = self.open_encoder(files, lambda patch: map_window(patch, middle, small=small))
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

    def crops(self) -> LabelledCrops:
        return MapCrops(self.training, self.transform, self.config.cache)

    def inputs(self, part: LabelledBatch, seed: int) -> tuple[Tensor, Tensor]:
        return self.transform.preprocess.normalise(part.pixels), part.targets.long()

    def curves(self, scores: MapScores) -> dict[str, float]:
        return {"val_miou": scores.miou, "val_pixel_accuracy": scores.pixel_accuracy}

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, *self.window, dtype=torch.long, device=self.group.device)  # of the first class

    def described(self) -> tuple[str, str, str]:
        return f"{self.settings.decoder} decoder", "pictures with label maps", "maehub.load_segmenter"

    def announced(self) -> tuple[str, str]:
        assert isinstance(self.model, Segmenter)
        short = self.model.config.short_side
        own = "pictures keep their own size" if short is None else f"pictures are scaled to a shorter side of {short}"
        return f"{len(self.training.classes)} classes of pixels", own


def build_segmenter(encoder: Encoder, config: SegmenterConfig, settings: MapSettings, seed: int) -> Segmenter:
    """A segmenter on the CPU with a fresh decoder, its positions trained, as published."""
    depth = encoder.config.depth
    last, normed = max(layer % depth for layer in config.layers), config.decoder == "linear"
    model = built(partial(Segmenter, encoder, config), settings, seed, last=last, normed=normed)
    for part in model.decoder.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = settings.dropout
    return model


def solve_decoder(
    model: Segmenter, crops: MapCrops, group: Group, precision: contextlib.AbstractContextManager[Any], seed: int
) -> None:
    """Begin a linear decoder as the logistic regression of the encoder's patches, the same in every process.

    Up to 24,000 patches of up to 400 pictures are taken, of those that are of one class: fewer than nine tenths of a
    patch are left out. Its strength is chosen on a fifth of the pictures.
    """
    assert isinstance(model.decoder, LinearDecoder)
    found = None
    with group.together("solving the probe of patches"):
        if group.is_main:
            features, labels, pictures = _patches(model.to(group.device).eval(), crops, precision, seed)
            classes = len(crops.labelled.classes)
            if len(np.unique(labels)) < 2:
                log.warning("no two classes fill a patch, so the decoder begins fresh; a smaller patch sees more")
            else:
                held = pictures % 5 == 0
                inner = [(np.flatnonzero(~held), np.flatnonzero(held))]
                able = held.any() and len(np.unique(labels[~held])) > 1
                strength = best(sweep(features, labels, classes, inner)).strength if able else 1e-3
                found = fit_at(features, labels, classes, strength)
                right = float((found.logits(features).argmax(dim=1).numpy() == labels).mean())
                log.info("the probe of %d patches of one class tells %.1f %% of them", len(labels), 100 * right)
    found = group.first(found, "the probe of patches")
    if found is not None:
        with torch.no_grad():
            state = {"classify.weight": found.weight[:, :, None, None], "classify.bias": found.bias}
            model.decoder.load_state_dict(state)


def _patches(
    model: Segmenter, crops: MapCrops, precision: contextlib.AbstractContextManager[Any], seed: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Features (n, D) float32 of patches, their classes (n,) and the numbers of their pictures (n,)."""
    samples, device = crops.labelled.samples, model.encoder.cls_token.device
    order = np.argsort([sample_seed(seed, 0, samples.sample_id(index), _VIEW) for index in range(len(samples))])
    patch, each = model.encoder.config.patch_size, -(-_PATCHES // min(len(samples), _PICTURES))
    generator = np.random.default_rng(seed % 2**63)
    rows, labels, pictures = [], [], []
    for number, index in enumerate(order[:_PICTURES].tolist()):
        batch = crops.__getitems__([Key(index, sample_seed(seed, 0, index, _VIEW), 0)])
        if isinstance(batch, DataError):
            raise batch
        images = crops.transform.preprocess.normalise(batch.pixels.to(device))
        with torch.inference_mode(), precision:
            features = model.maps(images)[-1][0].float().flatten(1).T.cpu()  # (N, D)
        classes, share = _main_class(batch.targets[0].numpy(), patch, len(crops.labelled.classes))
        pure = np.flatnonzero(share >= _PURE)
        some = generator.permutation(pure)[:each]
        rows.append(features[some])
        labels.append(classes[some])
        pictures.append(np.full(len(some), number))
    if not sum(map(len, labels)):
        raise DataError("no patch of the training pictures is of one class")
    return torch.cat(rows), np.concatenate(labels), np.concatenate(pictures)


def _main_class(target: np.ndarray, patch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The class that most pixels of a patch have, (N,) int64 in spatial order, and their share of all its pixels."""
    rows, columns = target.shape[0] // patch, target.shape[1] // patch
    cut = target.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows * columns, -1).astype(np.int64)
    counts = np.zeros((len(cut), classes + 1), np.int64)
    np.add.at(counts, (np.arange(len(cut))[:, None], cut + 1), 1)  # what is ignored comes first
    main = counts[:, 1:].argmax(axis=1)
    return main, counts[np.arange(len(cut)), main + 1] / cut.shape[1]
