"""Sets of pictures with objects, as users have them: where the annotations lie, of which format, on which side."""

import mmap
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from maehub.data.label_sources import TESTING, TRAINING, split_word
from maehub.data.labels import split_folders
from maehub.data.listing import IMAGE_ENDINGS, entries_in, search
from maehub.data.maps.folders import PICTURES, sides_in, two_sides
from maehub.data.objects.coco import read_coco
from maehub.data.objects.labelme import things_of_labelme
from maehub.data.objects.noted import Noted, beside
from maehub.data.objects.voc import things_of_voc
from maehub.data.objects.yolo import NAMING, read_yolo
from maehub.errors import DataError, first_names, log
from maehub.files import read_small
from maehub.images import printable

LAYOUT = (
    "Objects are said by a JSON file of COCO in DIR, DIR/annotations or by its own path; by YOLO's DIR/images, "
    "DIR/labels and DIR/data.yaml; by Pascal VOC's DIR/JPEGImages and DIR/Annotations; by LabelMe's JSON files beside "
    "the pictures; or by each of DIR/train and DIR/val so"
)
_NOTES = {"Pascal VOC": (b".xml", ("annotations", "annotation")), "YOLO": (b".txt", ("labels", "label"))}
_IMAGES, _ANNOTATIONS, _SHAPES = (
    re.compile(rb'"%s"\s*:\s*\[' % word) for word in (b"images", b"annotations", b"shapes")
)


class ObjectFiles(NamedTuple):
    """One side of a set."""

    kind: str
    """``COCO``, ``YOLO``, ``Pascal VOC`` or ``LabelMe``."""
    pictures: str
    """The folder of pictures; of COCO that of its file."""
    notes: str
    """COCO's file; else the folder with a file for each picture."""
    chosen: frozenset[bytes] | None = None
    """Names of pictures without their endings, where a list says which are of this side."""

    def read(self, data: str) -> Noted:
        """What the files say."""
        if self.kind == "COCO":
            return read_coco(self.notes)
        if self.kind == "YOLO":
            above = (os.path.dirname(folder) for folder in (self.pictures, self.notes))
            return read_yolo(self.pictures, self.notes, list(dict.fromkeys([data, *above])))
        if self.kind == "LabelMe":
            return beside(self.pictures, self.notes, ".json", things_of_labelme)
        return beside(self.pictures, self.notes, ".xml", things_of_voc, chosen=self.chosen)


Sides = tuple[ObjectFiles, ...]
"""What is to train on and to measure on; the former alone where no split was given."""


def object_files(data: str) -> Sides:
    """Where the annotations of a set lie; nothing where it is no set with objects. Looks at names, and into JSON files.

    Raises:
        DataError: there are annotations of several formats, or the sides of a split are not clear.
    """
    if not os.path.isdir(data):
        is_file = data.lower().endswith(".json") and os.path.isfile(data)
        return (ObjectFiles("COCO", os.path.dirname(data), data),) if is_file else ()
    words = split_folders(data)
    parts = {name: one for name in words if (one := _only(os.path.join(data, name), _inside(os.path.join(data, name))))}
    if not parts:
        return _only(data, _inside(data))
    if len({one[0].kind for one in parts.values()}) > 1:
        raise _several(data, [one[0] for one in parts.values()])
    names = sides_in(data, parts, words)
    return tuple(parts[name][0] for name in names) if len(names) > 1 else parts[names[0]]


def _only(data: str, found: list[Sides]) -> Sides:
    if len(found) > 1:
        raise _several(data, [one[0] for one in found])
    return found[0] if found else ()


def _several(data: str, found: list[ObjectFiles]) -> DataError:
    names = " and ".join(f"{one.kind}'s in {printable(one.notes)}" for one in found)
    return DataError(
        f"{printable(data)} has annotations of several formats, and which are meant is not known: {names}. Give the "
        "path of COCO's file, or move the others away"
    )


