"""What a pretraining run is told. Frozen dataclasses, saved in the run folder; the command line reads their fields.

No torch here, so that ``--help`` is fast.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from maehub.errors import UsageError
from maehub.train.engine import COMMON, Flag, RunConfig, Section, default, own_first, settings

Strategy = Literal["random", "block", "grid"]
Target = Literal["pixels", "normalised_pixels", "pca", "tokens"]
MaskTokens = Literal["decoder", "encoder"]
Augment = Literal["none", "fixed-crop", "random-crop", "colour-jitter"]


def _is_corruption(value: Any) -> bool:
    return settings.numbers(value, 3) and min(value) >= 0 and abs(sum(value) - 1) < 1e-6


Corruption = Annotated[tuple[float, float, float], settings.Rule(_is_corruption, "three shares that sum to 1")]

_BATCH, _LEAST_BATCH, _STEPS_AN_EPOCH = 256, 8, 8  # of the batch that is fitted to the data


@own_first
@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Pretrain a masked autoencoder by the recipe of He et al. 2021, table 8."""

    data: Annotated[Positional[str], Section.DATA, COMMON, arg(metavar="DATA")]
    """A folder of pictures, any nesting; DIR/train and DIR/val are used as such where both exist. Or a .txt list of
    files, tar shards in the webdataset format ("shards/{000..099}.tar", s3://…), a Parquet file or a saved dataset."""
    model: Annotated[settings.Model, COMMON, arg(metavar="PRESET")] = "vit-nano"
    """Architecture preset to train from scratch: vit-nano, vit-ti, vit-s, vit-b, vit-l, vit-h."""
    from_: Annotated[str, COMMON, default("from scratch", "MODEL"), arg(name="from")] = ""
    """Weights to continue from: a catalog name, a Hub id, a folder or a file. Overrides --model."""
    image_size: Annotated[settings.ImageSize, Section.DATA, COMMON] = ()
    """Side of the crops, or height and width, in pixels; multiples of the patch."""
    channels: settings.Channels = None

    mask_ratio: Annotated[settings.ProperShare, Section.OBJECTIVE, COMMON] = 0.75
    """Share of patches hidden from the encoder (figure 5)."""
    strategy: Strategy = "random"
    """Which patches are hidden (table 1f)."""
    target: Annotated[Target | None, COMMON, default("as --from, else normalised_pixels")] = None
    """What the decoder predicts (table 1d). tokens: ViT's 512 mean colours, or a tokenizer given in Python."""
    pca_components: settings.Count = 96
    """Coefficients of a patch with --target pca."""
    loss_on: settings.LossOn = "hidden"
    """Patches that the loss is taken on; "all" lost half a point in the paper (section 4)."""
    corruption: Corruption = (1.0, 0.0, 0.0)
    """Shares of hidden patches that become a mask token, another patch of the picture, or stay (BERT and ViT take
    0.8 0.1 0.1). Other than 1 0 0 needs --mask-tokens encoder."""
    predict_share: settings.PositiveShare = 1.0
    """Share of the hidden patches that the decoder predicts; the others are left out of it, which saves its time."""
    masks_per_image: settings.Count = 1
    """Masks of each decoded picture. The batch counts views; an epoch is this many times the pictures."""
    decoder_width: Annotated[settings.Count | None, Section.MODEL, default("the preset's")] = None
    """Width of the decoder (table 1b)."""
    decoder_depth: Annotated[settings.CountFrom0 | None, default("the preset's")] = None
    """Blocks of the decoder (table 1a); 0 is a linear head on an encoder that sees mask tokens."""
    decoder_heads: Annotated[settings.Count | None, default("the preset's")] = None
    """Heads of the decoder."""
    mask_tokens: Annotated[MaskTokens | None, default("as --from, else decoder")] = None
    """Where mask tokens enter; "encoder" is the ablation of table 1c."""

    augment: Annotated[Augment, Section.AUGMENTATION] = "random-crop"
    """What is done to pictures (table 1e). fixed-crop: the short side to 8/7 of the size, a crop at a random place;
    colour-jitter: brightness, contrast and saturation by up to 0.4 besides; none: the centre, not flipped."""
    crop_scale: settings.CropScale = (0.2, 1.0)
    """Share of the picture's area that a random crop covers."""
    hflip: bool = True
    """Mirror half of the crops left to right; --no-hflip leaves them."""
    vflip: bool = False
    """Mirror half of the crops upside down: for pictures without an upright, such as slides or aerial ones."""
    rot90: bool = False
    """Turn crops by a random multiple of 90 degrees; needs square crops."""
    rotate: Annotated[float, settings.number(lambda value: 0 <= value <= 180, "from 0 to 180")] = 0.0
    """Turn crops by up to this many degrees either way, the corners filled by mirroring."""

    steps: Annotated[settings.Count | None, Section.TRAINING, COMMON, default("as --epochs says")] = None
    """Optimizer steps; give this or --epochs."""
    epochs: Annotated[settings.Positive | None, COMMON, default("as --steps says")] = None
    """Passes over the data; give this or --steps."""
    batch_size: Annotated[settings.Count | None, COMMON, default("256, of less data an eighth")] = None
    """Views a step, over all processes; the paper's is 4096."""
    base_lr: Annotated[settings.Positive, COMMON] = 1.5e-4
    """Learning rate for 256 views a step. Scaled by batch_size / 256 from 256 on (Goyal et al. 2017), by its square
    root below."""
    weight_decay: settings.NotNegative = 0.05
    """AdamW's, for matrices; biases and norms have none."""
    warmup: Annotated[settings.Share, COMMON] = 0.05
    """Share of the steps over which the rate rises from 0 (the paper: 40 of 800 epochs)."""
    clip_grad: Annotated[settings.Positive | None, default("not limited")] = None
    """Largest norm of the gradient of all parameters."""

    holdout: Annotated[settings.CountFrom0 | None, Section.VALIDATION, default("a twentieth, at most 2000")] = None
    """Pictures held out of training for the validation loss, where there is no DIR/val; 0 holds none out."""
    group: Annotated[settings.Count | None, default("none")] = None
    """Folder level whose members are held out together: 1 is the first folder below DATA, such as a patient or site."""
    knn: Annotated[str | None, default("none", "DIR")] = None
    """A labelled folder: the accuracy of k nearest neighbours on it is measured at every validation."""
    validate_every: settings.Count = 500
    """Steps between validations and pictures of reconstructions."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError("give the length of the run as --steps or as --epochs, one of the two")
        super().__post_init__()
        if self.strategy == "grid" and self.mask_ratio != 0.75:
            raise UsageError(f"--mask-ratio must be 0.75 with --strategy grid, not {self.mask_ratio}")
        if self.batch_size and self.batch_size % self.masks_per_image:
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


def batch_size_of(config: PretrainConfig, pictures: int, processes: int) -> int:
    """The batch: as asked for, or 256 views, of little data an eighth of an epoch, as in fine-tuning.

    Raises:
        UsageError: it cannot be divided among the processes, or has more views than an epoch.
    """
    unit, views = processes * config.masks_per_image, pictures * config.masks_per_image
    if config.batch_size is None:
        fitted = min(_BATCH, max(views // _STEPS_AN_EPOCH, _LEAST_BATCH), views)
        return max(fitted // unit, 1) * unit
    if config.batch_size % unit:
        raise UsageError(
            f"--batch-size {config.batch_size} counts the views of all processes: it must be a multiple of "
            f"{processes} processes times {config.masks_per_image} masks of a picture"
        )
    if config.batch_size > views:
        raise UsageError(
            f"--batch-size {config.batch_size} is more than the {views} views of an epoch ({pictures} pictures to "
            "train on): leave it out, and it is fitted to them"
        )
    return config.batch_size


@own_first
@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """What a pretraining run will need: the flags of `maehub pretrain`, and these."""

    data: Annotated[Positional[str], Section.DATA, COMMON, arg(metavar="[DATA]", help_behavior_hint="")] = ""
    """The pictures: they are counted, and reading them is timed. Not needed with --images."""
    out: Annotated[Path, Section.OUTPUT, arg(aliases=["-o"])] = Path("run")
    """Run folder that pretrain would write; nothing is written here."""
    images: Annotated[settings.Count | None, Section.DATA, COMMON, default("counted in DATA")] = None
    """Pictures in the data set."""
    on: Annotated[str, Section.MACHINE, COMMON, arg(metavar="DEVICE")] = "auto"
    """Device to plan for, such as h100, a100-80, l4 or rtx-4090; auto is this machine's."""
    processes: Annotated[settings.Count, COMMON] = 1
    """Processes, one a device."""
    resume: Flag = False
    overwrite: Flag = False
    seed: Annotated[settings.Seed, Section.TRAINING] = 0
    device: settings.Device = "auto"
    utilisation: Annotated[settings.PositiveShare | None, default("as measured")] = None
    """Share of the device's peak rate that training reaches."""
