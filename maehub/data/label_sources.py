"""What data say about their pictures, in words: class folders, a CSV, tar shards, tables."""

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maehub.data.listing import Names, entries_in
from maehub.data.shards import Shards
from maehub.data.sources import Samples, Source, find_samples
from maehub.data.storage import at_once, is_remote
from maehub.data.tables import Table
from maehub.errors import DataError, UsageError, first_names, log
from maehub.files import check_regular
from maehub.images import printable

_LAYOUT = "A labelled folder holds one folder a class, with its pictures at any depth: DIR/CLASS/….jpg"
_BETWEEN = "\x1f"  # the cells of several columns of labels
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label")

TRAINING, TESTING = ("train", "training"), ("val", "validation", "valid", "dev", "eval", "test", "testing")
"""What may stand in the column split; of several that are for measuring, the first is meant."""
_SPLIT_FOLDER = re.compile(
    rf"(?:\w+[-_. ])?({'|'.join((*TRAINING[::-1], *TESTING[::-1]))})(?:[-_. ]?(?:set|data|images|\d+))?"
)


class Row(NamedTuple):
    """A picture of a CSV. Cells have no white space around them."""

    path: str  # absolute, or below the folder of the CSV
    label: str
    group: str  # empty if no column was asked for
    split: str  # one of TRAINING or TESTING; empty if there is no such column
    line: int


class NamedLabels(NamedTuple):
    """Pictures and what is said of each."""

    samples: Source
    # n names of classes; or n lists of them, where a picture may have several; or (n, columns) float64
    labels: list[str] | list[list[str]] | np.ndarray
    order: list[str] | None  # of the classes, where the data give one; of numbers the columns
    groups: list[str] | None  # n names of what must stay on one side of a split, if it was asked for
    sides: list[str] | None = None  # n cells of the column split of a CSV, where there is one


def read_label_source(
    data: str, group: str | None, label: str | None, index_dir: Path | None, *, known: bool, numeric: bool
) -> NamedLabels:
    """Labels and groups, see `find_labelled`; of classes that are ``known`` those without a picture are warned of."""
    if data.lower().endswith(".csv") and not os.path.isdir(data):
        return _numbers(data, group, label) if numeric else _csv(data, group, label)
    if numeric:
        raise UsageError(f"numbers are read from a .csv of path,label, and {printable(data)} is none")
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


def label_name(text: str) -> str:
    """The name of a class as it is compared: composed characters (NFC), no white space around it."""
    return unicodedata.normalize("NFC", text).strip()


def split_word(folder: str) -> str | None:
    """The word of `TRAINING` or `TESTING` that the name of a folder is, in any case, with what people add to it:
    ``seg_train``, ``Testing``, ``val2017``, ``train-set``; else None."""
    match = _SPLIT_FOLDER.fullmatch(label_name(folder).casefold())
    return match[1] if match else None


def _csv(path: str, group: str | None, label: str | None) -> NamedLabels:
    rows = read_csv(path, [label or "label"], group)
    samples = Samples(os.fsencode(os.path.dirname(path)), Names.of(os.fsencode(row.path) for row in rows))
    labels: list[str] | list[list[str]] = [label_name(row.label) for row in rows]
    several = [row for row in rows if "|" in row.label]
    if odd := several or [row for row in rows if not row.label]:
        has = "several labels" if several else "none"
        text = "%s: of %d pictures %d have %s (the first in line %d), so each may have any number of labels"
        log.warning(text, printable(path), len(rows), len(odd), has, odd[0].line)
        labels = [[name for part in row.label.split("|") if (name := label_name(part))] for row in rows]
    groups = [row.group for row in rows] if group is not None else None
    return NamedLabels(samples, labels, None, groups, [row.split for row in rows] if rows[0].split else None)


def _numbers(path: str, group: str | None, label: str | None) -> NamedLabels:
    """Pictures with the numbers of one column or of several, ``label`` with commas between."""
    columns = [name.strip() for name in (label or "label").split(",")]
    if len(set(columns)) < len(columns):
        raise UsageError(f"--label {label} names a column twice")
    rows = read_csv(path, columns, group)
    values, wrong = np.empty((len(rows), len(columns))), []
    for place, row in enumerate(rows):
        for number, cell in enumerate(row.label.split(_BETWEEN)):
            try:
                values[place, number] = float(cell.replace("_", "?"))  # which Python passes over
            except ValueError:
                values[place, number] = np.nan
            if not np.isfinite(values[place, number]):
                wrong.append(f"line {row.line}, {columns[number]}: {printable(cell) or 'empty'}")
    if wrong:
        raise DataError(
            f"{printable(path)}: {len(wrong)} cells hold no finite number: {first_names(wrong, 3)}. Numbers are like "
            "-1.5 or 2e3; fill them in, or leave those pictures out"
        )
    samples = Samples(os.fsencode(os.path.dirname(path)), Names.of(os.fsencode(row.path) for row in rows))
    groups, sides = [row.group for row in rows], [row.split for row in rows]
    return NamedLabels(samples, values, columns, groups if group else None, sides if sides[0] else None)