def _inside(folder: str) -> list[Sides]:
    """What is found of each format."""
    entries = entries_in(folder)
    below = {entry.name.casefold(): entry.path for entry in entries if entry.is_dir()}
    pictures = next((below[name] for name in PICTURES if name in below), folder)
    found: list[Sides] = []
    near = [folder, *(below[name] for name in _NOTES["Pascal VOC"][1] if name in below)]
    if pictures != folder:
        near.append(pictures)
    files = [entry for place in near for entry in entries_in(place) if entry.name.lower().endswith(".json")]
    kinds = {path: _kind(path) for path in sorted(entry.path for entry in files if entry.is_file())}
    if coco := [path for path, kind in kinds.items() if kind == "COCO"]:
        found.append(_coco(folder, coco))
    labelme = [os.path.dirname(path) for path, kind in kinds.items() if kind == "LabelMe"]
    if labelme or (not kinds and _kind(_first(pictures, b".json")) == "LabelMe"):
        found.append((ObjectFiles("LabelMe", pictures, labelme[0] if labelme else pictures),))
    for kind, (ending, names) in _NOTES.items():
        notes = next((below[name] for name in names if name in below), None)
        if notes is None and kind == "Pascal VOC" and any(entry.name.lower().endswith(".xml") for entry in entries):
            notes = folder
        if notes is None or not _first(notes, ending) or (kind == "YOLO" and _first(notes, *IMAGE_ENDINGS)):
            continue  # the last are label maps
        whole = ObjectFiles(kind, pictures, notes)
        found.append(_listed(folder, whole) or _parted(folder, whole))
    return found


def _coco(folder: str, files: list[str]) -> Sides:
    """One file, or that of each side."""
    instances = [path for path in files if os.path.basename(path).startswith("instances")]
    if instances and len(instances) < len(files):
        rest = first_names([printable(path) for path in files if path not in instances], 3)
        log.warning("%s: objects are those of files called instances…; not read: %s", printable(folder), rest)
    sides = {path: ObjectFiles("COCO", os.path.dirname(path), path) for path in instances or files}
    if len(sides) == 1:
        return tuple(sides.values())
    return _two(folder, {path: os.path.splitext(os.path.basename(path))[0] for path in sides}, sides.__getitem__)


def _two(folder: str, called: dict[str, str], side: Callable[[str], ObjectFiles]) -> Sides:
    """The sides by the words of a split that things are called by."""
    words = {name: word for name, stem in called.items() if (word := split_word(stem))}
    if len(words) < len(called):
        names = first_names([printable(name) for name in called], 3)
        raise DataError(f"{printable(folder)} has several annotation files, and which is meant is not known: {names}")
    training, testing = two_sides(folder, words)
    return side(training), side(testing)


def _parted(folder: str, whole: ObjectFiles) -> Sides:
    """The sides that lie below both folders, DIR/images/train and DIR/labels/train; else the whole."""
    words = [split_folders(place) for place in (whole.pictures, whole.notes)]
    both = {name: name for name in words[0] if name in words[1]} if whole.pictures != whole.notes else {}

    def side(name: str) -> ObjectFiles:
        return whole._replace(pictures=os.path.join(whole.pictures, name), notes=os.path.join(whole.notes, name))

    if len(both) > 1:
        return _two(folder, both, side)
    if both and len(words[0]) > 1:
        text = "%s: %s alone is read: the other folders of pictures have no annotations"
        log.warning(text, printable(folder), *both)
    return (side(*both) if both else whole,)


def _listed(folder: str, whole: ObjectFiles) -> Sides:
    """The sides that the lists of Pascal VOC name; nothing where they name none."""
    lists = Path(folder, "ImageSets", "Main")
    called = {path.name: path.stem for path in sorted(lists.glob("*.txt")) if path.stem in (*TRAINING, *TESTING)}
    if whole.kind != "Pascal VOC" or not all(set(called.values()) & set(words) for words in (TRAINING, TESTING)):
        return ()

    def side(name: str) -> ObjectFiles:
        lines = read_small(lists / name, DataError).splitlines()
        return whole._replace(chosen=frozenset(line.strip() for line in lines if line.strip()))

    return _two(folder, called, side)


def _first(folder: str, *endings: bytes) -> str | None:
    """The first file with one of these endings, at any depth; not one that names classes."""
    names = search(os.fsencode(folder), frozenset(endings), Counter())
    return next((os.path.join(folder, os.fsdecode(name)) for name in names if name not in NAMING), None)


def _kind(path: str | None) -> str:
    """``COCO`` or ``LabelMe`` by the lists that a JSON file has; empty of any other file."""
    try:
        with open(path or os.devnull, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if _IMAGES.search(text) and _ANNOTATIONS.search(text):
                return "COCO"
            return "LabelMe" if _SHAPES.search(text) else ""
    except (OSError, ValueError):  # it is empty, or no file
        return ""
