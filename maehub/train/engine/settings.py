"""What every kind of training run is told, and what an annotation says of a setting: its rule, its place in ``--help``.

No torch here, so that ``--help`` is fast.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from tyro.conf import Positional, Suppress, arg

from maehub.errors import UsageError

LossOn = Literal["hidden", "all"]

# -- what an annotation says


class Section(StrEnum):
    """Headings of ``--help``, in their order. One stands in the annotation of a flag, for it and those after it."""

    DATA = "data"
    MODEL = "model"
    PROTOCOL = "protocol"
    MASKING = "masking"
    OBJECTIVE = "objective"
    AUGMENTATION = "augmentation"
    TRAINING = "training"
    VALIDATION = "validation"
    OUTPUT = "output"
    MACHINE = "machine"


COMMON = "common"
"""Marks what ``--help`` shows of a command with many flags; ``--help-all`` shows all."""


class Rule(NamedTuple):
    """What a setting may be."""

    holds: Callable[[Any], bool]
    words: str


def whole(least: int) -> Rule:
    return Rule(lambda value: type(value) is int and least <= value < 2**63, f"a whole number of at least {least}")


def number(holds: Callable[[float], bool], words: str) -> Rule:
    return Rule(lambda value: type(value) in (int, float) and holds(value), f"a number {words}")


def default(meaning: str, metavar: str | None = None, help: str | None = None) -> object:
    """What ``--help`` says that a setting is if it is left out."""
    return arg(help_behavior_hint=f"(default: {meaning})", metavar=metavar, help=help)


def annotation(kind: Any) -> tuple[Any, list[Any]]:
    """A type, and what is said of it: of ``Annotated[Annotated[int, a] | None, b]`` int, and a and b."""
    said: list[Any] = []
    while True:
        some = [part for part in get_args(kind) if part is not NoneType]
        if get_origin(kind) is Annotated:
            kind, said = kind.__origin__, [*kind.__metadata__, *said]
        elif NoneType in get_args(kind) and len(some) == 1:
            kind = some[0]
        else:
            return kind, said


def option(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def settle(config: Any) -> None:
    """Give paths, names and sizes the types of their fields, and refuse a setting that cannot be.

    One whose default is None may be left out. Of a Literal the choices are the rule.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        kind, said = annotation(field.type)
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif kind is Path and isinstance(value, str):
            value = Path(value)
        elif kind == tuple[int, ...]:
            value = () if value is None else value
            value = tuple(value) if isinstance(value, tuple | list) else (value,)
        object.__setattr__(config, field.name, value)
        rules = [one for one in said if isinstance(one, Rule)]
        if get_origin(kind) is Literal:
            rules = [Rule(get_args(kind).__contains__, f"one of {', '.join(get_args(kind))}")]
        for rule in rules if value is not None or field.default is not None else ():
            if not rule.holds(value):
                raise UsageError(f"{option(field.name)} must be {rule.words}, not {value!r}")


def numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple | list) and [type(part) in (int, float) for part in value] == [True] * count


def _is_scale(value: Any) -> bool:
    return numbers(value, 2) and 0 < value[0] <= value[1] <= 1


def _is_size(value: Any) -> bool:
    return len(value) <= 2 and all(type(side) is int and side >= 1 for side in value)


# -- settings that several commands have, and their rules

