"""What a training run is told. Frozen dataclasses, saved in the run folder; the command line reads their fields.

No torch here, so that ``--help`` is fast.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maehub.errors import UsageError


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a masked autoencoder on a folder of pictures.

    The defaults are the recipe of He et al. 2021, appendix A.1, table 8, except for the batch and the length of the
    run, which fit one machine.
    """

    data: tyro.conf.Positional[Path]
    """Folder of pictures, any nesting. DIR/train and DIR/val are used as such where both exist."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Run folder to write."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "vit-nano"
    """Architecture preset to train from scratch: vit-nano, vit-ti, vit-s, vit-b, vit-l, vit-h."""
    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """Weights to continue from: a catalog name, a Hub id, a folder or a file. Overrides --model."""
    image_size: int | None = None
    """Side of the crops in pixels; None is the model's native size."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the encoder."""
    strategy: Literal["random", "block", "grid"] = "random"
    """Which patches are hidden."""
    target: Literal["pixels", "normalised_pixels"] | None = None
    """What the decoder predicts; None keeps that of --from, and normalised pixels from scratch."""
    decoder_width: int | None = None
    """Width of the decoder; None is the preset's."""
    decoder_depth: int | None = None
    """Blocks of the decoder; None is the preset's."""
    decoder_heads: int | None = None
    """Heads of the decoder; None is the preset's."""
    mask_tokens: Literal["decoder", "encoder"] = "decoder"
    """Where mask tokens enter; "encoder" is the ablation of table 1c."""
    steps: int | None = None
    """Optimizer steps; give this or --epochs."""
    epochs: float | None = None
    """Passes over the data; give this or --steps."""
    batch_size: int = 256
    """Images a step, over all processes."""
    base_lr: float = 1.5e-4
    """Learning rate for 256 images a step; the rate is base_lr · batch_size / 256."""
    weight_decay: float = 0.05
    """AdamW's, for matrices; biases and norms have none."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from 0 (the paper: 40 of 800 epochs)."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the picture's area that a random crop covers."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 where the device computes it natively, else fp32; losses are always fp32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is written at the end too."""
    validate_every: int = 500
    """Steps between validation losses and pictures, where there are validation pictures."""
    resume: bool = False
    """Go on from the newest valid checkpoint of the run folder."""
    overwrite: bool = False
    """Delete an existing run folder first."""
    seed: int = 0
    """Seed of weights, order, crops, flips and masks."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    workers: int | None = None
    """Processes that read pictures; None fits the machine."""
    cache: bool = False
    """Decode every picture once and keep it in memory: for data sets that fit, 4 bytes a pixel."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError("give the length of the run as --steps or as --epochs, one of the two")
        _require("--steps", self.steps, self.steps is None or self.steps >= 1, "at least 1")
        _require("--epochs", self.epochs, self.epochs is None or 0 < self.epochs < math.inf, "above 0")
        _require("--mask-ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "above 0 and below 1")
        _require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        _require("--base-lr", self.base_lr, 0 < self.base_lr < math.inf, "above 0")
        _require("--weight-decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        _require("--warmup", self.warmup, 0 <= self.warmup < 1, "at least 0 and below 1")
        low, high = self.crop_scale
        _require("--crop-scale", self.crop_scale, 0 < low <= high <= 1, "two numbers, 0 < low <= high <= 1")
        _require("--checkpoint-every", self.checkpoint_every, self.checkpoint_every >= 1, "at least 1")
        _require("--validate-every", self.validate_every, self.validate_every >= 1, "at least 1")
        _require("--workers", self.workers, self.workers is None or self.workers >= 0, "at least 0")
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with the run and --overwrite deletes it: give one of the two")


def _require(flag: str, value: object, valid: bool, rule: str) -> None:
    if not valid:
        raise UsageError(f"{flag} must be {rule}, not {value}")
