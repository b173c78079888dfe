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
    values: tuple[int, ...]
    """What no object covers is drawn as, and after it what each class of ``files`` is."""

    def read(self, index: int) -> np.ndarray:
        """Places of classes, (H, W) int16."""
        row = self.files.rows[index]
        assert row.shapes is not None or not len(row)
        shapes, size = row.shapes or (), row.size
        drawn = np.full(size, self.values[0], np.int64)
        for at in sorted(range(len(row)), key=lambda place: -area(shapes[place])):
            mask = masks_of([outline_code(shapes[at], size)])[0].view(bool)
            np.copyto(drawn, IGNORED if row.ignored[at] else self.values[row.labels[at] + 1], where=mask)
        found = self.classes.decode(drawn.clip(min=0))
        found[drawn == IGNORED] = IGNORED
        return found

    def take(self, indices: np.ndarray) -> "DrawnMaps":
        return replace(self, files=self.files.take(indices))
