"""How well every pixel is told: intersection over union of the classes, with an interval over pictures or groups.

A class's IoU is taken from areas summed over the whole set, as ADE20K, Cityscapes and Pascal VOC do it. The mean of
IoUs that are taken picture by picture is another number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from maehub.data import IGNORED
from maehub.errors import DataError
from maehub.train.evaluation.numbers import Measure, bootstrap
from maehub.train.evaluation.text_tables import html_table, percent, printable, text_table

_LONGEST = 60  # classes in a table


class ClassMeasure(NamedTuple):
    """One class; shares are in percent, None where it has no pixel, neither in truth nor in prediction."""

    name: str
    pictures: int  # that show it
    pixels: int  # that are of it
    iou: float | None
    accuracy: float | None  # share of its pixels that are found
    precision: float | None  # share of what is taken for it
    taken_for: str | None = None  # the class that its pixels are most often mistaken for
    times: float = 0.0  # percent of its pixels


@dataclass(frozen=True)
class MapScores:
    """What `score_maps` measured; shares are in percent. Prints as a table, and draws itself in a notebook."""

    n: int
    """Pictures."""
    miou: float
    """Mean IoU of the classes that occur, in truth or in prediction."""
    low: float | None
    """``low`` to ``high`` is the 95 % interval of ``miou``; None with few pictures or groups."""
    high: float | None
    interval: str
    """How the interval was found."""
    pixel_accuracy: float
    mean_accuracy: float
    """Mean share of the pixels of a class that are found."""
    per_class: tuple[ClassMeasure, ...]
    confusion: np.ndarray | None = field(default=None, repr=False, compare=False)
    """(C, C) int64 pixels: of the class of the row, how many are taken for the class of the column."""

    @property
    def headline(self) -> tuple[str, Measure]:
        """What stands for the whole, in percent."""
        return "mIoU", Measure(self.miou, self.low, self.high)

    @property
    def in_words(self) -> str:
        """The headline, as a card says it."""
        ends = "" if self.low is None else f" (95 % interval {self.headline[1].ends})"
        return f"mIoU {self.miou:.1f} %{ends}, {self.pixel_accuracy:.1f} % of the pixels right,"

    def summary(self) -> dict[str, Any]:
        """The numbers that stand for the whole, for JSON."""
        names = ("n", "miou", "low", "high", "interval", "pixel_accuracy", "mean_accuracy")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain lists, numbers and strings, for JSON."""
        return self.summary() | {
            "per_class": [row._asdict() for row in self.per_class],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "MapScores":
        """The inverse of `to_dict`."""
        confusion = facts["confusion"]
        rest = {name: value for name, value in facts.items() if name not in ("per_class", "confusion")}
        return cls(
            **rest,
            per_class=tuple(ClassMeasure(**row) for row in facts["per_class"]),
            confusion=None if confusion is None else np.array(confusion, np.int64),
        )

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Titles, and a row a class that occurs, the worst first."""
        ranked = sorted((row for row in self.per_class if row.iou is not None), key=lambda row: row.iou or 0.0)
        rows = []
        for row in ranked[:_LONGEST]:
            taken = "" if row.taken_for is None else f"{printable(row.taken_for)} ({row.times:.0f} %)"
            shares = (percent(value) for value in (row.iou, row.accuracy, row.precision))
            rows.append((printable(row.name), f"{row.pictures:,}", *shares, taken))
        return ("CLASS", "PICTURES", "IOU", "FOUND", "PRECISION", "MOST OFTEN TAKEN FOR"), rows

    def __str__(self) -> str:
        lines = [f"{name:<16}{value:>8}   {note}".rstrip() for name, value, note in self._summary_rows()]
        return "\n".join([*lines, "", text_table(*self.table(), left=(0, 5))])

    def _repr_html_(self) -> str:
        return html_table((), self._summary_rows()) + html_table(*self.table())

    def _summary_rows(self) -> list[tuple[str, str, str]]:
        between = self.interval if self.low is None else f"95 % interval {self.headline[1].ends} ({self.interval})"
        return [
            ("mIoU", percent(self.miou), f"mean over classes; {between}, n = {self.n:,}"),
            ("pixels right", percent(self.pixel_accuracy), ""),
            ("mean accuracy", percent(self.mean_accuracy), "mean share of a class's pixels that are found"),
        ]


def confusion_of(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) int64 pixels, of the class of the row taken for that of the column, of places of classes (H, W) each.

    What is ignored in ``truth`` does not count.
    """
    if truth.shape != predicted.shape:
        raise DataError(f"a label map of {truth.shape} is compared with a prediction of {predicted.shape}")
    known = truth != IGNORED
    cells = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def score_maps(tables: Sequence[np.ndarray], classes: Sequence[str], groups: np.ndarray | None) -> MapScores:
    """Scores of confusion tables, (C, C) int64 a picture; ``groups`` (n,) are resampled whole, where there are some.

    The interval is a bootstrap over pictures or groups, by percentiles; with fewer than ten there is none.
    """
    whole: np.ndarray = np.stack(tables).sum(axis=0, dtype=np.int64)
    if not whole.sum():
        raise DataError("no pixel of the label maps has a class, so there is nothing to measure")
    right, truth, said = (np.stack([part(table) for table in tables]) for part in _PARTS)
    found, total, guessed = (part(whole) for part in _PARTS)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy, precision = found / (total + guessed - found), found / total, found / guessed
    areas = [table.astype(float) for table in (right, truth, said)]

    def drawn_miou(weights: np.ndarray) -> np.ndarray:
        found, total, guessed = (weights @ table for table in areas)
        with np.errstate(invalid="ignore", divide="ignore"):
            means: np.ndarray = np.nanmean(found / (total + guessed - found), axis=1)
        return means

    low, high, how = bootstrap(len(tables), groups, drawn_miou)
    rows = []
    for place, name in enumerate(classes):
        others = whole[place].copy()
        others[place] = 0
        most = int(others.argmax())
        taken = (classes[most], 100 * float(others[most] / total[place])) if others[most] else (None, 0.0)
        shares: Any = [None if np.isnan(one[place]) else 100 * float(one[place]) for one in (iou, accuracy, precision)]
        pictures = int((truth[:, place] > 0).sum())
        rows.append(ClassMeasure(name, pictures, int(total[place]), *shares, *taken))
    return MapScores(
        len(tables),
        100 * float(np.nanmean(iou)),
        low,
        high,
        how,
        100 * float(found.sum() / total.sum()),
        100 * float(np.nanmean(accuracy)),
        tuple(rows),
        whole,
    )


_PARTS = (np.diag, lambda table: table.sum(axis=1), lambda table: table.sum(axis=0))
"""Of a confusion table, a number a class: pixels that are found, that are there, that are said to be."""
