"""Published settings of fine-tuning and probing, and how they are fitted to little data."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from maehub.errors import UsageError
from maehub.train.engine import peak_rate
from maehub.train.finetuning.config import HeadPool, HeadStart, Recipe

SMALL = 10_000
"""Training pictures below which a recipe is fitted to the data."""

_FEWEST_STEPS = 1000  # of a run on little data
_FEWEST_A_CLASS = 20  # pictures, for mixup and cutmix
_SMALL_BATCH = (8, 256)
_STEPS_AN_EPOCH = 8  # at least, on little data
_FIRST_BLOCK = 0.65**12  # factor of the first block of ViT-B in the official recipe
_LARGE = 384  # pixels: from here on the recipe for 448
_AVERAGED = 10  # with little data an average of weights covers at most one in so many steps of a run
_RANDAUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Settings:
    """Everything that a recipe decides; the fields that `FinetuneConfig` has too mean what they mean there."""

    recipe: Recipe
    epochs: float
    batch_size: int
    base_lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float = 1.0
    drop_path: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    floor: float = 1e-6
    """What the cosine of the learning rate ends at."""
    pool: HeadPool = "mean"
    randaugment: str = _RANDAUGMENT
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    erasing: float = 0.0
    ema: float = 0.0
    optimizer: Literal["adamw", "lars"] = "adamw"
    head: Literal["linear", "normed", "attentive"] = "linear"
    """A linear layer; one on batch-normalised features of a frozen network; one on features pooled by attention."""
    steps: int = 0
    warmup: float = 0.0
    """Share of the steps."""
    head_start: HeadStart = "zero"

    @property
    def mixed_at_once(self) -> int:
        """Pictures that are mixed with each other: what a batch must be a multiple of."""
        return 2 if self.mixup or self.cutmix else 1


@dataclass(frozen=True)
class Facts:
    """What a recipe is fitted to."""

    width: int
    depth: int
    trained: bool
    """Whether the network starts from weights."""
    size: int
    """The longer side of its pictures, pixels."""
    images: int
    classes: int
    multi_label: bool = False


def settle(recipe: Recipe, facts: Facts, asked: Mapping[str, Any], model: str) -> Settings:
    """The recipe for a network and a data set, changed where it is asked for.

    With fewer than `SMALL` pictures: batches of at most an eighth of them, at least 1,000 steps, a warm-up of a
    twentieth, no mixup and cutmix with fewer than 20 pictures a class, a layer decay that gives the first block the
    factor of ViT-B's, 0.65 to the twelfth, and of LARS the published peak rate. Multi-label targets are neither mixed
    nor smoothed, unless it is asked for. ``asked`` are fields of `Settings`.
    """
    name = recipe
    if recipe == "auto":
        name = "scratch" if not facts.trained else "448" if facts.size >= _LARGE else "official"
    if name == "scratch" and facts.trained:
        raise UsageError(f"--recipe scratch is for fresh weights and {model} has its own: use -m untrained/NAME")
    found = published = _published(name, facts)
    small = facts.images < SMALL
    if small:
        least, most = _SMALL_BATCH
        batch = 2 ** int(math.log2(max(1, facts.images / _STEPS_AN_EPOCH)))
        found = replace(found, batch_size=min(most, max(least, batch)))
        if _few_a_class(facts):
            found = replace(found, mixup=0.0, cutmix=0.0)
        if found.layer_decay < 1:
            found = replace(found, layer_decay=_FIRST_BLOCK ** (1 / facts.depth))
    if facts.multi_label:
        found = replace(found, mixup=0.0, cutmix=0.0, smoothing=0.0)
    found = replace(found, **asked)
    if small and found.optimizer == "lars" and "base_lr" not in asked:
        # Its steps are a share of the weights' own size at any batch: scaled down with it they would lead nowhere.
        peak = peak_rate(published.base_lr, published.batch_size)
        found = replace(found, base_lr=peak / peak_rate(1.0, found.batch_size))
    if facts.multi_label and found.smoothing:
        raise UsageError("--smoothing is for pictures of one class each, and these may have several")
    each = facts.images / found.batch_size
    steps = found.steps or math.ceil(found.epochs * each)
    if small and not {"steps", "epochs"} & set(asked):
        steps = max(steps, _FEWEST_STEPS)
    warmup = found.warmup
    if "warmup" not in asked:
        warmup = 0.05 if small else min(0.5, found.warmup_epochs * each / steps)
    ema = found.ema
    if small and "ema" not in asked:
        ema = min(ema, max(0.0, 1 - _AVERAGED / steps))
    return replace(found, steps=steps, warmup=warmup, ema=ema, epochs=steps / each)


def lasting(settings: Settings) -> dict[str, Any]:
    """What of a settled recipe must be the same when a run is resumed: not what follows from the number of pictures."""
    values = asdict(settings)
    follows = ["epochs", "steps", "warmup", "ema"]
    follows += ["head_start"] * (settings.head_start == "zero")  # the one that 0.1 had
    return {f"recipe's {name}": value for name, value in values.items() if name not in follows}


def describe(settings: Settings, facts: Facts, batch: str) -> str:
    """What a run says first: learning rate, factors, the true batch in words, and the augmentation."""
    peak = peak_rate(settings.base_lr, settings.batch_size)
    lowest = settings.layer_decay ** (facts.depth + 1)
    factors = f", factors {lowest:.2g} (stem) to 1 (head)" if settings.layer_decay < 1 else ""
    frozen = settings.head != "linear"
    mixing = [f"{name} {value:g}" for name, value in (("mixup", settings.mixup), ("cutmix", settings.cutmix)) if value]
    few = f" (fewer than {_FEWEST_A_CLASS} pictures a class)" if _few_a_class(facts) and not frozen else ""
    more = [
        *(["head from the probe"] if settings.head_start == "probe" else []),
        *([] if settings.randaugment == "none" else [settings.randaugment]),
        *(mixing or [f"no mixup, no cutmix{few}"]),
        *([f"smoothing {settings.smoothing:g}"] if settings.smoothing else []),
        *([f"erasing {settings.erasing:g}"] if settings.erasing else []),
        *([] if frozen else [f"drop path {settings.drop_path:g}", f"layer decay {settings.layer_decay:.3g}"]),
        *([f"average of weights {settings.ema:.5g}"] if settings.ema else []),
    ]
    return (
        f"recipe {settings.recipe}: lr {peak:.3g} = {settings.base_lr:g} for 256, at a batch of {batch}"
        f"{factors}; {settings.steps} steps, {settings.epochs:.3g} epochs, warm-up {100 * settings.warmup:.3g} %"
        f"; {', '.join(more)}"
    )


def _published(name: Recipe, facts: Facts) -> Settings:
    """A recipe as published for B, L and H; smaller networks take B's."""
    large, huge = facts.width >= 1024, facts.width >= 1280
    paper = Settings(  # He et al. 2021, table 9
        name,
        epochs=50 if large else 100,
        batch_size=1024,
        base_lr=1e-3,
        warmup_epochs=5,
        weight_decay=0.05,
        layer_decay=0.75,
        drop_path=0.2 if huge else 0.1,
    )
    if name == "paper":
        return paper
    if name in ("official", "448"):
        # Values of the published code for weights trained on normalised pixels. He et al. published none for 448: those
        # are mmpretrain's for ViT-H, which reached 87.3.
        long = name == "official" and not large
        return replace(
            paper,
            epochs=100 if long else 50,
            base_lr=5e-4 if long else 1e-3,
            layer_decay=0.75 if large else 0.65,
            drop_path=0.3 if huge else 0.2 if large else 0.1,
            erasing=0.25,
        )
    if name == "scratch":  # He et al. 2021, table 11
        return Settings(
            name,
            epochs=200 if large else 300,
            batch_size=4096,
            base_lr=1e-4,
            warmup_epochs=20,
            weight_decay=0.3,
            betas=(0.9, 0.95),
            drop_path=0.2 if large else 0.1,
            floor=0.0,
            ema=0.9999,
        )
    plain = Settings(
        name,
        epochs=50 if large else 90,
        batch_size=16384,
        base_lr=0.1,
        warmup_epochs=10,
        weight_decay=0.0,
        floor=0.0,
        pool="cls",
        randaugment="none",
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.0,
        optimizer="lars",
        head="normed",
    )
    if name == "linear":  # He et al. 2021, table 10
        return plain
    # Ours: not in He et al.
    return replace(plain, batch_size=1024, base_lr=5e-4, weight_decay=0.05, optimizer="adamw", head="attentive")


def _few_a_class(facts: Facts) -> bool:
    return facts.images < _FEWEST_A_CLASS * facts.classes