def _folders(samples: Source, data: str, group: str | None, *, known: bool) -> NamedLabels:
    paths = [samples.name(index).split(b"/") for index in range(len(samples))]
    loose = [parts[0] for parts in paths if len(parts) == 1]
    if loose:
        beside = " beside class folders" if len(loose) < len(paths) else ""
        lie = f"{len(loose)} pictures lie" if len(loose) > 1 else "a picture lies"
        first = f"the first {printable(loose[0])}, and of which class is not known"
        raise DataError(f"{printable(data)}: {lie} in it directly{beside}, {first}. {_LAYOUT}")
    full = {parts[0] for parts in paths}
    folders = {os.fsencode(entry.name) for entry in entries_in(data) if entry.is_dir()}
    if empty := sorted(folders - full):
        without = first_names([printable(name) for name in empty], 3)
        text = f"{printable(data)} has class folders without a picture: {without}"
        if not known:
            raise DataError(f"{text}. Put pictures of the class into them, or remove them")
        log.warning("%s", text)
    try:
        names = [label_name(parts[0].decode()) for parts in paths]
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(data)}: the name of the class {printable(error.object)} is not UTF-8") from error
    if group and group.lstrip("0") == "1":
        raise UsageError("--group 1: the folders of level 1 are the classes; groups are folders from level 2")
    what = f"of {printable(data)}: groups are folders below the class, from 2"
    groups = None if group is None else folder_groups(samples, paths, group, what)
    if odd := sorted(name for name in set(names) if split_word(name)):
        text = "%s: the folders %s are taken for classes, not for parts of a split"
        log.warning(text, printable(data), ", ".join(odd))
    return NamedLabels(samples, names, None, groups)


def _shards(samples: Shards, group: str | None) -> NamedLabels:
    count = len(samples)
    remote = any(is_remote(file.path) for file in samples.files)
    numbers: list[int] = []
    for number in at_once(samples.label, range(count)) if remote else map(samples.label, range(count)):
        if number is None or number < 0:
            has = "has no .cls member" if number is None else f"has the class {number}"
            rule = "the class of a picture is a number from 0 in the .cls member beside it"
            raise DataError(f"{samples.where(len(numbers))}: it {has}; {rule}")
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
        members = [samples.index.names[index].removeprefix(b"./").split(b"/") for index in range(count)]
        what = "of shards: a group is a shard, or a folder in the names of members, from 1"
        groups = folder_groups(samples, members, group, what)
    return NamedLabels(samples, [called[number] for number in numbers], list(called.values()), groups)


def _class_file(samples: Shards) -> list[str]:
    """The lines of classes.txt beside the first shard; none where there is no such file."""
    path = os.path.join(os.path.dirname(samples.files[0].path), "classes.txt")
    if is_remote(path) or not os.path.isfile(path):
        return []
    try:
        names = [label_name(line) for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{printable(path)} cannot be read: {error}") from error
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            what = f"{name!r} stands there twice" if name else "it is empty"
            raise DataError(f"{printable(path)}, line {number + 1}: {what}, and each line is the name of a class")
    return names


def _table(samples: Table, group: str | None, label: str | None) -> NamedLabels:
    kinds, column = samples.others.features, label or ""
    if not column:
        named = [name for name in _LABEL_COLUMNS if name in kinds]
        chosen = named or [name for name, kind in kinds.items() if type(kind).__name__ == "ClassLabel"]
        if len(chosen) != 1:
            which = f"several may hold labels: {', '.join(chosen)}" if chosen else "none is known to hold labels"
            where = f"of the columns of {printable(samples.parts[0])} ({', '.join(kinds) or 'none'})"
            raise UsageError(f"{where} {which}. Name one by --label")
        column = chosen[0]
    values = samples.values(column)
    several = any(isinstance(value, list) for value in values)
    kind = kinds[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)  # of a ClassLabel, or of a list of them
    for index, value in enumerate(values):
        items = value if isinstance(value, list) else [value]
        if value is None or not all(_is_label(item, names) for item in items):
            what = "nothing" if value is None else repr(value)
            raise DataError(f"{samples.where(index)}: its column {column!r} holds {what}, no label")
    flat = {item for value in values for item in (value if several else [value])}
    numbered = names is None and all(type(item) is int for item in flat)
    order = [str(number) for number in sorted(flat)] if numbered else names and [*dict.fromkeys(map(label_name, names))]
    called = {item: label_name(names[item] if names else str(item)) for item in flat}
    labels: Any = [[called[item] for item in value] if several else called[value] for value in values]
    groups = None
    if group is not None:
        members = samples.values(group)
        if None in members:
            raise DataError(f"{samples.where(members.index(None))}: its column {group!r} holds nothing")
        groups = [str(member) for member in members]
    return NamedLabels(samples, labels, order, groups)


def _is_label(item: Any, names: list[str] | None) -> bool:
    if names is not None:
        return type(item) is int and 0 <= item < len(names)
    if type(item) is str:
        return label_name(item) != ""
    return type(item) is bool or (type(item) is int and item >= 0)  # a negative number stands for none


def folder_groups(samples: Source, paths: list[list[bytes]], group: str, what: str) -> list[str]:
    """Groups by the name of one folder: a patient under two classes is one patient. ``what`` says which levels are."""
    if not (group.isascii() and group.isdigit()) or int(group) < 1:
        raise UsageError(f"--group {group} is no level {what}")
    level = int(group)
    for index, parts in enumerate(paths):
        if len(parts) <= level:
            has = f"{samples.where(index)} has {len(parts) - 1} folders in its name"
            raise UsageError(f"--group {level}: a group is the name of folder {level}, and {has}")
    return [printable(parts[level - 1]) for parts in paths]


def read_csv(path: str, labels: Sequence[str], group: str | None) -> list[Row]:
    """The pictures of a CSV in the order of its lines: commas between columns, a first line that names them, UTF-8.

    The file of a picture stands in the column ``path``: absolute, or relative to the folder of the CSV. A picture that
    stands there twice with the same cells is taken once. A column ``split`` is read where there is one. Of several
    columns of ``labels`` the cells are joined by `_BETWEEN`.
    """
    try:
        check_regular(path, DataError)
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _rows(path, csv.reader(file, strict=True), labels, group)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(path)} is not UTF-8 text ({error.reason}): save it as CSV in UTF-8") from error


