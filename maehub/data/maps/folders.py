"""Folders of pictures beside folders of label maps: which map belongs to which picture, and the sides of a split."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maehub.data.label_sources import TRAINING, folder_groups
from maehub.data.labels import Labelled, sides_of, split_folders
from maehub.data.listing import IMAGE_ENDINGS, Names, entries_in, search
from maehub.data.maps.label_maps import (
    LabelMaps,
    Looked,
    MapClasses,
    classes_of,
    counts_of,
    found_classes,
    look_at_maps,
)
from maehub.data.sources import Samples, find_images
from maehub.errors import DataError, UsageError, first_names, log
from maehub.images import printable
from maehub.rng import sample_id

PICTURES = ("images", "image", "imgs", "img", "pictures", "jpegimages")
"""What a folder of pictures is called, in lower case."""
_MAPS = ("masks", "mask", "labels", "labelmaps", "annotations", "segmentationclass")
ANNOTATIONS = frozenset([b".json", b".txt", b".xml"])
"""Endings of the files that say which objects pictures show."""
LAYOUT = (
    "Pictures and label maps lie in DIR/images and DIR/masks, under the same names; or in DIR/train/images, "
    "DIR/train/masks, DIR/val/images and DIR/val/masks"
)


class MapFolders(NamedTuple):
    """A folder of pictures, and the one of their label maps."""

    pictures: str
    maps: str


class Found(NamedTuple):
    """Pictures with their label maps or objects."""

    sides: list[Labelled]
    """To train and to measure on; all together where no split was given."""
    group_names: dict[int, str]
    wrong: list[str]
    """What is wrong with which files; those are not among the pictures."""
    clipped: int = 0
    """Objects that were cut at the edges of their pictures."""

    @property
    def training(self) -> Labelled:
        """The first side."""
        return self.sides[0]

    @property
    def testing(self) -> Labelled | None:
        """The second one; None where no split was given."""
        return self.sides[1] if len(self.sides) > 1 else None


def refuse_wrong(wrong: Sequence[str], more: str, *, strict: bool) -> None:
    """Of what is wrong, which is named in full by another command, make an error where it is to be one."""
    if wrong and strict:
        rest = f", and {len(wrong) - 1} more {more}; `maehub data check DATA` names all of them"
        raise DataError(f"{wrong[0]}{rest if len(wrong) > 1 else ''}")


def folders_in(folder: str) -> dict[str, str]:
    """Paths of the folders in one, by their names in lower case."""
    return {entry.name.casefold(): entry.path for entry in entries_in(folder) if entry.is_dir()}


def map_folders(data: str) -> list[MapFolders]:
    """The folders of a set, or of its training side and its testing one; none where it is no set with label maps.

    Raises:
        DataError: every folder is called like a part of a split, but they are not one.
    """
    if not os.path.isdir(data):
        return []
    if both := _beside(data):
        words = [split_folders(folder) for folder in both]
        if len(words[0]) > 1 and words[0].keys() == words[1].keys():
            names = two_sides(data, words[0])
            return [MapFolders(*(os.path.join(folder, name) for folder in both)) for name in names]
        return [both]
    named = split_folders(data)
    found = {name: both for name in named if (both := _beside(os.path.join(data, name)))}
    return [found[name] for name in sides_in(data, found, named)]


def sides_in(data: str, found: Collection[str], words: dict[str, str]) -> tuple[str, ...]:
    """Of folders in which something was found those to train and to measure on, by the words of a split that they are;
    one of training alone is a whole."""
    if not found or (len(found) == 1 and words[next(iter(found))] in TRAINING):
        return tuple(found)
    return two_sides(data, {name: words[name] for name in found})


def _beside(folder: str) -> MapFolders | None:
    below = folders_in(folder)
    pictures = next((below[name] for name in PICTURES if name in below), None)
    maps = next((below[name] for name in _MAPS if name in below and _holds_maps(below[name])), None)
    return None if pictures is None or maps is None else MapFolders(pictures, maps)


def _holds_maps(folder: str) -> bool:
    """Whether a folder is one of pictures, and not of annotation files."""
    root = os.fsencode(folder)
    notes = next(search(root, ANNOTATIONS, Counter()), None)
    return notes is None or next(search(root, IMAGE_ENDINGS, Counter()), None) is not None


def two_sides(data: str, words: dict[str, str]) -> tuple[str, str]:
    """The names of the folders or files to train and to measure on; see `sides_of`."""
    training, (testing, *passed) = sides_of(data, words)
    if passed:
        log.warning("measured on %s; %s in %s is not read", testing, ", ".join(passed), printable(data))
    return training, testing


def find_label_maps(
    data: str | Path,
    *,
    group: str | None = None,
    classes: MapClasses | None = None,
    strict: bool = True,
    side: str | None = None,
) -> Found:
    """Pictures with their label maps; every map is read once, to see whether it can be used and what it holds.

    Of objects with outlines the maps are drawn: see `DrawnMaps`.
    Pictures and maps belong together by their names below their folders, without the ending; a picture without a map
    is left out, and said. So are pictures of whose map every pixel is ignored. ``labels`` of the result are (n, C)
    bool, the classes that occur.

    Args:
        data: see `LAYOUT`; classes.json or classes.txt in it, or beside the two folders, names the classes.
        group: the level of a folder below the one of pictures, from 1, whose name is what must stay on one side.
        classes: what values mean where no file says so; None takes the values that occur.
        strict: an unusable map is an error; else it is told.
        side: ``"testing"`` takes that side alone, where a split was given.

    Raises:
        UsageError: ``data`` is no such folder, or a group is not in the names.
        DataError: no pictures or no maps, two files of one name, maps that cannot be used.
    """
    from maehub.data.objects.finding import drawn_maps  # which knows folders of maps

    text = os.fsdecode(data)
    sides = map_folders(text)
    if not sides:
        if drawn := drawn_maps(text, group=group, classes=classes, strict=strict, side=side):
            return drawn
        raise UsageError(f"{printable(text)} holds no folders of pictures and label maps. {LAYOUT}")
    if side == "testing":
        sides = sides[-1:]
    pairs = [_paired(*one) for one in sides]
    looked = [look_at_maps(pictures, files) for pictures, files in pairs]
    everything = [one for part in looked for one in part]
    beside = [text, *dict.fromkeys(os.path.dirname(folder) for one in sides for folder in one)]
    known = classes_of(beside) or classes or found_classes([one for one in everything if not one.reason], text)
    wrong: list[str] = []
    found = [_labelled(*pair, part, known, group, wrong) for pair, part in zip(pairs, looked, strict=True)]
    refuse_wrong(wrong, "label maps cannot be used", strict=strict)
    names = {number: name for _, some in found for number, name in some.items()}
    return Found([one for one, _ in found], names, wrong)


def _paired(pictures: str, maps: str) -> tuple[Samples, Samples]:
    """Pictures and their maps, in the order of their names."""
    found = [find_images(folder) for folder in (pictures, maps)]
    stems = [[os.path.splitext(samples.name(index))[0] for index in range(len(samples))] for samples in found]
    for folder, names in zip((pictures, maps), stems, strict=True):
        (name, times), *_ = Counter(names).most_common(1)
        if times > 1:
            raise DataError(
                f"{printable(folder)} has several files called {printable(name)} with different endings, and which "
                "belongs to which is not known: leave one"
            )
    of = {name: place for place, name in enumerate(stems[1])}
    both = [place for place, name in enumerate(stems[0]) if name in of]
    if not both:
        raise DataError(
            f"no picture in {printable(pictures)} has a label map in {printable(maps)}: of {len(stems[0])} pictures "
            f"and {len(stems[1])} maps none share a name, such as {printable(stems[0][0])} and {printable(stems[1][0])}"
        )
    if without := sorted(set(stems[0]) - of.keys()):
        shown = first_names([printable(name) for name in without], 3)
        log.warning("%s: %d pictures have no label map and are left out: %s", printable(maps), len(without), shown)
    if without := sorted(of.keys() - set(stems[0])):
        shown = first_names([printable(name) for name in without], 3)
        log.warning("%s: %d label maps have no picture: %s", printable(pictures), len(without), shown)
    chosen = Names.of(found[0].name(place) for place in both)
    files = Names.of(found[1].name(of[stems[0][place]]) for place in both)
    return Samples(found[0].root, chosen, found[0].passed_over), Samples(found[1].root, files)


def _labelled(
    pictures: Samples,
    files: Samples,
    looked: Sequence[Looked],
    classes: MapClasses,
    group: str | None,
    wrong: list[str],
) -> tuple[Labelled, dict[int, str]]:
    """What can be used; the rest is added to ``wrong``."""
    counts, unusable = counts_of(looked, classes, files.where)
    wrong += unusable.values()
    empty = [index for index in np.flatnonzero(~counts.any(axis=1)).tolist() if index not in unusable]
    if empty:
        text = "%s: of %d pictures every pixel is ignored, and they are left out: %s"
        names = first_names([printable(pictures.name(index)) for index in empty], 3)
        log.warning(text, printable(pictures.root), len(empty), names)
    usable = np.flatnonzero(counts.any(axis=1))
    groups, names_of = group_numbers(pictures, group)
    if not len(usable):
        raise DataError(wrong[0] if wrong else f"{printable(pictures.root)}: no label map holds a class")
    whole = Labelled(pictures, counts > 0, classes.names, groups, LabelMaps(files, classes))
    return whole.take(usable), names_of


def group_numbers(pictures: Samples, group: str | None) -> tuple[np.ndarray | None, dict[int, str]]:
    """(n,) int64 of the groups by the names of folders, and what each is called; None where nobody asked for any."""
    if group is None:
        return None, {}
    paths = [pictures.name(index).split(b"/") for index in range(len(pictures))]
    what = f"of {printable(pictures.root)}: groups are folders below it, from 1"
    called = folder_groups(pictures, paths, group, what)
    numbers = {name: sample_id(b"group " + name.encode("utf-8", "surrogateescape")) for name in set(called)}
    return np.array([numbers[name] for name in called], np.int64), {number: name for name, number in numbers.items()}
