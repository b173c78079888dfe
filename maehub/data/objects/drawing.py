"""Label maps that are drawn from the outlines of objects: class 0 is what no object covers."""

from dataclasses import dataclass, replace

import numpy as np

from maehub.data.maps.label_maps import IGNORED, MapClasses
from maehub.data.objects.objects import ObjectLabels, masks_of, outline_code
from maehub.data.objects.outlines import area


@dataclass(frozen=True)
class DrawnMaps:
    """As `LabelMaps`, of objects with outlines: smaller ones lie on larger ones, and ignored ones are `IGNORED`."""

    files: ObjectLabels
    classes: MapClasses
    """Values are 0, and from 1 on the places in ``files.classes``."""

    def read(self, index: int) -> np.ndarray:
        """Places of classes, (H, W) int16."""
        row = self.files.rows[index]
        assert row.shapes is not None or not len(row)
        shapes, size = row.shapes or (), row.size
        values = np.zeros(size, np.int64)
        for at in sorted(range(len(row)), key=lambda place: -area(shapes[place])):
            mask = masks_of([outline_code(shapes[at], size)])[0].view(bool)
            np.copyto(values, IGNORED if row.ignored[at] else row.labels[at] + 1, where=mask)
        found = self.classes.decode(values.clip(min=0))
        found[values == IGNORED] = IGNORED
        return found

    def take(self, indices: np.ndarray) -> "DrawnMaps":
        return replace(self, files=self.files.take(indices))
