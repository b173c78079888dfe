"""Whether one network does better than another on the same pictures, and whether that is more than chance."""

import math
from typing import NamedTuple

import numpy as np
import torch

from maehub.train.evaluation.linear import accuracy
from maehub.train.evaluation.scores import losses

_SIGNIFICANT = 0.05


class Paired(NamedTuple):
    """Two classifiers on the same pictures."""

    gained: int  # pictures that the second alone is right about
    lost: int  # that the first alone is right about
    p: float  # of a difference as large if both were right equally often

    def describe(self, *, numeric: bool = False) -> str:
        """Whether the difference is more than chance; with ``numeric`` pictures count that each is nearer to."""
        what = "more than chance" if self.p < _SIGNIFICANT else "no more than chance gives"
        counts = f"right about {self.gained:,} more and {self.lost:,} fewer"
        if numeric:
            counts = f"nearer in {self.gained:,} pictures and further off in {self.lost:,}"
        test = "exact sign test" if numeric else "McNemar's exact test"
        return f"{counts}: {what} ({test}, p = {self.p:.2g})"


def paired(before: np.ndarray, after: np.ndarray, truth: np.ndarray) -> Paired:
    """Whether two networks are right equally often (McNemar 1947, exact), by their outputs (n, classes).

    The truth is (n,) places of classes; or (n, classes) floating, numbers, and right is who is nearer.
    """
    if truth.dtype.kind == "f":
        errors = losses(before, truth), losses(after, truth)
        first, second = errors[0] < errors[1], errors[1] < errors[0]
    else:
        first, second = before.argmax(axis=1) == truth, after.argmax(axis=1) == truth
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    differ, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(differ, count) for count in range(few + 1))
    return Paired(gained, lost, min(1.0, 2 * tail / 2**differ))


def surely_better(one: np.ndarray, other: np.ndarray, truth: np.ndarray) -> bool:
    """Whether logits are right more often than others, by more than the standard error of the difference.

    Of numbers: whether squared errors are smaller by so much. With several labels a picture that is not known, and any
    difference counts.
    """
    if truth.dtype.kind == "f":
        gain = losses(other, truth) - losses(one, truth)
        return float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain))
    if truth.ndim == 2:
        return accuracy(torch.from_numpy(one), truth) > accuracy(torch.from_numpy(other), truth)
    found = paired(other, one, truth)
    return found.gained - found.lost > math.sqrt(found.gained + found.lost)
