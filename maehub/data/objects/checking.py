"""What a set with objects holds, and what is wrong with it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maehub.data.labels import Labelled
from maehub.data.maps.checking import ClassCount, class_counts, class_lines, wrong_lines
from maehub.data.objects.finding import find_objects


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
            *class_lines(self.classes),
            "objects of each class:",
            *class_lines(self.counts),
        ]
        return "\n".join([*lines, *wrong_lines(self.wrong, "pictures or annotations")])


def check_objects(data: str | Path) -> ObjectCheck:
    """Read all annotations of a set; see `find_objects` for its layout.

    Raises:
        UsageError: it is no set with objects.
        DataError: none can be used.
    """
    found = find_objects(data, strict=False)
    sides: list[Labelled] = [one for one in (found.training, found.testing) if one is not None]
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
        classes=class_counts(found.training.classes, [side.counts.tolist() for side in sides]),
        counts=class_counts(found.training.classes, counts),
        wrong=tuple(found.wrong),
    )
