"""What class every pixel of pictures is of, by a segmenter: label maps as files, overlays to look at, and shares."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from maehub.data import MapClasses, find_images
from maehub.dense import Segmenter, pixels_of
from maehub.errors import DataError, UsageError
from maehub.features import Skipped
from maehub.files import check_free, whole_folder, write_json
from maehub.images import ImagePath, printable
from maehub.models import Precision, autocast
from maehub.train.evaluation.maps.plots import overlay
from maehub.train.evaluation.text_tables import html_table, text_table

_PRINTED, _COLUMNS = 20, 5  # pictures and classes of a table
_Found = TypeVar("_Found")


class DensePredictions(ABC):
    """What is said of pictures. Prints as a table of the first of them."""

    members: ClassVar[tuple[str, ...]]
    """What a folder of them is made of."""

    paths: list[str]
    skipped: list[Skipped]

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
        skipped = [picture._asdict() for picture in self.skipped]
        return {"images": len(self), "task": "segment", "predictions": rows, "skipped": skipped}

    def _table(self, places: Iterable[int]) -> tuple[list[str], list[list[str]]]:
        count = min(_COLUMNS, len(self.classes))
        rows = []
        for path, row in ((self.paths[place], self.shares[place]) for place in places):
            cells = [shown_path(path)]
            for place in np.argsort(-row, kind="stable")[:count].tolist():
                cells.append(f"{100 * row[place]:5.1f} % {printable(self.classes[place])}" if row[place] else "")
            rows.append(cells)
        return ["PICTURE", "MOST PIXELS", *[""] * (count - 1)], rows


class _Named(NamedTuple):
    path: bytes
    name: str  # below the folder that is written, without an ending


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

    def keep(name: str, pixels: np.ndarray, places: np.ndarray, folder: Path | None) -> None:
        shares.append(np.bincount(places.reshape(-1), minlength=len(classes.names)) / places.size)
        if folder is not None:
            save_below(folder / "masks", name, label_map(places, classes, palette))
            save_below(folder / "overlays", name, Image.fromarray(overlay(pixels, places, palette)))

    def finish(paths: list[str], skipped: list[Skipped], folder: Path | None) -> MapPredictions:
        found = MapPredictions(paths, classes.names, np.stack(shares), skipped)
        if folder is not None:
            write_json(folder / "classes.json", _said(classes))
            write_json(folder / "predictions.json", found.to_dict())
        return found

    target = None if out is None else Path(out)
    return of_each(
        model, sources, target, MapPredictions.members, keep, finish, overwrite, precision, skip_bad, progress
    )


def of_each(
    model: Any,
    sources: ImagePath | Iterable[ImagePath],
    out: Path | None,
    members: Collection[str],
    keep: Callable[[str, np.ndarray, Any, Path | None], None],
    finish: Callable[[list[str], list[Skipped], Path | None], _Found],
    overwrite: bool,
    precision: Precision,
    skip_bad: bool,
    progress: bool,
) -> _Found:
    """What a model predicts of each picture, and a folder of that, as `predict_maps` says.

    ``keep`` takes the name that a picture's files have, its pixels, what is predicted, and the folder that is written;
    ``finish`` the paths of the pictures, what was skipped, and that folder.
    """
    named = list(_named([sources] if isinstance(sources, ImagePath) else sources))
    names = [one.name for one in named]
    if out is not None:
        check_free(out, overwrite, members)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"several pictures are called {printable(twice)}, and would be written to one file")
    device = model.encoder.cls_token.device
    paths: list[str] = []
    skipped: list[Skipped] = []
    staged = whole_folder(out, overwrite=overwrite, members=members) if out is not None else None
    with staged or contextlib.nullcontext() as folder:
        for one in tqdm(named, unit=" pictures", disable=None if progress else True, leave=False):
            try:
                pixels = pixels_of(one.path, model.encoder.config.channels)
            except DataError as error:
                if not skip_bad:
                    raise
                skipped.append(Skipped(os.fsdecode(one.path), str(error)))
                continue
            with autocast(precision, device), torch.inference_mode():
                predicted = model.predict(pixels)
            paths.append(os.fsdecode(one.path))
            keep(one.name, pixels, predicted, folder)
        if not paths:
            raise DataError(f"none of {len(named)} pictures can be read; {skipped[0].reason}")
        return finish(paths, skipped, folder)


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


def _named(sources: Iterable[ImagePath]) -> Iterator[_Named]:
    for source in sources:
        samples = find_images(source)
        for index in range(len(samples)):
            name = samples.name(index) if samples.root else os.path.basename(samples.name(index))
            yield _Named(samples.path(index), os.fsdecode(os.path.splitext(name)[0]))
