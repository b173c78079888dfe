"""Measuring a segmenter or a detector, and the folder with what was found."""

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import maehub.dense as dense
from maehub.data import (
    Labelled,
    LabelledSplit,
    MapClasses,
    ObjectClasses,
    find_label_maps,
    find_objects,
    mapped,
    naming,
    split_label_maps,
    split_objects,
)
from maehub.dense import Detections, pixels_of
from maehub.errors import DataError, UsageError, first_names, log
from maehub.files import check_free, read_json, whole_folder, write_text
from maehub.models import autocast, computed_in, usable_device
from maehub.train.evaluation.config import EvaluateConfig
from maehub.train.evaluation.dense.map_scores import MapScores, confusion_of, score_maps
from maehub.train.evaluation.dense.object_scores import ObjectScores, coco_results, score_objects
from maehub.train.evaluation.dense.plots import Example, counted, map_sheet, object_sheet, sure_ones
from maehub.train.evaluation.text_tables import printable

_MEMBERS, _RESULTS = ("evaluation.json", "worst.png"), "detections.json"
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


@dataclass(frozen=True)
class ObjectEvaluation(DenseEvaluation):
    """What `evaluate` found of a detector; ``worst`` are the pictures with the most missed and false ones for those
    that are right, of detections with a score from one half on."""

    task = "detect"

    scores: ObjectScores
    images: tuple[str, ...] = ()
    """Names of the pictures; detections.json calls them by their numbers, from 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return super().to_dict() | {"images": list(self.images)}


class Measured(NamedTuple):
    """What is found in one picture."""

    place: int
    found: Any  # that can be drawn
    row: Any  # that is scored
    right: float  # share, to show the worst ones by


class Measuring(ABC):
    """How what a model tells of pictures is scored and drawn."""

    def each(
        self,
        model: Any,
        labelled: Labelled,
        places: Iterable[int],
        precision: contextlib.AbstractContextManager[Any],
        *,
        progress: bool = False,
    ) -> Iterator[Measured]:
        """Of these pictures, by their places, what the model finds."""
        for index in tqdm(list(places), unit=" pictures", disable=None if progress else True, leave=False):
            with naming(labelled.samples, index), precision, torch.inference_mode():
                found = model.predict(labelled.samples.source(index))
            yield Measured(index, found, *self.row(labelled, index, found))

    def sheet(self, model: Any, labelled: Labelled, shown: Iterable[Measured]) -> Image.Image:
        """Some pictures with what is found in them."""
        examples = []
        for one in shown:
            pixels = pixels_of(labelled.samples.source(one.place), model.encoder.config.channels)  # type: ignore[arg-type]
            name = labelled.samples.name(one.place).decode("utf-8", "replace")
            examples.append(Example(name, pixels, self.truth(labelled, one.place), one.found))
        return self.drawn(model, examples)

    @abstractmethod
    def truth(self, labelled: Labelled, index: int) -> Any:
        """What is there to be found in a picture."""

    @abstractmethod
    def row(self, labelled: Labelled, index: int, found: Any) -> tuple[Any, float]:
        """What of a picture is scored, and the share of it that is right."""

    @abstractmethod
    def scored(self, labelled: Labelled, rows: Sequence[Any]) -> Any:
        """Scores of these pictures."""

    @abstractmethod
    def drawn(self, model: Any, examples: Sequence[Example]) -> Image.Image:
        """A sheet of them."""


class MapMeasuring(Measuring):
    """Of segmenters: a row is a confusion table (C, C) int64."""

    def truth(self, labelled: Labelled, index: int) -> np.ndarray:
        assert labelled.maps is not None
        return labelled.maps.read(index)

    def row(self, labelled: Labelled, index: int, found: np.ndarray) -> tuple[np.ndarray, float]:
        table = confusion_of(self.truth(labelled, index), found, len(labelled.classes))
        return table, float(np.trace(table) / max(1, table.sum()))

    def scored(self, labelled: Labelled, rows: Sequence[np.ndarray]) -> MapScores:
        return score_maps(rows, labelled.classes, labelled.groups)

    def drawn(self, model: Any, examples: Sequence[Example]) -> Image.Image:
        return map_sheet(examples, model.config.classes.names, model.config.palette)


class ObjectMeasuring(Measuring):
    """Of detectors: a row is what is found. What is right of a picture is twice what is found, of that, what is missed
    and what is made up (F1)."""

    def truth(self, labelled: Labelled, index: int) -> Any:
        assert labelled.objects is not None
        return labelled.objects.rows[index]

    def row(self, labelled: Labelled, index: int, found: Detections) -> tuple[Detections, float]:
        right, missed, wrong = counted(self.truth(labelled, index), sure_ones(found))
        return found, 2 * right / (2 * right + missed + wrong) if right + missed + wrong else 1.0

    def scored(self, labelled: Labelled, rows: Sequence[Detections]) -> ObjectScores:
        assert labelled.objects is not None
        return score_objects(labelled.objects.rows, rows, labelled.objects.classes, labelled.groups)

    def drawn(self, model: Any, examples: Sequence[Example]) -> Image.Image:
        return object_sheet([one._replace(found=sure_ones(one.found)) for one in examples], model.config.classes)


def evaluate_dense(config: EvaluateConfig, *, detects: bool) -> MapEvaluation | ObjectEvaluation:
    """Measure a segmenter, or a detector; see `maehub.train.evaluate`, which calls it for one."""
    for name in ("label", "classes_from", "corruptions", "baseline", "image_size", "batch_size"):
        if getattr(config, name):
            does = "finds objects" if detects else "tells every pixel"
            raise UsageError(f"--{name.replace('_', '-')} is for classifiers, and {config.model} {does}")
    members = (*_MEMBERS, _RESULTS) if detects else _MEMBERS
    if config.out is not None:
        check_free(config.out, config.overwrite, members)
    parts: Any = (MapMeasuring(), dense.load_segmenter, find_label_maps, split_label_maps)
    if detects:
        parts = (ObjectMeasuring(), dense.load_detector, find_objects, split_objects)
    measuring, load, find, split = parts
    device = usable_device(config.device)
    model = load(config.model, device=device)
    known = model.config.classes
    labelled = held_out_by(
        config, lambda run: split(config.data, seed=run["seed"], share=run["val_share"], group=run["group"])
    )
    labelled = labelled or find(config.data, group=config.group, classes=known, side="testing").training
    labelled = in_classes(labelled, known, config.data)
    rows: list[Any] = []
    shown: list[Measured] = []
    precision = autocast(config.precision, device)
    for one in measuring.each(model, labelled, range(len(labelled)), precision, progress=not config.quiet):
        rows.append(one.row)
        shown = worst([*shown, one], _WORST)
    sheet, used = measuring.sheet(model, labelled, shown), computed_in(config.precision)
    told = (config.model, config.data, measuring.scored(labelled, rows), sheet)
    found: MapEvaluation | ObjectEvaluation = MapEvaluation(*told, precision=used)
    if detects:
        names = tuple(labelled.samples.name(index).decode("utf-8", "replace") for index in range(len(labelled)))
        found = ObjectEvaluation(*told, precision=used, images=names)
    if config.out is None:
        return found
    found = replace(found, files=tuple(config.out / name for name in members))
    with whole_folder(config.out, overwrite=config.overwrite, members=members) as folder:
        write_text(folder / "evaluation.json", json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
        sheet.save(folder / "worst.png")
        if detects:
            results = [row for number, one in enumerate(rows, 1) for row in coco_results(one, known, number)]
            write_text(folder / _RESULTS, json.dumps(results) + "\n")
    return found


def worst(measured: Iterable[Measured], count: int) -> list[Measured]:
    """Those of which the least is right, as many as a sheet shows."""
    return sorted(measured, key=lambda one: (one.right, one.place))[:count]


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
    maps, objects = labelled.maps, labelled.objects
    if maps is not None:
        moved = tuple(at if at < 0 else int(place[at]) for at in maps.classes.places)
        maps = replace(maps, classes=replace(maps.classes, names=names, places=moved))
    if objects is not None:
        assert isinstance(known, ObjectClasses)
        moves = np.append(place, -1)  # what is ignored and of no class stays so
        rows = tuple(replace(row, labels=moves[row.labels]) for row in objects.rows)
        objects = replace(objects, rows=rows, classes=known)
    return replace(mapped(labelled, names, data), maps=maps, objects=objects)
