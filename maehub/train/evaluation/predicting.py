"""What pictures show, by a classifier: its probabilities for files, folders and pictures in memory."""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from maehub.data import PictureSource
from maehub.errors import UsageError
from maehub.features import Skipped, check_bad_files, extract_features, write_bad_files
from maehub.files import atomic_write, sheet_cells
from maehub.models import Encoder, Precision
from maehub.train.evaluation.config import check_target
from maehub.train.evaluation.scores import probabilities
from maehub.train.evaluation.text_tables import html_table, printable, text_table

_PRINTED = 20  # pictures
_COLUMNS = 5  # classes
_ROWS = 4096  # features that go through the head at once


class Guess(NamedTuple):
    """A class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Predictions:
    """One row of probabilities a picture. Prints as a table, and draws itself in a notebook.

    ``paths``: one a row, as `os.fsdecode` gives them; a picture that came without a file is called by its place in the
    source. ``classes``: C names. ``probabilities``: (n, C) float32; rows sum to 1, unless with ``multi_label`` every
    class has a probability of its own; with ``numeric`` they are the numbers that ``classes`` names. ``skipped``:
    pictures that could not be read. ``shown``: how many classes are named for each picture where nothing else is asked
    for.
    """

    paths: list[str]
    classes: tuple[str, ...]
    probabilities: np.ndarray
    multi_label: bool
    skipped: list[Skipped]
    shown: int = 5
    numeric: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def top(self, k: int | None = None) -> list[list[Guess]]:
        """The ``k`` most probable classes of each picture, the first first; of equal ones in the order of classes.

        Numbers are all there, in their order.
        """
        rows = self.probabilities
        if self.numeric:
            return [list(map(Guess, self.classes, row)) for row in rows.tolist()]
        order = np.argsort(-rows, axis=1, kind="stable")[:, : self.shown if k is None else k]
        values = np.take_along_axis(rows, order, axis=1)
        return [
            [Guess(self.classes[place], share) for place, share in zip(places, shares, strict=True)]
            for places, shares in zip(order.tolist(), values.tolist(), strict=True)
        ]

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the ``shown`` most probable classes of each picture to a .csv or .json file.

        Pictures that were skipped stand in the .json file too; beside a .csv they are in ``bad_files.csv``.

        Raises:
            UsageError: another ending, or the file exists.
            CheckpointError: the disk is full or read-only; what was there before is unchanged.
        """
        path = Path(path)
        check_target(path, overwrite)
        if self.skipped and path.suffix == ".csv":
            check_bad_files(path, overwrite)
        with (
            atomic_write(path) as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        ):
            if path.suffix == ".json":
                file.write(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
            else:
                rows = csv.writer(file)
                places = range(1, min(self.shown, len(self.classes)) + 1)
                columns = [f"{what}{place}" for place in places for what in ("class", "probability")]
                rows.writerow(sheet_cells(["path", *(self.classes if self.numeric else columns)]))
                for name, guesses in zip(self.paths, self.top(), strict=True):
                    cells = [[f"{value:.7g}"] if self.numeric else [word, f"{value:.6g}"] for word, value in guesses]
                    rows.writerow(sheet_cells([name, *(cell for pair in cells for cell in pair)]))
        if self.skipped and path.suffix == ".csv":
            write_bad_files(path, self.skipped)

    def to_dict(self) -> dict[str, object]:
        """Plain lists, numbers and strings, for JSON: of each picture the ``shown`` most probable classes."""
        rows = zip(self.paths, self.top(), strict=True)
        listed: list[dict[str, object]] = [
            {"path": path}
            | ({"numbers": dict(guesses)} if self.numeric else {"top": [guess._asdict() for guess in guesses]})
            for path, guesses in rows
        ]
        return {
            "images": len(self),
            "classes": len(self.classes),
            "multi_label": self.multi_label,
            "numeric": self.numeric,
            "predictions": listed,
            "skipped": [picture._asdict() for picture in self.skipped],
        }

    def __str__(self) -> str:
        header, rows = self._table()
        return "\n".join([text_table(header, rows, left=range(len(header))), *self._rest()])

    def _repr_html_(self) -> str:
        header, rows = self._table()
        return "".join([html_table(header, rows), *(f"<p>{line}</p>" for line in self._rest())])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        count = min(self.shown, len(self.classes), _COLUMNS)
        titles = [f"{'TOP' if place == 1 else ''} {place}".strip() for place in range(1, count + 1)]
        header = ["PICTURE", *([printable(name, 24) for name in self.classes] if self.numeric else titles)]
        first = replace(self, paths=self.paths[:_PRINTED], probabilities=self.probabilities[:_PRINTED])
        rows = [
            [name if len(name) <= 40 else f"…{name[-39:]}"]  # the end of a path tells files apart
            + [
                f"{value:.6g}" if self.numeric else f"{100 * value:5.1f} % {printable(word, 24)}"
                for word, value in guesses
            ]
            for name, guesses in zip((printable(path, 10_000) for path in first.paths), first.top(count), strict=True)
        ]
        return header, rows

    def _rest(self) -> list[str]:
        lines = [f"… and {len(self) - _PRINTED:,} more pictures"] if len(self) > _PRINTED else []
        return [*lines, f"{len(self.skipped):,} skipped, since they cannot be read"] if self.skipped else lines


def predict(
    encoder: Encoder,
    source: PictureSource,
    *,
    top: int = 5,
    batch_size: int | None = None,
    workers: int | None = None,
    precision: Precision = "fp32",
    skip_bad: bool = False,
    progress: bool = True,
) -> Predictions:
    """What each picture of a source shows, through the model's own transform.

        classifier = maehub.load("runs/flowers")
        print(maehub.train.predict(classifier, "photos/"))

    Args:
        encoder: with a head, on the device where it shall compute.
        source: as `maehub.extract_features` takes it: a folder, a file, a list of paths, pictures in memory.
        top: how many classes are named for each picture where the predictions are printed and written.
        batch_size, workers, precision, skip_bad, progress: as in `maehub.extract_features`.

    Raises:
        UsageError: the model has no head, or an argument that cannot be.
        DataError: no pictures, or one that cannot be read, unless ``skip_bad``.
    """
    if not isinstance(encoder, Encoder) or not encoder.config.classes:
        raise UsageError(
            "predictions need an Encoder with a head, and this model has none: `maehub finetune DATA -m MODEL -o RUN` "
            "trains one, and maehub.load(RUN) loads it"
        )
    if top < 1:
        raise UsageError(f"top must be 1 or more, not {top}")
    table = extract_features(
        encoder,
        source,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        skip_bad=skip_bad,
        progress=progress,
    )
    weight = encoder.head.weight
    with torch.inference_mode():
        parts = [encoder.head(part.to(weight)).float().cpu() for part in table.features.split(_ROWS)]
    config = encoder.config
    names = config.class_names or tuple(map(str, range(config.classes)))
    found = torch.cat(parts).numpy()
    shares = found if config.numeric else probabilities(found, multi_label=config.multi_label)
    return Predictions(table.paths, names, shares, config.multi_label, table.skipped, top, config.numeric)
