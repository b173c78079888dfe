"""What a set with label maps holds, and what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from maehub.data.labels import Labelled
from maehub.data.maps.folders import find_label_maps
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
        rows = [row._asdict() for row in self.classes]
        return {"pictures": self.pictures, "classes": rows, "wrong": list(self.wrong)}

    def describe(self) -> str:
        """The same in words."""
        lines = [f"{self.pictures:,} pictures have label maps of {len(self.classes)} classes; pictures that show each:"]
        lines += class_lines(self.classes)
        return "\n".join([*lines, *wrong_lines(self.wrong, "label maps")])


def wrong_lines(wrong: Sequence[str], what: str) -> list[str]:
    """The first things that are wrong, below a line that counts them; no line where nothing is."""
    shown = [f"  {visible(one)}" for one in wrong[:_SHOWN]]
    return [*[f"{len(wrong):,} {what} cannot be used:"] * bool(wrong), *shown, *["  …"] * (len(wrong) > _SHOWN)]


def class_lines(rows: Sequence[ClassCount]) -> list[str]:
    """A line for each class."""
    lines = []
    for row in rows:
        sides = f"{row.training:,}" if row.testing is None else f"{row.training:,} to train, {row.testing:,} to test"
        absent = "" if row.training and row.testing != 0 else "   (a side has none)"
        lines.append(f"  {visible(row.name):<24}{sides}{absent}")
    return lines


def class_counts(classes: Sequence[str], counts: Sequence[list[int]]) -> tuple[ClassCount, ...]:
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
    sides: list[Labelled] = [one for one in (found.training, found.testing) if one is not None]
    return MapCheck(
        sum(map(len, sides)),
        class_counts(found.training.classes, [side.counts.tolist() for side in sides]),
        tuple(found.wrong),
    )
