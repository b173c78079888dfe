"""What is done to a batch of labelled crops on the device: erasing, mixup, cutmix, and what its targets become."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maehub.images import Preprocess
from maehub.rng import sample_seed
from maehub.train.finetuning.recipes import Settings
from maehub.train.finetuning.views import LabelledBatch, seeded

_MIXING, _STEP, _ERASING = 6, 7, 8  # views of `sample_seed`


class Mixed(NamedTuple):
    """What a network and its loss are given."""

    images: Tensor  # (B, C, H, W) float32, normalised
    targets: Tensor  # (B, classes) float32


class Mixing:
    """Normalisation, then timm's random erasing of single crops, then its mixup or cutmix of the batch.

    Args:
        settings: of the recipe.
        preprocess: of the model.
        class_weights: (classes,) float32 that the loss of each class is multiplied by, or None.
    """

    def __init__(
        self, settings: Settings, preprocess: Preprocess, device: torch.device, class_weights: Tensor | None = None
    ) -> None:
        self.settings = settings
        self.preprocess = preprocess
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self._erase: Callable[[Tensor], Tensor] | None = None
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if settings.erasing:
            from timm.data.random_erasing import RandomErasing

            self._erase = RandomErasing(settings.erasing, mode="pixel", device=str(device))
        if settings.mixup or settings.cutmix:
            from timm.data.mixup import Mixup

            # With as many "classes" as pictures its target says in which shares pictures are mixed.
            self._mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0)

    def __call__(self, batch: LabelledBatch, seed: int) -> Mixed:
        """The batch as the network sees it: normalised, erased, mixed.

        Args:
            batch: on the device.
            seed: of the batch, for its mixup; crops are erased by their own seeds.
        """
        images = self.preprocess.normalise(batch.pixels)
        if self._erase is not None:
            self._erase_each(images, batch.seeds.tolist(), self._erase)
        targets = batch.targets
        if self._mix is not None:
            with seeded(sample_seed(seed, 0, 0, _MIXING)):
                images, targets = self._mixed(images, targets)
        return Mixed(images, self._weighted(self._smoothed(targets)))

    @staticmethod
    def _erase_each(images: Tensor, seeds: list[int], erase: Callable[[Tensor], Tensor]) -> None:
        """In place, each crop by its own seed: timm's erasing draws from the global generators."""
        with seeded(0), seeded_torch(0, images.device):
            for image, number in zip(images, seeds, strict=True):
                own = sample_seed(number, 0, 0, _ERASING)
                random.seed(own)
                torch.manual_seed(own)
                erase(image)

    def _mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert self._mix is not None
        places = torch.arange(len(images), device=images.device)
        self._mix.num_classes = len(images)  # type: ignore[attr-defined]
        images, shares = self._mix(images, places)
        return images, shares.to(targets.dtype) @ targets

    def _smoothed(self, targets: Tensor) -> Tensor:
        smoothing = self.settings.smoothing
        return targets * (1 - smoothing) + smoothing / targets.shape[1] if smoothing else targets

    def _weighted(self, targets: Tensor) -> Tensor:
        return targets if self.class_weights is None else targets * self.class_weights


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
