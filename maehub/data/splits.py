"""Sides of a split that can be trusted: as given, or made by hashes of names, with whole groups and every class."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maehub.data.label_sources import TESTING, TRAINING
from maehub.data.labels import (
    Labelled,
    LoadedLabels,
    Sides,
    find_labelled,
    given_folders,
    mapped,
    one_class,
    split_folders,
)
from maehub.data.maps.folders import Found, find_label_maps
from maehub.data.objects.finding import find_objects
from maehub.data.shards import Shards
from maehub.errors import DataError, UsageError, first_names, log
from maehub.files import cache_folder
from maehub.images import printable
from maehub.rng import sample_seed

_FEW, _FOLD_COUNT = 2000, 5  # training pictures below which is cross-validation, and its folds
_SPLIT, _INNER, _FOLDS = 11, 12, 13  # streams of hashes: an inner split does not follow the outer one
_ALONE = "every picture has a class that no other picture has, or no other group"
_ROUNDS = 10  # over all groups; two or three settle it
_NOTHING = 1e-9  # what rounding may seem to gain


class SplitGroups(NamedTuple):
    """What is moved as a whole: groups, or single pictures where there are none, with their classes.

    Where a picture may have several labels, having none counts as one more class.
    """

    members: np.ndarray  # (n,) int64, the group of each picture
    order: list[int]  # of groups, by their hashes
    sizes: list[int]  # pictures of each group
    starts: list[int]  # (groups + 1), where its classes begin in the two that follow
    classes: list[int]
    counts: list[int]
    totals: list[int]  # pictures of each class
    spread: list[int]  # groups of each class

    @classmethod
    def of(cls, labelled: Labelled, seed: int, stream: int) -> "SplitGroups":
        if labelled.groups is None:
            members = np.arange(len(labelled))
            names = [labelled.samples.sample_id(index) for index in range(len(labelled))]
        else:
            numbers, members = np.unique(labelled.groups, return_inverse=True)
            names = numbers.tolist()
        hashes = np.array([sample_seed(seed, 0, name, stream) for name in names], np.int64)
        labelled = labelled.strata
        if labelled.multi_label:
            table = np.column_stack([labelled.labels, ~labelled.labels.any(axis=1)])
            pictures, numbers = np.nonzero(table)
            classes = table.shape[1]
        else:
            pictures, numbers, classes = np.arange(len(labelled)), labelled.labels, len(labelled.classes)
        pairs, counts = np.unique(members[pictures] * classes + numbers, return_counts=True)
        groups, of_class = np.divmod(pairs, classes)
        return cls(
            members=members,
            order=np.argsort(hashes, kind="stable").tolist(),
            sizes=np.bincount(members, minlength=len(names)).tolist(),
            starts=np.searchsorted(groups, np.arange(len(names) + 1)).tolist(),
            classes=of_class.tolist(),
            counts=counts.tolist(),
            totals=np.bincount(of_class, counts, minlength=classes).astype(int).tolist(),
            spread=np.bincount(of_class, minlength=classes).tolist(),
        )

    def parts(self, group: int) -> Iterator[tuple[int, int]]:
        """Classes of a group, each with its number of pictures."""
        part = slice(self.starts[group], self.starts[group + 1])
        return zip(self.classes[part], self.counts[part], strict=True)


class LabelledSplit(NamedTuple):
    """Pictures to train on, and pictures to measure on, of the same classes."""

    training: Labelled
    testing: Labelled
    made: bool  # by the seed, not by the user's folders or column

    @property
    def groups(self) -> tuple[int, int] | None:
        """Groups on each side; None if the pictures have none."""
        training, testing = self.training.groups, self.testing.groups
        return None if training is None or testing is None else (len(set(training)), len(set(testing)))


class Inner(NamedTuple):
    """Places in a training part."""

    train: np.ndarray  # (a,) int64, ascending, to fit on
    held: np.ndarray  # (b,) int64, ascending, to choose by


def split_labelled(
    data: str | Path,
    *,
    seed: int = 0,
    share: float = 0.2,
    group: str | None = None,
    label: str | None = None,
    numeric: bool = False,
) -> LabelledSplit:
    """Training and testing pictures.

    DIR/train and DIR/val, or the column ``split`` of a CSV, are used as they are. Otherwise ``share`` of each class is
    for testing, at least one picture and not all, and whole groups stay together, whose sizes decide how near to
    ``share`` that comes. Where a picture may have several labels, a class with one picture is trained on alone. The
    seed is that of a split that is made; for the others see `find_labelled`.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to measure on must be above 0 and below 1, not {share:g}")
    text, index_dir = os.fsdecode(data), cache_folder() / "shards"
    if (sides := given_folders(text)) and not numeric:
        return _tested(text, _of_folders(text, sides, group, label, index_dir))
    words = split_folders(text)
    if len(words) == 1 and set(words.values()) <= set(TRAINING):
        text = os.path.join(text, *words)  # that folder alone: a split is made of it
    loaded = find_labelled(text, group=group, label=label, index_dir=index_dir, numeric=numeric)
    if loaded.sides:
        return _tested(text, _of_column(text, loaded.labelled, loaded.sides, loaded.group_names))
    labelled = loaded.labelled
    groups = SplitGroups.of(labelled, seed, _SPLIT)
    if labelled.labels.ndim == 1:
        _check_can_be_split(loaded, groups)
    places = _held_out(groups, share, f"{printable(text)} cannot be split")
    return _tested(text, LabelledSplit(labelled.take(places.train), labelled.take(places.held), True))


