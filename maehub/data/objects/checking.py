"""What a set with objects holds, and what is wrong with it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.data.labels import Labelled
from maehub.data.maps.checking import ClassCount, class_counts, wrong_lines
from maehub.data.objects.finding import find_objects
from maehub.errors import visible


class ObjectCount(NamedTuple):
    """One class: pictures that show it and its objects, on each side of a split that was given."""

    pictures: ClassCount
    training: int
    testing: int | None


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
    classes: tuple[ObjectCount, ...]
    wrong: tuple[str, ...]
    """Pictures and annotations that cannot be used, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        rows = [
            row.pictures._asdict() | {"training_objects": row.training, "testing_objects": row.testing}
            for row in self.classes
        ]
        return asdict(self) | {"classes": rows, "wrong": list(self.wrong)}

    def describe(self) -> str:
        """The same in words."""
        kind = "with outlines" if self.masked else "boxes alone"
        lines = [
            f"{self.pictures:,} pictures show {self.objects:,} objects of {len(self.classes)} classes, {kind}; "
            f"{self.empty:,} show none; {self.ignored:,} more objects are ignored; {self.clipped:,} are cut at edges",
            "pictures that show each class, and its objects:",
        ]
        for row in self.classes:
            text = f"{row.pictures.training:,} with {row.training:,}"
            if row.testing is not None:
                text = f"{text} to train, {row.pictures.testing:,} with {row.testing:,} to test"
            absent = "" if row.training and row.testing != 0 else "   (a side has none)"
            lines.append(f"  {visible(row.pictures.name):<24}{text}{absent}")
        return "\n".join([*lines, *wrong_lines(self.wrong, "pictures or annotations")])


def check_objects(data: str | Path) -> ObjectCheck:
    """Read all annotations of a set; see `find_objects` for its layout.

    Raises:
        UsageError: it is no set with objects.
        DataError: none can be used.
    """
    found = find_objects(data, strict=False)
    sides: list[Labelled] = [one for one in (found.training, found.testing) if one is not None]
    counts, ignored, masked = [], 0, True
    for side in sides:
        assert side.objects is not None
        labels = [row.labels[~row.ignored] for row in side.objects.rows]
        counts.append(np.bincount(np.concatenate(labels), minlength=len(side.classes)).tolist())
        ignored += sum(int(row.ignored.sum()) for row in side.objects.rows)
        masked = masked and side.objects.masked
    rows = [
        ObjectCount(row, counts[0][place], counts[1][place] if len(sides) > 1 else None)
        for place, row in enumerate(class_counts(sides))
    ]
    return ObjectCheck(
        pictures=sum(map(len, sides)),
        empty=sum(int((~side.labels.any(axis=1)).sum()) for side in sides),
        objects=sum(map(sum, counts)),
        ignored=ignored,
        masked=masked,
        clipped=found.clipped,
        classes=tuple(rows),
        wrong=tuple(found.wrong),
    )
