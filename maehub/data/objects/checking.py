"""What a set with label maps or with objects holds, and what is wrong with it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.data.maps.folders import find_label_maps
from maehub.data.objects.finding import find_objects
from maehub.errors import visible

_SHOWN = 20  # that are printed of what is wrong


class ClassCount(NamedTuple):
    """One class: pictures that show it, or its objects, on each side of a split that was given."""

    name: str
    training: int
    testing: int | None


@dataclass(frozen=True)
class MapCheck:
    """What `check_label_maps` found. Prints as a table."""

    pictures: int
    """With a label map that can be used."""
    classes: tuple[ClassCount, ...]
    wrong: tuple[str, ...]
    """Label maps that cannot be used, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return asdict(self) | {"classes": [row._asdict() for row in self.classes], "wrong": list(self.wrong)}

    def describe(self) -> str:
        """The same in words."""
        lines = [f"{self.pictures:,} pictures have label maps of {len(self.classes)} classes; pictures that show each:"]
        lines += _class_lines(self.classes)
        return "\n".join([*lines, *_wrong_lines(self.wrong, "label maps")])


@dataclass(frozen=True)
class ObjectCheck:
    """What `check_objects` found. Prints as a table."""

    pictures: int
    """With annotations that can be used, or with no object."""
    empty: int
    """Of these, the ones without an object."""
    objects: int
    ignored: int
    """Objects besides that are neither trained on nor missed: crowds, difficult ones."""
    masked: bool
    """Whether every object has an outline."""
    clipped: int
    """Objects that reach over the edges of their pictures, and are cut there."""
    classes: tuple[ClassCount, ...]
    """Pictures that show each."""
    counts: tuple[ClassCount, ...]
    """Objects of each."""
    wrong: tuple[str, ...]
    """Pictures and annotations that cannot be used, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        rows = {name: [row._asdict() for row in getattr(self, name)] for name in ("classes", "counts")}
        return asdict(self) | rows | {"wrong": list(self.wrong)}

    def describe(self) -> str:
        """The same in words."""
        kind = "with outlines" if self.masked else "boxes alone"
        lines = [
            f"{self.pictures:,} pictures show {self.objects:,} objects of {len(self.classes)} classes, {kind}; "
            f"{self.empty:,} show none; {self.ignored:,} more objects are ignored; {self.clipped:,} are cut at edges",
            "pictures that show each class:",
            *_class_lines(self.classes),
            "objects of each class:",
            *_class_lines(self.counts),
        ]
        return "\n".join([*lines, *_wrong_lines(self.wrong, "pictures or annotations")])


def _wrong_lines(wrong: Sequence[str], what: str) -> list[str]:
    """The first things that are wrong, below a line that counts them; no line where nothing is."""
    shown = [f"  {visible(one)}" for one in wrong[:_SHOWN]]
    return [*[f"{len(wrong):,} {what} cannot be used:"] * bool(wrong), *shown, *["  …"] * (len(wrong) > _SHOWN)]


def _class_lines(rows: Sequence[ClassCount]) -> list[str]:
    """A line for each class."""
    lines = []
    for row in rows:
        sides = f"{row.training:,}" if row.testing is None else f"{row.training:,} to train, {row.testing:,} to test"
        absent = "" if row.training and row.testing != 0 else "   (a side has none)"
        lines.append(f"  {visible(row.name):<24}{sides}{absent}")
    return lines


def _class_counts(classes: Sequence[str], counts: Sequence[list[int]]) -> tuple[ClassCount, ...]:
    """Numbers for each class on one side or two."""
    tested = counts[1] if len(counts) > 1 else [None] * len(classes)
    return tuple(map(ClassCount, classes, counts[0], tested))


def check_label_maps(data: str | Path) -> MapCheck:
    """Read every label map of a set; see `find_label_maps` for its layout.

    Raises:
        UsageError: it is no set with label maps.
        DataError: none can be used, or what their values mean is not known.
    """
    found = find_label_maps(data, strict=False)
    counts = _class_counts(found.training.classes, [side.counts.tolist() for side in found.sides])
    return MapCheck(sum(map(len, found.sides)), counts, tuple(found.wrong))


def check_objects(data: str | Path) -> ObjectCheck:
    """Read all annotations of a set; see `find_objects` for its layout.

    Raises:
        UsageError: it is no set with objects.
        DataError: none can be used.
    """
    found = find_objects(data, strict=False)
    sides = found.sides
    rows = [side.objects.rows if side.objects else () for side in sides]
    labels = [np.concatenate([row.labels[~row.ignored] for row in part]) for part in rows]
    counts = [np.bincount(part, minlength=len(found.training.classes)).tolist() for part in labels]
    return ObjectCheck(
        pictures=sum(map(len, sides)),
        empty=sum(int((~side.labels.any(axis=1)).sum()) for side in sides),
        objects=sum(map(sum, counts)),
        ignored=sum(int(row.ignored.sum()) for part in rows for row in part),
        masked=all(side.objects is not None and side.objects.masked for side in sides),
        clipped=found.clipped,
        classes=_class_counts(found.training.classes, [side.counts.tolist() for side in sides]),
        counts=_class_counts(found.training.classes, counts),
        wrong=tuple(found.wrong),
    )
