"""Published settings of fine-tuning and probing, and how they are fitted to little data."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from maehub.data import Labelled, inner_split
from maehub.errors import DataError, UsageError, log
from maehub.files import read_json
from maehub.models import Encoder, EncoderConfig
from maehub.train.engine import Group, peak_rate
from maehub.train.finetuning.config import FinetuneConfig, HeadPool, HeadStart, Recipe
from maehub.train.networks import Backbone

SMALL = 10_000
"""Training pictures below which a recipe is fitted to the data."""

_FEWEST_STEPS = 1000  # of a run on little data
_FEWEST_A_CLASS = 20  # pictures, for mixup and cutmix
_SMALL_BATCH = (8, 256)
_STEPS_AN_EPOCH = 8  # at least, on little data
_FIRST_BLOCK = 0.65**12  # factor of the first block of ViT-B in the official recipe
_LARGE = 384  # pixels: from here on the recipe for 448
_AVERAGED = 10  # with little data an average of weights covers at most one in so many steps of a run
_FEW_RATE, _FEW_WIDTH = 3e-3, 192  # of ``auto``, measured with that width
_PASSES = 60  # of a recipe for few pictures over one of each class; over more by the root of how many
_FEW_BLOCKS = 0.4  # of all
_NUMBERS_AS, _NUMBERS_SHOWN = 10, 0.8  # classes that numbers count as; share of a picture that a crop of it shows
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
    crop_scale: tuple[float, float] = (0.08, 1.0)
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
    blocks: float | None = None

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
    probed: bool = True
    """Whether a probe can begin it: classes are not weighted, and of the pictures some can be held out to choose by."""
    partial: bool = True
    """Whether single blocks of the network can be trained."""
    numeric: bool = False
    """Whether labels are numbers, which ``classes`` counts the columns of."""


def settle(recipe: Recipe, facts: Facts, asked: Mapping[str, Any], model: str) -> Settings:
    """The recipe for a network and a data set, changed where it is asked for.

    ``auto`` is a recipe of its own for fewer than `SMALL` pictures, else that of the published ones that fits. Of
    those, with fewer than `SMALL` pictures: batches of at most an eighth of them, at least 1,000 steps, a warm-up of a
    twentieth, no mixup and cutmix with fewer than 20 pictures a class, a layer decay that gives the first block the
    factor of ViT-B's, 0.65 to the twelfth, and of LARS the published peak rate. Multi-label targets are neither mixed
    nor smoothed, unless it is asked for; numbers never, and their head begins as a probe. ``asked`` are fields of
    `Settings`.
    """
    name = recipe
    small = facts.images < SMALL
    few = recipe == "auto" and facts.trained and small and facts.probed
    if recipe == "auto" and not few:
        name = "scratch" if not facts.trained else "448" if facts.size >= _LARGE else "official"
    if name == "scratch" and facts.trained:
        raise UsageError(f"--recipe scratch is for fresh weights and {model} has its own: use -m untrained/NAME")
    found = published = _for_few(facts) if few else _published(name, facts)
    if small and not few:
        least, most = _SMALL_BATCH
        batch = 2 ** int(math.log2(max(1, facts.images / _STEPS_AN_EPOCH)))
        found = replace(found, batch_size=min(most, max(least, batch)))
        if _few_a_class(facts):
            found = replace(found, mixup=0.0, cutmix=0.0)
        if found.layer_decay < 1:
            found = replace(found, layer_decay=_FIRST_BLOCK ** (1 / facts.depth))
    if facts.multi_label or facts.numeric:
        found = replace(found, mixup=0.0, cutmix=0.0, smoothing=0.0)
    if facts.numeric:
        found = replace(found, head_start="probe")
    found = replace(found, **asked)
    if small and found.optimizer == "lars" and "base_lr" not in asked:
        # Its steps are a share of the weights' own size at any batch: scaled down with it they would lead nowhere.
        peak = peak_rate(published.base_lr, published.batch_size)
        found = replace(found, base_lr=peak / peak_rate(1.0, found.batch_size))
    if facts.multi_label and found.smoothing:
        raise UsageError("--smoothing is for pictures of one class each, and these may have several")
    each = facts.images / found.batch_size
    steps = found.steps or math.ceil(found.epochs * each)
    if small and not few and not {"steps", "epochs"} & set(asked):
        steps = max(steps, _FEWEST_STEPS)
    warmup = found.warmup
    if "warmup" not in asked and not few:
        warmup = 0.05 if small else min(0.5, found.warmup_epochs * each / steps)
    ema = found.ema
    if small and "ema" not in asked:
        ema = min(ema, max(0.0, 1 - _AVERAGED / steps))
    return replace(found, steps=steps, warmup=warmup, ema=ema, epochs=steps / each)


def lasting(settings: Settings) -> dict[str, Any]:
    """What of a settled recipe must be the same when a run is resumed: not what follows from the number of pictures."""
    values = asdict(settings)
    follows = ["epochs", "steps", "warmup", "ema"]
    follows += ["crop_scale"]  # told as the flag
    follows += ["head_start"] * (settings.head_start == "zero")  # the one that 0.1 had
    follows += ["blocks"] * (settings.blocks is None)
    return {f"recipe's {name}": value for name, value in values.items() if name not in follows}


def describe(settings: Settings, facts: Facts, batch: str) -> str:
    """What a run says first: learning rate, factors, the true batch in words, and the augmentation."""
    peak = peak_rate(settings.base_lr, settings.batch_size)
    lowest = settings.layer_decay ** (facts.depth + 1)
    factors = f", factors {lowest:.2g} (stem) to 1 (head)" if settings.layer_decay < 1 else ""
    frozen = settings.head != "linear"
    mixing = [f"{name} {value:g}" for name, value in (("mixup", settings.mixup), ("cutmix", settings.cutmix)) if value]
    few = f" (fewer than {_FEWEST_A_CLASS} pictures a class)" if _few_a_class(facts) and not frozen else ""
    few *= settings.recipe != "auto"
    more = [
        *(["head from the probe"] if settings.head_start == "probe" else []),
        *([] if settings.blocks is None else [f"the last {settings.blocks:g} of {facts.depth} blocks trained"]),
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
    start: HeadStart = "probe" if facts.probed and facts.images < SMALL else "zero"
    adamw: Any = {"base_lr": 5e-4, "weight_decay": 0.05, "optimizer": "adamw"}
    return replace(plain, batch_size=1024, head="attentive", head_start=start, **adamw)


def _for_few(facts: Facts) -> Settings:
    """Ours: what did best of the recipes that benchmarks/small_data.py tries. Wider networks take smaller steps."""
    each = max(1.0, facts.images / (_NUMBERS_AS if facts.numeric else facts.classes))
    return Settings(
        "auto",
        epochs=_PASSES / math.sqrt(each),
        batch_size=32,
        base_lr=_FEW_RATE * _FEW_WIDTH / facts.width,
        warmup_epochs=0.0,
        warmup=0.1,
        weight_decay=0.05,
        layer_decay=0.75,
        crop_scale=(_NUMBERS_SHOWN if facts.numeric else 0.5, 1.0),
        randaugment="none",
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.0,
        head_start="probe",
        blocks=max(1, round(_FEW_BLOCKS * facts.depth)) if facts.partial else None,
    )


def _few_a_class(facts: Facts) -> bool:
    return facts.images < _FEWEST_A_CLASS * facts.classes


def asked_of(config: FinetuneConfig) -> dict[str, Any]:
    """What of a recipe the user decides."""
    given = {name: getattr(config, name, None) for name in Settings.__dataclass_fields__ if name != "recipe"}
    return {name: value for name, value in given.items() if value is not None}


def settled(
    config: FinetuneConfig, backbone: Backbone, training: Labelled, group: Group, *, probed: bool
) -> tuple[Facts, Settings]:
    """The recipe, and what it was fitted to."""
    asked = asked_of(config)
    if config.pool is None and config.recipe == "auto" and has_classes(backbone, training):
        asked["pool"] = getattr(backbone.module.config, "pool", None)  # that of its head
    facts = Facts(
        width=backbone.width,
        depth=backbone.depth,
        trained=not config.model.startswith("untrained/"),
        size=max(backbone.preprocess.size),
        images=len(training),
        classes=len(training.classes),
        multi_label=training.multi_label,
        numeric=training.numeric,
        probed=probed,
        partial=isinstance(backbone.module, Encoder),
    )
    settings = settle(config.recipe, facts, asked, config.model)
    if config.fsdp and settings.head != "linear":
        raise UsageError(f"--fsdp is for training a network, which --recipe {settings.recipe} freezes")
    size, even = settings.batch_size, settings.mixed_at_once
    if size % (group.size * even):
        if config.batch_size is not None:
            raise UsageError(
                f"--batch-size {size} must be a multiple of {group.size * even}: {group.size} processes"
                + (", each with an even number of pictures to mix" if even == 2 else "")
            )
        asked["batch_size"] = -(-size // (group.size * even)) * group.size * even
        settings = settle(config.recipe, facts, asked, config.model)
    if settings.optimizer == "lars" and len(training) < 2 * group.size:
        raise DataError(f"batch normalisation needs at least two pictures, and {config.data} has {len(training)}")
    return facts, settings


def can_begin_as_probe(config: FinetuneConfig, training: Labelled, group: Group) -> bool:
    """Whether a recipe may take a probe by itself; where no pictures can be held out to choose by, that is said."""
    if config.class_weights == "balanced":
        return False
    if config.head_start or config.recipe not in ("auto", "attentive") or training.numeric or len(training) >= SMALL:
        return True
    try:
        inner_split(training, seed=config.seed)
    except DataError as error:
        if group.is_main:
            log.warning("%s: a published recipe is taken, and a fresh head", error)
        return False
    return True


def has_classes(backbone: Backbone, training: Labelled) -> bool:
    """Whether a network is a classifier of the same classes already."""
    known = getattr(backbone.module, "config", None)
    return (
        isinstance(known, EncoderConfig)
        and known.class_names == tuple(training.classes)
        and (known.multi_label, known.numeric) == (training.multi_label, training.numeric)
    )


def stored_settings(config: FinetuneConfig) -> dict[str, Any]:
    """The settings of a run that is resumed."""
    if not config.resume or not (config.out / "config.json").is_file():
        return {}
    found: dict[str, Any] = read_json(config.out / "config.json").get("settings", {})
    return found