def _rows(path: str, reader: Any, labels: Sequence[str], group: str | None) -> list[Row]:
    root, rows, again = os.path.dirname(path), dict[str, Row](), 0
    lines = _lines(path, reader)
    _, header = next(lines, (0, list[str]()))
    columns = _columns(path, header, labels, group) if header else {}  # fields of a row to columns
    for number, cells in lines:
        where = f"{printable(path)}, line {number}"
        if len(cells) != len(header):
            has = f"it has {len(cells)} cells and the first line {len(header)}"
            raise DataError(f"{where}: {has}; a cell that holds a comma stands between double quotes")
        by_column = dict(zip(header, cells, strict=True))
        joined = {field: _BETWEEN.join(by_column[name] for name in names) for field, names in columns.items()}
        row = Row(**joined, line=number)
        for field in ("path", "group", "split"):
            if columns[field] and not getattr(row, field):
                raise DataError(f"{where}: its column {columns[field][0]!r} is empty")
        if columns["split"]:
            row = row._replace(split=row.split.casefold())
            if row.split not in TRAINING + TESTING:
                raise DataError(f"{where}: the split {row.split!r} is not one of {', '.join(TRAINING + TESTING)}")
        before = rows.setdefault(os.path.normpath(row.path), row)
        if before is not row:
            _check_same(where, before, row, columns)
            again += 1
        elif not os.path.isfile(os.path.join(root, row.path)):
            raise DataError(f"{where}: there is no file {printable(os.path.join(root, row.path))}")
    if not rows:
        raise DataError(f"0 images in {printable(path)}: it has no line below the one that names the columns")
    if again:
        log.warning("%s: %d lines name a picture again, and each is taken once", printable(path), again)
    return list(rows.values())


def _lines(path: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Line numbers with their cells, empty lines left out; of a cell that runs over several lines, the last one's."""
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise DataError(f"{printable(path)}, line {reader.line_num}: {error}") from error


def _columns(path: str, header: list[str], labels: Sequence[str], group: str | None) -> dict[str, Sequence[str]]:
    name, times = Counter(header).most_common(1)[0]
    if times > 1:
        raise DataError(f"{printable(path)}, line 1: the column {name!r} stands there twice")
    split = ["split"] if "split" in header else []
    columns = {"path": ["path"], "label": labels, "group": [group] if group else [], "split": split}
    missing = next((name for names in columns.values() for name in names if name not in header), None)
    if missing is None:
        return columns
    names = first_names(list(map(repr, header)), 20)
    text = f"{printable(path)} has no column {missing!r}; its first line names {names}"
    if missing == group or (missing in labels and missing != "label"):
        raise UsageError(text)
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise DataError(f"{text}: put commas between columns")
    raise DataError(f"{text}. It must be like path,label" + ("; --label names another column" * (missing == "label")))


def _check_same(where: str, before: Row, row: Row, columns: dict[str, Sequence[str]]) -> None:
    """See that a picture's second line says what its first one said."""
    for field in ("label", "group", "split"):
        was, now = getattr(before, field), getattr(row, field)
        if was != now:
            of = f"{', '.join(columns[field])} {was!r}"
            other = f"{printable(row.path)} stands in line {before.line} too, with the {of} there"
            hint = "Several labels of a picture go into one cell, with | between them"
            raise DataError(f"{where}: {other} and {now!r} here. {hint}")
