"""What a segmenter or a detector says of pictures: label maps or COCO's results as files, overlays to look at."""

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from maehub.data import MapClasses, ObjectClasses, find_images
from maehub.dense import Detections, Segmenter, pixels_of
from maehub.errors import DataError, UsageError
from maehub.features import Skipped
from maehub.files import check_free, whole_folder, write_json, write_text
from maehub.images import ImagePath, Size, printable
from maehub.models import Precision, autocast
from maehub.train.evaluation.dense.object_scores import coco_results
from maehub.train.evaluation.dense.plots import SURE, found_marks, marked, overlay, sure_ones
from maehub.train.evaluation.text_tables import html_table, text_table
from maehub.train.evaluation.text_tables import printable as shortened

if TYPE_CHECKING:
    from maehub.dense import Detector

_PRINTED, _COLUMNS = 20, 5  # pictures and classes of a table


class DensePredictions(ABC):
    """What is said of pictures. Prints as a table of the first of them."""

    members: ClassVar[tuple[str, ...]]
    """What a folder of them is made of."""

    paths: list[str]
    skipped: list[Skipped]

    def _facts(self, task: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        skipped = [picture._asdict() for picture in self.skipped]
        return {"images": len(self), "task": task, **more, "predictions": rows, "skipped": skipped}

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        header, rows = self._table(range(len(self))[:_PRINTED])
        lines = [text_table(header, rows, left=range(len(header)))]
        lines += [f"… and {len(self) - _PRINTED:,} more pictures"] * (len(self) > _PRINTED)
        return "\n".join([*lines, *[f"{len(self.skipped):,} skipped, since they cannot be read"] * bool(self.skipped)])

    def _repr_html_(self) -> str:
        return html_table(*self._table(range(len(self))[:_PRINTED]))

    @abstractmethod
    def _table(self, places: Iterable[int]) -> tuple[list[str], list[list[str]]]:
        """Titles, and a row a picture; each begins with `shown_path`."""


@dataclass(frozen=True)
class MapPredictions(DensePredictions):
    """Of each picture the share of its pixels that each class has. Prints as a table."""

    members = ("masks", "overlays", "classes.json", "predictions.json")

    paths: list[str]
    classes: tuple[str, ...]
    shares: np.ndarray
    """(n, classes) float64, rows sum to 1."""
    skipped: list[Skipped]
    """Pictures that cannot be read."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON; classes without a pixel are left out."""
        rows: list[dict[str, Any]] = []
        for path, row in zip(self.paths, self.shares, strict=True):
            shares = {name: round(float(share), 6) for name, share in zip(self.classes, row, strict=True) if share}
            rows.append({"path": path, "shares": shares})
        return self._facts("segment", rows)

    def _table(self, places: Iterable[int]) -> tuple[list[str], list[list[str]]]:
        count = min(_COLUMNS, len(self.classes))
        rows = []
        for path, row in ((self.paths[place], self.shares[place]) for place in places):
            cells = [shown_path(path)]
            for place in np.argsort(-row, kind="stable")[:count].tolist():
                cells.append(f"{100 * row[place]:5.1f} % {printable(self.classes[place])}" if row[place] else "")
            rows.append(cells)
        return ["PICTURE", "MOST PIXELS", *[""] * (count - 1)], rows


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
        categories = dict(zip(self.classes.names, self.classes.ids, strict=True))
        return self._facts("detect", rows, score_from=SURE, categories=categories)

    def _table(self, places: Iterable[int]) -> tuple[list[str], list[list[str]]]:
        counts = self.counts
        most = np.argsort(-counts.sum(axis=0), kind="stable")[:_COLUMNS].tolist()
        rows = [
            [shown_path(self.paths[place]), f"{counts[place].sum():,}", *(f"{counts[place, at]:,}" for at in most)]
            for place in places
        ]
        return ["PICTURE", f"OBJECTS FROM {SURE} ON", *(shortened(self.classes.names[at], 20) for at in most)], rows


class _Run(NamedTuple):
    """Pictures on their way through a model, and what is written of them."""

    each: Iterator[tuple[str, np.ndarray, Any]]
    """The name that a picture's files have, its pixels, and what is predicted."""
    paths: list[str]
    """Of the pictures that were read so far."""
    skipped: list[Skipped]
    folder: Path | None


def predict_maps(
    model: Segmenter,
    sources: ImagePath | Iterable[ImagePath],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    precision: Precision = "fp32",
    skip_bad: bool = False,
    progress: bool = True,
) -> MapPredictions:
    """The class of every pixel of pictures, and with ``out`` a folder of label maps.

    The folder has ``masks/NAME.png``, label maps with the values that the training's had (colours, where it had them)
    in the colours of the classes; ``overlays/NAME.png``, pictures under those colours; ``classes.json``, which
    `--task segment` reads; and ``predictions.json``. It appears whole or not at all. NAME is that of the picture below
    the folder that was searched.

    Args:
        model: on the device where it shall compute.
        sources: pictures, and folders searched at any depth.
        overwrite: replace such a folder.
        skip_bad: leave out pictures that cannot be read.

    Raises:
        UsageError: the folder is in use, or two pictures would be written under one name.
        DataError: no pictures, or one that cannot be read, unless ``skip_bad``.
    """
    classes, palette, shares = model.config.classes, model.config.palette, []
    with _predicting(model, sources, out, MapPredictions, overwrite, precision, skip_bad, progress) as run:
        for name, pixels, places in run.each:
            shares.append(np.bincount(places.reshape(-1), minlength=len(classes.names)) / places.size)
            if run.folder is not None:
                save_below(run.folder / "masks", name, label_map(places, classes, palette))
                save_below(run.folder / "overlays", name, Image.fromarray(overlay(pixels, places, palette)))
        found = MapPredictions(run.paths, classes.names, np.stack(shares), run.skipped)
        if run.folder is not None:
            write_json(run.folder / "classes.json", _said(classes))
            write_json(run.folder / "predictions.json", found.to_dict())
    return found


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
    with _predicting(model, sources, out, ObjectPredictions, overwrite, precision, skip_bad, progress) as run:
        for name, pixels, said in run.each:
            sizes.append((pixels.shape[0], pixels.shape[1]))
            found.append(said)
            if run.folder is not None:
                save_below(run.folder / "overlays", name, marked(pixels, found_marks(sure_ones(said), classes)))
        done = ObjectPredictions(run.paths, sizes, found, classes, run.skipped)
        if run.folder is not None:
            write_text(run.folder / "detections.json", json.dumps(done.results(), allow_nan=False) + "\n")
            write_json(run.folder / "predictions.json", done.to_dict())
    return done


@contextlib.contextmanager
def _predicting(
    model: Any,
    sources: ImagePath | Iterable[ImagePath],
    out: str | Path | None,
    kind: type[DensePredictions],
    overwrite: bool,
    precision: Precision,
    skip_bad: bool,
    progress: bool,
) -> Iterator[_Run]:
    """What a model predicts of each picture, and a folder of that, as `predict_maps` says."""
    named = list(_named([sources] if isinstance(sources, ImagePath) else sources))
    names = [name for _, name in named]
    staged: Any = contextlib.nullcontext()
    if out is not None:
        check_free(Path(out), overwrite, kind.members)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"several pictures are called {printable(twice)}, and would be written to one file")
        staged = whole_folder(Path(out), overwrite=overwrite, members=kind.members)
    device, paths, skipped = model.encoder.cls_token.device, list[str](), list[Skipped]()

    def each() -> Iterator[tuple[str, np.ndarray, Any]]:
        for path, name in tqdm(named, unit=" pictures", disable=None if progress else True, leave=False):
            try:
                pixels = pixels_of(path, model.encoder.config.channels)
            except DataError as error:
                if not skip_bad:
                    raise
                skipped.append(Skipped(os.fsdecode(path), str(error)))
                continue
            with autocast(precision, device), torch.inference_mode():
                predicted = model.predict(pixels)
            paths.append(os.fsdecode(path))
            yield name, pixels, predicted
        if not paths:
            raise DataError(f"none of {len(named)} pictures can be read; {skipped[0].reason}")

    with staged as folder:
        yield _Run(each(), paths, skipped, folder)


