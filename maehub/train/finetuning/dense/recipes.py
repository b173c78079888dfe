"""Published settings of segmentation and of detection, and those for few pictures."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np

from maehub.dense import AttentionConfig, Decoder
from maehub.errors import UsageError
from maehub.train.engine import peak_rate
from maehub.train.finetuning.config import HeadStart, Recipe

_BATCH, _OBJECT_BATCH = 16, 8  # of our own recipes
_FEW_STEPS, _FEW_PASSES = 4000, 60  # of ``auto`` where there is no clock, at most
_MAP_SIDE, _OBJECT_SIDE = 32, 64  # patches of a window's side, as published: 512 and 1024 pixels of patches of 16
_SIDE_ON_CPU = 16
_SCALED = 4  # windows that a picture's shorter side may be long before it is scaled down, of segmentation
_FITTED, _LEAST = 4, 12  # windows that a picture may be long before it is seen in parts; pixels of small objects then


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """What a recipe of pixels or of objects decides; fields that `FinetuneConfig` has mean what they mean there."""

    recipe: Recipe
    epochs: float = 0.0
    batch_size: int
    base_lr: float
    weight_decay: float
    layer_decay: float
    drop_path: float = 0.0
    steps: int = 0
    warmup: float = 0.0
    """Share of the steps."""
    floor: float = 0.0
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    resize: tuple[float, float] = (0.5, 2.0)
    """Least and greatest factor of a picture before it is cropped."""
    colours: bool = True
    ema: float = 0.0
    looked_at: int = 32
    """Held-out pictures that are measured before the end, at most."""
    blocks: float | None = None
    """How many of the last blocks train, None for the whole encoder, 0 for none of it."""

    def of_length(self, asked: Mapping[str, Any], images: int) -> Self:
        """With what is asked for, and its length in steps and in passes over so many pictures."""
        found = replace(self, **asked)
        each = images / found.batch_size
        steps = found.steps if found.steps and "epochs" not in asked else math.ceil(found.epochs * each)
        return replace(found, steps=steps, epochs=steps / each)

    @property
    def lasting(self) -> dict[str, Any]:
        """What must be the same when a run is resumed: not what follows from the number of pictures."""
        found = {name: value for name, value in asdict(self).items() if name not in ("epochs", "steps", "looked_at")}
        return {f"recipe's {name}": value for name, value in found.items()}

    def describe(self, *first: str) -> str:
        """What a run says first, with %s for its batch, and ``first`` of what is on the encoder."""
        peak = peak_rate(self.base_lr, self.batch_size)
        more = [
            *first,
            *(["encoder frozen"] if self.blocks == 0 else [f"layer decay {self.layer_decay:.3g}"]),
            *([f"the last {self.blocks:g} blocks trained"] if self.blocks else []),
            *([f"drop path {self.drop_path:g}"] if self.drop_path else []),
            *(["attention in windows"] if self.attention.window else []),
            *(["relative positions"] if self.attention.relative != "none" else []),
            *(["layer scale"] if self.attention.layer_scale else []),
            "scaled by {:g} to {:g}".format(*self.resize),
            *(["colours changed"] if self.colours else []),
        ]
        return (
            f"recipe {self.recipe}: lr {peak:.3g} at a batch of %s; {self.steps} steps, {self.epochs:.3g} epochs, "
            f"warm-up {100 * self.warmup:.3g} %%; {', '.join(more)}"
        )


@dataclass(frozen=True, kw_only=True)
class MapSettings(DenseSettings):
    """Everything that a recipe of segmentation decides."""

    decoder: Decoder
    falls: Literal["cosine", "linear"] = "cosine"
    """How the rate falls after the warm-up."""
    layers: tuple[int, ...] = (-1,)
    width: int = 0
    norm: Literal["layer", "batch"] = "layer"
    side_loss: float = 0.0
    """Weight of the side head's loss; 0 for no side head."""
    dropout: float = 0.0
    most_of_one: float = 1.0
    """Share of a crop that one class may fill; a crop with more is drawn again, up to ten times."""
    head_start: HeadStart = "zero"
    """probe: a linear decoder begins as the logistic regression of the frozen encoder's patches."""

    def describe(self, *first: str) -> str:
        """What a run says first."""
        decoder = f"decoder {self.decoder}" + f" {self.width} wide" * (self.width > 0)
        return super().describe(decoder, *["begun as the probe of patches"] * (self.head_start == "probe"), *first)


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

    @property
    def head_start(self) -> HeadStart:
        """Heads of a detector begin with fresh weights."""
        return "zero"

    def describe(self, *first: str) -> str:
        """What a run says first."""
        heads = f"heads {self.width} wide with {self.convolutions} convolutions, {self.regions} regions a picture"
        return super().describe(heads, *first)


@dataclass(frozen=True)
class DenseFacts:
    """What a recipe is fitted to."""

    width: int
    depth: int
    images: int
    trained: bool = True
    device: str = "cpu"


def settle_maps(recipe: Recipe, facts: DenseFacts, asked: Mapping[str, Any]) -> MapSettings:
    """The recipe for a network and a number of pictures, changed where it is asked for."""
    recipes = {"auto": _for_few_maps, "ade20k": _ade20k, "linear": _linear}
    if recipe not in recipes:
        raise UsageError(f"--recipe {recipe} is for classes of pictures; --task segment has {', '.join(recipes)}")
    found = recipes[recipe](facts)
    decoder = asked.get("decoder", found.decoder)
    if recipe == "linear" and decoder != "linear":
        raise UsageError(f"--recipe linear trains a linear decoder, not --decoder {decoder}")
    if decoder != found.decoder:
        found = replace(found, **(_upernet(facts) if decoder == "upernet" else _plain(facts)))
    found = found.of_length(asked, facts.images)
    if (found.decoder, found.head_start) == ("upernet", "probe"):
        raise UsageError("--head-start probe is for --decoder linear: UPerNet is no linear map of patches")
    return found