def split_label_maps(data: str | Path, *, seed: int = 0, share: float = 0.2, group: str | None = None) -> LabelledSplit:
    """Training and testing pictures with label maps, as given or as `split_labelled` makes them.

    Classes are those of classes.json or classes.txt, else the values that occur. Of a split that is made every class is
    on both sides, where two pictures or groups have it.
    """
    text = os.fsdecode(data)
    return _of_found(text, find_label_maps(text, group=group), seed, share, "a label map")


def split_objects(data: str | Path, *, seed: int = 0, share: float = 0.2, group: str | None = None) -> LabelledSplit:
    """Training and testing pictures with objects, as given or as `split_labelled` makes them.

    Classes are those that occur. Of a split that is made every class is on both sides, where two pictures or groups
    have it, and so are pictures without objects.
    """
    text = os.fsdecode(data)
    return _of_found(text, find_objects(text, group=group), seed, share, "objects")


def _of_found(text: str, found: Found, seed: int, share: float, what: str) -> LabelledSplit:
    training, testing = found.training, found.testing
    if testing is not None:
        split = LabelledSplit(training, testing, False)
        _check_groups(text, split, found.group_names)
    else:
        cannot = f"{printable(text)} cannot be split"
        if len(training) < 2:
            raise DataError(f"{cannot}: it has one picture with {what}, and one is needed to measure on")
        places = _held_out(SplitGroups.of(training, seed, _SPLIT), share, cannot)
        split = LabelledSplit(training.take(places.train), training.take(places.held), True)
    if unseen := [split.training.classes[number] for number in np.flatnonzero(split.training.counts == 0)]:
        log.warning("%s: no picture to train on of the classes %s", printable(text), first_names(unseen, 3))
    return _tested(text, split)


def measured_folder(data: str) -> str:
    """The folder that is for measuring, where there is one: DIR/val beside DIR/train, or alone; else DIR itself."""
    if sides := given_folders(data):
        return sides.testing
    words = split_folders(data)
    return os.path.join(data, *words) if len(words) == 1 and not set(words.values()) & set(TRAINING) else data


def measured_part(
    data: str | Path,
    *,
    group: str | None = None,
    label: str | None = None,
    classes: tuple[str, ...] | None = None,
    numeric: bool = False,
) -> Labelled:
    """What a finished classifier is measured on: DIR/val, or the testing rows of a CSV with a column ``split``, where
    there are such; else all pictures. Parameters are those of `find_labelled`.
    """
    place, index_dir = measured_folder(os.fsdecode(data)), cache_folder() / "shards"
    loaded = find_labelled(place, group=group, label=label, classes=classes, index_dir=index_dir, numeric=numeric)
    return loaded.labelled.take(_rows_of(os.fsdecode(place), loaded.sides)[1]) if loaded.sides else loaded.labelled


def inner_split(labelled: Labelled, *, share: float = 0.2, seed: int = 0) -> Inner:
    """Places of a training part to fit on, and places to choose settings by: a pure function of names, labels and seed.

    As in `split_labelled`; a class with one picture, or in one group, is never held out.
    """
    cannot = f"{len(labelled)} training pictures cannot be split once more, to choose by"
    return _held_out(SplitGroups.of(labelled, seed, _INNER), share, cannot)


