"""Objects by a JSON file in the form of COCO."""

import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from maehub.data.label_sources import label_name, split_word
from maehub.data.listing import entries_in
from maehub.data.maps.folders import PICTURES, folders_in
from maehub.data.objects.noted import Entry, Noted, json_object, rows_of
from maehub.data.objects.objects import Shape
from maehub.data.objects.outlines import Thing, corners, numbers, run_length, same_size
from maehub.errors import DataError, first_names, visible
from maehub.images import Size, printable

_TRIED = 50  # pictures by which the folder is found


def read_coco(path: str) -> Noted:
    """What an annotation file says.

    Raises:
        DataError: it is broken, or not one of its pictures is there.
    """
    where = printable(path)
    said = json_object(path)
    lists = ("images", "annotations", "categories")
    images, notes, categories = (rows_of(said, key, f"{where}: ", "COCO's") for key in lists)
    names: dict[str, int] = {}
    for row in categories:
        number, name = row.get("id"), row.get("name")
        name = label_name(name) if isinstance(name, str) else ""
        if type(number) is not int or not name or number in names.values() or name in names:
            raise DataError(f"{where}: a category needs a number and a name that no other has, not {row!r:.80}")
        names[name] = number
    known = {number: name for name, number in names.items()}
    noted = Noted([], [], b"", names)
    times = Counter(_key(row.get("id")) for row in images)
    files = Counter(_file(row) for row in images)
    doubled = {key for key, count in Counter(_key(row.get("id")) for row in notes if "id" in row).items() if count > 1}
    of: dict[str, list[Mapping[str, Any]]] = {}
    for row in notes:
        of.setdefault(_key(row.get("image_id")), []).append(row)
    if lost := [key for key in of if key not in times]:
        noted.wrong.append(f"{where}: annotations of images that it does not list: {first_names(sorted(lost), 3)}")
    noted.root = os.fsencode(_root(path, [name for row in images[:_TRIED] if (name := _file(row))]))
    for row in images:
        key, name = _key(row.get("id")), _file(row)
        what = f"{where}: the image {key}, {visible(name or str(row.get('file_name'))[:200])},"
        if name is None:
            noted.wrong.append(f"{what} has no file_name below the folder of pictures")
        elif times[key] > 1 or files[name] > 1:
            noted.wrong.append(f"{what} stands there twice, by its id or its file_name")
        elif not os.path.isfile(os.path.join(noted.root, os.fsencode(name))):
            noted.wrong.append(f"{what} is not there: looked in {printable(noted.root)}")
        else:
            things = partial(_things, row, of.get(key, []), known, doubled)
            noted.entries.append(Entry(os.fsencode(name), f"{where}, {printable(name)}", things))
    if not noted.entries:
        raise DataError(noted.wrong[-1] if noted.wrong else f"{where} lists no images")
    return noted


def _things(
    image: Mapping[str, Any], notes: list[Mapping[str, Any]], known: dict[int, str], doubled: set[str], size: Size
) -> list[Thing]:
    same_size((image.get("height"), image.get("width")), size, "itself")
    things = []
    for note in notes:
        what = f"annotation {note.get('id')!r:.40}"
        if _key(note.get("id")) in doubled:
            raise DataError(f"{what} stands there twice")
        label = known.get(number) if type(number := note.get("category_id")) is int else None
        if label is None:
            raise DataError(f"{what} is of the category {number!r:.40}, which the file does not name")
        if note.get("iscrowd") not in (None, 0, 1):
            raise DataError(f"{what} has an iscrowd of {note['iscrowd']!r:.40}, and it is 0 or 1")
        drawn, box = note.get("segmentation"), None
        shape: Shape | None = None
        if note.get("bbox"):
            box = numbers(note["bbox"], f"the bbox of {what}", 4)
            box[2:] += box[:2]
        if isinstance(drawn, dict):
            shape = run_length(drawn, size, what)
        elif isinstance(drawn, list) and drawn:
            shape = tuple(corners(part, what) for part in drawn)
        elif drawn or box is None:
            raise DataError(f"{what} has neither a bbox nor polygons or a mask in segmentation")
        things.append(Thing(what, label, box, shape, bool(note.get("iscrowd"))))
    return things


def _key(number: Any) -> str:
    """Ids are numbers, or texts where somebody made them so; whatever else stands there is another id."""
    return f"{number!r:.80}"


def _file(row: Mapping[str, Any]) -> str | None:
    """The path of a picture below the folder of pictures."""
    said = row.get("file_name")
    if not isinstance(said, str) or not said or "\0" in said or os.path.isabs(said):
        return None
    name = os.path.normpath(said.replace("\\", "/"))
    return None if name.startswith("..") or not _encodes(name) else name


def _encodes(name: str) -> bool:
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


def _root(path: str, names: list[str]) -> str:
    """The folder that file names begin in: that of the file or the one above, or below these a folder of pictures or
    of the part of a split that the file is called by."""
    base = os.path.dirname(path) or os.curdir
    word = split_word(os.path.splitext(os.path.basename(path))[0])
    folders: list[str] = []
    for near in (base, os.path.normpath(os.path.join(base, os.pardir))):
        below = folders_in(near)
        for folder in (near, *(below[name] for name in PICTURES if name in below)):
            folders.append(folder)
            inner = sorted(entry.path for entry in entries_in(folder) if word and entry.is_dir())
            folders += [one for one in inner if split_word(os.path.basename(one)) == word]
    return max(folders, key=lambda folder: sum(os.path.isfile(os.path.join(folder, name)) for name in names))
