"""What evaluation and prediction are told. No torch here, so that ``--help`` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from maehub.errors import UsageError
from maehub.files import check_place
from maehub.train.engine import Flag, Section, default, settings, settle

Classifier = Annotated[
    settings.Model,
    arg(
        help="A classifier: a catalog name, a Hub id, a run folder, a model folder or a .safetensors file; or a "
        "segmenter or a detector: a run folder or a model folder."
    ),
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well a classifier tells labelled pictures, a segmenter their pixels, or a detector their objects."""

    data: Annotated[Positional[str], Section.DATA, arg(metavar="DATA")]
    """Labelled pictures: DIR/CLASS/…, or DIR/val/CLASS/… where there is DIR/val; a .csv with the columns
    path and label, several labels with | between; tar shards with .cls members; a Parquet file or a saved dataset. Of a
    segmenter pictures and label maps: DIR/images and DIR/masks, or those in DIR/val. Of a detector what
    `maehub finetune` takes for its training."""
    model: Classifier
    out: Annotated[Path | None, Section.OUTPUT, default("none"), arg(aliases=["-o"], metavar="FOLDER")] = None
    """Folder to write: evaluation.json, confusion.png, mistakes.png, predictions.csv; of a segmenter worst.png, of a
    detector detections.json too."""
    overwrite: Flag = False
    """Replace the evaluation in an existing folder."""
    image_size: Annotated[settings.ImageSize, Section.DATA] = ()
    label: settings.Label = None
    classes_from: Annotated[Path | None, default("by name", "FILE")] = None
    """Which class is which output, where names do not tell: a text file whose line i is the folder name of output i, or
    a .csv of folder,class (class: a name or number of the model) for some of them; only those are scored."""
    corruptions: Flag = False
    """Also measure under the 15 common corruptions at 5 severities (ImageNet-C): 75 passes over the pictures."""
    baseline: Annotated[Path | None, default("none", "FOLDER")] = None
    """Folder of another model's evaluation by --corruptions, which it implies: what the errors are divided by."""
    group: Annotated[str | None, default("none", "COLUMN|LEVEL")] = None
    """Column of a table, or folder level, of what belongs together, such as a patient: the interval is over groups."""
    batch_size: settings.BatchSize = None
    workers: settings.Workers = None
    device: settings.Device = "auto"
    precision: settings.Precision = "auto"
    seed: int = 0
    """Accepted everywhere; an evaluation has nothing random about it."""
    quiet: settings.Quiet = False

    def __post_init__(self) -> None:
        settle(self)
        if self.baseline is not None:
            object.__setattr__(self, "corruptions", True)


@dataclass(frozen=True)
class PredictConfig:
    """Say what pictures show by a classifier, what every pixel is by a segmenter, where objects are by a detector."""

    pictures: Annotated[
        Positional[tuple[str, ...]], Section.DATA, arg(metavar="PICTURE ...", help_behavior_hint="(required)")
    ]
    """Pictures, and folders searched at any depth."""
    model: Classifier
    out: Annotated[Path | None, Section.OUTPUT, default("none"), arg(aliases=["-o"], metavar="FILE")] = None
    """File to write, .csv or .json; of a segmenter a folder for label maps and overlays, of a detector one for
    detections.json and overlays. Without one a table is printed."""
    top: settings.Count = 5
    """Classes to name for each picture."""
    image_size: Annotated[settings.ImageSize, Section.DATA] = ()
    batch_size: settings.BatchSize = None
    workers: settings.Workers = None
    device: settings.Device = "auto"
    precision: settings.Precision = "auto"
    skip_bad: Annotated[Flag, Section.OUTPUT] = False
    """Leave out pictures that cannot be read, list them (with a .csv in bad_files.csv beside it), and exit with 9."""
    overwrite: Flag = False
    """Replace an existing file."""
    seed: int = 0
    """Accepted everywhere; predictions have nothing random about them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", tuple(map(str, self.pictures)))
        settle(self)
        if not self.pictures:
            raise UsageError("name pictures or folders")
        if self.out is not None and self.out.suffix:
            check_target(self.out, self.overwrite)


def check_target(
    path: Path, overwrite: bool, what: str = "predictions", endings: tuple[str, ...] = (".csv", ".json")
) -> None:
    """Whether results can be written to a path, before anything is computed."""
    if path.suffix not in endings:
        raise UsageError(f"{path}: {what} are written as {' or '.join(endings)}")
    check_place(path, overwrite)
