"""Pictures that a run validates on and never trains on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from maehub.data import Source, find_samples, groups, select
from maehub.errors import DataError, UsageError
from maehub.files import cache_folder
from maehub.rng import sample_id

_SHARE, _MOST = 20, 2000  # one in so many is held out, and no more than this


class Split(NamedTuple):
    """What a run sees of its data."""

    training: Source
    heldout: Source | None


def split_data(data: str, holdout: int | None, group: int | None) -> Split:
    """Training and held-out pictures.

    DIR/train and DIR/val are used as such where both exist. Otherwise pictures are held out by the hash of their names,
    or groups by the hash of their first picture's, so that adding pictures moves none from one side to the other.

    ``holdout`` is how many pictures, None one in twenty, at most 2000; ``group`` the folder level whose members stay on
    one side.
    """
    folder, index_dir = Path(data), cache_folder() / "shards"
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        if holdout:
            raise UsageError(f"{data} has a folder val, which is what is held out: leave --holdout out")
        training = find_samples(str(folder / "train"), index_dir=index_dir)
        return Split(training, None if holdout == 0 else find_samples(str(folder / "val"), index_dir=index_dir))
    samples = find_samples(data, index_dir=index_dir)
    wanted = min(len(samples) // _SHARE, _MOST) if holdout is None else holdout
    if not wanted:
        return Split(samples, None)
    if wanted >= len(samples):
        raise DataError(f"--holdout {wanted} leaves none of {len(samples)} pictures in {data} to train on")
    if group is None:
        keys = np.fromiter((samples.sample_id(index) for index in range(len(samples))), np.int64, len(samples))
        chosen = np.zeros(len(samples), dtype=bool)
        chosen[np.argsort(keys, kind="stable")[:wanted]] = True
    else:
        members = groups(samples, group)
        numbers, firsts, sizes = np.unique(members, return_index=True, return_counts=True)
        order = sorted(range(len(numbers)), key=lambda place: sample_id(b"group" + samples.name(int(firsts[place]))))
        taken = np.array(order[:-1], dtype=int)  # one group is left to train on
        before = np.cumsum(sizes[taken]) - sizes[taken]  # pictures held out when a group's turn comes
        chosen = np.isin(members, numbers[taken[before < wanted]])
        if chosen.all() or not chosen.any():
            raise DataError(
                f"--group {group} puts all of {len(samples)} pictures in {data} on one side; choose another"
            )
    return Split(select(samples, np.flatnonzero(~chosen)), select(samples, np.flatnonzero(chosen)))
