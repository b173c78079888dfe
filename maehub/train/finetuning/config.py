"""What a fine-tuning run is told. No torch here, so that ``--help`` is fast."""

from dataclasses import dataclass
from typing import Annotated, Literal

from maehub.errors import UsageError
from maehub.train.engine import COMMON, Flag, RunConfig, Section, default, own_first, settings

Recipe = Literal["auto", "official", "paper", "448", "scratch", "linear", "attentive", "ade20k", "vitdet"]
HeadPool = Literal["cls", "mean"]
HeadStart = Literal["probe", "zero"]
ClassWeights = Literal["none", "balanced"]
Task = Literal["classification", "regression", "segment", "detect"]
Decoder = Literal["linear", "upernet"]


@own_first
@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tune an encoder as a classifier or a segmenter, by a recipe fitted to the data."""

    data: Annotated[settings.LabelledData, COMMON]
    model: Annotated[settings.Model, COMMON] = "vit-nano"
    """Weights to start from: a catalog name, a Hub id, a folder or a file; timm/NAME for a backbone of timm;
    untrained/NAME for fresh weights."""
    recipe: Annotated[Recipe, Section.TRAINING, COMMON] = "auto"
    """auto: for fewer than 10,000 pictures, found by measurement; else one of the next ones, by the network. official:
    of the published code, for weights trained on normalised pixels; paper: of table 9; 448: for large pictures;
    scratch: supervised training from fresh weights, table 11; linear: linear probing, table 10; attentive: a probe that
    pools by attention. Of segmentation there are auto, linear and ade20k: UPerNet as published; of detection auto and
    vitdet, as published."""
    blocks: Annotated[
        float | None,
        settings.number(lambda value: value == 0.5 or (value >= 0 and value == int(value)), "of whole blocks, or 0.5"),
        COMMON,
        default("the recipe's: all, or by auto two fifths"),
    ] = None
    """Partial fine-tuning (figure 9): train the last so many blocks and the head; 0.5 is the MLP of the last one."""
    pool: Annotated[HeadPool | None, Section.MODEL, default("the recipe's")] = None
    """What the head sees: the class token, or the mean of the patches."""
    head_start: Annotated[HeadStart | None, default("the recipe's")] = None
    """probe: the head begins as the linear probe of what it sees, solved before the first step, and of the probe and
    the network the better one is kept, by training pictures that are not trained on. zero: a fresh head."""
    image_size: Annotated[settings.ImageSize, Section.DATA, COMMON] = ()
    channels: settings.Channels = None

    steps: Annotated[settings.Count | None, Section.TRAINING, default("as --epochs says")] = None
    """Optimizer steps."""
    epochs: Annotated[settings.Positive | None, COMMON, default("the recipe's")] = None
    """Passes over the training pictures; by published recipes at least 1,000 steps if there are fewer than 10,000."""
    minutes: Annotated[settings.Positive | None, COMMON, default("10 on a CPU by auto, else not limited")] = None
    """Fit the length of the run to the clock, before it starts; a recipe that needs less takes less."""
    batch_size: Annotated[settings.Count | None, COMMON, default("the recipe's, less for small data")] = None
    """Pictures a step, over all processes."""
    base_lr: Annotated[settings.Positive | None, COMMON, default("the recipe's")] = None
    """Learning rate for 256 pictures a step. Scaled by batch_size / 256 from 256 on, by its square root below."""
    layer_decay: Annotated[settings.PositiveShare | None, default("the recipe's")] = None
    """Factor of the learning rate from each layer to the one below."""
    drop_path: Annotated[settings.Share | None, default("the recipe's")] = None
    """Share of samples for which the last block is passed over; earlier ones linearly less (Huang et al. 2016)."""
    weight_decay: Annotated[settings.NotNegative | None, default("the recipe's")] = None
    """The optimizer's, for matrices."""
    warmup: Annotated[settings.Share | None, default("the recipe's")] = None
    """Share of the steps over which the rate rises from 0."""
    clip_grad: Annotated[settings.Positive | None, default("not limited")] = None
    """Largest norm of the gradient of all parameters."""

    crop_scale: Annotated[settings.CropScale | None, Section.AUGMENTATION, default("the recipe's")] = None
    """Share of the picture's area that a random crop covers."""
    hflip: bool = True
    """Mirror half of the crops left to right; --no-hflip leaves them."""
    vflip: bool = False
    """Mirror half of the crops upside down."""
    rot90: bool = False
    """Turn crops by a random multiple of 90 degrees; needs square crops."""
    randaugment: Annotated[str | None, default("the recipe's", "POLICY")] = None
    """RandAugment, AugMix or AutoAugment in the words of timm, such as rand-m9-mstd0.5-inc1; none leaves it out."""
    mixup: Annotated[settings.NotNegative | None, default("the recipe's")] = None
    """Alpha of mixup (Zhang et al. 2017); 0 leaves it out."""
    cutmix: Annotated[settings.NotNegative | None, default("the recipe's")] = None
    """Alpha of cutmix (Yun et al. 2019); 0 leaves it out. With mixup, half of the batches get each."""
    smoothing: Annotated[settings.Share | None, Section.TRAINING, default("the recipe's")] = None
    """Label smoothing (Szegedy et al. 2015)."""
    erasing: Annotated[
        float | None,
        settings.number(lambda value: 0 <= value <= 1, "from 0 to 1"),
        Section.AUGMENTATION,
        default("the recipe's"),
    ] = None
    """Probability of random erasing (Zhong et al. 2017), filled with noise."""
    ema: Annotated[settings.Share | None, Section.TRAINING, default("the recipe's")] = None
    """Decay of an average of the weights, which is then what is measured and exported; 0 for none."""
    class_weights: ClassWeights = "none"
    """balanced: every class counts alike in the loss, however many pictures it has."""

    val_share: Annotated[settings.ValShare, Section.DATA] = 0.2
    group: Annotated[settings.SplitGroup, COMMON] = None
    label: settings.Label = None
    task: Annotated[Task, COMMON] = "classification"
    """regression: the labels are numbers, in the column --label of a CSV, or in several with commas between. segment:
    every pixel has a class, in DIR/images and DIR/masks, or drawn from outlines. detect: objects with boxes, and masks
    where all have outlines, as COCO, YOLO, Pascal VOC or LabelMe files have them."""
    decoder: Annotated[Decoder | None, Section.MODEL, default("the recipe's")] = None
    """Of segmentation: one linear map of every patch, or UPerNet."""
    short_side: Annotated[
        settings.CountFrom0 | None, Section.DATA, default("their own, or one window, or four", "PIXELS")
    ] = None
    """Of segmentation and detection: what pictures are scaled to before crops and windows of --image-size; 0 for their
    own size."""
    skip_twins: Flag = False
    """Do not look for pictures that are on both sides of the split, as is done with up to 20,000 pictures."""
    validate_every: Annotated[settings.Count | None, Section.VALIDATION, default("a tenth of the run")] = None
    """Steps between measurements on the held-out pictures; nothing is chosen by them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.epochs is not None:
            raise UsageError("give the length of the run as --steps or as --epochs, not both")
        if self.minutes is not None and (self.steps is not None or self.epochs is not None):
            raise UsageError("--minutes fits the length of the run to the clock: leave out --steps and --epochs")
        if self.rot90 and len(self.image_size) == 2 and self.image_size[0] != self.image_size[1]:
            raise UsageError(f"--rot90 needs square crops, not --image-size {self.image_size[0]} {self.image_size[1]}")
        if self.head_start == "probe" and (self.recipe == "linear" or self.class_weights == "balanced"):
            raise UsageError(
                "--head-start probe goes with neither --recipe linear nor --class-weights balanced: it begins from a "
                "linear probe without weights of classes"
            )
        if self.task != "segment" and self.decoder is not None:
            raise UsageError("--decoder is for --task segment")
        if self.task not in ("segment", "detect") and self.short_side is not None:
            raise UsageError("--short-side is for --task segment and --task detect")
        if self.task != "segment" and self.recipe == "ade20k":
            raise UsageError("--recipe ade20k is for --task segment")
        if self.task != "detect" and self.recipe == "vitdet":
            raise UsageError("--recipe vitdet is for --task detect")
        if self.task == "regression":
            unfit = {"recipe": "linear", "head_start": "zero", "class_weights": "balanced"}
            for name in ("mixup", "cutmix", "smoothing", *unfit):
                value = getattr(self, name)
                if value and value == unfit.get(name, value):
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise UsageError(f"{flag} is for classes, and --task regression has numbers")
        if self.recipe in ("linear", "attentive"):
            for name in ("blocks", "drop_path", "layer_decay"):
                if getattr(self, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} is for training the network, which --recipe {self.recipe} freezes"
                    )
