"""A caller's mask: an array, a picture or boxes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor

from maehub.errors import UsageError
from maehub.images import Preprocess, Size


def mask_from_image(image: Image.Image | np.ndarray, grid: Size) -> np.ndarray:
    """A mask that somebody painted, of any size, on a grid of (rows, columns) patches: bool, True where hidden.

    White hides: a patch is hidden if more than half of its area is white. Brightness is white, a bool array counts True
    as white, transparency counts as black.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.astype(np.uint8) * 255 if image.dtype == bool else image)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    shares = image.convert("L").resize((grid[1], grid[0]), Image.Resampling.BOX)
    return np.asarray(shares) > 127


def mask_from_boxes(boxes: Sequence[Sequence[float]], image_size: Size, grid: Size) -> np.ndarray:
    """Hide every patch that a box (left, top, right, bottom) in pixels of the image touches.

    ``image_size`` is (height, width), pixels. The result is (rows, columns) bool as the grid, True where hidden.
    """
    masked = np.zeros(grid, dtype=bool)
    for box in boxes:
        if len(box) != 4 or not all(math.isfinite(side) for side in box) or box[0] >= box[2] or box[1] >= box[3]:
            raise UsageError(f"a box is (left, top, right, bottom) with left < right and top < bottom, not {box!r}")
        left, right = (side * grid[1] / image_size[1] for side in (box[0], box[2]))
        top, bottom = (side * grid[0] / image_size[0] for side in (box[1], box[3]))
        rows = slice(max(0, math.floor(top)), max(0, math.ceil(bottom)))
        masked[rows, max(0, math.floor(left)) : max(0, math.ceil(right))] = True
    return masked


MaskSource = np.ndarray | Tensor | Image.Image | Sequence[Sequence[float]]


def given_mask(mask: MaskSource, picture: Size, preprocess: Preprocess, pixels: Size, grid: Size) -> np.ndarray:
    """What the caller wants hidden, see `reconstruct`: (rows, columns) bool as the grid, True where hidden.

    ``picture`` is the (height, width) of the picture before ``preprocess``, ``pixels`` that after it.
    """
    if isinstance(mask, Image.Image):
        if mask.size == picture[::-1] and picture != pixels:
            # Painted over the whole picture, so it is resized and cropped with it; what padding adds stays visible.
            black = Image.new("RGBA", mask.size, (0, 0, 0, 255))
            flat = Image.alpha_composite(black, mask.convert("RGBA")).convert("L")
            mask = Image.fromarray(replace(preprocess, mean=(0.0,), std=(1.0,)).pixels(flat)[:, :, 0])
        return mask_from_image(mask, grid)
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    if isinstance(array, np.ndarray):
        if array.dtype != bool or array.shape != grid:
            raise UsageError(
                f"a mask array must be bool of shape {grid} (rows, columns), True where hidden, "
                f"not {array.dtype} of {array.shape}; a painted mask is given as a PIL image"
            )
        return array
    boxes = isinstance(array, Sequence) and all(isinstance(box, Sequence | np.ndarray) for box in array)
    if not boxes or isinstance(array, str):
        raise UsageError(f"a mask is a bool array, a PIL image or a list of boxes, not {type(mask).__name__}")
    return mask_from_boxes(array, pixels, grid)