def folds(labelled: Labelled, count: int, seed: int) -> list[Inner]:
    """Cross-validation of a training part: a pure function of names, labels and seed.

    Held parts are disjoint, and together they are all pictures but those of a group with a class that no other has:
    these are always fitted on. A class differs by at most one picture from fold to fold, unless there are groups or
    several labels. There are fewer folds than ``count`` where there are fewer groups to hold out.
    """
    if count < 2:
        raise UsageError(f"cross-validation needs 2 folds or more, not {count}")
    groups, labelled = SplitGroups.of(labelled, seed, _FOLDS), labelled.strata
    large_first = sorted(groups.order, key=groups.sizes.__getitem__, reverse=True)
    free = [group for group in large_first if all(groups.spread[number] > 1 for number, _ in groups.parts(group))]
    if len(free) < 2:
        raise DataError(f"{len(labelled)} training pictures cannot be cross-validated: {_ALONE}")
    count = min(count, len(free))
    fold_of = np.full(len(groups.sizes), -1)
    pictures, members = np.zeros((2, count, len(groups.totals)), int)  # of a class in a fold: pictures, groups
    filled = [0] * count
    totals, spread = np.array(groups.totals), np.array(groups.spread)
    for group in free:  # to the fold that has least of its classes, if it can be so that no fold holds all of a class
        numbers, sizes = map(list, zip(*groups.parts(group), strict=True))
        emptied = (members[:, numbers] + 1 == spread[numbers]).sum(axis=1).tolist()
        crowd = (pictures[:, numbers] * (sizes / totals[numbers])).sum(axis=1).tolist()
        home = fold_of[group] = min(range(count), key=list(zip(emptied, crowd, filled, strict=True)).__getitem__)
        filled[home] += groups.sizes[group]
        pictures[home, numbers] += sizes
        members[home, numbers] += 1
    homes = fold_of[groups.members]
    # Say which classes the folds cannot choose by.
    if alone := [name for place, name in enumerate(labelled.classes) if groups.spread[place] == 1]:
        what = "picture" if labelled.groups is None else "group"
        log.warning("always fitted on, since they are in one %s: the classes %s", what, first_names(alone, 3))
    for fold in range(homes.max() + 1):
        has = labelled.take(np.flatnonzero(homes != fold)).counts
        if unseen := [labelled.classes[number] for number in np.flatnonzero((has == 0) & (labelled.counts > 0))]:
            text = "fold %d is fitted on no picture of the classes %s, since groups stay whole"
            log.warning(text, fold + 1, first_names(unseen, 3))
    return [Inner(np.flatnonzero(homes != fold), np.flatnonzero(homes == fold)) for fold in range(homes.max() + 1)]


def inner_parts(training: Labelled, seed: int) -> tuple[list[Inner], str]:
    """What to choose settings by, and in words: cross-validation of few training pictures, one inner split of many."""
    if len(training) < _FEW:
        parts = folds(training, _FOLD_COUNT, seed)
        return parts, f"{len(parts)}-fold cross-validation of {len(training):,} training pictures"
    inner = inner_split(training, seed=seed)
    return [inner], f"{len(inner.held):,} of {len(training):,} training pictures, which were not fitted to"


def _check_can_be_split(loaded: LoadedLabels, groups: SplitGroups) -> None:
    labelled = loaded.labelled
    for number, name in enumerate(labelled.classes):
        if groups.spread[number] > 1:
            continue
        count = groups.totals[number]
        if count == 1:
            where = labelled.samples.where(int(np.flatnonzero(labelled.labels == number)[0]))
            why = f"it has one picture, {where}. Give more pictures of it, or leave it out"
        else:
            assert labelled.groups is not None
            group = loaded.group_names[int(labelled.groups[np.argmax(labelled.labels == number)])]
            why = f"all {count} pictures of it are in one group, {group}. Give some from another, or leave it out"
        raise DataError(f"a split would leave class {name} out of one side: {why}")


def _of_folders(data: str, sides: Sides, group: str | None, label: str | None, index_dir: Path) -> LabelledSplit:
    passed = [name for name in sorted(split_folders(data)) if os.path.join(data, name) not in sides]
    if passed:
        text = "measured on %s; %s in %s is not read"
        log.warning(text, printable(sides.testing), ", ".join(passed), printable(data))
    training = find_labelled(sides.training, group=group, label=label, index_dir=index_dir)
    classes = training.labelled.classes
    testing = find_labelled(sides.testing, group=group, label=label, classes=classes, index_dir=index_dir)
    split = LabelledSplit(training.labelled, testing.labelled, False)
    # Shards of two folders are never the same, even if they are called so.
    if not (group == "shard" and isinstance(split.training.samples, Shards)):
        _check_groups(data, split, training.group_names | testing.group_names)
    return split


