"""What annotation files say of pictures before it is checked against them."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from maehub.data.listing import IMAGE_ENDINGS, say_passed_over, search
from maehub.data.objects.outlines import Thing
from maehub.errors import DataError, first_names, log
from maehub.files import check_regular
from maehub.images import Size, printable


class Entry(NamedTuple):
    """A picture, and what is said of it."""

    picture: bytes
    """Its path below the folder of pictures."""
    where: str
    """The file that says so, for messages."""
    things: Callable[[Size], list[Thing]]
    """The objects of the picture when it has this (height, width); raises a DataError without a file's name."""


@dataclass
class Noted:
    """All that is said of one side of a split."""

    entries: list[Entry]
    wrong: list[str]
    root: bytes
    """The folder of pictures."""
    ids: dict[str, int] | None = None
    """Classes with their numbers; None where the files give none."""


def json_object(path: str) -> dict[str, Any]:
    """An object in a JSON file of any size."""
    try:
        check_regular(path, DataError)
        with open(path, "rb") as file:
            said = json.load(file)
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{printable(path)} is no well-formed JSON: {error}") from error
    if not isinstance(said, dict):
        raise DataError(f"{printable(path)} holds a {type(said).__name__}, and annotations are an object")
    return said


def rows_of(said: dict[str, Any], key: str, where: str, whose: str) -> list[dict[str, Any]]:
    """The objects in a list of a JSON file."""
    rows = said.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{where}{key} must be a list of objects, as in {whose} files")
    return rows


def beside(
    pictures: str,
    folder: str,
    ending: str,
    read: Callable[[str, Size], list[Thing]],
    *,
    chosen: frozenset[bytes] | None = None,
    may_lack: bool = False,
    passed: frozenset[bytes] = frozenset(),
) -> Noted:
    """Annotation files, one a picture, that are called like it below their folder, but for the ending.

    ``chosen`` are the names, without an ending, of one side of a split. Where pictures ``may_lack`` a file, those
    without one show nothing. Files called as in ``passed`` are none.
    """
    root, notes, others = os.fsencode(pictures), os.fsencode(folder), Counter[bytes]()
    noted = Noted([], [], root)
    images: dict[bytes, list[bytes]] = {}
    for name in search(root, IMAGE_ENDINGS, others):
        images.setdefault(os.path.splitext(name)[0], []).append(name)
    del others[ending.encode()]
    say_passed_over(printable(pictures), others)
    found = [name for name in search(notes, frozenset([ending.encode()]), Counter()) if name not in passed]
    files = {os.path.splitext(name)[0]: name for name in found}
    lacking = []
    for stem in sorted(images.keys() | files.keys() if chosen is None else chosen):
        names = images.get(stem, [])
        path = os.fsdecode(os.path.join(notes, files.get(stem, stem + ending.encode())))
        if len(names) != 1:
            has = first_names([printable(name) for name in names], 3) if names else "none"
            noted.wrong.append(f"{printable(path)}: one picture is called so; in {printable(pictures)} is {has}")
        elif stem in files or may_lack:
            things = partial(read, path) if stem in files else _nothing_in
            noted.entries.append(Entry(names[0], printable(path), things))
        if stem not in files:
            lacking.append(printable(stem))
    if lacking:
        so = (
            "count as showing no object"
            if may_lack
            else "are left out; a file without objects says that there are none"
        )
        text, shown = "%s: %d pictures have no %s in %s and %s: %s", first_names(lacking, 3)
        log.warning(text, printable(pictures), len(lacking), ending, printable(folder), so, shown)
    if not noted.entries or not images.keys() & files.keys():
        raise DataError(
            f"no picture in {printable(pictures)} has a {ending} file in {printable(folder)}: of {len(images)} "
            f"pictures and {len(files)} files none share a name"
        )
    return noted


def _nothing_in(size: Size) -> list[Thing]:
    return []
