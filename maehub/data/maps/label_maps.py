"""Label maps beside pictures: what their values mean, and how often each occurs."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.data.label_sources import label_name
from maehub.data.sources import Source, select
from maehub.data.workers import core_count
from maehub.errors import DataError, UsageError, first_names
from maehub.images import Size, printable, read_label_map, upright_size

IGNORED = -1
"""In place of a class: a pixel that is neither trained on nor measured."""

_IGNORED_VALUE = 255  # of numbers, where no class has it (as in Pascal VOC, Cityscapes and ADE20K's tools)
_FILES = ("classes.json", "classes.txt")
_MOST_CLASSES = 2**15 - 1
_UNKNOWN = -2

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""


@dataclass(frozen=True)
class MapClasses:
    """Which values of label maps are which classes.

    ``values`` and ``places`` belong together: a pixel of that value is of the class ``names[place]``, or none where the
    place is `IGNORED`. With ``coloured`` a value is 65536 · red + 256 · green + blue.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    places: tuple[int, ...]
    coloured: bool = False

    def __post_init__(self) -> None:
        known, count = set(range(len(self.names))), len(self.values)
        numbers = all(type(number) is int for number in (*self.values, *self.places))
        named = len(self.names) > 1 and all(isinstance(name, str) for name in self.names)
        each = count == len(self.places) == len(set(self.values)) and known <= set(self.places) <= known | {IGNORED}
        if not (numbers and named and each):
            raise UsageError("classes of label maps need two names or more, and a value each")

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Places of classes, (H, W) int16, of what `maehub.images.read_label_map` gives.

        Raises:
            DataError: a value that no class has, or colours in place of numbers.
        """
        packed = self.packed(values)
        order = np.argsort(self.values)
        known, places = np.array(self.values, np.int64)[order], np.array(self.places, np.int16)[order]
        if not self.coloured:
            table = np.full(max(int(known[-1]), _IGNORED_VALUE) + 1, _UNKNOWN, np.int16)
            table[_IGNORED_VALUE] = IGNORED
            table[known] = places
            found = table[np.minimum(packed, len(table) - 1)]
            found[(packed < 0) | (packed >= len(table))] = _UNKNOWN
        else:
            at = np.searchsorted(known, packed).clip(max=len(known) - 1)
            found = np.where(known[at] == packed, places[at], _UNKNOWN).astype(np.int16)
        if (found == _UNKNOWN).any():
            raise DataError(self.unknown({int(packed[found == _UNKNOWN][0])}))
        return found

    def packed(self, values: np.ndarray) -> np.ndarray:
        """(H, W) int64 of values as a file has them: numbers, or colours in one number each."""
        if (values.ndim == 3) != self.coloured:
            raise DataError(self.other_kind())
        return pack(values)

    def other_kind(self) -> str:
        """What is wrong with a map of colours where classes have numbers, or of numbers where they have colours."""
        if self.coloured:
            return "its pixels are numbers, and classes.json knows classes by their colours"
        return (
            "its pixels are colours, and classes are known by numbers. If the colours are classes, name them in "
            'classes.json beside the label maps: {"road": [128, 64, 128], …}; else write numbers'
        )

    @property
    def first_values(self) -> tuple[int, ...]:
        """The value that each class is written as: the first of its own."""
        first = {place: value for value, place in reversed(list(zip(self.values, self.places, strict=True)))}
        return tuple(first[place] for place in range(len(self.names)))

    def unknown(self, values: set[int]) -> str:
        """What is wrong with values that no class has."""
        what = "colour" if self.coloured else "value"
        shown = first_names([self.word(value) for value in sorted(values)], 3)
        known = first_names([f"{self.word(v)} {n}" for v, n in self._named()], 3)
        return f"pixels of the {what} {shown} are of no known class; known are {known}"

    def word(self, value: int) -> str:
        return str([value >> 16, value >> 8 & 255, value & 255]) if self.coloured else str(value)

    def written(self, places: np.ndarray) -> np.ndarray:
        """The inverse of `decode`, for numbers: (H, W) uint8, or uint16 where a class has a value above 255."""
        numbers = np.array(self.first_values)
        return numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16)[places]

    def _named(self) -> Iterator[tuple[int, str]]:
        for value, place in zip(self.values, self.places, strict=True):
            yield value, "ignored" if place == IGNORED else self.names[place]


def pack(values: np.ndarray) -> np.ndarray:
    """Numbers (H, W), or colours (H, W, 3) as one number each, to (H, W) int64."""
    wide = values.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2] if values.ndim == 3 else wide


@dataclass(frozen=True)
class LabelMaps:
    """A label map for each picture of a row, by its file."""

    files: Source
    classes: MapClasses = field(repr=False)

    def read(self, index: int) -> np.ndarray:
        """Places of classes, (H, W) int16."""
        try:
            return self.classes.decode(read_label_map(self.files.source(index)))
        except DataError as error:
            where = self.files.where(index)
            raise error if where in str(error) else DataError(f"{where}: {error}") from error

    def take(self, indices: np.ndarray) -> "LabelMaps":
        return replace(self, files=select(self.files, indices))


class Looked(NamedTuple):
    """What one label map holds."""

    values: dict[int, int]
    """Values, colours packed, with the number of their pixels."""
    coloured: bool
    reason: str = ""
    """Why it cannot be used; empty where it can."""


def look_at_maps(pictures: Source, files: Source) -> list[Looked]:
    """Read every label map, and see that it is of the size of its picture; (n,) in their order."""
    with ThreadPoolExecutor(core_count()) as pool:  # Pillow decodes without Python's lock
        return list(pool.map(partial(_look, pictures, files), range(len(files))))


def _look(pictures: Source, files: Source, index: int) -> Looked:
    try:
        values = read_label_map(files.source(index))
        reason = _other_size(values.shape[:2], upright_size(pictures.source(index)), pictures.where(index))
        found, counts = np.unique(pack(values), return_counts=True)
        return Looked(dict(zip(found.tolist(), counts.tolist(), strict=True)), values.ndim == 3, reason)
    except DataError as error:
        return Looked({}, False, str(error))


def _other_size(size: tuple[int, ...], picture: Size, where: str) -> str:
    if size == picture:
        return ""
    turned = " or the picture is turned by its EXIF orientation, and the map is not" * (size == picture[::-1])
    has = f"it has {size[1]}×{size[0]} pixels, and its picture {where} has {picture[1]}×{picture[0]}"
    return f"{has}: it belongs to another picture, was scaled{',' if turned else ''}{turned}"


def classes_of(folders: Sequence[str]) -> MapClasses | None:
    """What the first classes.json or classes.txt in these folders says; None where there is none."""
    for folder in folders:
        for name in _FILES:
            path = Path(folder, name)
            if path.is_file():
                try:
                    return read_classes(path)
                except (ValueError, OSError, RecursionError) as error:
                    raise DataError(f"{printable(str(path))} cannot be read: {error}") from error
    return None


def read_classes(path: Path) -> MapClasses:
    """Classes by a file.

    *classes.txt*: a line is the name of a class, the first one that of the value 0. *classes.json*: a list of names,
    the first one that of the value 0; or an object of names by values, ``{"0": "background", "255": "crown"}``; or of
    values or colours by names, ``{"road": 7}``, ``{"road": [128, 64, 128]}``, where a name may have a list of several,
    ``{"road": [[128, 64, 128], [0, 0, 70]]}``; a list of three numbers is a colour. A value whose name is
    null, or the name ``ignored``, is left out of training and measuring. So is 255, where it has no name.

    Raises:
        DataError: the file says something else, a name or a value stands there twice, or there is one class alone.
    """
    where = printable(str(path))
    text = path.read_text(encoding="utf-8-sig")
    rows: list[tuple[str | None, Any]]
    said = text.splitlines() if path.suffix == ".txt" else json.loads(text, object_pairs_hook=_Pairs)
    if isinstance(said, list) and all(isinstance(name, str | None) for name in said):
        while said and not said[-1]:
            said.pop()
        rows = [(name, number) for number, name in enumerate(said)]
    elif isinstance(said, _Pairs) and all(isinstance(name, str | None) for _, name in said):
        rows = [(name, int(value) if value.isascii() and value.isdigit() else value) for value, name in said]
    elif isinstance(said, _Pairs):
        rows = list(said)
    else:
        raise DataError(f"{where}: it must be a list of names, or an object of names and values")
    names: list[str] = []
    values: dict[int, int] = {}
    kinds = set()
    for name, value in rows:
        called = label_name(name) if name is not None else ""
        if name is not None and not called:
            raise DataError(f"{where}: the value {value} has an empty name; say null for what is ignored")
        if called in names:
            raise DataError(f"{where}: the class {called} stands there twice")
        place = IGNORED
        if called and called != "ignored":
            place = len(names)
            names.append(called)
        several = isinstance(value, list) and (len(value) != 3 or isinstance(value[0], list))
        for one in value if several else [value]:
            number, coloured = _value(one, where)
            kinds.add(coloured)
            if number in values:
                raise DataError(f"{where}: the value {one} stands there twice")
            values[number] = place
    if len(kinds) > 1:
        raise DataError(f"{where}: some classes have numbers and some have colours")
    if len(names) < 2:
        raise DataError(f"{where}: it names {len(names)} classes, and there is nothing to tell them from: two or more")
    if len(names) > _MOST_CLASSES:
        raise DataError(f"{where}: it names {len(names):,} classes, and at most {_MOST_CLASSES:,} can be told apart")
    return MapClasses(tuple(names), tuple(values), tuple(values.values()), kinds == {True})


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON with its keys as they stand there, twice or not."""