Count = Annotated[int, whole(1)]
CountFrom0 = Annotated[int, whole(0)]
Positive = Annotated[float, number(lambda value: 0 < value < math.inf, "above 0")]
NotNegative = Annotated[float, number(lambda value: 0 <= value < math.inf, "of at least 0")]
Share = Annotated[float, number(lambda value: 0 <= value < 1, "of at least 0 and below 1")]
ProperShare = Annotated[float, number(lambda value: 0 < value < 1, "above 0 and below 1")]
PositiveShare = Annotated[float, number(lambda value: 0 < value <= 1, "above 0 and at most 1")]
CropScale = Annotated[tuple[float, float], Rule(_is_scale, "two numbers, 0 < low <= high <= 1")]
Seed = Annotated[int, Rule(lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits")]
Channels = Annotated[
    int | None,
    Rule(lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    default("the model's", help="Image channels: 3, or 1 for greyscale."),
]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Quiet = Annotated[Suppress[bool], "No progress bar."]

Sides = Annotated[
    tuple[int, ...],
    default("the model's", "PIXELS ...", "Side, or height and width, in pixels; multiples of the patch."),
]
ImageSize = Annotated[Sides, Rule(_is_size, "a side, or a height and a width, in whole pixels")]
LabelledData = Annotated[
    Positional[str],
    Section.DATA,
    arg(
        metavar="DATA",
        help="Labelled pictures: DIR/CLASS/…, or DIR/train/CLASS and DIR/val/CLASS; a .csv with the columns path and "
        "label (several labels with | between them); tar shards with .cls members; a Parquet file or a saved dataset.",
    ),
]
ValShare = Annotated[ProperShare, arg(help="Share of each class to measure on, where there is no DIR/val.")]
SplitGroup = Annotated[
    str | None,
    default(
        "none",
        "COLUMN|LEVEL",
        "What must stay on one side of every split, such as a patient or a site: a column of the CSV or table, or a "
        "folder level below DATA as a number.",
    ),
]
Label = Annotated[str | None, default("label", "COLUMN", "The column of labels in a CSV or table.")]
Task = Annotated[
    Literal["classification", "regression"],
    arg(help="regression: the labels are numbers, in the column --label of a CSV, or in several with commas between."),
]
Model = Annotated[str, Section.MODEL, arg(aliases=["-m"], metavar="MODEL")]
BatchSize = Annotated[Count | None, Section.MACHINE, default("as fits the model", help="Pictures computed at once.")]
Workers = Annotated[
    CountFrom0 | None,
    Section.MACHINE,
    default("as fits the machine", help="Processes that read pictures; 0 reads in this one."),
]
Device = Annotated[
    str, Section.MACHINE, arg(metavar="DEVICE", help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one.")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    Section.MACHINE,
    arg(
        help="What matrices are multiplied in. auto is bf16 where the device computes it natively, else fp32; of CPUs "
        "those with tile units for it do (AMX), and there from the command line alone. Sums and losses are fp32."
    ),
]

# -- a training run

Config = TypeVar("Config", bound=type)


def own_first(config: Config) -> Config:
    """Move the settings that a run shares with every other behind its own, for whoever lists them."""
    shared = {field.name for field in fields(RunConfig)} - {"data", "out"}
    kind: Any = config
    kind.__dataclass_fields__ = dict(sorted(kind.__dataclass_fields__.items(), key=lambda item: item[0] in shared))
    return config


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out, whatever is trained."""

    data: Annotated[Positional[str], Section.DATA, COMMON, arg(metavar="DATA")]
    """The pictures."""
    out: Annotated[Path, Section.OUTPUT, COMMON, arg(aliases=["-o"])]
    """Run folder to write."""

    micro_batch: Annotated[Count | None, Section.MACHINE, default("as many as fit")] = None
    """Crops that a process computes at once; gradients are accumulated over them."""
    precision: Precision = "auto"
    compile: Flag = False
    """Compile the model with torch.compile."""
    checkpoint_activations: Flag = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    fsdp: Flag = False
    """Shard weights and optimizer over the processes (FSDP2) instead of copying them (DDP)."""
    deterministic: Flag = False
    """Use deterministic algorithms, so that a resumed run is equal bit for bit on a GPU too."""
    checkpoint_every: Annotated[Count, Section.OUTPUT] = 1000
    """Steps between checkpoints; one is written at the end too."""
    keep: Count = 2
    """Checkpoints that are kept; the last good one is never deleted."""
    time_limit: Annotated[Positive | None, default("none", "MINUTES")] = None
    """Save and stop, resumable, so that the run ends within this many minutes of its start."""
    timeout: Annotated[Positive, Section.MACHINE] = 120.0
    """Seconds that processes wait for each other before the run ends with an error."""
    tensorboard: Annotated[Flag, Section.OUTPUT] = False
    """Also write the metrics for TensorBoard, into the run folder."""
    resume: Annotated[Flag, COMMON] = False
    """Go on from the newest valid checkpoint of the run folder."""
    allow_data_change: Flag = False
    """Go on although the pictures are not those that the run was started with."""
    overwrite: Annotated[Flag, COMMON] = False
    """Replace the run in an existing run folder."""
    seed: Annotated[Seed, Section.TRAINING, COMMON] = 0
    """Seed of all that is drawn: fresh weights, order, crops, masks, a split that is made."""
    device: Annotated[Device, COMMON] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one, under torchrun one a process."""
    workers: Workers = None
    """Processes that read pictures, for each training process; 0 reads in this one."""
    cache: Flag = False
    """Decode every picture once and keep it in memory: for data sets that fit, 4 bytes a pixel."""
    quiet: Quiet = False

    def __post_init__(self) -> None:
        settle(self)
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with the run and --overwrite deletes it: give one of the two")
