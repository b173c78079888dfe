"""The arguments of each command but training: frozen dataclasses that the command line reads. No torch here.

What a value may be is checked by the functions that the commands call.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from maehub.errors import UsageError
from maehub.train.engine import BatchSize, Device, Flag, Model, Section, Sides, Workers, default, settings

Out = Annotated[Path, Section.OUTPUT, arg(aliases=["-o"])]
Loadable = Annotated[Model, arg(help="A catalog name, a Hub id, a folder or a .safetensors file.")]
CacheFolder = Annotated[Path | None, default("the Hub's own cache", "FOLDER", "Where downloads are kept.")]


@dataclass(frozen=True)
class List:
    """List the models of the catalog: size, role, target, licence, source."""

    pattern: Annotated[Positional[str], arg(metavar="[PATTERN]")] = "*"
    """Names to show; * and ? are wildcards."""


@dataclass(frozen=True)
class Info:
    """Show everything that is known about a model."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """A name that `maehub list` shows."""


@dataclass(frozen=True)
class Download:
    """Download a model's files and verify them, for later use without a network."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """A name that `maehub list` shows, or a Hub id: user/repo or user/repo@revision."""
    revision: Annotated[str | None, default("the catalog's, or main", "BRANCH|TAG|COMMIT")] = None
    """What to take from the Hub."""
    cache_dir: CacheFolder = None
    lock_timeout: Annotated[float, arg(metavar="SECONDS")] = 60.0
    """Longest wait for another process that downloads the same file; then it is downloaded beside that one."""


@dataclass(frozen=True)
class Cache:
    """Look after the caches that downloads are kept in."""

    what: Annotated[Positional[Literal["clean"]], arg(metavar="{clean}")]
    """clean removes what killed downloads left, unless something was written to it within the last hour."""
    dry_run: Flag = False
    """Only say what would be removed."""
    cache_dir: CacheFolder = None


@dataclass(frozen=True)
class Verify:
    """Hash a model's files again and compare."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A catalog name, a Hub id, a folder or a file."""


@dataclass(frozen=True)
class Convert:
    """Convert weights between the forms of other libraries, pickles included."""

    source: Annotated[Positional[str], arg(metavar="MODEL")]
    """A file or folder with the names of the official code, timm, transformers, lightly or mmpretrain, a name that
    `maehub list` shows, or a Hub id."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """Folder to write."""
    to: Annotated[
        Literal[
            "maehub", "official", "timm", "transformers", "lightly", "mmpretrain", "detectron2", "onnx", "torch-export"
        ],
        arg(metavar="FORM"),
    ] = "maehub"
    """maehub, official, transformers, lightly or mmpretrain; of the encoder alone timm, detectron2 (the backbone of
    ViTDet), onnx or torch-export."""
    heads: Annotated[int | None, default("those of the published network with this shape")] = None
    """Attention heads of the encoder."""
    decoder_heads: Annotated[int | None, default("16 at width 512")] = None
    """Attention heads of the decoder."""
    target: Annotated[Literal["pixels", "normalised_pixels", "pca", "tokens"] | None, default("unknown")] = None
    """What the decoder was trained to predict; no file of weights says it."""
    overwrite: Flag = False
    """Replace an existing folder."""


@dataclass(frozen=True)
class Features:
    """Write the features of every picture below a folder to a file."""

    source: Annotated[Positional[Path], Section.DATA]
    """A picture, or a folder searched at any depth."""
    out: Out = Path("features.safetensors")
    """File to write; its ending says how: .safetensors, .npz, .parquet or .csv."""
    model: Loadable = "vit-nano"
    pool: Annotated[Literal["cls", "mean", "cls+mean", "tokens", "map"] | None, default("as it was trained")] = None
    """Which tokens make the feature."""
    layers: Annotated[tuple[int, ...], default("the last", "INT ...")] = ()
    """Blocks whose outputs to take: 0 is the first, -1 the last."""
    image_size: Annotated[Sides, Section.DATA] = ()
    batch_size: BatchSize = None
    workers: Workers = None
    device: Device = "auto"
    precision: settings.Precision = "auto"
    exact_decode: Annotated[Flag, Section.DATA] = False
    """Decode JPEGs at full size instead of a smaller one that is large enough."""
    skip_bad: Annotated[Flag, Section.OUTPUT] = False
    """Leave out pictures that cannot be read, list them in bad_files.csv, and exit with 9."""
    overwrite: Flag = False
    """Replace an existing file."""
    seed: Annotated[int, Section.MACHINE] = 0
    """Accepted everywhere; features have nothing random about them."""


@dataclass(frozen=True)
class Reconstruct:
    """Hide part of a picture and draw what the autoencoder makes of it."""

    images: Annotated[
        Positional[tuple[str, ...]], Section.DATA, default("a photo that comes with maehub", "[PICTURE ...]")
    ] = ()
    """Pictures, folders or addresses."""
    out: Out = Path("reconstruction.png")
    """Figure to write; several pictures or ratios share it as rows. A folder gets one figure a picture."""
    model: Loadable = "vit-nano"
    mask_ratio: Annotated[tuple[float, ...], Section.MASKING, arg(metavar="SHARE ...")] = (0.75,)
    """Share of patches to hide; several draw a row each."""
    strategy: Literal["random", "block", "grid"] = "random"
    """Which patches are hidden."""
    mask_image: Annotated[Path | None, default("none")] = None
    """A picture whose white parts are hidden, in place of a strategy."""
    statistics: Literal["visible", "true"] = "visible"
    """Of models trained on normalised pixels: where the hidden patches' mean and variance come from."""
    error_map: Flag = False
    """Predict every patch unseen, by masks that cover the picture, and draw where the model errs."""
    image_size: Annotated[Sides, Section.DATA] = ()
    seed: Annotated[int, Section.MASKING] = 0
    """Seed of the mask."""
    device: Device = "auto"
    overwrite: Annotated[Flag, Section.OUTPUT] = False
    """Replace an existing figure."""


