"""What a split moves as a whole, single pictures or groups of them, and which of it is held out.

Units are looked at in the order of a seeded hash of their names. So the same pictures are split in the same way
wherever they lie, and more pictures move few of those that were there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from maehub.data.labels import Labelled
from maehub.models.masking import sample_seed

_ROUNDS = 10  # over all units; two or three settle it
_NOTHING = 1e-9  # what rounding may seem to gain


class Units(NamedTuple):
    """What is moved as a whole: pictures or groups, and how many pictures of which class each has.

    Where a picture may have several labels, having none counts as one more class.
    """

    members: np.ndarray  # (n,) int64, the unit of each picture
    order: list[int]  # of units, by their hashes
    sizes: list[int]  # pictures of each unit
    starts: list[int]  # (units + 1), where its classes begin in the two that follow
    classes: list[int]
    counts: list[int]
    totals: list[int]  # pictures of each class
    spread: list[int]  # units of each class

    @classmethod
    def of(cls, labelled: Labelled, seed: int, stream: int) -> "Units":
        """Those of labelled pictures."""
        if labelled.groups is None:
            members = np.arange(len(labelled))
            names = [labelled.samples.sample_id(index) for index in range(len(labelled))]
        else:
            numbers, members = np.unique(labelled.groups, return_inverse=True)
            names = numbers.tolist()
        hashes = np.array([sample_seed(seed, 0, name, stream) for name in names], np.int64)
        if labelled.multi_label:
            table = np.column_stack([labelled.labels, ~labelled.labels.any(axis=1)])
            pictures, numbers = np.nonzero(table)
            classes = table.shape[1]
        else:
            pictures, numbers, classes = np.arange(len(labelled)), labelled.labels, len(labelled.classes)
        pairs, counts = np.unique(members[pictures] * classes + numbers, return_counts=True)
        units, of_class = np.divmod(pairs, classes)
        return cls(
            members,
            np.argsort(hashes, kind="stable").tolist(),
            np.bincount(members, minlength=len(names)).tolist(),
            np.searchsorted(units, np.arange(len(names) + 1)).tolist(),
            of_class.tolist(),
            counts.tolist(),
            np.bincount(of_class, counts, minlength=classes).astype(int).tolist(),
            np.bincount(of_class, minlength=classes).tolist(),
        )

    def parts(self, unit: int) -> Iterator[tuple[int, int]]:
        """Classes of a unit, each with its number of pictures."""
        part = slice(self.starts[unit], self.starts[unit + 1])
        return zip(self.classes[part], self.counts[part], strict=True)


def held_out(units: Units, share: float) -> np.ndarray:
    """Which pictures are held out when about ``share`` of each class is: (n,) bool.

    A unit is moved, here or back again, if that brings the classes nearer to their shares, in the sum of squares, and
    leaves no class out of a side. For single pictures of one class each, those with the lowest hashes are held out. A
    class of which nothing is held out then gets the unit that disturbs least.
    """
    targets = [min(max(1.0, share * total), max(1, total - 1)) for total in units.totals]
    taken, away = [0] * len(targets), [0] * len(targets)  # of each class: pictures and units that are held out
    found = np.zeros(len(units.sizes), bool)

    def gain(unit: int) -> float:
        """How much nearer the shares are with the unit on the other side; −∞ where that would leave a class out."""
        sign, total = -1 if found[unit] else 1, 0.0
        for number, size in units.parts(unit):
            if not 0 < away[number] + sign < units.spread[number]:
                return -np.inf
            before, after = taken[number] - targets[number], taken[number] + sign * size - targets[number]
            total += (before**2 - after**2) / units.totals[number] ** 2
        return total

    def move(unit: int) -> None:
        sign = -1 if found[unit] else 1
        found[unit] = not found[unit]
        for number, size in units.parts(unit):
            taken[number] += sign * size
            away[number] += sign

    for _ in range(_ROUNDS):
        moved = False
        for unit in units.order:
            if gain(unit) > _NOTHING:
                move(unit)
                moved = True
        if not moved:
            break
    for number in sorted(range(len(targets)), key=units.spread.__getitem__):
        if away[number] or units.spread[number] < 2:
            continue
        best = max((unit for unit in units.order if number in dict(units.parts(unit))), key=gain)
        if gain(best) > -np.inf:
            move(best)
    return found[units.members]


def folds_of(units: Units, count: int) -> np.ndarray | None:
    """The fold in which each picture is held out: (n,) int64, −1 for those of a unit with a class that no other has.

    Large units come first, each to the fold that has least of its classes, if it can be so that no fold holds all units
    of a class. There are fewer folds than ``count`` where there are fewer units; None where there are not even two.
    """
    large_first = sorted(units.order, key=units.sizes.__getitem__, reverse=True)
    free = [unit for unit in large_first if all(units.spread[number] > 1 for number, _ in units.parts(unit))]
    if len(free) < 2:
        return None
    count = min(count, len(free))
    homes = np.full(len(units.sizes), -1)
    pictures, members = np.zeros((2, count, len(units.totals)), int)  # of a class in a fold: pictures, units
    filled = [0] * count
    totals, spread = np.array(units.totals), np.array(units.spread)
    for unit in free:
        numbers, sizes = map(list, zip(*units.parts(unit), strict=True))
        emptied = (members[:, numbers] + 1 == spread[numbers]).sum(axis=1).tolist()
        crowd = (pictures[:, numbers] * (sizes / totals[numbers])).sum(axis=1).tolist()
        home = homes[unit] = min(range(count), key=list(zip(emptied, crowd, filled, strict=True)).__getitem__)
        filled[home] += units.sizes[unit]
        pictures[home, numbers] += sizes
        members[home, numbers] += 1
    return homes[units.members]
