"""Label maps: pictures whose pixels are the numbers or the colours of classes. Not one of them may be changed."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

from maehub.errors import DataError
from maehub.images.decoding import ImagePath, open_header, opened_file, orientation_of
from maehub.images.sizes import Size

_NUMBERS = ("L", "P", "I", "I;16", "I;16B")
_SPREAD = {"L;2": 85, "L;4": 17}  # what Pillow multiplies the values of narrow grey by, to fill 8 bits


def read_label_map(source: ImagePath | BinaryIO) -> np.ndarray:
    """The values of a label map: (H, W) uint8, uint16 or int32 numbers, of a palette its places; or (H, W, 3) colours.

    PNG, TIFF, BMP, GIF, and what else keeps every value. An orientation by EXIF is refused: which way the map lies then
    differs from reader to reader.

    Raises:
        DataError: it cannot be read, is a JPEG, has half-transparent colours or floating-point numbers.
    """
    with opened_file(source) as file:
        image, jpeg = open_header(file)
        if jpeg is not None or isinstance(image, JpegImageFile):
            raise DataError(
                "it is a JPEG, which changes the values of pixels: a label map is a PNG, written anew from its source"
            )
        spread = _SPREAD.get(str(image.tile[0].args), 1) if image.tile else 1
        if orientation_of(image) != 1:
            raise DataError("it is a label map with an EXIF orientation: turn its pixels and leave the tag out")
        image.load()
        if image.mode in ("LA", "RGBA", "PA"):
            if np.asarray(image.getchannel("A")).min() < 255:
                raise DataError("it has transparent pixels, and what they mean in a label map is not known")
            image = image.convert("L" if image.mode == "LA" else "RGB")  # type: ignore[assignment]
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8)
        if image.mode in _NUMBERS or image.mode == "RGB":
            return np.asarray(image) // spread if spread > 1 else np.asarray(image)
        raise DataError(f"its pixels are of mode {image.mode}, and a label map has whole numbers or colours")


def upright_size(source: ImagePath | BinaryIO) -> Size:
    """(height, width) of a picture as it is seen, by its header alone."""
    with opened_file(source) as file:
        image, _ = open_header(file)
        return image.size if orientation_of(image) >= 5 else image.size[::-1]


def nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """(h, w) to another (height, width), every pixel taking the value under its middle."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.intp).clip(max=old - 1)
        for old, new in zip(values.shape, size, strict=True)
    )
    return values[rows[:, None], columns]