@dataclass(frozen=True)
class Data:
    """Look at a data set before anything is trained on it."""

    what: Annotated[Positional[Literal["check", "stats"]], arg(metavar="{check,stats}")]
    """check decodes every picture, lists those that cannot be read, and exits with 5 if there are any. stats shows
    formats, sizes, values, and the mean and standard deviation of each channel."""
    data: Annotated[Positional[str], arg(metavar="DATA")]
    """A folder of pictures, any nesting; a .txt list of files, tar shards ("shards/{000..099}.tar", s3://…), a Parquet
    file or a saved dataset."""
    out: Annotated[Path | None, default("none"), arg(aliases=["-o"], metavar="CSV")] = None
    """check: a .csv file to write, with a line for each picture that cannot be read."""
    overwrite: Flag = False
    """check: replace an existing file."""
    sample: Annotated[int | None, default("2000", "PICTURES")] = None
    """stats: how many pictures to look at, always the same ones; 0 is all."""
    workers: Annotated[int | None, default("as fits the machine", "PROCESSES")] = None
    """Processes that decode pictures; 0 decodes in this one."""

    def __post_init__(self) -> None:
        if self.what == "stats" and self.out is not None:
            raise UsageError("--out is for check; stats has --json")
        if self.what == "check" and self.sample is not None:
            raise UsageError("--sample is for stats; check decodes every picture")


@dataclass(frozen=True)
class Identify:
    """Say what a checkpoint is and what to do with it; no code in it is run."""

    file: Positional[Path]
    """A .safetensors, .pth, .pt, .bin or .ckpt file, a model or run folder, or a folder with one such file."""
    heads: Annotated[int | None, default("those of the published network with this shape", "N")] = None
    """Attention heads of the encoder, where you know them."""
    decoder_heads: Annotated[int | None, default("16 at width 512", "N")] = None
    """Attention heads of the decoder, where you know them."""
    decide_target: Annotated[bool, arg(name="decide", help_behavior_hint="")] = False
    """Run the decoder on two photos, also of a file above 500 MB, to decide what it was trained to predict."""


@dataclass(frozen=True)
class Push:
    """Publish a model on the Hub, read back by every library that it names."""

    source: Annotated[Positional[Path], arg(metavar="RUN")]
    """A run folder or a model folder."""
    repo: Annotated[Positional[str], arg(metavar="USER/NAME")]
    """The repository; made if it does not exist."""
    licence: Annotated[str | None, default("that of the weights it was trained from", "ID")] = None
    """The Hub's identifier of a licence, such as apache-2.0."""
    about: Annotated[Path | None, default("none")] = None
    """A Markdown file for the card: what the data are, what the model is for."""
    dataset: Annotated[str, default("none", "WORDS")] = ""
    """What the data are called, for the numbers in the card."""
    with_pictures: Annotated[tuple[Path, ...], default("none", "FILE ...")] = ()
    """Pictures to publish beside the model. No other picture of yours is."""
    revision: Annotated[str, arg(metavar="BRANCH")] = "main"
    """Branch to write."""
    parent: Annotated[str | None, default("the head that was looked at", "COMMIT")] = None
    """The head that is expected there; if it is another, nothing is sent."""
    private: Flag = False
    """Make the repository private, if it is made."""
    pr: Flag = False
    """Propose the commit as a pull request."""
    message: Annotated[str, default("what the model is", "WORDS")] = ""
    """Of the commit."""
    dry_run: Flag = False
    """Build, check and show the plan; send nothing."""
    yes: Flag = False
    """Do not ask; needed where nobody can answer."""

    def __post_init__(self) -> None:
        if self.dry_run and self.yes:
            raise UsageError("--dry-run sends nothing and --yes sends without asking: give one of the two")
