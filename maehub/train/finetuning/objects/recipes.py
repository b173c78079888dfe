"""Published settings of detection, and those for few pictures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maehub.dense import AttentionConfig
from maehub.errors import UsageError
from maehub.train.engine import peak_rate
from maehub.train.finetuning.config import Recipe
from maehub.train.finetuning.maps.recipes import DenseSettings

RECIPES = ("auto", "vitdet")
_FEW_STEPS, _FEW_PASSES, _FEW_BATCH = 4000, 60, 8  # of ``auto`` where there is no clock
_SIDE, _SIDE_ON_CPU = 64, 16  # patches of a window's side: 64 as published, 1024 pixels of patches of 16
_FITTED, _LEAST = 4, 12  # windows that a picture may be long before it is seen in parts; pixels of small objects then


@dataclass(frozen=True, kw_only=True)
class ObjectSettings(DenseSettings):
    """Everything that a recipe of detection decides."""

    falls: tuple[float, ...] = ()
    """Shares of the steps after which the rate is a tenth of what it was; without any it falls by a cosine."""
    width: int = 256
    convolutions: int = 4
    hidden: int = 1024
    regions: int = 512
    """Of a picture, for the loss of classes and boxes."""
    proposals: int = 1000
    """Regions of a window that are looked at afterwards."""

    def describe(self, *first: str) -> str:
        """What a run says first."""
        heads = f"heads {self.width} wide with {self.convolutions} convolutions, {self.regions} regions a picture"
        return super().describe(heads, *first)


@dataclass(frozen=True)
class ObjectFacts:
    """What a recipe is fitted to."""

    width: int
    depth: int
    images: int
    device: str


def settle(recipe: Recipe, facts: ObjectFacts, asked: Mapping[str, Any]) -> ObjectSettings:
    """The recipe for a network and a number of pictures, changed where it is asked for."""
    if recipe not in RECIPES:
        raise UsageError(f"--recipe {recipe} is not for objects; --task detect has {', '.join(RECIPES)}")
    return (_vitdet if recipe == "vitdet" else _for_few)(facts).of_length(asked, facts.images)


def _vitdet(facts: ObjectFacts) -> ObjectSettings:
    """Mask R-CNN on COCO (Li et al. 2022, arXiv 2203.16527, and the published configurations): 51.6, 55.5 and 56.7 box
    AP for ViT-B, L and H. Windows of 1024 pixels, 100 epochs of 64 pictures (H: 75), large-scale jitter."""
    number = 0 if facts.width < 1024 else 1 if facts.width < 1280 else 2
    epochs = (100, 100, 75)[number]
    steps = epochs * facts.images / 64
    return ObjectSettings(
        recipe="vitdet",
        epochs=epochs,
        batch_size=64,
        base_lr=1e-4 / peak_rate(1.0, 64),
        weight_decay=0.1,
        layer_decay=(0.7, 0.8, 0.9)[number],
        drop_path=(0.1, 0.4, 0.5)[number],
        warmup=min(0.1, 250 / max(1.0, steps)),
        falls=(8 / 9, 26 / 27),
        resize=(0.1, 2.0),
        colours=False,
        attention=AttentionConfig(
            window=14,
            whole=tuple(facts.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)),
            relative="decomposed",
            cls=False,
        ),
    )


def _for_few(facts: ObjectFacts) -> ObjectSettings:
    """Ours, chosen by a few runs (docs/detection.md): heads as wide as the encoder can feed, and without convolutions
    of regions on a CPU, where those would take most of the time."""
    steps = min(_FEW_STEPS, math.ceil(_FEW_PASSES * facts.images / _FEW_BATCH))
    small = facts.device == "cpu"
    return ObjectSettings(
        recipe="auto",
        steps=max(100, steps),
        batch_size=_FEW_BATCH,
        base_lr=5.6e-3 * 192 / facts.width,
        weight_decay=0.05,
        layer_decay=0.75,
        warmup=0.05,
        width=min(256, max(64, facts.width // 2)),
        convolutions=0 if small else 4,
        hidden=256 if small else 1024,
        regions=64 if small else 512,
        proposals=200 if small else 1000,
    )


def window_of(patch: int, longest: int, multiple: int, *, small: bool) -> int:
    """Side of a window in pixels, where none is asked for: the middle picture's longer side, in whole multiples, at
    most 64 patches, or 16 where it must be ``small``."""
    return multiple * max(1, round(min((_SIDE_ON_CPU if small else _SIDE) * patch, longest) / multiple))


def is_fitted(window: int, longest: int, small: float) -> bool:
    """Whether pictures are scaled into one window, where nothing is asked for.

    Those that are not longer are, and up to four times as long ones in which an object of the side ``small``, than
    which a tenth is smaller, keeps 12 pixels.
    """
    return longest <= window or (longest <= _FITTED * window and small * window / longest >= _LEAST)


def anchor_of(sides: np.ndarray, stride: float) -> float:
    """Side of an anchor in strides of its level, by the sides of objects as the network sees them, (n,) pixels.

    The smallest anchor is as large as the smallest tenth of them: 2, 2.8, 4, 5.7 or 8 strides; 8 is published.
    """
    strides = float(np.quantile(sides, 0.1)) / stride if len(sides) else 8.0
    return round(2 ** (round(2 * math.log2(min(8.0, max(2.0, strides)))) / 2), 1)
