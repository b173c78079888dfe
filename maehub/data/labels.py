"""Pictures with their classes: names become places in a list of classes, and groups become numbers."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from maehub.data.label_sources import TESTING, TRAINING, NamedLabels, read_label_source, split_word
from maehub.data.listing import entries_in
from maehub.data.maps.label_maps import LabelMaps
from maehub.data.objects.objects import DrawnMaps, ObjectLabels
from maehub.data.sources import Source, select
from maehub.errors import DataError, UsageError, first_names
from maehub.images import printable
from maehub.rng import sample_id

_LARGEST, _SPARSEST = 2**29, 1000  # cells of a table of pictures and classes; and more, if one in so many is a label


@dataclass(frozen=True)
class Labelled:
    """Pictures with their classes, or with numbers.

    ``labels``: (n,) int64, places in ``classes``; where a picture may have several, (n, classes) bool; or (n, classes)
    float64, the numbers in the columns that ``classes`` names. ``groups``: (n,) int64, equal for pictures that must
    stay on one side of a split; None where nobody said. What `find_labelled` gives is a hash of a group's name, so a
    group has the same number wherever it is read. ``maps``: where every pixel has a class, which; ``labels`` are then
    (n, classes) bool, the classes that occur; so are they with ``objects``, where a picture shows which.
    """

    samples: Source
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    maps: LabelMaps | DrawnMaps | None = None
    objects: ObjectLabels | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a picture may have several classes, or none."""
        return self.labels.dtype == bool

    @property
    def numeric(self) -> bool:
        """Whether labels are numbers to be predicted, and no classes."""
        return self.labels.dtype.kind == "f"

    @property
    def strata(self) -> "Labelled":
        """The same pictures with the classes whose shares a split keeps: a single one where labels are numbers."""
        return replace(self, labels=np.zeros(len(self), np.int64), classes=("",)) if self.numeric else self

    @property
    def counts(self) -> np.ndarray:
        """(classes,) int64, how many pictures each class has."""
        if self.numeric:
            return np.full(len(self.classes), len(self), np.int64)
        if self.multi_label:
            return self.labels.sum(axis=0, dtype=np.int64)
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)

    def take(self, indices: np.ndarray) -> "Labelled":
        """Some of them, in the order of ``indices``."""
        groups = None if self.groups is None else self.groups[indices]
        maps = None if self.maps is None else self.maps.take(indices)
        objects = None if self.objects is None else self.objects.take(indices)
        samples, labels = select(self.samples, indices), self.labels[indices]
        return replace(self, samples=samples, labels=labels, groups=groups, maps=maps, objects=objects)

    def without_empty_classes(self) -> "Labelled":
        """The same pictures, with the classes alone that one of them has."""
        if self.numeric:
            return self
        has = self.counts > 0
        classes = tuple(name for name, some in zip(self.classes, has, strict=True) if some)
        labels = self.labels[:, has] if self.multi_label else (np.cumsum(has) - 1)[self.labels]
        return replace(self, labels=labels, classes=classes)


class LoadedLabels(NamedTuple):
    """Labelled pictures with what else is known of them."""

    labelled: Labelled
    group_names: dict[int, str]  # of the numbers in ``labelled.groups``
    sides: list[str] | None  # n cells of the column split of a CSV, where there is one


class Sides(NamedTuple):
    """Folders of a split that was given."""

    training: str
    testing: str


def find_labelled(
    data: str | Path,
    *,
    group: str | None = None,
    label: str | None = None,
    classes: Sequence[str] | None = None,
    index_dir: Path | None = None,
    numeric: bool = False,
) -> LoadedLabels:
    """Labelled pictures: a folder of class folders, a CSV, tar shards, Parquet files or a saved dataset.

    *Folder*: DIR/CLASS/…, at any depth. *CSV*: see `label_sources.read_csv`; if any cell holds several labels
    with | between them, or none, every picture may have several. *Shards*: the number in the .cls member; classes are
    called by the lines of a file classes.txt beside the shards, the first one 0, or by their numbers. *Table*: the
    column label, labels, class or fine_label, or the only one of datasets' ClassLabel; text, numbers, or lists of them.

    ``index_dir`` is as in `find_samples`. ``group`` is what must stay on one side of a split: a column of a CSV or
    table; of a folder the level of the folder whose name is the group, ``"2"`` being the first one below the class; of
    shards ``"shard"``, or the level of a folder in the names of members, from ``"1"``. ``label`` is the label's column,
    in a CSV or table. ``classes`` are those that labels are places in, such as those of a model; None takes those that
    have a picture, sorted by name, or in the order that the data give them, two at least; ``()`` takes even one.
    With ``numeric`` labels are numbers, in one column of a CSV or in several with commas between.
    """
    text = os.fsdecode(data)
    if not numeric and (sides := given_folders(text)):
        raise UsageError(f"{printable(text)} holds the two sides of a split: name one, such as {sides.testing}")
    named = read_label_source(text, group, label, index_dir, known=classes is not None, numeric=numeric)
    numbers = {name: sample_id(b"group " + name.encode("utf-8", "surrogateescape")) for name in set(named.groups or ())}
    labelled = _numbered(named, numbers)
    if classes:
        labelled = mapped(labelled, tuple(classes), text)
    elif classes is None and not numeric and _is_one_class(labelled):
        raise one_class(text, labelled.classes[0])
    return LoadedLabels(labelled, {number: name for name, number in numbers.items()}, named.sides)


