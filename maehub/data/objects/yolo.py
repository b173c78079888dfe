"""Objects by text files in the form of YOLO: a line each, in parts of the width and the height of the picture."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from maehub.data.label_sources import label_name
from maehub.data.objects.noted import Noted, beside
from maehub.data.objects.outlines import Thing
from maehub.errors import DataError, log
from maehub.files import read_small
from maehub.images import Size, printable

_ROUNDED = 1e-3  # what three decimals may be over 1
_NAMES = ("data.yaml", "classes.txt")
NAMING = frozenset(name.encode() for name in _NAMES)
"""Files that name classes."""


def read_yolo(pictures: str, labels: str, near: Sequence[str]) -> Noted:
    """What label files say; classes are named by the first data.yaml or classes.txt in the folders ``near``."""
    names = _names([*near, labels])
    noted = beside(pictures, labels, ".txt", partial(_things, names), may_lack=True, passed=NAMING)
    noted.ids = {name: number for number, name in names.items()}
    return noted


def _names(folders: Sequence[str]) -> dict[int, str]:
    path = next((path for folder in folders for name in _NAMES if (path := Path(folder, name)).is_file()), None)
    if path is None:
        where = " and ".join(printable(folder) for folder in folders[:2])
        raise DataError(f"YOLO's files number classes, and no data.yaml or classes.txt in {where} names them")
    where = printable(str(path))
    try:
        text = read_small(path, DataError).decode("utf-8-sig")
        said = text.rstrip().splitlines() if path.suffix == ".txt" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    if path.suffix != ".txt":
        if isinstance(said, dict) and said.keys() & {"path", "train", "val", "test"}:
            log.info("%s names the classes; its paths are not followed, and the folders decide", where)
        said = said.get("names") if isinstance(said, dict) else None
    rows = dict(enumerate(said)) if isinstance(said, list) else said
    if not isinstance(rows, dict) or not rows or not all(type(number) is int for number in rows):
        raise DataError(f"{where}: names must be a list of names, or names by their numbers")
    for number, name in rows.items():
        if type(name) not in (str, int) or not label_name(str(name)):
            raise DataError(f"{where}: the name of the class {number} is {name!r:.40}: put it in quotes")
    names = {number: label_name(str(name)) for number, name in rows.items()}
    if doubled := [name for name in names.values() if list(names.values()).count(name) > 1]:
        raise DataError(f"{where}: several classes are called {doubled[0]}")
    return names


def _things(names: Mapping[int, str], path: str, size: Size) -> list[Thing]:
    try:
        lines = read_small(Path(path), DataError).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("it is no text") from error
    things = []
    for place, line in enumerate(lines, 1):
        if not (cells := line.split()):
            continue
        what = f"line {place}"
        try:
            row = np.array(cells, np.float64)
        except ValueError:
            raise DataError(f"{what} has something else than numbers: {line!r:.60}") from None
        if len(row) != 5 and (len(row) < 7 or len(row) % 2 == 0):
            hint = ": a sixth is the confidence of a prediction, or the number of a track" if len(row) == 6 else ""
            raise DataError(f"{what} has {len(row)} numbers, and a box has 5, a polygon 7, 9, 11 …{hint}")
        if not ((row[1:] >= -_ROUNDED) & (row[1:] <= 1 + _ROUNDED)).all():
            raise DataError(f"{what} has numbers outside of 0 to 1, and they are parts of the picture: {line!r:.60}")
        label = names.get(int(row[0])) if abs(row[0]) < 2**31 and row[0] % 1 == 0 else None
        if label is None:
            raise DataError(f"{what} is of the class {cells[0]:.40}, which has no name: there are {len(names)}")
        points = row[1:].reshape(-1, 2) * (size[1], size[0])
        if len(row) == 5:
            edges = np.concatenate([points[0] - points[1] / 2, points[0] + points[1] / 2])
            things.append(Thing(what, label, edges))
        else:
            things.append(Thing(what, label, None, (points,)))
    return things
