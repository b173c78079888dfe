"""Measuring a detector on pictures with objects, and the folder with what was found."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from maehub.data import Labelled, Objects, find_objects, split_objects
from maehub.dense import Detections, pixels_of
from maehub.models import autocast, computed_in, usable_device
from maehub.train.evaluation.config import EvaluateConfig
from maehub.train.evaluation.maps.evaluating import (
    DenseEvaluation,
    check_asked,
    held_out_by,
    in_classes,
    predicted_of,
    worst,
    written,
)
from maehub.train.evaluation.objects.plots import ObjectExample, counted, example_sheet, sure_ones
from maehub.train.evaluation.objects.scores import ObjectScores, coco_results, score_objects

if TYPE_CHECKING:
    from maehub.dense import Detector

_RESULTS = "detections.json"


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


def evaluate_objects(config: EvaluateConfig) -> ObjectEvaluation:
    """Measure a detector; see `maehub.train.evaluate`, which calls it for one."""
    from maehub.dense import load_detector  # which takes torchvision's parts, and a while

    check_asked(config, "finds objects", [_RESULTS])
    device = usable_device(config.device)
    model = load_detector(config.model, device=device)
    known = model.config.classes
    labelled = held_out_by(
        config,
        lambda run: split_objects(config.data, seed=run["seed"], share=run["val_share"], group=run["group"]),
    )
    labelled = labelled or find_objects(config.data, group=config.group, classes=known, side="testing").training
    labelled = in_classes(labelled, known, config.data)
    assert labelled.objects is not None
    rows, found = labelled.objects.rows, []
    examples: list[tuple[float, int, Detections]] = []
    precision = autocast(config.precision, device)
    for index, said in measured_objects(model, labelled, range(len(labelled)), precision, progress=not config.quiet):
        found.append(said)
        examples = worst([*examples, (share_right(rows[index], said), index, said)])
    scores = score_objects(rows, found, known, labelled.groups)
    sheet = objects_sheet(model, labelled, [(index, said) for _, index, said in examples])
    names = tuple(labelled.samples.name(index).decode("utf-8", "replace") for index in range(len(labelled)))
    done = ObjectEvaluation(
        config.model, config.data, scores, sheet, precision=computed_in(config.precision), images=names
    )
    results = [row for number, one in enumerate(found, 1) for row in coco_results(one, known, number)]
    return written(done, config, {_RESULTS: json.dumps(results) + "\n"})


def measured_objects(
    model: "Detector",
    labelled: Labelled,
    places: Iterable[int],
    precision: contextlib.AbstractContextManager[Any],
    *,
    progress: bool = False,
) -> Iterator[tuple[int, Detections]]:
    """Of each of these pictures its place, and what is found in it."""
    return predicted_of(model, labelled, places, precision, progress)


def share_right(truth: Objects, found: Detections) -> float:
    """What is right of a picture, 0 to 1: twice what is found, of that, what is missed and what is made up (F1)."""
    right, missed, wrong = counted(truth, sure_ones(found))
    return 2 * right / (2 * right + missed + wrong) if right + missed + wrong else 1.0


def objects_sheet(model: "Detector", labelled: Labelled, shown: Sequence[tuple[int, Detections]]) -> Image.Image:
    """Some pictures by their places, with what is found in them."""
    assert labelled.objects is not None
    examples = []
    for index, found in shown:
        pixels = pixels_of(labelled.samples.source(index), model.encoder.config.channels)  # type: ignore[arg-type]
        name = labelled.samples.name(index).decode("utf-8", "replace")
        examples.append(ObjectExample(name, pixels, labelled.objects.rows[index], sure_ones(found)))
    return example_sheet(examples, labelled.objects.classes)