def _is_one_class(labelled: Labelled) -> bool:
    return len(labelled.classes) < 2 and not (labelled.multi_label and not labelled.labels.all())


def given_folders(data: str) -> Sides | None:
    """Folders to train and to measure on, such as DIR/train and DIR/val, or else DIR/test.

    They are parts of a split only where every folder beside them is called so, each in its way (see
    `label_sources.split_word`), and each holds class folders, shards or tables: ``train`` is a thing in pictures, too.

    Raises:
        DataError: every folder is called like a part of a split, but they are not one.
    """
    words = split_folders(data)
    if len(words) < 2 or not all(_holds_classes(os.path.join(data, folder)) for folder in words):
        return None
    training, testing = sides_of(data, words)
    return Sides(os.path.join(data, training), os.path.join(data, testing[0]))


def sides_of(data: str, words: dict[str, str]) -> tuple[str, list[str]]:
    """Of folders with the words of a split that they are the one to train on, and those to measure on, the first meant.

    Raises:
        DataError: not one is for training, or none for measuring.
    """
    training = [folder for folder, word in words.items() if word in TRAINING]
    testing = sorted(words.keys() - training, key=lambda name: (TESTING.index(words[name]), name))
    if len(training) != 1 or not testing:
        names = ", ".join(map(printable, sorted(words)))
        raise DataError(
            f"{printable(data)} holds {names}: all are called like parts of a split, and which is for training and "
            "which for measuring is not clear. Give one of them, or rename them"
        )
    return training[0], testing


def split_folders(data: str) -> dict[str, str]:
    """The folders in a folder with the words of a split that they are; empty where one of them is none."""
    if not os.path.isdir(data):
        return {}
    words = {entry.name: split_word(entry.name) for entry in entries_in(data) if entry.is_dir()}
    return {folder: word for folder, word in words.items() if word} if all(words.values()) else {}


def _holds_classes(folder: str) -> bool:
    return any(entry.is_dir() or entry.name.endswith((".tar", ".parquet", ".arrow")) for entry in entries_in(folder))


def _numbered(named: NamedLabels, numbers: dict[str, int]) -> Labelled:
    """Names to places in the row of the classes that have a picture."""
    groups = None if named.groups is None else np.array([numbers[name] for name in named.groups], np.int64)
    if isinstance(named.labels, np.ndarray):
        return Labelled(named.samples, named.labels, tuple(named.order or ()), groups)
    several = isinstance(named.labels[0], list)
    cells = cast(list[list[str]], named.labels if several else [[name] for name in named.labels])
    seen = {name for cell in cells for name in cell}
    classes = tuple(name for name in named.order or sorted(seen) if name in seen)
    if not classes:
        raise DataError(f"none of {len(cells)} pictures has a label, the first {named.samples.where(0)}")
    places = {name: place for place, name in enumerate(classes)}
    if several:
        if len(cells) * len(classes) > max(_LARGEST, _SPARSEST * sum(map(len, cells))):
            has = f"{len(cells):,} pictures have {len(classes):,} classes, which hardly any two of them share"
            raise DataError(f"{named.samples.where(0)} and the others: {has}. Leave out classes with few pictures")
        labels = np.zeros((len(cells), len(classes)), bool)
        for row, cell in zip(labels, cells, strict=True):
            row[[places[name] for name in cell]] = True
    else:
        labels = np.array([places[cell[0]] for cell in cells], np.int64)
    return Labelled(named.samples, labels, classes, groups)


def mapped(labelled: Labelled, classes: tuple[str, ...], data: str) -> Labelled:
    """The same pictures with labels that are places in ``classes``."""
    times = Counter(classes)
    counts = dict(zip(labelled.classes, labelled.counts.tolist(), strict=True))
    if unseen := [name for name in labelled.classes if name not in times]:
        names = first_names([f"{name} (pictures: {counts[name]})" for name in unseen], 3)
        has = f"{printable(data)} has classes that are not among the {len(classes)} known ones: {names}"
        known = first_names(classes, 3)
        raise DataError(f"{has}. Known are {known}. Leave those pictures out, or train with them")
    if (name := next((name for name in labelled.classes if times[name] > 1), None)) is not None:
        raise DataError(f"{times[name]} of the known classes are called {name}; which is meant is not known")
    order = {name: place for place, name in enumerate(classes)}
    places = np.array([order[name] for name in labelled.classes], np.int64)
    if labelled.labels.ndim == 1:
        return replace(labelled, labels=places[labelled.labels], classes=classes)
    labels = np.zeros((len(labelled), len(classes)), labelled.labels.dtype)
    labels[:, places] = labelled.labels
    return replace(labelled, labels=labels, classes=classes)


def one_class(data: str, name: str) -> DataError:
    """The error to raise for data of a single class."""
    text = f"all pictures in {printable(data)} are of one class, {name}, and there is nothing to tell it from"
    inside = os.path.join(data, name)
    if os.path.isdir(inside) and any(os.path.isdir(os.path.join(inside, entry)) for entry in os.listdir(inside)):
        return DataError(f"{text}. If the classes are the folders in {name}, give {printable(inside)}")
    return DataError(f"{text}. Two classes or more are needed")
