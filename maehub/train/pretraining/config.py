"""What a pretraining run is told. Frozen dataclasses, saved in the run folder; the command line reads their fields.

No torch here, so that ``--help`` is fast.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from maehub.errors import UsageError
from maehub.train.engine import (
    POSITIVE,
    SHARE,
    LossOn,
    Rule,
    RunConfig,
    check,
    default,
    is_scale,
    is_size,
    number,
    numbers,
    one_of,
    own_first,
    sides,
    whole,
)

Strategy = Literal["random", "block", "grid"]
Target = Literal["pixels", "normalised_pixels", "pca", "tokens"]
MaskTokens = Literal["decoder", "encoder"]
Augment = Literal["none", "fixed-crop", "random-crop", "colour-jitter"]


@own_first
@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrain a masked autoencoder by the recipe of He et al. 2021, table 8."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A folder of pictures, any nesting; DIR/train and DIR/val are used as such where both exist. Or a .txt list of
    files, tar shards in the webdataset format ("shards/{000..099}.tar", s3://…), a Parquet file or a saved dataset."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="PRESET")] = "vit-nano"
    """Architecture preset to train from scratch: vit-nano, vit-ti, vit-s, vit-b, vit-l, vit-h."""
    from_: Annotated[str, tyro.conf.arg(name="from", metavar="MODEL", help_behavior_hint="(default: from scratch)")] = (
        ""
    )
    """Weights to continue from: a catalog name, a Hub id, a folder or a file. Overrides --model."""
    image_size: Annotated[tuple[int, ...], default("the model's", "PIXELS ...")] = ()
    """Side of the crops, or height and width, in pixels; multiples of the patch."""
    channels: Annotated[int | None, default("the model's")] = None
    """Image channels: 3, or 1 for greyscale."""

    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder (figure 5)."""
    strategy: Strategy = "random"
    """Which patches are hidden (table 1f)."""
    target: Annotated[Target | None, default("as --from, else normalised_pixels")] = None
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
    decoder_width: Annotated[int | None, default("the preset's")] = None
    """Width of the decoder (table 1b)."""
    decoder_depth: Annotated[int | None, default("the preset's")] = None
    """Blocks of the decoder (table 1a); 0 is a linear head on an encoder that sees mask tokens."""
    decoder_heads: Annotated[int | None, default("the preset's")] = None
    """Heads of the decoder."""
    mask_tokens: Annotated[MaskTokens | None, default("as --from, else decoder")] = None
    """Where mask tokens enter; "encoder" is the ablation of table 1c."""

    augment: Augment = "random-crop"
    """What is done to pictures (table 1e). fixed-crop: the short side to 8/7 of the size, a crop at a random place;
    colour-jitter: brightness, contrast and saturation by up to 0.4 besides; none: the centre, not flipped."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that a random crop covers."""
    hflip: bool = True
    """Mirror half of the crops left to right; --no-hflip leaves them."""
    vflip: bool = False
    """Mirror half of the crops upside down: for pictures without an upright, such as slides or aerial ones."""
    rot90: bool = False
    """Turn crops by a random multiple of 90 degrees; needs square crops."""
    rotate: float = 0.0
    """Turn crops by up to this many degrees either way, the corners filled by mirroring."""

    steps: Annotated[int | None, default("as --epochs says")] = None
    """Optimizer steps; give this or --epochs."""
    epochs: Annotated[float | None, default("as --steps says")] = None
    """Passes over the data; give this or --steps."""
    batch_size: int = 256
    """Views a step, over all processes; the paper's is 4096."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 views a step. Scaled by batch_size / 256 from 256 on (Goyal et al. 2017), by its square
    root below."""
    weight_decay: float = 0.05
    """AdamW's, for matrices; biases and norms have none."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0 (the paper: 40 of 800 epochs)."""
    clip_grad: Annotated[float | None, default("not limited")] = None
    """Largest norm of the gradient of all parameters."""

    holdout: Annotated[int | None, default("a twentieth, at most 2000")] = None
    """Pictures held out of training for the validation loss, where there is no DIR/val; 0 holds none out."""
    group: Annotated[int | None, default("none")] = None
    """Folder level whose members are held out together: 1 is the first folder below DATA, such as a patient or site."""
    knn: Annotated[str | None, default("none", "DIR")] = None
    """A labelled folder: the accuracy of k nearest neighbours on it is measured at every validation."""
    validate_every: int = 500
    """Steps between validations and pictures of reconstructions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", sides(self.image_size))
        if (self.steps is None) == (self.epochs is None):
            raise UsageError("give the length of the run as --steps or as --epochs, one of the two")
        super().__post_init__()
        check(self, _RULES)
        if self.strategy == "grid" and self.mask_ratio != 0.75:
            raise UsageError(f"--mask-ratio must be 0.75 with --strategy grid, not {self.mask_ratio}")
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


def _is_corruption(value: Any) -> bool:
    return numbers(value, 3) and min(value) >= 0 and abs(sum(value) - 1) < 1e-6


_RULES = {
    "image_size": Rule(is_size, "a side, or a height and a width, in whole pixels"),
    "channels": Rule(lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    "mask_ratio": number(lambda value: 0 < value < 1, "above 0 and below 1"),
    "strategy": one_of(Strategy),
    "target": one_of(Target),
    "pca_components": whole(1),
    "loss_on": one_of(LossOn),
    "corruption": Rule(_is_corruption, "three shares that sum to 1"),
    "predict_share": number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "masks_per_image": whole(1),
    "decoder_width": whole(1),
    "decoder_depth": whole(0),
    "decoder_heads": whole(1),
    "mask_tokens": one_of(MaskTokens),
    "augment": one_of(Augment),
    "crop_scale": Rule(is_scale, "two numbers, 0 < low <= high <= 1"),
    "rotate": number(lambda value: 0 <= value <= 180, "from 0 to 180"),
    "steps": whole(1),
    "epochs": POSITIVE,
    "batch_size": whole(1),
    "base_lr": POSITIVE,
    "weight_decay": number(lambda value: 0 <= value < math.inf, "of at least 0"),
    "warmup": SHARE,
    "clip_grad": POSITIVE,
    "holdout": whole(0),
    "group": whole(1),
    "validate_every": whole(1),
}


@own_first
@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """What a pretraining run will need: the flags of `maehub pretrain`, and these."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DATA]", help_behavior_hint="")] = ""
    """The pictures: they are counted, and reading them is timed. Not needed with --images."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("run")
    """Run folder that pretrain would write; nothing is written here."""
    images: Annotated[int | None, default("counted in DATA")] = None
    """Pictures in the data set."""
    on: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """Device to plan for, such as h100, a100-80, l4 or rtx-4090; auto is this machine's."""
    processes: int = 1
    """Processes, one a device."""
    utilisation: Annotated[float | None, default("as measured")] = None
    """Share of the device's peak rate that training reaches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share = number(lambda value: 0 < value <= 1, "above 0 and at most 1")
        check(self, {"images": whole(1), "utilisation": share, "processes": whole(1)})
