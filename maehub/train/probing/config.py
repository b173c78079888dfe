"""What probes of frozen features are told, and their comparison. No torch here, so that ``--help`` is fast."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from maehub.errors import UsageError
from maehub.train.engine import Flag, Section, default, settings, settle
from maehub.train.evaluation import check_target

Method = Literal["fast", "lars", "attentive"]
PROTOCOLS = ("probe", "knn", "finetune")

MODEL = "vit-nano"
Models = Annotated[UseAppendAction[tuple[str, ...]], Section.MODEL, default(MODEL, "MODEL"), arg(aliases=["-m"])]


@dataclass(frozen=True)
class FrozenConfig:
    """How frozen networks are measured on labelled pictures, whatever the protocol."""

    data: settings.LabelledData
    _: KW_ONLY
    image_size: settings.ImageSize = ()
    val_share: settings.ValShare = 0.2
    group: settings.SplitGroup = None
    label: settings.Label = None
    task: Annotated[settings.Task, Section.DATA] = "classification"
    skip_twins: Flag = False
    """Do not look for test pictures that are in training too; beyond 20,000 pictures it is never done."""
    batch_size: settings.BatchSize = None
    workers: settings.Workers = None
    device: settings.Device = "auto"
    precision: settings.Precision = "auto"
    overwrite: Annotated[Flag, Section.OUTPUT] = False
    """Replace what --out names."""
    quiet: settings.Quiet = False

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class ProbeConfig(FrozenConfig):
    """Measure what a classifier finds in the features of a frozen network."""

    model: Models = ()
    """A catalog name, a Hub id, a folder or a file; timm/NAME for a network of timm, timm/NAME@FILE with the weights of
    a file; untrained/NAME for fresh weights; baseline/pixels and baseline/colours. With --sweep as often as wanted."""
    method: Annotated[Method, Section.PROTOCOL] = "fast"
    """fast: logistic regression (of numbers ridge) on features computed once, the penalty chosen from a sweep. lars:
    linear probing as published (table 10), with augmentation. attentive: a probe that pools by attention. The last two
    train in a run folder, --out."""
    pool: Annotated[str | None, Section.MODEL, default("chosen on a part of the training pictures", "POOL")] = None
    """Which tokens make the feature: cls, mean, cls+mean; own for networks without tokens."""
    layer: Annotated[tuple[int, ...], default("the last; all with --sweep", "INT ...")] = ()
    """Block whose output to take: 0 is the first, -1 the last. Several with --sweep."""
    sweep: Annotated[Flag, Section.PROTOCOL] = False
    """Show a table over models, layers and pools. Which one is best is decided on a part of the training pictures, and
    of each model that one alone is measured on the test pictures."""
    out: Annotated[Path | None, default("none"), arg(aliases=["-o"], metavar="FOLDER"), Section.OUTPUT] = None
    """Folder to write: probe.json, and where it can be one network, the classifier as the model folder model/."""
    seed: Annotated[settings.Seed, Section.PROTOCOL] = 0
    """Seed of the splits that are made, and of fresh weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_models(self)
        if not self.sweep and len(self.model) > 1:
            raise UsageError(
                "several --model need --sweep, which shows a row of each; `maehub compare` has more columns"
            )
        if not self.sweep and len(self.layer) > 1:
            raise UsageError("several --layer need --sweep, which shows a row of each")
        if self.method != "fast":
            if self.method == "lars" and self.task == "regression":
                raise UsageError("--method lars is for classes; of numbers the fast probe is the linear one")
            if self.out is None:
                raise UsageError(f"--method {self.method} trains in a run folder: name one by --out")
            if self.sweep or self.layer not in ((), (-1,)):
                raise UsageError(
                    f"--method {self.method} sees the last layer of one model; --sweep and --layer are for fast"
                )


@dataclass(frozen=True)
class KnnConfig(FrozenConfig):
    """Measure how well the nearest neighbours of a feature tell its class."""

    model: settings.Model = MODEL
    """What `maehub probe` takes as --model."""
    neighbours: Annotated[
        settings.Count | None,
        Section.PROTOCOL,
        default("chosen among 1 to 200, leaving one out", "K"),
        arg(aliases=["-k"]),
    ] = None
    """How many training pictures vote."""
    temperature: settings.Positive = 0.07
    """Each votes with exp(cosine similarity / temperature)."""
    pool: Annotated[str | None, Section.MODEL, default("chosen on the training pictures", "POOL")] = None
    """Which tokens make the feature: cls, mean, cls+mean; own for networks without tokens."""
    layer: int = -1
    """Block whose output to take: 0 is the first, -1 the last."""
    out: Annotated[Path | None, default("none"), arg(aliases=["-o"], metavar="JSON"), Section.OUTPUT] = None
    """A .json file to write."""
    seed: Annotated[settings.Seed, Section.PROTOCOL] = 0
    """Seed of the split, if one is made, and of fresh weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None:
            check_target(self.out, self.overwrite, "results", (".json",))


@dataclass(frozen=True)
class CompareConfig(FrozenConfig):
    """Measure several networks by the same protocols on the same pictures: one table."""

    model: Models = ()
    """What `maehub probe` takes as --model; as often as wanted."""
    protocol: Annotated[str, Section.PROTOCOL, arg(metavar="NAMES")] = "probe,knn"
    """Columns, with commas between: probe (linear, fast), knn, finetune."""
    seeds: Annotated[
        tuple[int, ...],
        settings.Rule(lambda seeds: seeds and len(set(seeds)) == len(seeds), "different whole numbers"),
        arg(aliases=["--seed"], metavar="INT ..."),
    ] = (0,)
    """Each is of a split, where one is made, of fresh weights and of fine-tuning; several are averaged."""
    epochs: Annotated[settings.Positive | None, default("the recipe's")] = None
    """Passes over the training pictures of each fine-tuning."""
    steps: Annotated[settings.Count | None, default("as --epochs says")] = None
    """Optimizer steps of each fine-tuning."""
    out: Annotated[Path | None, default("none"), arg(aliases=["-o"], metavar="FOLDER"), Section.OUTPUT] = None
    """Folder to write: compare.json, and a run folder of each fine-tuning, which needs --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _settle_models(self)
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