def _of_column(data: str, labelled: Labelled, sides: list[str], group_names: dict[int, str]) -> LabelledSplit:
    rows = _rows_of(data, sides)
    training = labelled.take(rows[0]).without_empty_classes()
    if len(training.classes) < 2 and training.labels.ndim == 1:
        raise one_class(f"{data}, for training", training.classes[0])
    testing = mapped(labelled.take(rows[1]).without_empty_classes(), training.classes, data)
    split = LabelledSplit(training, testing, False)
    _check_groups(data, split, group_names)
    return split


def _rows_of(data: str, sides: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the rows to train and to measure on."""
    has = set(sides)
    measured = next((name for name in TESTING if name in has), None)
    if not has & set(TRAINING) or measured is None:
        missing = "to measure on" if measured is None else "to train on"
        only = first_names(sorted(has), 3)
        raise DataError(f"{printable(data)} has a column split, and no row in it is {missing}, only {only}")
    if passed := sorted(has - set(TRAINING) - {measured}):
        log.warning("%s: measured on its rows of %s; those of %s are not read", printable(data), measured, passed[0])
    cells = np.array(sides)
    return np.flatnonzero(np.isin(cells, TRAINING)), np.flatnonzero(cells == measured)


def _check_groups(data: str, split: LabelledSplit, names: dict[int, str]) -> None:
    """See that no group is on both sides."""
    training, testing = split.training.groups, split.testing.groups
    if training is None or testing is None:
        return
    if both := sorted(np.intersect1d(training, testing).tolist(), key=names.__getitem__):
        shown = []
        for number in both[:3]:
            sides = [int((groups == number).sum()) for groups in (training, testing)]
            shown.append(f"{names[number]} (pictures to train on: {sides[0]}, to measure on: {sides[1]})")
        raise DataError(
            f"{printable(data)}: {len(both)} groups are on both sides of the split: {', '.join(shown)}"
            f"{', …' * (len(both) > 3)}. Move each to one side, or what is measured says little about new groups"
        )


def _tested(data: str, split: LabelledSplit) -> LabelledSplit:
    """The split itself; classes without a picture to measure on are warned of, numbers that never differ refused."""
    for side, what in ((split.training, "train"), (split.testing, "measure")) if split.training.numeric else ():
        if (same := np.ptp(side.labels, axis=0) == 0).any():
            name = side.classes[int(same.argmax())]
            raise DataError(f"{printable(data)}: {name} is the same for all {len(side)} pictures to {what} on")
    if untested := [split.testing.classes[number] for number in np.flatnonzero(split.testing.counts == 0)]:
        log.warning("%s: no picture to measure on of the classes %s", printable(data), first_names(untested, 3))
    return split


def _held_out(groups: SplitGroups, share: float, cannot: str) -> Inner:
    """Which pictures are held out when about ``share`` of each class is; where none can be, that is said.

    A group is moved, here or back again, if that brings the classes nearer to their shares, in the sum of squares, and
    leaves no class out of a side. For single pictures of one class each, those with the lowest hashes are held out. A
    class of which nothing is held out then gets the group that disturbs least.
    """
    targets = [min(max(1.0, share * total), max(1, total - 1)) for total in groups.totals]
    taken, away = [0] * len(targets), [0] * len(targets)  # of each class: pictures and groups that are held out
    held = np.zeros(len(groups.sizes), bool)

    def gain(group: int) -> float:
        """How much nearer the shares are with the group on the other side; −∞ where that would leave a class out."""
        sign, total = -1 if held[group] else 1, 0.0
        for number, size in groups.parts(group):
            if not 0 < away[number] + sign < groups.spread[number]:
                return -np.inf
            before, after = taken[number] - targets[number], taken[number] + sign * size - targets[number]
            total += (before**2 - after**2) / groups.totals[number] ** 2
        return total

    def move(group: int) -> None:
        sign = -1 if held[group] else 1
        held[group] = not held[group]
        for number, size in groups.parts(group):
            taken[number] += sign * size
            away[number] += sign

    for _ in range(_ROUNDS):
        moved = False
        for group in groups.order:
            if gain(group) > _NOTHING:
                move(group)
                moved = True
        if not moved:
            break
    for number in sorted(range(len(targets)), key=groups.spread.__getitem__):
        if away[number] or groups.spread[number] < 2:
            continue
        best = max((group for group in groups.order if number in dict(groups.parts(group))), key=gain)
        if gain(best) > -np.inf:
            move(best)
    if not held.any():
        raise DataError(f"{cannot}: {_ALONE}")
    return Inner(np.flatnonzero(~held[groups.members]), np.flatnonzero(held[groups.members]))
