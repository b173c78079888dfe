"""Measuring a segmenter on pictures with label maps, and the folder with what was found."""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from maehub.data import Labelled, LabelledSplit, MapClasses, ObjectClasses, find_label_maps, naming, split_label_maps
from maehub.dense import Segmenter, load_segmenter, pixels_of
from maehub.errors import DataError, UsageError, first_names, log
from maehub.files import check_free, read_json, whole_folder, write_text
from maehub.models import autocast, computed_in, usable_device
from maehub.train.evaluation.config import EvaluateConfig
from maehub.train.evaluation.maps.plots import MapExample, map_sheet
from maehub.train.evaluation.maps.scores import MapScores, confusion_of, score_maps
from maehub.train.evaluation.text_tables import printable

_MEMBERS = ("evaluation.json", "worst.png")
_WORST = 8


@dataclass(frozen=True)
class DenseEvaluation:
    """What `evaluate` found of a segmenter or a detector. Prints as tables."""

    task: ClassVar[str]

    model: str
    data: str
    scores: Any
    worst: Image.Image | None = field(default=None, repr=False, compare=False)
    """The pictures that it is most wrong about, as a sheet."""
    files: tuple[Path, ...] = ()
    """What was written."""
    precision: str = "fp32"
    """What the network computed in."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        facts = {"model": self.model, "data": self.data, "task": self.task, "precision": self.precision}
        return facts | self.scores.to_dict() | {"files": [str(path) for path in self.files]}

    def __str__(self) -> str:
        how = "" if self.precision == "fp32" else f", computed in {self.precision}"
        parts = [f"{self.model} on {printable(self.data, 200)}{how}\n\n{self.scores}"]
        return "\n\n".join([*parts, "\n".join(map(str, self.files))] if self.files else parts)


@dataclass(frozen=True)
class MapEvaluation(DenseEvaluation):
    """What `evaluate` found of a segmenter; ``worst`` are the pictures with the fewest right pixels."""

    task = "segment"

    scores: MapScores


_Found = TypeVar("_Found", bound=DenseEvaluation)


def evaluate_maps(config: EvaluateConfig) -> MapEvaluation:
    """Measure a segmenter; see `maehub.train.evaluate`, which calls it for one."""
    check_asked(config, "tells every pixel")
    device = usable_device(config.device)
    model = load_segmenter(config.model, device=device)
    known = model.config.classes
    labelled = held_out_by(
        config,
        lambda run: split_label_maps(config.data, seed=run["seed"], share=run["val_share"], group=run["group"]),
    )
    labelled = labelled or find_label_maps(config.data, group=config.group, classes=known, side="testing").training
    labelled = in_classes(labelled, known, config.data)
    examples: list[tuple[float, int, np.ndarray]] = []
    tables = []
    for index, predicted, table in measured_maps(
        model, labelled, range(len(labelled)), autocast(config.precision, device), progress=not config.quiet
    ):
        tables.append(table)
        examples = worst([*examples, (np.trace(table) / max(1, table.sum()), index, predicted)])
    scores = score_maps(tables, known.names, labelled.groups)
    sheet = sheet_of(model, labelled, [(index, predicted) for _, index, predicted in examples])
    found = MapEvaluation(config.model, config.data, scores, sheet, precision=computed_in(config.precision))
    return written(found, config)


def check_asked(config: EvaluateConfig, does: str, more: Collection[str] = ()) -> None:
    """Refuse what is for classifiers alone, and a folder that is in use; ``more`` files are written than usual."""
    for name in ("label", "classes_from", "corruptions", "baseline", "image_size", "batch_size"):
        if getattr(config, name):
            raise UsageError(f"--{name.replace('_', '-')} is for classifiers, and {config.model} {does}")
    if config.out is not None:
        check_free(config.out, config.overwrite, (*_MEMBERS, *more))


def worst(examples: Iterable[tuple[float, int, Any]]) -> list[tuple[float, int, Any]]:
    """Of what is right of pictures, their places, and what was said, those that a sheet shows."""
    return sorted(examples, key=lambda one: one[:2])[:_WORST]


def written(found: _Found, config: EvaluateConfig, more: Mapping[str, str] = MappingProxyType({})) -> _Found:
    """The evaluation with its folder, where one is asked for; ``more`` are the texts of further files."""
    sheet = found.worst
    if config.out is None or sheet is None:
        return found
    members = (*_MEMBERS, *more)
    found = replace(found, files=tuple(config.out / name for name in members))
    with whole_folder(config.out, overwrite=config.overwrite, members=members) as folder:
        write_text(folder / "evaluation.json", json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        sheet.save(folder / "worst.png")
        for name, text in more.items():
            write_text(folder / name, text)
    return found


def held_out_by(config: EvaluateConfig, split: Callable[[Mapping[str, Any]], LabelledSplit]) -> Labelled | None:
    """Of the data that a run split by its seed the part that it held out; None of any other run and data.

    ``split`` makes the split again, by what the run was told.
    """
    try:
        run = read_json(Path(config.model) / "config.json")
        if run["kind"] != "finetune" or not os.path.samefile(run["data"], config.data):
            return None
        found = split(run)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not found.made:
        return None
    log.info(
        "%s was trained on a part of %s: measured on the %d pictures that it held out",
        config.model,
        config.data,
        len(found.testing),
    )
    return found.testing


def in_classes(labelled: Labelled, known: MapClasses | ObjectClasses, data: str) -> Labelled:
    """The same pictures with the classes in another order, that of a model, which has all of them."""
    names = known.names
    if labelled.classes == names:
        return labelled
    if unknown := sorted(set(labelled.classes) - set(names)):
        advice = "; name classes alike in both classes.json, or null what is not to count" if labelled.maps else ""
        raise DataError(
            f"{printable(data, 200)} has classes that the model does not know: {first_names(unknown, 3)}. "
            f"Known are {first_names(names, 3)}{advice}"
        )
    place = np.array([names.index(name) for name in labelled.classes])
    labels = np.zeros((len(labelled), len(names)), bool)
    labels[:, place] = labelled.labels
    maps, objects = labelled.maps, labelled.objects
    if maps is not None:
        moved = tuple(at if at < 0 else int(place[at]) for at in maps.classes.places)
        maps = replace(maps, classes=replace(maps.classes, names=names, places=moved))
    if objects is not None:
        assert isinstance(known, ObjectClasses)
        moves = np.append(place, -1)  # what is ignored and of no class stays so
        rows = tuple(replace(row, labels=moves[row.labels]) for row in objects.rows)
        objects = replace(objects, rows=rows, classes=known)
    return replace(labelled, labels=labels, classes=names, maps=maps, objects=objects)


def measured_maps(
    model: Segmenter,
    labelled: Labelled,
    places: Iterable[int],
    precision: contextlib.AbstractContextManager[Any],
    *,
    progress: bool = False,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each of these pictures its place, the classes (H, W) that are said, and its confusion table (C, C) int64."""
    assert labelled.maps is not None
    for index, predicted in predicted_of(model, labelled, places, precision, progress):
        yield index, predicted, confusion_of(labelled.maps.read(index), predicted, len(labelled.classes))


def predicted_of(
    model: Any,
    labelled: Labelled,
    places: Iterable[int],
    precision: contextlib.AbstractContextManager[Any],
    progress: bool,
) -> Iterator[tuple[int, Any]]:
    """Of each of these pictures its place, and what the model predicts."""
    for index in tqdm(list(places), unit=" pictures", disable=None if progress else True, leave=False):
        with naming(labelled.samples, index), precision, torch.inference_mode():
            predicted = model.predict(labelled.samples.source(index))
        yield index, predicted


def sheet_of(model: Segmenter, labelled: Labelled, shown: Sequence[tuple[int, np.ndarray]]) -> Image.Image:
    """Some pictures by their places, with what is said of them."""
    assert labelled.maps is not None
    examples = []
    for index, predicted in shown:
        truth = labelled.maps.read(index)
        counted = truth >= 0
        right = 100 * float((truth == predicted)[counted].mean()) if counted.any() else 0.0
        pixels = pixels_of(labelled.samples.source(index), model.encoder.config.channels)  # type: ignore[arg-type]
        name = labelled.samples.name(index).decode("utf-8", "replace")
        examples.append(MapExample(name, pixels, truth, predicted, right))
    return map_sheet(examples, labelled.classes, model.config.palette)
