"""Pictures in: open files safely, upright, as RGB or greyscale of 8 bits.

Like `images` this module imports no torch, so that the processes that decode start in a fraction of a second.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from maehub.errors import DataError, UsageError

if TYPE_CHECKING:
    from maehub.patches import Size

ImagePath = str | Path | bytes

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 2 GiB/4 of 24-bit pixels

# By first bytes, never by name: what is not here (EPS, PDF, FITS, …) never reaches a decoder.
_DECODERS: tuple[tuple[str, tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ("JPEG", (b"\xff\xd8\xff",), JpegImageFile),
    ("PNG", (b"\x89PNG\r\n\x1a\n",), PngImageFile),
    ("WebP", (b"RIFF",), WebPImageFile),
    ("GIF", (b"GIF87a", b"GIF89a"), GifImageFile),
    ("BMP", (b"BM",), BmpImageFile),
    ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    ("PNM", (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), PpmImageFile),
)
_ORIENTATION = 0x0112  # the EXIF tag
_FLIPS_X, _FLIPS_Y = (2, 3, 6, 7), (3, 4, 7, 8)  # its values where the upright picture starts at the stored end
_UPRIGHT = {  # what undoes each of its values; 5 and above swap height and width
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def printable(path: ImagePath) -> str:
    """A path for messages: one line, every byte visible, whatever the file is called."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def open_image(
    source: ImagePath | BinaryIO,
    *,
    channels: int = 3,
    scaled_to: Size | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Open a picture file, fully decoded, upright, as RGB or greyscale of 8 bits.

    JPEG, PNG, WebP, GIF, BMP, TIFF and PNM, recognised by content; of an animation the first frame. EXIF orientation
    is applied, transparency is laid over white, 16- and 32-bit integers are scaled to 8 bits (values of a 32-bit file
    that never exceed 65535 count as 16-bit), floats must lie in [0, 1]. Colour profiles are ignored.

    Args:
        source: a path, or a binary file.
        channels: 3 for RGB, 1 for greyscale.
        scaled_to: (height, width) that is needed; a JPEG may then be decoded at 1/2, 1/4 or 1/8, never smaller than
            this. None decodes every pixel.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        DataError: it cannot be read; the text names the path and why.
        UsageError: ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise UsageError(f"a picture file has 1 or 3 channels, not {channels}; give (H, W, {channels}) arrays instead")
    return to_channels(decode(source, scaled_to, max_pixels).image, channels)


class Decoded(NamedTuple):
    """A picture out of its file."""

    image: Image.Image  # mode L or RGB, upright
    full_size: Size  # (height, width) had it not been decoded scaled
    content: tuple[float, float, float, float]
    """Left, top, right, bottom of the picture in ``image``: scaled decoding rounds up to whole pixels."""

    @classmethod
    def whole(cls, image: Image.Image) -> Self:
        """An L or RGB picture that was not decoded scaled."""
        return cls(image, (image.height, image.width), (0, 0, image.width, image.height))


def decode(source: ImagePath | BinaryIO, scaled_to: Size | None, max_pixels: int) -> Decoded:
    """What `open_image` does, in the channels that the file has."""
    name = printable(source) if isinstance(source, ImagePath) else "the picture"
    try:
        if not isinstance(source, ImagePath):
            return _decode_file(source, scaled_to, max_pixels)
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise DataError("it is not a regular file")
        with open(source, "rb") as file:
            return _decode_file(file, scaled_to, max_pixels)
    except Exception as error:
        # Decoders raise nearly every type there is on broken bytes, so no list of types would be complete.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name} cannot be read: {reason or type(error).__name__}") from error


def _decode_file(file: BinaryIO, scaled_to: Size | None, max_pixels: int) -> Decoded:
    start = file.tell()
    head = file.read(16)
    file.seek(start)
    # Not `Image.open`: its limit on pixels is a global setting and half of it a global warning filter.
    image = _decoder(head)(file)
    if isinstance(image, PngImageFile):
        image.verify()  # the checksums of the pixels, which loading passes over
        file.seek(start)
        image = PngImageFile(file)
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"it has {width}×{height} pixels")
    if width * height > max_pixels:
        megapixels = width * height / 1e6
        raise DataError(f"{width}×{height} pixels are {megapixels:.0f} MP, over the limit of {max_pixels / 1e6:.0f} MP")
    if not scaled_to or not isinstance(image, JpegImageFile):
        return Decoded.whole(plain(image))
    orientation = _orientation(image)
    turned = orientation >= 5
    rows, columns = reversed(scaled_to) if turned else scaled_to
    drafted = image.draft(None, (columns, rows))
    right, bottom = drafted[1][2:] if drafted else image.size
    if turned:
        right, bottom, width, height = bottom, right, height, width
    upright = plain(image)
    left = upright.width - right if orientation in _FLIPS_X else 0
    top = upright.height - bottom if orientation in _FLIPS_Y else 0
    return Decoded(upright, (height, width), (left, top, left + right, top + bottom))


def _decoder(head: bytes) -> type[ImageFile.ImageFile]:
    for name, beginnings, decoder in _DECODERS:
        if head.startswith(beginnings) and (name != "WebP" or head[8:12] == b"WEBP"):
            return decoder
    if not head:
        raise DataError("the file is empty")
    names = ", ".join(name for name, _, _ in _DECODERS)
    raise DataError(f"it begins with {head[:8]!r}, which none of {names} does")


def _orientation(image: Image.Image) -> int:
    """1 to 8; a broken EXIF block is no reason to refuse the picture."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return value if value in _UPRIGHT else 1


def plain(image: Image.Image) -> Image.Image:
    """Any picture as L or RGB: upright, alpha over white, wide numbers scaled."""
    image.load()  # turns a TIFF itself, and takes its orientation away
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(_to_8_bits(image))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if turn is None:
        return image
    image = image.transpose(turn)
    image.info.clear()  # Pillow keeps the orientation in there, and it would be applied a second time
    return image


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Wide greyscale to (H, W) uint8 by its full range. Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        least, most = float(values.min()), float(values.max())
        if not (least >= 0 and most <= 1):
            raise DataError(f"its floating-point values run from {least:g} to {most:g}, not within 0 and 1")
        return (values * 255 + 0.5).astype(np.uint8)
    # Pillow reads unsigned numbers of 32 bits as signed ones.
    if image.mode == "I" and isinstance(image, TiffImageFile) and image.tag_v2.get(SAMPLEFORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)
    if values.min() < 0:
        raise DataError(f"its integers go down to {values.min()}, and what a negative brightness means is not known")
    largest = 65535 if values.max() <= 65535 else np.iinfo(values.dtype).max
    return (np.multiply(values, np.float32(255 / largest), dtype=np.float32) + np.float32(0.5)).astype(np.uint8)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An L or RGB picture as L (1) or RGB (3)."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
