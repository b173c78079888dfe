"""What probes of frozen features are told, and their comparison. No torch here, so that ``--help`` is fast."""

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from maehub.errors import UsageError
from maehub.train.engine import POSITIVE, Flag, Rule, check, default, is_size, number, one_of, sides, whole

Method = Literal["fast", "lars", "attentive"]
Protocol = Literal["probe", "knn", "finetune"]
PROTOCOLS: tuple[Protocol, ...] = ("probe", "knn", "finetune")

MODEL = "vit-nano"


@dataclass(frozen=True)
class FrozenConfig:
    """How frozen networks are measured on labelled pictures, whatever the protocol."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Labelled pictures: DIR/CLASS/…, or DIR/train/CLASS and DIR/val/CLASS; a .csv with the columns path and label
    (several labels with | between them); tar shards with .cls members; a Parquet file or a saved dataset."""
    _: KW_ONLY
    image_size: Annotated[tuple[int, ...], default("the model's", "PIXELS ...")] = ()
    """Side of the pictures, or height and width, in pixels."""
    val_share: float = 0.2
    """Share of each class to measure on, where there is no DIR/val."""
    group: Annotated[str | None, default("none", "COLUMN|LEVEL")] = None
    """What must stay on one side of every split, such as a patient or a site: a column of the CSV or table, or a folder
    level below DATA as a number."""
    label: Annotated[str | None, default("label", "COLUMN")] = None
    """The column of labels in a CSV or table."""
    skip_twins: Flag = False
    """Do not look for test pictures that are in training too; beyond 20,000 pictures it is never done."""
    batch_size: Annotated[int | None, default("as fits the model")] = None
    """Pictures computed at once."""
    workers: Annotated[int | None, default("as fits the machine")] = None
    """Processes that read pictures; 0 reads in this one."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    overwrite: Flag = False
    """Replace what --out names."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", str(self.data))
        object.__setattr__(self, "image_size", sides(self.image_size))
        check(self, _SHARED)


@dataclass(frozen=True)
class ProbeConfig(FrozenConfig):
    """Measure what a classifier finds in the features of a frozen network."""

    model: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        default(MODEL, "MODEL"),
        tyro.conf.arg(aliases=["-m"]),
    ] = ()
    """A catalog name, a Hub id, a folder or a file; timm/NAME for a network of timm, timm/NAME@FILE with the weights of
    a file; untrained/NAME for fresh weights; baseline/pixels and baseline/colours. With --sweep as often as wanted."""
    method: Method = "fast"
    """fast: logistic regression on features computed once, the penalty chosen from a sweep. lars: linear probing as
    published (table 10), with augmentation. attentive: a probe that pools by attention. The last two train in a run
    folder, --out."""
    pool: Annotated[str | None, default("chosen on a part of the training pictures", "POOL")] = None
    """Which tokens make the feature: cls, mean, cls+mean; own for networks without tokens."""
    layer: Annotated[tuple[int, ...], default("the last; all with --sweep", "INT ...")] = ()
    """Block whose output to take: 0 is the first, -1 the last. Several with --sweep."""
    sweep: Flag = False
    """Show a table over models, layers and pools. Which one is best is decided on a part of the training pictures, and
    of each model that one alone is measured on the test pictures."""
    out: Annotated[Path | None, default("none"), tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder to write: probe.json, and where it can be one network, the classifier as the model folder model/."""
    seed: int = 0
    """Seed of the splits that are made, and of fresh weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_models(self)
        object.__setattr__(self, "layer", sides(self.layer))
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))
        check(self, {"method": one_of(Method), "seed": _SEED})
        if not self.sweep and len(self.model) > 1:
            raise UsageError(
                "several --model need --sweep, which shows a row of each; `maehub compare` has more columns"
            )
        if not self.sweep and len(self.layer) > 1:
            raise UsageError("several --layer need --sweep, which shows a row of each")
        if self.method != "fast":
            if self.out is None:
                raise UsageError(f"--method {self.method} trains in a run folder: name one by --out")
            if self.sweep or self.layer not in ((), (-1,)):
                raise UsageError(
                    f"--method {self.method} sees the last layer of one model; --sweep and --layer are for fast"
                )


