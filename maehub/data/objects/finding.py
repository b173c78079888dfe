"""Pictures with their objects, whatever format says them, and what is wrong with which."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maehub.data.labels import Labelled
from maehub.data.listing import IMAGE_ENDINGS, Names, entries_in, search
from maehub.data.maps.folders import Found, group_numbers, map_folders, refuse_wrong
from maehub.data.maps.label_maps import IGNORED, MapClasses
from maehub.data.objects.coco import read_coco
from maehub.data.objects.folders import LAYOUT, object_files
from maehub.data.objects.labelme import around
from maehub.data.objects.noted import Entry, Noted
from maehub.data.objects.objects import DrawnMaps, ObjectClasses, ObjectLabels, Objects, Shape
from maehub.data.objects.outlines import Placed, place
from maehub.data.sources import Samples
from maehub.data.workers import core_count
from maehub.errors import DataError, UsageError, first_names, log
from maehub.images import Size, printable, upright_size

_BACKGROUND = "background"


class Looked(NamedTuple):
    """A picture whose file and annotations can be used."""

    picture: bytes
    where: str
    size: Size
    placed: list[Placed]
    flat: int
    """Points and lines that were left out."""

    @property
    def names(self) -> set[str]:
        """Classes of what is to be found."""
        return {thing.label for thing in self.placed if thing.label and not thing.ignored}


def is_object_set(data: str | Path) -> bool:
    """Whether a folder, or a file of COCO, says which objects pictures show: by names, and by what JSON files hold.

    Raises:
        DataError: there are annotations of several formats, or the sides of a split are not clear.
    """
    return bool(object_files(os.fsdecode(data)))


def annotation_files(folder: str) -> Counter[bytes]:
    """How many files of each ending say which objects the pictures of a folder show; none where that is not clear."""
    with contextlib.suppress(DataError):
        if sides := object_files(folder):
            ending = {"YOLO": b".txt", "Pascal VOC": b".xml"}.get(sides[0].kind, b".json")
            notes = {os.fsencode(one.notes) for one in sides}
            files = [[one] if os.path.isfile(one) else search(one, frozenset([ending]), Counter()) for one in notes]
            return Counter({ending: sum(1 for some in files for _ in some)})
    return Counter()


def find_objects(
    data: str | Path,
    *,
    group: str | None = None,
    classes: ObjectClasses | None = None,
    strict: bool = True,
    side: str | None = None,
) -> Found:
    """Pictures with their objects; annotations are checked against the size of every picture.

    ``labels`` of the result are (n, C) bool, the classes that occur, ignored objects apart. Pictures without objects
    are kept. An object's outline is dropped where others of the set have none: all are boxes then.

    Args:
        data: see `maehub.data.objects.folders.LAYOUT`.
        group: the level of a folder below the one of pictures, from 1, whose name is what must stay on one side.
        classes: those that labels are places in, such as those of a model; None takes those that occur, in the order
            of the files' numbers, else sorted by name.
        strict: what cannot be used is an error; else it is told.
        side: ``"testing"`` takes that side alone, where a split was given.

    Raises:
        UsageError: ``data`` is no set with objects, or a group is not in the names.
        DataError: annotations are broken, or say what cannot be; no object is left.
    """
    text = os.fsdecode(data)
    sides = object_files(text)
    if not sides:
        maps = "It holds label maps: `maehub finetune DATA -o RUN --task segment` trains with them"
        raise UsageError(f"{printable(text)} holds no pictures with objects. {maps if map_folders(text) else LAYOUT}")
    if side == "testing":
        sides = sides[-1:]
    noted = [one.read(text) for one in sides]
    if sides[0].kind == "COCO":
        _say_unlisted(noted)
    wrong = [reason for one in noted for reason in one.wrong]
    looked = [_looked(one, wrong) for one in noted]
    known = classes or _classes(noted, looked, text)
    looked = [[one for one in part if _is_known(one, known, wrong)] for part in looked]
    refuse_wrong(wrong, "such things", strict=strict)
    everything = [one for part in looked for one in part]
    clipped = _say(everything, sides[0].kind, text)
    outlines = _outlines(everything, sides[0].kind, text)
    found: list[Labelled] = []
    names: dict[int, str] = {}
    for one, part in zip(noted, looked, strict=True):
        if not any(not thing.ignored for row in part for thing in row.placed):
            raise DataError(wrong[0] if wrong else f"{printable(one.root)}: not one of its pictures shows an object")
        pictures = Samples(one.root, Names.of(row.picture for row in part))
        rows = tuple(_objects(row, known, outlines) for row in part)
        labels = np.zeros((len(rows), len(known.names)), bool)
        for occur, row in zip(labels, rows, strict=True):
            occur[row.labels[~row.ignored]] = True
        groups, called = group_numbers(pictures, group)
        names |= called
        found.append(Labelled(pictures, labels, known.names, groups, objects=ObjectLabels(rows, known)))
        if empty := int((~labels.any(axis=1)).sum()):
            log.info("%s: %d of %d pictures show no object, and are kept", printable(one.root), empty, len(rows))
    return Found(found, names, wrong, clipped)


def _looked(noted: Noted, wrong: list[str]) -> list[Looked]:
    """What can be used, by the names of pictures; the rest is added to ``wrong``."""
    entries = sorted(noted.entries, key=lambda entry: entry.picture)
    with ThreadPoolExecutor(core_count()) as pool:
        found = list(pool.map(partial(_look, noted.root), entries))
    wrong += [one for one in found if isinstance(one, str)]
    return [one for one in found if isinstance(one, Looked)]


def _look(root: bytes, entry: Entry) -> Looked | str:
    try:
        size = upright_size(os.path.join(root, entry.picture))
        things = entry.things(size)
        solid = [thing for thing in things if thing.box is not None or thing.shape is not None]
        placed = [place(thing, size) for thing in solid]
        if odd := [thing.label for thing in solid if thing.label and not thing.label.isprintable()]:
            raise DataError(f"the name of the class {odd[0]!a} has letters that cannot be shown")
    except DataError as error:
        return str(error) if str(error).startswith(entry.where) else f"{entry.where}: {error}"
    return Looked(entry.picture, entry.where, size, placed, len(things) - len(solid))


def _classes(noted: list[Noted], looked: list[list[Looked]], data: str) -> ObjectClasses:
    """The classes that occur, with the numbers of the first file that has them."""
    occur = {name for part in looked for one in part for name in one.names}
    numbers: dict[str, int] = {}
    for one in noted:
        numbers |= {name: number for name, number in (one.ids or {}).items() if name not in numbers}
    if absent := [name for name in numbers if name not in occur]:
        text = "%s: no object is of the classes %s, and they are left out"
        log.warning(text, printable(data), first_names(absent, 5))
    order = sorted(occur or {"object"}, key=lambda name: (numbers.get(name, 0), name))  # of none the caller says so
    ids = tuple(numbers.get(name, 0) for name in order)
    return ObjectClasses(tuple(order), ids if len(set(ids)) == len(order) else tuple(range(1, len(order) + 1)))


def _is_known(one: Looked, classes: ObjectClasses, wrong: list[str]) -> bool:
    if not (unknown := one.names - set(classes.names)):
        return True
    shown = first_names(sorted(unknown), 3)
    wrong.append(f"{one.where} has objects of {shown}; known classes are {first_names(classes.names, 3)}")
    return False


def _say(looked: list[Looked], kind: str, data: str) -> int:
    """Tell what was changed or left out; the number of objects that were cut at edges."""
    where = printable(data)
    clipped = [one.where for one in looked for thing in one.placed if thing.beyond]
    if clipped:
        text = "%s: %d objects reach over the edges of their pictures and are cut there; the first in %s%s"
        hint = ". Pascal VOC counts pixels from 1; is that a file that counts from 0?" * (kind == "Pascal VOC")
        log.warning(text, where, len(clipped), clipped[0], hint)
    if apart := [one.where for one in looked for thing in one.placed if thing.apart]:
        text = (
            "%s: the box and the outline of %d objects have less than half in common, and each is taken as it is; the "
            "first in %s. COCO's bbox is left, top, width, height"
        )
        log.warning(text, where, len(apart), apart[0])
    if flat := sum(one.flat for one in looked):
        log.warning("%s: %d points and lines have no area and are left out", where, flat)
    return len(clipped)


def _outlines(looked: list[Looked], kind: str, data: str) -> str:
    """What is done with outlines: ``kept``, ``dropped``, or where LabelMe has rectangles among them ``completed``."""
    has = [thing.shape is not None for one in looked for thing in one.placed]
    if all(has) or not any(has):
        return "kept" if any(has) else "dropped"
    bare, where = len(has) - sum(has), printable(data)
    if kind == "LabelMe":
        log.warning("%s: %d rectangles among outlines are taken as outlines of four corners", where, bare)
        return "completed"
    log.warning("%s: %d of %d objects have no outline, so the others' are dropped: boxes alone", where, bare, len(has))
    return "dropped"


def _objects(one: Looked, classes: ObjectClasses, outlines: str) -> Objects:
    places: Mapping[str, int] = {name: place for place, name in enumerate(classes.names)}
    labels = [places.get(thing.label or "", -1) for thing in one.placed]
    shapes: tuple[Shape, ...] | None = None
    if outlines != "dropped":
        shapes = tuple(around(thing.box) if thing.shape is None else thing.shape for thing in one.placed)
    boxes = np.array([thing.box for thing in one.placed], np.float32).reshape(-1, 4)
    ignored = np.array([thing.ignored for thing in one.placed], bool)
    return Objects(one.size, boxes, np.array(labels, np.int64), ignored, shapes)


def _say_unlisted(noted: list[Noted]) -> None:
    """Tell of pictures beside those of COCO's files that none of them lists."""
    listed = {os.path.join(one.root, entry.picture) for one in noted for entry in one.entries}
    others = [
        entry.path
        for folder in sorted({os.path.dirname(path) for path in listed})
        for entry in entries_in(os.fsdecode(folder))
        if os.path.splitext(os.fsencode(entry.name))[1].lower() in IMAGE_ENDINGS
        and os.fsencode(entry.path) not in listed
    ]
    if others:
        text = "%d pictures beside those of COCO's files are in none of them and are left out: %s"
        log.warning(text, len(others), first_names([printable(path) for path in sorted(others)], 3))