def settle_objects(recipe: Recipe, facts: DenseFacts, asked: Mapping[str, Any]) -> ObjectSettings:
    """The recipe for a network and a number of pictures, changed where it is asked for."""
    recipes = {"auto": _for_few_objects, "vitdet": _vitdet}
    if recipe not in recipes:
        raise UsageError(f"--recipe {recipe} is not for objects; --task detect has {', '.join(recipes)}")
    return recipes[recipe](facts).of_length(asked, facts.images)


def _few_steps(images: int, batch: int) -> int:
    return max(100, min(_FEW_STEPS, math.ceil(_FEW_PASSES * images / batch)))


def _plain(facts: DenseFacts) -> dict[str, Any]:
    start = "probe" if facts.trained else "zero"
    return {"decoder": "linear", "layers": (-1,), "width": 0, "side_loss": 0.0, "head_start": start}


def _upernet(facts: DenseFacts, width: int | None = None) -> dict[str, Any]:
    """UPerNet on blocks at even distances: of 12 the 4th, 6th, 8th and 12th, of 24 the 8th, 12th, 16th and 24th."""
    layers = tuple(max(1, round(facts.depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1))
    own = min(facts.width, 256) if width is None else width
    return {"decoder": "upernet", "layers": layers, "width": own, "side_loss": 0.4, "head_start": "zero"}


def _ade20k(facts: DenseFacts) -> MapSettings:
    """UPerNet on ADE20K as it was reproduced for ViT-B: 48.1 mIoU (He et al. 2021, table 5).

    The values are those of the code to which the published one points for segmentation, and of mmsegmentation's
    configuration, which reach 48.15 and 48.13: AdamW 1e-4 at 16 crops of 512 pixels, decay of layers 0.65, 160,000
    steps; relative position bias and layer scale. The tables are decayed with the weights; there, by a slip, the class
    token and the positions are too.
    """
    large = facts.width >= 1024
    return MapSettings(
        recipe="ade20k",
        steps=160_000,
        batch_size=_BATCH,
        base_lr=1e-4 / peak_rate(1.0, _BATCH),
        weight_decay=0.05,
        layer_decay=0.65,
        drop_path=0.2 if large else 0.1,
        warmup=1500 / 160_000,
        falls="linear",
        norm="batch",
        attention=AttentionConfig(relative="table", layer_scale=True),
        dropout=0.1,
        most_of_one=0.75,
        **(_upernet(facts, facts.width)),
    )


def _linear(facts: DenseFacts) -> MapSettings:
    """A diagnostic of the frozen encoder, no product: MAE's patches are far from linear (docs/segmentation.md)."""
    return MapSettings(
        recipe="linear",
        steps=1000,
        batch_size=_BATCH,
        base_lr=1e-3 / peak_rate(1.0, _BATCH),
        weight_decay=1e-3,
        layer_decay=1.0,
        warmup=0.04,
        blocks=0,
        **_plain(facts),
    )


def _for_few_maps(facts: DenseFacts) -> MapSettings:
    """Ours, chosen by a few runs on drawn objects (docs/segmentation.md). Wider networks take smaller steps."""
    return MapSettings(
        recipe="auto",
        steps=_few_steps(facts.images, _BATCH),
        batch_size=_BATCH,
        base_lr=4e-3 * 192 / facts.width,
        weight_decay=0.05,
        layer_decay=0.75,
        warmup=0.05,
        **_plain(facts),
    )


def _vitdet(facts: DenseFacts) -> ObjectSettings:
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


def _for_few_objects(facts: DenseFacts) -> ObjectSettings:
    """Ours, chosen by a few runs (docs/detection.md): heads as wide as the encoder can feed, and without convolutions
    of regions on a CPU, where those would take most of the time."""
    small = facts.device == "cpu"
    return ObjectSettings(
        recipe="auto",
        steps=_few_steps(facts.images, _OBJECT_BATCH),
        batch_size=_OBJECT_BATCH,
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


def map_window(patch: int, middle: int, *, small: bool) -> int:
    """Side of a window in pixels, where none is asked for: that of the middle picture's shorter side, in whole patches,
    at most 32 of them, or 16 where it must be ``small``."""
    return patch * max(1, min((_SIDE_ON_CPU if small else _MAP_SIDE) * patch, middle) // patch)


def short_side_of(window: int, middle: int) -> int | None:
    """What the shorter side of pictures is scaled to, where nothing is asked for; None for their own size.

    One window where that is at least half of what the middle picture has, four where it has more.
    """
    if window < middle <= 2 * window:
        return window
    return _SCALED * window if middle > _SCALED * window else None


def object_window(patch: int, longest: int, *, small: bool) -> int:
    """Side of a window in pixels, where none is asked for: the middle picture's longer side, in pairs of
    patches, at most 64 patches, or 16 where it must be ``small``."""
    return 2 * patch * max(1, round(min((_SIDE_ON_CPU if small else _OBJECT_SIDE) * patch, longest) / (2 * patch)))


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