def save_below(folder: Path, name: str, picture: Image.Image) -> None:
    """Write NAME.png, where a name may be that of a folder and a file."""
    file = folder / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def shown_path(path: str) -> str:
    """The end of a path, which tells files apart."""
    shown = printable(path)
    return shown if len(shown) <= 40 else f"…{shown[-39:]}"


def label_map(places: np.ndarray, classes: MapClasses, palette: Iterable[tuple[int, int, int]]) -> Image.Image:
    """Places of classes (H, W) as a label map: the values of the classes, seen in their colours where there is room
    for a palette; or their colours alone, where classes are known by colours."""
    colours = list(palette)
    if classes.coloured:
        return Image.fromarray(np.array(colours, np.uint8)[places])
    values = classes.written(places)
    picture = Image.fromarray(values)
    if values.dtype == np.uint8:
        table = np.zeros((256, 3), np.uint8)
        table[list(classes.first_values)] = colours
        picture.putpalette(table.tobytes())
    return picture


def _said(classes: MapClasses) -> dict[str, Any]:
    """What classes.json says of them."""
    values: dict[str, list[Any]] = {name: [] for name in classes.names}
    for value, place in zip(classes.values, classes.places, strict=True):
        if place >= 0:
            values[classes.names[place]].append(
                [value >> 16, value >> 8 & 255, value & 255] if classes.coloured else value
            )
    return {name: some[0] if len(some) == 1 else some for name, some in values.items()}


def _named(sources: Iterable[ImagePath]) -> Iterator[tuple[bytes, str]]:
    """The paths of pictures, and what each is called below the folder that is written, without an ending."""
    for source in sources:
        samples = find_images(source)
        for index in range(len(samples)):
            name = samples.name(index) if samples.root else os.path.basename(samples.name(index))
            yield samples.path(index), os.fsdecode(os.path.splitext(name)[0])
