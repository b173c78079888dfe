"""What objects pictures show, by a detector: COCO's results, overlays to look at, and counts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maehub.data import ObjectClasses
from maehub.dense import Detections
from maehub.features import Skipped
from maehub.files import write_json, write_text
from maehub.images import ImagePath, Size
from maehub.models import Precision
from maehub.train.evaluation.maps.predicting import DensePredictions, of_each, save_below, shown_path
from maehub.train.evaluation.objects.plots import SURE, found_marks, marked, sure_ones
from maehub.train.evaluation.objects.scores import coco_results
from maehub.train.evaluation.text_tables import printable

if TYPE_CHECKING:
    from maehub.dense import Detector

_COLUMNS = 5  # classes of a table


@dataclass(frozen=True)
class ObjectPredictions(DensePredictions):
    """Of each picture the objects that are found. Prints as a table of those with a score of 0.5 or more."""

    members = ("overlays", "detections.json", "predictions.json")

    paths: list[str]
    sizes: list[Size]
    """(height, width) of the pictures."""
    found: list[Detections]
    classes: ObjectClasses
    skipped: list[Skipped]
    """Pictures that cannot be read."""

    @property
    def counts(self) -> np.ndarray:
        """(n, classes) int64, objects with a score of 0.5 or more."""
        rows = [np.bincount(sure_ones(one).labels, minlength=len(self.classes.names)) for one in self.found]
        return np.stack(rows) if rows else np.zeros((0, len(self.classes.names)), int)

    def results(self) -> list[dict[str, Any]]:
        """All of them, however unsure, as COCO's results; pictures are called by their numbers, from 1."""
        return [row for number, one in enumerate(self.found, 1) for row in coco_results(one, self.classes, number)]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON; of the objects those with a score of 0.5 or more."""
        rows = []
        for number, (path, size, found) in enumerate(zip(self.paths, self.sizes, self.found, strict=True), 1):
            one = sure_ones(found)
            objects = [
                {"name": self.classes.names[label], "score": round(score, 6), "box": [round(edge, 3) for edge in box]}
                for label, score, box in zip(one.labels.tolist(), one.scores.tolist(), one.boxes.tolist(), strict=True)
            ]
            facts = {"image_id": number, "path": path, "height": size[0], "width": size[1]}
            rows.append(facts | {"found": len(found), "objects": objects})
        return {
            "images": len(self),
            "task": "detect",
            "score_from": SURE,
            "categories": dict(zip(self.classes.names, self.classes.ids, strict=True)),
            "predictions": rows,
            "skipped": [picture._asdict() for picture in self.skipped],
        }

    def _table(self, places: Iterable[int]) -> tuple[list[str], list[list[str]]]:
        counts = self.counts
        most = np.argsort(-counts.sum(axis=0), kind="stable")[:_COLUMNS].tolist()
        rows = [
            [shown_path(self.paths[place]), f"{counts[place].sum():,}", *(f"{counts[place, at]:,}" for at in most)]
            for place in places
        ]
        return ["PICTURE", f"OBJECTS FROM {SURE} ON", *(printable(self.classes.names[at], 20) for at in most)], rows


def predict_objects(
    model: "Detector",
    sources: ImagePath | Iterable[ImagePath],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    precision: Precision = "fp32",
    skip_bad: bool = False,
    progress: bool = True,
) -> ObjectPredictions:
    """The objects in pictures, and with ``out`` a folder of them.

    The folder has ``detections.json``, COCO's results, all that is found; ``predictions.json``, which says the path and
    size of each ``image_id``, the number of each class, and the objects with a score of 0.5 or more; and
    ``overlays/NAME.png``, pictures with these. It appears whole or not at all. NAME is that of the picture below the
    folder that was searched. Arguments and errors are those of `predict_maps`.
    """
    classes, sizes, found = model.config.classes, [], []

    def keep(name: str, pixels: np.ndarray, said: Detections, folder: Path | None) -> None:
        sizes.append((pixels.shape[0], pixels.shape[1]))
        found.append(said)
        if folder is not None:
            save_below(folder / "overlays", name, marked(pixels, found_marks(sure_ones(said), classes)))

    def finish(paths: list[str], skipped: list[Skipped], folder: Path | None) -> ObjectPredictions:
        done = ObjectPredictions(paths, sizes, found, classes, skipped)
        if folder is not None:
            write_text(folder / "detections.json", json.dumps(done.results(), allow_nan=False) + "\n")
            write_json(folder / "predictions.json", done.to_dict())
        return done

    target = None if out is None else Path(out)
    return of_each(
        model, sources, target, ObjectPredictions.members, keep, finish, overwrite, precision, skip_bad, progress
    )
