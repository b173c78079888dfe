"""What a fine-tuning run is told. No torch here, so that ``--help`` is fast."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from maehub.errors import UsageError
from maehub.train.engine import (
    POSITIVE,
    SHARE,
    Flag,
    Rule,
    RunConfig,
    check,
    default,
    is_scale,
    is_size,
    number,
    one_of,
    own_first,
    sides,
    whole,
)

Recipe = Literal["auto", "official", "paper", "448", "scratch", "linear", "attentive"]
HeadPool = Literal["cls", "mean"]
ClassWeights = Literal["none", "balanced"]


@own_first
@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Fine-tune an encoder as a classifier, by a recipe fitted to the data."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Labelled pictures: DIR/CLASS/…, or DIR/train/CLASS and DIR/val/CLASS; a .csv with the columns path and label
    (several labels with | between them); tar shards with .cls members; a Parquet file or a saved dataset."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = "vit-nano"
    """Weights to start from: a catalog name, a Hub id, a folder or a file; timm/NAME for a backbone of timm;
    untrained/NAME for fresh weights."""
    recipe: Recipe = "auto"
    """official: of the published code, for weights trained on normalised pixels; paper: of table 9; 448: for large
    pictures; scratch: supervised training from fresh weights, table 11; linear: linear probing, table 10; attentive: a
    probe that pools by attention. auto chooses one of the first four."""
    blocks: Annotated[float | None, default("all")] = None
    """Partial fine-tuning (figure 9): train the last so many blocks and the head; 0.5 is the MLP of the last one."""
    pool: Annotated[HeadPool | None, default("the recipe's")] = None
    """What the head sees: the class token, or the mean of the patches."""
    image_size: Annotated[tuple[int, ...], default("the model's", "PIXELS ...")] = ()
    """Side of the pictures, or height and width, in pixels; multiples of the patch."""
    channels: Annotated[int | None, default("the model's")] = None
    """Image channels: 3, or 1 for greyscale."""

    steps: Annotated[int | None, default("as --epochs says")] = None
    """Optimizer steps."""
    epochs: Annotated[float | None, default("the recipe's")] = None
    """Passes over the training pictures; with fewer than 10,000 of them the default is at least 1,000 steps."""
    batch_size: Annotated[int | None, default("the recipe's, less for small data")] = None
    """Pictures a step, over all processes."""
    base_lr: Annotated[float | None, default("the recipe's")] = None
    """Learning rate for 256 pictures a step. Scaled by batch_size / 256 from 256 on, by its square root below."""
    layer_decay: Annotated[float | None, default("the recipe's")] = None
    """Factor of the learning rate from each layer to the one below."""
    drop_path: Annotated[float | None, default("the recipe's")] = None
    """Share of samples for which the last block is passed over; earlier ones linearly less (Huang et al. 2016)."""
    weight_decay: Annotated[float | None, default("the recipe's")] = None
    """The optimizer's, for matrices."""
    warmup: Annotated[float | None, default("the recipe's")] = None
    """Share of the steps over which the rate rises from 0."""
    clip_grad: Annotated[float | None, default("not limited")] = None
    """Largest norm of the gradient of all parameters."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the picture's area that a random crop covers."""
    hflip: bool = True
    """Mirror half of the crops left to right; --no-hflip leaves them."""
    vflip: bool = False
    """Mirror half of the crops upside down."""
    rot90: bool = False
    """Turn crops by a random multiple of 90 degrees; needs square crops."""
    randaugment: Annotated[str | None, default("the recipe's", "POLICY")] = None
    """RandAugment, AugMix or AutoAugment in the words of timm, such as rand-m9-mstd0.5-inc1; none leaves it out."""
    mixup: Annotated[float | None, default("the recipe's")] = None
    """Alpha of mixup (Zhang et al. 2017); 0 leaves it out."""
    cutmix: Annotated[float | None, default("the recipe's")] = None
    """Alpha of cutmix (Yun et al. 2019); 0 leaves it out. With mixup, half of the batches get each."""
    smoothing: Annotated[float | None, default("the recipe's")] = None
    """Label smoothing (Szegedy et al. 2015)."""
    erasing: Annotated[float | None, default("the recipe's")] = None
    """Probability of random erasing (Zhong et al. 2017), filled with noise."""
    ema: Annotated[float | None, default("the recipe's")] = None
    """Decay of an average of the weights, which is then what is measured and exported; 0 for none."""
    class_weights: ClassWeights = "none"
    """balanced: every class counts alike in the loss, however many pictures it has."""

    val_share: float = 0.2
    """Share of each class to measure on, where there is no DIR/val."""
    group: Annotated[str | None, default("none", "COLUMN|LEVEL")] = None
    """What must stay on one side of the split, such as a patient or a site: a column of the CSV or table, or a folder
    level below DATA as a number."""
    label: Annotated[str | None, default("label", "COLUMN")] = None
    """The column of labels in a CSV or table."""
    skip_twins: Flag = False
    """Do not look for pictures that are on both sides of the split, as is done with up to 20,000 pictures."""
    validate_every: Annotated[int | None, default("a tenth of the run")] = None
    """Steps between measurements on the held-out pictures; nothing is chosen by them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", sides(self.image_size))
        super().__post_init__()
        check(self, _RULES)
        if self.steps is not None and self.epochs is not None:
            raise UsageError("give the length of the run as --steps or as --epochs, not both")
        if self.rot90 and len(self.image_size) == 2 and self.image_size[0] != self.image_size[1]:
            raise UsageError(f"--rot90 needs square crops, not --image-size {self.image_size[0]} {self.image_size[1]}")
        if self.recipe in ("linear", "attentive"):
            for name in ("blocks", "drop_path", "layer_decay"):
                if getattr(self, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} is for training the network, which --recipe {self.recipe} freezes"
                    )


_FROM_0 = number(lambda value: 0 <= value < math.inf, "of at least 0")
_RULES = {
    "recipe": one_of(Recipe),
    "blocks": number(lambda value: value == 0.5 or (value >= 0 and value == int(value)), "of whole blocks, or 0.5"),
    "pool": one_of(HeadPool),
    "image_size": Rule(is_size, "a side, or a height and a width, in whole pixels"),
    "channels": Rule(lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    "steps": whole(1),
    "epochs": POSITIVE,
    "batch_size": whole(1),
    "base_lr": POSITIVE,
    "layer_decay": number(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "drop_path": SHARE,
    "weight_decay": _FROM_0,
    "warmup": SHARE,
    "clip_grad": POSITIVE,
    "crop_scale": Rule(is_scale, "two numbers, 0 < low <= high <= 1"),
    "mixup": _FROM_0,
    "cutmix": _FROM_0,
    "smoothing": SHARE,
    "erasing": number(lambda value: 0 <= value <= 1, "from 0 to 1"),
    "ema": SHARE,
    "class_weights": one_of(ClassWeights),
    "val_share": number(lambda value: 0 < value < 1, "above 0 and below 1"),
    "validate_every": whole(1),
}
