"""Labelled crops of a fine-tuning run: cropped, flipped and recoloured where they are decoded.

What is random about a crop is a pure function of (seed, epoch, sample id), as in pretraining: timm's policies, which
draw from the global generators, run while those are seeded for the sample.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from maehub.data import Key, Labelled, naming
from maehub.errors import DataError, UsageError
from maehub.images import Augmentation, Preprocess, crop
from maehub.rng import sample_seed, seeded
from maehub.train.evaluation import targets_of
from maehub.train.pretraining import opened

_POLICY = 5  # view of `sample_seed`
_TRANSLATION = 0.45  # of the shorter side, the furthest that timm's policies move a picture

Policy = Callable[[Image.Image], Image.Image]


class LabelledBatch(NamedTuple):
    """Labelled crops of one step, or a part of them."""

    pixels: Tensor  # (B, H, W, C) uint8
    targets: Any  # (B, classes) float32, 1 for the classes of a picture; or of parts of pictures, see `dense.views`
    seeds: Tensor  # (B,) int64 on the CPU, for what else is random about a crop

    def to(self, device: torch.device) -> Self:
        """On a device, without waiting for it; seeds are read by the host and stay."""
        pixels, targets = (field.to(device, non_blocking=True) for field in self[:2])
        return type(self)(pixels, targets, self.seeds)


@dataclass(frozen=True)
class TrainTransform:
    """How labelled pictures are looked at in training."""

    preprocess: Preprocess
    augmentation: Augmentation
    policy: Policy | None = None

    def crop(self, source: object, key: Key) -> np.ndarray:
        """(H, W, C) uint8."""
        size, channels = self.preprocess.size, self.preprocess.channels
        pixels = crop(source, size, channels, self.augmentation, key.crop)  # type: ignore[arg-type]
        if self.policy is None:
            return pixels
        picture = Image.fromarray(pixels if channels == 3 else pixels.repeat(3, axis=2))
        with seeded(sample_seed(key.crop, 0, 0, _POLICY)):
            changed = self.policy(picture)
        return np.array(changed) if channels == 3 else np.array(changed.convert("L"))[:, :, None]


class LabelledCrops(Dataset[LabelledBatch | DataError]):
    """Labelled crops, a whole batch at a time; a picture that cannot be read comes back as its error.

    With ``cache`` every picture is decoded once, here; forked workers share the memory.
    """

    def __init__(self, labelled: Labelled, transform: Any, cache: bool) -> None:
        self.labelled = labelled
        self.transform = transform
        samples, channels = labelled.samples, transform.preprocess.channels
        self.decoded = [opened(samples, index, channels) for index in range(len(samples))] if cache else None

    def __getitems__(self, keys: list[Key]) -> LabelledBatch | DataError:
        samples = self.labelled.samples
        if self.decoded is None:
            samples.prefetch([key.sample for key in keys])
        crops = []
        for key in keys:
            try:
                with naming(samples, key.sample):
                    source = self.decoded[key.sample] if self.decoded else samples.source(key.sample)
                    crops.append(self.crop(source, key))
            except DataError as error:
                return error
        return LabelledBatch(*self.joined(crops, keys), torch.tensor([key.crop for key in keys]))

    def crop(self, source: Any, key: Key) -> Any:
        """One crop, by its key."""
        return torch.from_numpy(self.transform.crop(source, key))

    def joined(self, crops: list[Any], keys: list[Key]) -> tuple[Tensor, Any]:
        """Pixels and targets of all of them together."""
        labels = self.labelled.labels[[key.sample for key in keys]]
        return torch.stack(crops), targets_of(labels, len(self.labelled.classes))


def policy_of(words: str, preprocess: Preprocess) -> Policy | None:
    """A policy of timm by its words, such as ``rand-m9-mstd0.5-inc1``; None for ``none``."""
    if words == "none":
        return None
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    make = kinds.get(words.split("-")[0], auto_augment_transform)
    low, high = preprocess.value_range
    colour = tuple(min(255, max(0, round(low + mean * (high - low)))) for mean in preprocess.mean)
    hints = {
        "translate_const": int(_TRANSLATION * min(preprocess.size)),
        "img_mean": colour if len(colour) == 3 else colour[:1] * 3,
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        policy: Any = make(words, hints)
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--randaugment {words} is not understood; rand-m9-mstd0.5-inc1, augmix-m3-w3 and original are, or none"
        ) from error
    for op in itertools.chain.from_iterable(getattr(policy, "policy", None) or [policy.ops]):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterized
    return policy


def _posterized(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """With timm's own meaning of no bits at all, which Pillow refuses since version 12."""
    if bits <= 0:
        return Image.new(picture.mode, picture.size)
    return picture if bits >= 8 else ImageOps.posterize(picture, bits)