def drawn_maps(
    data: str, *, group: str | None, classes: MapClasses | None, strict: bool, side: str | None
) -> Found | None:
    """What `find_label_maps` gives, of a set of objects with outlines; None where it is none.

    Raises:
        DataError: objects have boxes alone, or see `find_objects`.
    """
    if not is_object_set(data):
        return None
    if classes is not None and _BACKGROUND not in classes.names:
        has = f"{printable(data)} has outlines of objects, and what they do not cover is of the class {_BACKGROUND}"
        raise DataError(f"{has}, which is not known: known are {first_names(classes.names, 3)}")
    known = None if classes is None else ObjectClasses(classes.names, tuple(range(len(classes.names))))
    found = find_objects(data, group=group, classes=known, strict=strict, side=side)
    if not all(one.objects is not None and one.objects.masked for one in found.sides):
        raise DataError(
            f"{printable(data)} has boxes alone, and which pixels in a box are of its class is not known. Give label "
            "maps, or outlines of every object, such as COCO's segmentation; or train a detector, "
            "`maehub finetune DATA -o RUN --task detect`"
        )
    names = (_BACKGROUND, *(name for name in found.training.classes if name != _BACKGROUND))
    names = names if classes is None else classes.names
    log.warning("%s: label maps are drawn from the outlines of objects; the rest is %s", printable(data), _BACKGROUND)
    return Found([_drawn(one, names) for one in found.sides], found.group_names, found.wrong)