@dataclass(frozen=True)
class KnnConfig(FrozenConfig):
    """Measure how well the nearest neighbours of a feature tell its class."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = MODEL
    """What `maehub probe` takes as --model."""
    neighbours: Annotated[
        int | None, default("chosen among 1 to 200, leaving one out", "K"), tyro.conf.arg(aliases=["-k"])
    ] = None
    """How many training pictures vote."""
    temperature: float = 0.07
    """Each votes with exp(cosine similarity / temperature)."""
    pool: Annotated[str | None, default("chosen on the training pictures", "POOL")] = None
    """Which tokens make the feature: cls, mean, cls+mean; own for networks without tokens."""
    layer: int = -1
    """Block whose output to take: 0 is the first, -1 the last."""
    out: Annotated[Path | None, default("none"), tyro.conf.arg(aliases=["-o"], metavar="JSON")] = None
    """A .json file to write."""
    seed: int = 0
    """Seed of the split, if one is made, and of fresh weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", str(self.model))
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))
        check(self, {"neighbours": whole(1), "temperature": POSITIVE, "seed": _SEED})
        _check_json(self.out, self.overwrite)


@dataclass(frozen=True)
class CompareConfig(FrozenConfig):
    """Measure several networks by the same protocols on the same pictures: one table."""

    model: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(aliases=["-m"], metavar="MODEL", help_behavior_hint="(default: vit-nano)"),
    ] = ()
    """What `maehub probe` takes as --model; as often as wanted."""
    protocol: Annotated[str, tyro.conf.arg(metavar="NAMES")] = "probe,knn"
    """Columns, with commas between: probe (linear, fast), knn, finetune."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"], metavar="INT ...")] = (0,)
    """Each is of a split, where one is made, of fresh weights and of fine-tuning; several are averaged."""
    epochs: Annotated[float | None, default("the recipe's")] = None
    """Passes over the training pictures of each fine-tuning."""
    steps: Annotated[int | None, default("as --epochs says")] = None
    """Optimizer steps of each fine-tuning."""
    out: Annotated[Path | None, default("none"), tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder to write: compare.json, and a run folder of each fine-tuning, which needs --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_models(self)
        object.__setattr__(self, "seeds", tuple(self.seeds))
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))
        check(self, {"seeds": Rule(lambda seeds: seeds and len(set(seeds)) == len(seeds), "different whole numbers")})
        check(self, {"epochs": POSITIVE, "steps": whole(1)})
        wrong = [name for name in self.protocols if name not in PROTOCOLS]
        if wrong or not self.protocols:
            raise UsageError(f"--protocol has {', '.join(PROTOCOLS)} with commas between, not {self.protocol!r}")
        if "finetune" in self.protocols and self.out is None:
            raise UsageError("--protocol finetune trains in run folders: name a folder for them by --out")
        if self.epochs is not None and self.steps is not None:
            raise UsageError("give the length of fine-tuning as --steps or as --epochs, not both")

    @property
    def protocols(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(dict.fromkeys(name.strip() for name in self.protocol.split(",") if name.strip()))


def _settle_models(config: ProbeConfig | CompareConfig) -> None:
    """One name is a tuple of it, and none is the default."""
    given = (config.model,) if isinstance(config.model, str | Path) else config.model
    object.__setattr__(config, "model", tuple(dict.fromkeys(map(str, given))) or (MODEL,))


def _check_json(path: Path | None, overwrite: bool) -> None:
    """Whether a result can be written to a path, before anything is computed."""
    if path is None:
        return
    if path.suffix != ".json":
        raise UsageError(f"{path}: results are written as .json")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist; make it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise UsageError(f"{path} exists; choose another file, or replace it with --overwrite")


_SEED = Rule(lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits")
_SHARED = {
    "image_size": Rule(is_size, "a side, or a height and a width, in whole pixels"),
    "val_share": number(lambda value: 0 < value < 1 and math.isfinite(value), "above 0 and below 1"),
    "batch_size": whole(1),
    "workers": whole(0),
}