def _value(value: Any, where: str) -> tuple[int, bool]:
    """A value, colours packed, and whether it is one."""
    if type(value) is int and 0 <= value < 2**16:
        return value, False
    if isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part < 256 for part in value):
        return value[0] << 16 | value[1] << 8 | value[2], True
    raise DataError(f"{where}: {value!r:.60} is neither a number from 0 to 65535 nor a colour like [128, 64, 128]")


def found_classes(looked: Sequence[Looked], where: str) -> MapClasses:
    """Classes by the values that occur, called by their numbers, where no file names them."""
    if coloured := [place for place, one in enumerate(looked) if one.coloured]:
        raise DataError(
            f"{where}: {len(coloured)} label maps have colours, and which classes those are is not known. Name them in "
            'classes.json beside the folders: {"road": [128, 64, 128], …}; or write numbers'
        )
    values = sorted(set().union(*(one.values for one in looked)) - {_IGNORED_VALUE})
    if len(values) < 2:
        only = f"{values[0]} alone" if values else "nothing"
        hint = ""
        if any(_IGNORED_VALUE in one.values for one in looked):
            hint = (
                f", and {_IGNORED_VALUE}, which is ignored. If that is a class, say so in classes.json beside the "
                f'folders: {{"{values[0] if values else 0}": "background", "{_IGNORED_VALUE}": "object"}}'
            )
        raise DataError(f"{where}: its label maps hold {only}{hint or ', and there is nothing to tell it from'}")
    if len(values) > 1000:
        raise DataError(
            f"{where}: its label maps hold {len(values):,} different values, from {values[0]} to {values[-1]}: they "
            "look like numbers of objects, or measurements, not of classes. If they are, name them in classes.json"
        )
    names = tuple(map(str, values))
    return MapClasses(names, tuple(values), tuple(range(len(values))))


def counts_of(
    looked: Sequence[Looked], classes: MapClasses, where: Callable[[int], str]
) -> tuple[np.ndarray, dict[int, str]]:
    """(n, C) int64 pixels of each class in each map, and what is wrong with which of them."""
    place = dict(zip(classes.values, classes.places, strict=True))
    if not classes.coloured:
        place.setdefault(_IGNORED_VALUE, IGNORED)
    counts, wrong = np.zeros((len(looked), len(classes.names)), np.int64), dict[int, str]()
    for index, one in enumerate(looked):
        reason = one.reason
        if not reason and one.coloured != classes.coloured:
            reason = classes.other_kind()
        if not reason and (unknown := one.values.keys() - place.keys()):
            reason = classes.unknown(unknown)
        if reason:
            wrong[index] = reason if where(index) in reason else f"{where(index)}: {reason}"
            continue
        for value, count in one.values.items():
            if place[value] != IGNORED:
                counts[index, place[value]] += count
    return counts, wrong
