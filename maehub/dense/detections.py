"""What a detector finds in a picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Detections:
    """Objects of one picture, the surest first."""

    boxes: np.ndarray
    """(n, 4) float32: left, top, right and bottom edge in pixels of the picture, 0 being its left or top edge."""
    scores: np.ndarray
    """(n,) float32, 0 to 1, falling."""
    labels: np.ndarray
    """(n,) int64, places of classes."""
    masks: tuple[dict[str, Any], ...] | None = None
    """n masks of the whole picture in COCO's compressed run-length code; None of a detector of boxes alone."""

    def __len__(self) -> int:
        return len(self.scores)
