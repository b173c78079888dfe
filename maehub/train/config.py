"""What a training run is told. Frozen dataclasses, saved in the run folder; the command line reads their fields.

No torch here, so that ``--help`` is fast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from maehub.errors import UsageError

Strategy = Literal["random", "block", "grid"]
Target = Literal["pixels", "normalised_pixels"]
MaskTokens = Literal["decoder", "encoder"]
Precision = Literal["auto", "fp32", "bf16"]


def _default(meaning: str) -> object:
    """What ``--help`` says that a setting is if it is left out."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {meaning})")


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder by the recipe of He et al. 2021, table 8."""

    data: tyro.conf.Positional[Path]
    """Folder of pictures, any nesting. DIR/train and DIR/val are used as such where both exist."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Run folder to write."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="PRESET")] = "vit-nano"
    """Architecture preset to train from scratch: vit-nano, vit-ti, vit-s, vit-b, vit-l, vit-h."""
    from_: Annotated[str, tyro.conf.arg(name="from", metavar="MODEL", help_behavior_hint="(default: from scratch)")] = (
        ""
    )
    """Weights to continue from: a catalog name, a Hub id, a folder or a file. Overrides --model."""
    image_size: Annotated[int | None, _default("the model's")] = None
    """Side of the crops in pixels, a multiple of the patch."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder."""
    strategy: Strategy = "random"
    """Which patches are hidden."""
    target: Annotated[Target | None, _default("as --from, else normalised_pixels")] = None
    """What the decoder predicts."""
    decoder_width: Annotated[int | None, _default("the preset's")] = None
    """Width of the decoder."""
    decoder_depth: Annotated[int | None, _default("the preset's")] = None
    """Blocks of the decoder."""
    decoder_heads: Annotated[int | None, _default("the preset's")] = None
    """Heads of the decoder."""
    mask_tokens: Annotated[MaskTokens | None, _default("as --from, else decoder")] = None
    """Where mask tokens enter; "encoder" is the ablation of table 1c."""
    steps: Annotated[int | None, _default("as --epochs says")] = None
    """Optimizer steps; give this or --epochs."""
    epochs: Annotated[float | None, _default("as --steps says")] = None
    """Passes over the data; give this or --steps."""
    batch_size: int = 256
    """Images a step, over all processes; the paper's is 4096."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 images a step; the rate is base_lr · batch_size / 256."""
    weight_decay: float = 0.05
    """AdamW's, for matrices; biases and norms have none."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0 (the paper: 40 of 800 epochs)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that a random crop covers."""
    precision: Precision = "auto"
    """bf16 where the device computes it natively, else fp32; losses are always fp32."""
    compile: Flag = False
    """Compile the model with torch.compile."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is written at the end too."""
    validate_every: int = 500
    """Steps between pictures of reconstructions, and between validation losses where there is a DIR/val."""
    resume: Flag = False
    """Go on from the newest valid checkpoint of the run folder."""
    allow_data_change: Flag = False
    """Go on although the pictures are not those that the run was started with."""
    overwrite: Flag = False
    """Replace the run in an existing run folder."""
    seed: int = 0
    """Seed of weights, order, crops, flips and masks."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    workers: Annotated[int | None, _default("as fits the machine")] = None
    """Processes that read pictures; 0 reads in this one."""
    cache: Flag = False
    """Decode every picture once and keep it in memory: for data sets that fit, 4 bytes a pixel."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""

    def __post_init__(self) -> None:
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
        brought = ("decoder_width", "decoder_depth", "decoder_heads", "mask_tokens")
        given = [_option(name) for name in brought if name not in unset]
        if self.from_ and given:
            raise UsageError(f"--from brings a decoder of its own: leave {', '.join(given)} out")


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


def _is_scale(value: Any) -> bool:
    if not isinstance(value, tuple | list) or [type(part) in (int, float) for part in value] != [True, True]:
        return False
    return 0 < value[0] <= value[1] <= 1


def _option(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


_RULES = {
    "image_size": _whole(1),
    "mask_ratio": _number(lambda value: 0 < value < 1, "above 0 and below 1"),
    "strategy": _one_of(Strategy),
    "target": _one_of(Target),
    "decoder_width": _whole(1),
    "decoder_depth": _whole(0),
    "decoder_heads": _whole(1),
    "mask_tokens": _one_of(MaskTokens),
    "steps": _whole(1),
    "epochs": _number(lambda value: 0 < value < math.inf, "above 0"),
    "batch_size": _whole(1),
    "base_lr": _number(lambda value: 0 < value < math.inf, "above 0"),
    "weight_decay": _number(lambda value: 0 <= value < math.inf, "of at least 0"),
    "warmup": _number(lambda value: 0 <= value < 1, "of at least 0 and below 1"),
    "crop_scale": _Rule(_is_scale, "two numbers, 0 < low <= high <= 1"),
    "precision": _one_of(Precision),
    "checkpoint_every": _whole(1),
    "validate_every": _whole(1),
    "seed": _Rule(lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "workers": _whole(0),
}
