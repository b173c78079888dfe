"""What a training run is told. Frozen dataclasses, saved in the run folder; the command line reads their fields.

No torch here, so that ``--help`` is fast.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from maehub.errors import UsageError

Strategy = Literal["random", "block", "grid"]
Target = Literal["pixels", "normalised_pixels", "pca", "tokens"]
MaskTokens = Literal["decoder", "encoder"]
LossOn = Literal["hidden", "all"]
Augment = Literal["none", "fixed-crop", "random-crop", "colour-jitter"]
Precision = Literal["auto", "fp32", "bf16"]


def _default(meaning: str, metavar: str | None = None) -> object:
    """What ``--help`` says that a setting is if it is left out."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {meaning})", metavar=metavar)


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder by the recipe of He et al. 2021, table 8."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A folder of pictures, any nesting; DIR/train and DIR/val are used as such where both exist. Or a .txt list of
    files, tar shards in the webdataset format ("shards/{000..099}.tar", s3://…), a Parquet file or a saved dataset."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Run folder to write."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="PRESET")] = "vit-nano"
    """Architecture preset to train from scratch: vit-nano, vit-ti, vit-s, vit-b, vit-l, vit-h."""
    from_: Annotated[str, tyro.conf.arg(name="from", metavar="MODEL", help_behavior_hint="(default: from scratch)")] = (
        ""
    )
    """Weights to continue from: a catalog name, a Hub id, a folder or a file. Overrides --model."""
    image_size: Annotated[tuple[int, ...], _default("the model's", "PIXELS ...")] = ()
    """Side of the crops, or height and width, in pixels; multiples of the patch."""
    channels: Annotated[int | None, _default("the model's")] = None
    """Image channels: 3, or 1 for greyscale."""

    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder (figure 5)."""
    strategy: Strategy = "random"
    """Which patches are hidden (table 1f)."""
    target: Annotated[Target | None, _default("as --from, else normalised_pixels")] = None
    """What the decoder predicts (table 1d). tokens: ViT's 512 mean colours, or a tokenizer given in Python."""
    pca_components: int = 96
    """Coefficients of a patch with --target pca."""
    loss_on: LossOn = "hidden"
    """Patches that the loss is taken on; "all" lost half a point in the paper (section 4)."""
    corruption: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Shares of hidden patches that become a mask token, another patch of the picture, or stay (BERT and ViT take
    0.8 0.1 0.1). Other than 1 0 0 needs --mask-tokens encoder."""
    predict_share: float = 1.0
    """Share of the hidden patches that the decoder predicts; the others are left out of it, which saves its time."""
    masks_per_image: int = 1
    """Masks of each decoded picture. The batch counts views; an epoch is this many times the pictures."""
    decoder_width: Annotated[int | None, _default("the preset's")] = None
    """Width of the decoder (table 1b)."""
    decoder_depth: Annotated[int | None, _default("the preset's")] = None
    """Blocks of the decoder (table 1a); 0 is a linear head on an encoder that sees mask tokens."""
    decoder_heads: Annotated[int | None, _default("the preset's")] = None
    """Heads of the decoder."""
    mask_tokens: Annotated[MaskTokens | None, _default("as --from, else decoder")] = None
    """Where mask tokens enter; "encoder" is the ablation of table 1c."""

    augment: Augment = "random-crop"
    """What is done to pictures (table 1e). fixed-crop: the short side to 8/7 of the size, a crop at a random place;
    colour-jitter: brightness, contrast and saturation by up to 0.4 besides; none: the centre, not flipped."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that a random crop covers."""
    hflip: bool = True
    """Mirror half of the crops left to right."""
    vflip: bool = False
    """Mirror half of the crops upside down: for pictures without an upright, such as slides or aerial ones."""
    rot90: bool = False
    """Turn crops by a random multiple of 90 degrees; needs square crops."""
    rotate: float = 0.0
    """Turn crops by up to this many degrees either way, the corners filled by mirroring."""

    steps: Annotated[int | None, _default("as --epochs says")] = None
    """Optimizer steps; give this or --epochs."""
    epochs: Annotated[float | None, _default("as --steps says")] = None
    """Passes over the data; give this or --steps."""
    batch_size: int = 256
    """Views a step, over all processes; the paper's is 4096."""
    micro_batch: Annotated[int | None, _default("as many as fit")] = None
    """Views that a process computes at once; gradients are accumulated over them."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 views a step. Scaled by batch_size / 256 from 256 on (Goyal et al. 2017), by its square
    root below."""
    weight_decay: float = 0.05
    """AdamW's, for matrices; biases and norms have none."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0 (the paper: 40 of 800 epochs)."""
    clip_grad: Annotated[float | None, _default("not limited")] = None
    """Largest norm of the gradient of all parameters."""
    precision: Precision = "auto"
    """bf16 where the device computes it natively, else fp32; losses are always fp32."""
    compile: Flag = False
    """Compile the model with torch.compile."""
    checkpoint_activations: Flag = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    fsdp: Flag = False
    """Shard weights and optimizer over the processes (FSDP2) instead of copying them (DDP)."""
    deterministic: Flag = False
    """Use deterministic algorithms, so that a resumed run is equal bit for bit on a GPU too."""

    holdout: Annotated[int | None, _default("a twentieth, at most 2000")] = None
    """Pictures held out of training for the validation loss, where there is no DIR/val; 0 holds none out."""
    group: Annotated[int | None, _default("none")] = None
    """Folder level whose members are held out together: 1 is the first folder below DATA, such as a patient or site."""
    knn: Annotated[str | None, _default("none", "DIR")] = None
    """A labelled folder: the accuracy of k nearest neighbours on it is measured at every validation."""
    validate_every: int = 500
    """Steps between validations and pictures of reconstructions."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is written at the end too."""
    keep: int = 2
    """Checkpoints that are kept; the last good one is never deleted."""
    time_limit: Annotated[float | None, _default("none", "MINUTES")] = None
    """Save and stop, resumable, so that the run ends within this many minutes of its start."""
    timeout: float = 120.0
    """Seconds that processes wait for each other before the run ends with an error."""
    tensorboard: Flag = False
    """Also write the metrics for TensorBoard, into the run folder."""

    resume: Flag = False
    """Go on from the newest valid checkpoint of the run folder."""
    allow_data_change: Flag = False
    """Go on although the pictures are not those that the run was started with."""
    overwrite: Flag = False
    """Replace the run in an existing run folder."""
    seed: int = 0
    """Seed of weights, order, crops, flips and masks."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one, under torchrun one a process."""
    workers: Annotated[int | None, _default("as fits the machine")] = None
    """Processes that read pictures, for each training process; 0 reads in this one."""
    cache: Flag = False
    """Decode every picture once and keep it in memory: for data sets that fit, 4 bytes a pixel."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.fspath(self.data))
        object.__setattr__(self, "image_size", _sides(self.image_size))
        unset = {field.name for field in fields(self) if field.default is None and getattr(self, field.name) is None}
        if len(unset & {"steps", "epochs"}) != 1:
            raise UsageError("give the length of the run as --steps or as --epochs, one of the two")
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if name not in unset and not rule.holds(value):
                raise UsageError(f"{_option(name)} must be {rule.words}, not {value!r}")
        if self.strategy == "grid" and self.mask_ratio != 0.75:
            raise UsageError(f"--mask-ratio must be 0.75 with --strategy grid, not {self.mask_ratio}")
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with the run and --overwrite deletes it: give one of the two")
        if self.batch_size % self.masks_per_image:
            raise UsageError(
                f"--batch-size counts views, so it must be a multiple of --masks-per-image {self.masks_per_image}, "
                f"not {self.batch_size}"
            )
        if self.predict_share < 1 and self.loss_on == "all":
            raise UsageError("--predict-share below 1 leaves patches out, so it cannot go with --loss-on all")
        if self.decoder_depth == 0 and self.mask_tokens == "decoder":
            raise UsageError("--decoder-depth 0 is a linear head on the encoder: it needs --mask-tokens encoder")
        if self.rot90 and len(self.image_size) == 2 and self.image_size[0] != self.image_size[1]:
            raise UsageError(f"--rot90 needs square crops, not --image-size {self.image_size[0]} {self.image_size[1]}")


class _Rule(NamedTuple):
    """What a setting may be."""

    holds: Callable[[Any], bool]
    words: str


def _whole(least: int) -> _Rule:
    return _Rule(lambda value: type(value) is int and least <= value < 2**63, f"a whole number of at least {least}")


def _number(holds: Callable[[float], bool], words: str) -> _Rule:
    return _Rule(lambda value: type(value) in (int, float) and holds(value), f"a number {words}")


def _one_of(choices: Any) -> _Rule:
    return _Rule(lambda value: value in get_args(choices), f"one of {', '.join(get_args(choices))}")


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple | list) and [type(part) in (int, float) for part in value] == [True] * count


def _is_scale(value: Any) -> bool:
    return _numbers(value, 2) and 0 < value[0] <= value[1] <= 1


def _is_corruption(value: Any) -> bool:
    return _numbers(value, 3) and min(value) >= 0 and abs(sum(value) - 1) < 1e-6


def _is_size(value: Any) -> bool:
    return len(value) <= 2 and all(type(side) is int and side >= 1 for side in value)


def _sides(size: Any) -> Any:
    """A side, or a height and a width, as a tuple; none given is empty."""
    if size is None:
        return ()
    return tuple(size) if isinstance(size, tuple | list) else (size,)


def _option(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


_POSITIVE = _number(lambda value: 0 < value < math.inf, "above 0")
_RULES = {
    "image_size": _Rule(_is_size, "a side, or a height and a width, in whole pixels"),
    "channels": _Rule(lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    "mask_ratio": _number(lambda value: 0 < value < 1, "above 0 and below 1"),
    "strategy": _one_of(Strategy),
    "target": _one_of(Target),
    "pca_components": _whole(1),
    "loss_on": _one_of(LossOn),
    "corruption": _Rule(_is_corruption, "three shares that sum to 1"),
    "predict_share": _number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "masks_per_image": _whole(1),
    "decoder_width": _whole(1),
    "decoder_depth": _whole(0),
    "decoder_heads": _whole(1),
    "mask_tokens": _one_of(MaskTokens),
    "augment": _one_of(Augment),
    "crop_scale": _Rule(_is_scale, "two numbers, 0 < low <= high <= 1"),
    "rotate": _number(lambda value: 0 <= value <= 180, "from 0 to 180"),
    "steps": _whole(1),
    "epochs": _POSITIVE,
    "batch_size": _whole(1),
    "micro_batch": _whole(1),
    "base_lr": _POSITIVE,
    "weight_decay": _number(lambda value: 0 <= value < math.inf, "of at least 0"),
    "warmup": _number(lambda value: 0 <= value < 1, "of at least 0 and below 1"),
    "clip_grad": _POSITIVE,
    "precision": _one_of(Precision),
    "holdout": _whole(0),
    "group": _whole(1),
    "validate_every": _whole(1),
    "checkpoint_every": _whole(1),
    "keep": _whole(1),
    "time_limit": _POSITIVE,
    "timeout": _POSITIVE,
    "seed": _Rule(lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "workers": _whole(0),
}


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """What a pretraining run will need: the flags of `maehub pretrain`, and these."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DATA]", help_behavior_hint="")] = ""
    """The pictures: they are counted, and reading them is timed. Not needed with --images."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("run")
    """Run folder that pretrain would write; nothing is written here."""
    images: Annotated[int | None, _default("counted in DATA")] = None
    """Pictures in the data set."""
    on: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """Device to plan for, such as h100, a100-80, l4 or rtx-4090; auto is this machine's."""
    processes: int = 1
    """Processes, one a device."""
    utilisation: Annotated[float | None, _default("as measured")] = None
    """Share of the device's peak rate that training reaches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {"images": _whole(1), "utilisation": _number(lambda value: 0 < value <= 1, "above 0 and at most 1")}
        for name, rule in rules.items():
            value = getattr(self, name)
            if value is not None and not rule.holds(value):
                raise UsageError(f"{_option(name)} must be {rule.words}, not {value!r}")
        if not _whole(1).holds(self.processes):
            raise UsageError(f"--processes must be a whole number of at least 1, not {self.processes!r}")