def _drawn(labelled: Labelled, names: tuple[str, ...]) -> Labelled:
    assert labelled.objects is not None
    every, values = tuple(range(len(names))), [names.index(name) for name in (_BACKGROUND, *labelled.classes)]
    maps = DrawnMaps(labelled.objects, MapClasses(names, every, every), tuple(values))
    labels = np.zeros((len(labelled), len(names)), bool)
    with ThreadPoolExecutor(core_count()) as pool:
        for row, drawn in zip(labels, pool.map(maps.read, range(len(labelled))), strict=True):
            row[:] = np.bincount(drawn.reshape(-1) - IGNORED, minlength=len(names) + 1)[1:] > 0
    if empty := np.flatnonzero(~labels.any(axis=1)).tolist():
        where = first_names([labelled.samples.where(index) for index in empty], 3)
        log.warning("of %d pictures every pixel is ignored, and they are left out: %s", len(empty), where)
    whole = replace(labelled, labels=labels, classes=names, maps=maps, objects=None)
    return whole.take(np.flatnonzero(labels.any(axis=1)))


def listed_pictures(path: str) -> Samples:
    """The pictures that a file of COCO lists and that are there."""
    noted = read_coco(path)
    return Samples(noted.root, Names.of(sorted(entry.picture for entry in noted.entries)))
