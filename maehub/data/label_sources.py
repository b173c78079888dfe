"""What data say about their pictures, in words: class folders, a CSV, tar shards, tables."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.data.label_csv import read_csv
from maehub.data.names import Names
from maehub.data.shards import Shards
from maehub.data.sources import Samples, Source, find_samples
from maehub.data.storage import at_once, is_remote
from maehub.data.tables import Table
from maehub.errors import DataError, UsageError
from maehub.images.decoding import printable

log = logging.getLogger("maehub")

_LAYOUT = "A labelled folder holds one folder a class, with its pictures at any depth: DIR/CLASS/….jpg"
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
_NAMED = 3  # in a message, before "and so many more"


class Told(NamedTuple):
    """Pictures and what is said of each."""

    samples: Source
    labels: list[str] | list[list[str]]  # n names of classes; or n lists of them, where a picture may have several
    order: list[str] | None  # of the classes, where the data give one
    groups: list[str] | None  # n names of what must stay on one side of a split, if it was asked for
    sides: list[str] | None = None  # n cells of the column split of a CSV, where there is one


def find_told(data: str, group: str | None, label: str | None, index_dir: Path | None, *, known: bool) -> Told:
    """Labels and groups of pictures; see `maehub.data.labels.read_labelled`.

    Args:
        known: the classes are given, and those without a picture are only warned of.

    Raises:
        DataError: a picture has no label or is at the wrong level, or a class is empty.
        UsageError: there is no such column or level.
    """
    if data.lower().endswith(".csv") and not os.path.isdir(data):
        return _csv(data, group, label)
    samples = find_samples(data, index_dir=index_dir)
    if isinstance(samples, Table):
        return _table(samples, group, label)
    if label is not None:
        raise UsageError(f"--label {label} names a column, and {printable(data)} is no table")
    if isinstance(samples, Shards):
        return _shards(samples, group)
    if not os.path.isdir(data):
        raise UsageError(f"{printable(data)} says of no picture what it shows. {_LAYOUT}; or give a .csv of path,label")
    return _folders(samples, data, group, known=known)


def listed(names: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _csv(path: str, group: str | None, label: str | None) -> Told:
    rows = read_csv(path, label=label, group=group)
    samples = Samples(os.fsencode(os.path.dirname(path)), Names.of(os.fsencode(row.path) for row in rows))
    labels: list[str] | list[list[str]] = [row.label for row in rows]
    several = [row for row in rows if "|" in row.label]
    if odd := several or [row for row in rows if not row.label]:
        has = "several labels" if several else "none"
        text = "%s: of %d pictures %d have %s (the first in line %d), so each may have any number of labels"
        log.warning(text, printable(path), len(rows), len(odd), has, odd[0].line)
        labels = [[name for part in row.label.split("|") if (name := part.strip())] for row in rows]
    groups = [row.group for row in rows] if group is not None else None
    return Told(samples, labels, None, groups, [row.split for row in rows] if rows[0].split else None)


def _folders(samples: Source, data: str, group: str | None, *, known: bool) -> Told:
    paths = [samples.name(index).split(b"/") for index in range(len(samples))]
    loose = [parts[0] for parts in paths if len(parts) == 1]
    if loose:
        beside = " beside class folders" if len(loose) < len(paths) else ""
        lie = f"{len(loose)} pictures lie" if len(loose) > 1 else "a picture lies"
        raise DataError(
            f"{printable(data)}: {lie} in it directly{beside}, the first {printable(loose[0])}, and of which class is "
            f"not known. {_LAYOUT}"
        )
    _check_folders(data, {parts[0] for parts in paths}, known=known)
    groups = None
    if group is not None:
        level = _level(group, f"of {printable(data)}: groups are folders below the class, from 2")
        if level == 1:
            raise UsageError("--group 1: the folders of level 1 are the classes; groups are folders from level 2")
        groups = _folder_groups(samples, paths, level)
    return Told(samples, [parts[0].decode() for parts in paths], None, groups)


def _check_folders(data: str, full: set[bytes], *, known: bool) -> None:
    """See that every class folder has pictures, and a name that can be written down."""
    with os.scandir(os.fsencode(data)) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(b".")}
    if empty := sorted(folders - full):
        text = f"{printable(data)} has class folders without a picture: {listed([printable(name) for name in empty])}"
        if not known:
            raise DataError(f"{text}. Put pictures of the class into them, or remove them")
        log.warning("%s", text)
    for name in sorted(full):
        try:
            name.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{printable(data)}: the name of the class {printable(name)} is not UTF-8") from error


def _shards(samples: Shards, group: str | None) -> Told:
    count = len(samples)
    remote = any(is_remote(file.path) for file in samples.files)
    numbers: list[int] = []
    for number in at_once(samples.label, range(count)) if remote else map(samples.label, range(count)):
        if number is None or number < 0:
            has = "has no .cls member" if number is None else f"has the class {number}"
            where = samples.where(len(numbers))
            raise DataError(
                f"{where}: it {has}; the class of a picture is a number from 0 in the .cls member beside it"
            )
        numbers.append(number)
    names = _class_file(samples)
    highest = int(np.argmax(numbers))
    if names and numbers[highest] >= len(names):
        has = f"it has the class {numbers[highest]}, and classes.txt beside the shards names {len(names)}, from 0 on"
        raise DataError(f"{samples.where(highest)}: {has}")
    called = {number: names[number] if names else str(number) for number in sorted(set(numbers))}
    groups = None
    if group == "shard":
        prefixes = [printable(prefix) for prefix in samples.prefixes]
        places = np.searchsorted(samples.starts, np.arange(count), side="right") - 1
        groups = [prefixes[place] for place in places.tolist()]
    elif group is not None:
        level = _level(group, "of shards: a group is a shard, or a folder in the names of members, from 1")
        members = [samples.index.names[index].removeprefix(b"./").split(b"/") for index in range(count)]
        groups = _folder_groups(samples, members, level)
    return Told(samples, [called[number] for number in numbers], list(called.values()), groups)


def _class_file(samples: Shards) -> list[str]:
    """The lines of classes.txt beside the first shard; none where there is no such file."""
    path = os.path.join(os.path.dirname(samples.files[0].path), "classes.txt")
    if is_remote(path) or not os.path.isfile(path):
        return []
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{printable(path)} cannot be read: {error}") from error
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            what = f"{name!r} stands there twice" if name else "it is empty"
            raise DataError(f"{printable(path)}, line {number + 1}: {what}, and each line is the name of a class")
    return names


def _table(samples: Table, group: str | None, label: str | None) -> Told:
    column = label or _label_column(samples)
    values = samples.values(column)
    several = any(isinstance(value, list) for value in values)
    kind = samples.others.features[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)  # of a ClassLabel, or of a list of them
    for index, value in enumerate(values):
        items = value if isinstance(value, list) else [value]
        if value is None or not all(_is_label(item, names) for item in items):
            what = "nothing" if value is None else repr(value)
            raise DataError(f"{samples.where(index)}: its column {column!r} holds {what}, no label")
    flat = {item for value in values for item in (value if several else [value])}
    if names is None and flat and all(type(item) is int for item in flat):
        order: list[str] | None = [str(number) for number in sorted(flat)]
    else:
        order = names
    called = {item: names[item] if names else str(item) for item in flat}
    labels: Any = [[called[item] for item in value] if several else called[value] for value in values]
    groups = None
    if group is not None:
        members = samples.values(group)
        if None in members:
            raise DataError(f"{samples.where(members.index(None))}: its column {group!r} holds nothing")
        groups = [str(member) for member in members]
    return Told(samples, labels, order, groups)


def _label_column(samples: Table) -> str:
    kinds = samples.others.features
    named = [name for name in _LABEL_COLUMNS if name in kinds]
    chosen = named or [name for name, kind in kinds.items() if type(kind).__name__ == "ClassLabel"]
    if len(chosen) == 1:
        return chosen[0]
    several = f"several may hold labels: {', '.join(chosen)}" if chosen else "none is known to hold labels"
    where = printable(samples.parts[0])
    raise UsageError(f"of the columns of {where} ({', '.join(kinds) or 'none'}) {several}. Name one by --label")


def _is_label(item: Any, names: list[str] | None) -> bool:
    if names is not None:
        return type(item) is int and 0 <= item < len(names)
    return type(item) in (int, bool) or (type(item) is str and item != "")


def _folder_groups(samples: Source, paths: list[list[bytes]], level: int) -> list[str]:
    """Groups by the name of one folder: a patient under two classes is one patient."""
    for index, parts in enumerate(paths):
        if len(parts) <= level:
            has = f"{samples.where(index)} has {len(parts) - 1} folders in its name"
            raise UsageError(f"--group {level}: a group is the name of folder {level}, and {has}")
    return [printable(parts[level - 1]) for parts in paths]


def _level(group: str, what: str) -> int:
    if not (group.isascii() and group.isdigit()) or int(group) < 1:
        raise UsageError(f"--group {group} is no level {what}")
    return int(group)
