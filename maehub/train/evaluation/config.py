"""What evaluation and prediction are told. No torch here, so that ``--help`` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from maehub.errors import UsageError
from maehub.train.engine import Flag, Rule, check, default, is_size, sides, whole

PREDICTION_ENDINGS = (".csv", ".json")

_RULES = {
    "image_size": Rule(is_size, "a side, or a height and a width, in whole pixels"),
    "batch_size": whole(1),
    "workers": whole(0),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well a classifier tells labelled pictures."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """Labelled pictures: DIR/CLASS/…, or DIR/val/CLASS/… where there is DIR/val; a .csv with the columns
    path and label, several labels with | between; tar shards with .cls members; a Parquet file or a saved dataset."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")]
    """A classifier: a catalog name, a Hub id, a run folder, a model folder or a .safetensors file."""
    out: Annotated[Path | None, default("none"), tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder to write: evaluation.json, confusion.png, mistakes.png, predictions.csv."""
    overwrite: Flag = False
    """Replace the evaluation in an existing folder."""
    image_size: Annotated[tuple[int, ...], default("the model's", "PIXELS ...")] = ()
    """Side of the pictures, or height and width, in pixels; multiples of the patch."""
    label: Annotated[str | None, default("label", "COLUMN")] = None
    """Column of a table with the label."""
    group: Annotated[str | None, default("none", "COLUMN|LEVEL")] = None
    """Column of a table, or folder level, of what belongs together, such as a patient: the interval is over groups."""
    batch_size: Annotated[int | None, default("as fits the model")] = None
    """Pictures computed at once."""
    workers: Annotated[int | None, default("as fits the machine")] = None
    """Processes that read pictures; 0 reads in this one."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    seed: int = 0
    """Accepted everywhere; an evaluation has nothing random about it."""
    quiet: tyro.conf.Suppress[bool] = False
    """No progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", str(self.data))
        object.__setattr__(self, "model", str(self.model))
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))
        object.__setattr__(self, "image_size", sides(self.image_size))
        check(self, _RULES)


@dataclass(frozen=True)
class PredictConfig:
    """Say what pictures show, by a classifier."""

    pictures: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PICTURE ...", help_behavior_hint="(required)")
    ]
    """Pictures, and folders searched at any depth."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="MODEL")]
    """A classifier: a catalog name, a Hub id, a run folder, a model folder or a .safetensors file."""
    out: Annotated[Path | None, default("none"), tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """File to write, .csv or .json; without one a table is printed."""
    top: int = 5
    """Classes to name for each picture."""
    image_size: Annotated[tuple[int, ...], default("the model's", "PIXELS ...")] = ()
    """Side of the pictures, or height and width, in pixels; multiples of the patch."""
    batch_size: Annotated[int | None, default("as fits the model")] = None
    """Pictures computed at once."""
    workers: Annotated[int | None, default("as fits the machine")] = None
    """Processes that read pictures; 0 reads in this one."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    skip_bad: Flag = False
    """Leave out pictures that cannot be read, list them (with a .csv in bad_files.csv beside it), and exit with 9."""
    overwrite: Flag = False
    """Replace an existing file."""
    seed: int = 0
    """Accepted everywhere; predictions have nothing random about them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", tuple(map(str, self.pictures)))
        object.__setattr__(self, "out", None if self.out is None else Path(self.out))
        object.__setattr__(self, "image_size", sides(self.image_size))
        check(self, _RULES | {"top": whole(1)})
        if not self.pictures:
            raise UsageError("name pictures or folders")
        if self.out is not None:
            check_target(self.out, self.overwrite)


def check_target(path: Path, overwrite: bool) -> None:
    """Whether predictions can be written to a path, before anything is computed.

    Raises:
        UsageError: its ending is unknown, its folder does not exist, or it exists already.
    """
    if path.suffix not in PREDICTION_ENDINGS:
        raise UsageError(f"{path}: predictions are written as {' or '.join(PREDICTION_ENDINGS)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist; make it first")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another file, or replace it with --overwrite (overwrite=True)")
