"""A CSV of labelled pictures: which file, which label, which group, which side of a split."""

import csv
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from maehub.errors import DataError, UsageError
from maehub.images.decoding import printable

log = logging.getLogger("maehub")

TRAINING, TESTING = ("train", "training"), ("val", "validation", "valid", "test", "testing")
"""What may stand in the column split; of several that are for measuring, the first is meant."""

_PATH, _LABEL, _SPLIT = "path", "label", "split"


class Row(NamedTuple):
    """A picture of a CSV. Cells have no white space around them."""

    path: str  # absolute, or below the folder of the CSV
    label: str
    group: str  # empty if no column was asked for
    split: str  # one of TRAINING or TESTING; empty if there is no such column
    line: int


def read_csv(path: str, *, label: str | None = None, group: str | None = None) -> list[Row]:
    """The pictures of a CSV in the order of its lines: commas between columns, a first line that names them, UTF-8.

    The file of a picture stands in the column ``path``: absolute, or relative to the folder of the CSV. A picture that
    stands there twice with the same cells is taken once. A column ``split`` is read where there is one.

    Args:
        label: the label's column; None means ``label``.
        group: the column of what belongs together.

    Raises:
        DataError: the CSV cannot be read, has no rows or no such columns, or a line is wrong; the text names the line.
        UsageError: there is no column of the name that was given.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _rows(path, csv.reader(file, strict=True), label, group)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(path)} is not UTF-8 text ({error.reason}): save it as CSV in UTF-8") from error


def _rows(path: str, reader: Any, label: str | None, group: str | None) -> list[Row]:
    root, found = os.path.dirname(path), dict[str, Row]()
    header: list[str] = []
    columns: dict[str, str | None] = {}  # fields of a row to columns
    again = 0
    for number, cells in _lines(path, reader):
        if not header:
            header = cells
            columns = _columns(path, header, label, group)
            continue
        where = f"{printable(path)}, line {number}"
        if len(cells) != len(header):
            raise DataError(
                f"{where}: it has {len(cells)} cells and the first line {len(header)}; a cell that holds a comma "
                "stands between double quotes"
            )
        by_column = dict(zip(header, cells, strict=True))
        row = Row(**{field: by_column[column] if column else "" for field, column in columns.items()}, line=number)
        for field in ("path", "group", "split"):
            if columns[field] and not getattr(row, field):
                raise DataError(f"{where}: its column {columns[field]!r} is empty")
        if columns["split"]:
            row = row._replace(split=row.split.casefold())
            if row.split not in TRAINING + TESTING:
                raise DataError(f"{where}: the split {row.split!r} is not one of {', '.join(TRAINING + TESTING)}")
        before = found.setdefault(os.path.normpath(row.path), row)
        if before is not row:
            _check_same(where, before, row, columns)
            again += 1
        elif not _is_file(os.path.join(root, row.path)):
            raise DataError(f"{where}: there is no file {printable(os.path.join(root, row.path))}")
    if not found:
        raise DataError(f"0 images in {printable(path)}: it has no line below the one that names the columns")
    if again:
        log.warning("%s: %d lines name a picture again, and each is taken once", printable(path), again)
    return list(found.values())


def _lines(path: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Line numbers with their cells, empty lines left out; of a cell that runs over several lines, the last one's."""
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise DataError(f"{printable(path)}, line {reader.line_num}: {error}") from error


def _columns(path: str, header: list[str], label: str | None, group: str | None) -> dict[str, str | None]:
    if twice := [name for place, name in enumerate(header) if name in header[:place]]:
        raise DataError(f"{printable(path)}, line 1: the column {twice[0]!r} stands there twice")
    columns = {"path": _PATH, "label": label or _LABEL, "group": group, "split": _SPLIT if _SPLIT in header else None}
    missing = next((column for column in columns.values() if column and column not in header), None)
    if missing is None:
        return columns
    text = f"{printable(path)} has no column {missing!r}; its first line names {', '.join(map(repr, header))}"
    if missing in (label, group):
        raise UsageError(text)
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise DataError(f"{text}: put commas between columns")
    raise DataError(f"{text}. It must be like path,label" + ("; --label names another column" * (missing == _LABEL)))


def _check_same(where: str, before: Row, row: Row, columns: dict[str, str | None]) -> None:
    """See that a picture's second line says what its first one said."""
    for field in ("label", "group", "split"):
        was, now = getattr(before, field), getattr(row, field)
        if was != now:
            raise DataError(
                f"{where}: {printable(row.path)} stands in line {before.line} too, with the {columns[field]} {was!r} "
                f"there and {now!r} here. Several labels of a picture go into one cell, with | between them"
            )


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a zero byte in it
        return False
