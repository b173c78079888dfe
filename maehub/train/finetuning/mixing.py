"""What is done to a batch of labelled crops on the device: erasing, mixup, cutmix, and what its targets become."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from maehub.images import Preprocess
from maehub.rng import sample_seed, seeded
from maehub.train.finetuning.recipes import Settings
from maehub.train.finetuning.views import LabelledBatch

_MIXING, _STEP, _ERASING = 6, 7, 8  # views of `sample_seed`


class Mixing:
    """Normalisation, then timm's random erasing of single crops, then its mixup or cutmix of the batch.

    With ``class_weights``, (classes,) float32, the loss of each class is multiplied by its own.
    """

    def __init__(
        self, settings: Settings, preprocess: Preprocess, device: torch.device, class_weights: Tensor | None = None
    ) -> None:
        self.settings = settings
        self.preprocess = preprocess
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self._erase: Any = None
        self._mix: Any = None
        if settings.erasing:
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(settings.erasing, mode="pixel", device=str(device))
        if settings.mixup or settings.cutmix:
            from timm.data.mixup import Mixup

            # With as many "classes" as pictures its target says in which shares pictures are mixed.
            self._mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0)

    def __call__(self, batch: LabelledBatch, seed: int) -> tuple[Tensor, Tensor]:
        """A batch on the device as the network and its loss see it: (B, C, H, W) and (B, classes), float32.

        The seed is of its mixup; crops are erased by their own.
        """
        images, targets = self.preprocess.normalise(batch.pixels), batch.targets
        if self._erase is not None:  # timm's erasing draws from the global generators
            with seeded(0), seeded_torch(0, images.device):
                for image, number in zip(images, batch.seeds.tolist(), strict=True):
                    own = sample_seed(number, 0, 0, _ERASING)
                    random.seed(own)
                    torch.manual_seed(own)
                    self._erase(image)  # in place
        if self._mix is not None:
            with seeded(sample_seed(seed, 0, 0, _MIXING)):
                self._mix.num_classes = len(images)
                images, shares = self._mix(images, torch.arange(len(images), device=images.device))
            targets = shares.to(targets.dtype) @ targets
        if smoothing := self.settings.smoothing:
            targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
        return images, targets if self.class_weights is None else targets * self.class_weights


@contextlib.contextmanager
def seeded_torch(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device`` for a while."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what is random in a step of one process: its mixup and its stochastic depth."""
    return sample_seed(seed, step, rank, _STEP)
