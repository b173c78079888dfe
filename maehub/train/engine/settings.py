"""What every kind of training run is told, and what a setting may be. No torch here, so that ``--help`` is fast."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import tyro

from maehub.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]
LossOn = Literal["hidden", "all"]


def default(meaning: str, metavar: str | None = None) -> object:
    """What ``--help`` says that a setting is if it is left out."""
    return tyro.conf.arg(help_behavior_hint=f"(default: {meaning})", metavar=metavar)


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


class Rule(NamedTuple):
    """What a setting may be."""

    holds: Callable[[Any], bool]
    words: str


def whole(least: int) -> Rule:
    return Rule(lambda value: type(value) is int and least <= value < 2**63, f"a whole number of at least {least}")


def number(holds: Callable[[float], bool], words: str) -> Rule:
    return Rule(lambda value: type(value) in (int, float) and holds(value), f"a number {words}")


def one_of(choices: Any) -> Rule:
    return Rule(lambda value: value in get_args(choices), f"one of {', '.join(get_args(choices))}")


def numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple | list) and [type(part) in (int, float) for part in value] == [True] * count


def is_scale(value: Any) -> bool:
    return numbers(value, 2) and 0 < value[0] <= value[1] <= 1


def is_size(value: Any) -> bool:
    return len(value) <= 2 and all(type(side) is int and side >= 1 for side in value)


def sides(size: Any) -> Any:
    """A side, or a height and a width, as a tuple; none given is empty."""
    if size is None:
        return ()
    return tuple(size) if isinstance(size, tuple | list) else (size,)


def option(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


POSITIVE = number(lambda value: 0 < value < math.inf, "above 0")
SHARE = number(lambda value: 0 <= value < 1, "of at least 0 and below 1")


def check(config: Any, rules: Mapping[str, Rule]) -> None:
    """Refuse a setting that cannot be. One whose default is None may be left out.

    Raises:
        UsageError: the text names the flag.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for name, rule in rules.items():
        value = getattr(config, name)
        if (value is not None or defaults[name] is not None) and not rule.holds(value):
            raise UsageError(f"{option(name)} must be {rule.words}, not {value!r}")


Config = TypeVar("Config", bound=type)


def own_first(config: Config) -> Config:
    """Move the settings that a run shares with every other behind its own, for whoever lists them: ``--help`` does."""
    shared = {field.name for field in fields(RunConfig)} - {"data", "out"}
    kind: Any = config
    kind.__dataclass_fields__ = dict(sorted(kind.__dataclass_fields__.items(), key=lambda item: item[0] in shared))
    return config


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out, whatever is trained."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """The pictures."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Run folder to write."""

    micro_batch: Annotated[int | None, default("as many as fit")] = None
    """Crops that a process computes at once; gradients are accumulated over them."""
    precision: Precision = "auto"
    """bf16 where the device computes it natively, else fp32; losses are always fp32."""
    compile: Flag = False
    """Compile the model with torch.compile."""
    checkpoint_activations: Flag = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    fsdp: Flag = False
    """Shard weights and optimizer over the processes (FSDP2) instead of copying them (DDP)."""
    deterministic: Flag = False
    """Use deterministic algorithms, so that a resumed run is equal bit for bit on a GPU too."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is written at the end too."""
    keep: int = 2
    """Checkpoints that are kept; the last good one is never deleted."""
    time_limit: Annotated[float | None, default("none", "MINUTES")] = None
    """Save and stop, resumable, so that the run ends within this many minutes of its start."""
    timeout: float = 120.0
    """Seconds that processes wait for each other before the run ends with an error."""
    tensorboard: Flag = False
    """Also write the metrics for TensorBoard, into the run folder."""
    resume: Flag = False
    """Go on from the newest valid checkpoint of the run folder."""
    allow_data_change: Flag = False
    """Go on although the pictures are not those that the run was started with."""
    overwrite: Flag = False
    """Replace the run in an existing run folder."""
    seed: int = 0
    """Seed of all that is drawn: fresh weights, order, crops, masks, a split that is made."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one, under torchrun one a process."""
    workers: Annotated[int | None, default("as fits the machine")] = None
    """Processes that read pictures, for each training process; 0 reads in this one."""
    cache: Flag = False
    """Decode every picture once and keep it in memory: for data sets that fit, 4 bytes a pixel."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.fspath(self.data))
        check(self, _RULES)
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with the run and --overwrite deletes it: give one of the two")


_RULES = {
    "micro_batch": whole(1),
    "precision": one_of(Precision),
    "checkpoint_every": whole(1),
    "keep": whole(1),
    "time_limit": POSITIVE,
    "timeout": POSITIVE,
    "seed": Rule(lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "workers": whole(0),
}
