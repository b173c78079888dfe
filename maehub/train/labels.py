"""Pictures with what they show: class folders, a CSV, tar shards, tables."""

from dataclasses import dataclass, replace

import numpy as np

from maehub.sources import Source, select


@dataclass(frozen=True)
class Labelled:
    """Pictures with their classes.

    ``labels``: (n,) int64, places in ``classes``; where a picture may have several, (n, classes) bool. ``groups``:
    (n,) int64, equal for pictures that must stay on one side of a split; None where nobody said.
    """

    samples: Source
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a picture may have several classes, or none."""
        return self.labels.ndim == 2

    def take(self, indices: np.ndarray) -> "Labelled":
        """Some of them, in the order of ``indices``."""
        groups = None if self.groups is None else self.groups[indices]
        return replace(self, samples=select(self.samples, indices), labels=self.labels[indices], groups=groups)
