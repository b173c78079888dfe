"""Pictures in: open files safely, upright, as RGB or greyscale of 8 bits.

Like `images` this module imports no torch, so that the processes that decode start in a fraction of a second.
"""

from __future__ import annotations

import io
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from PIL import Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from maehub.errors import DataError, UsageError, visible
from maehub.images.jpeg import Jpeg, decode_rows, read_jpeg
from maehub.images.png import open_png, transparent_pixels
from maehub.images.sizes import Size
from maehub.images.tiff import open_tiff

ImagePath = str | Path | bytes

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 2 GiB/4 of 24-bit pixels
_PATIENCE = 10.0  # seconds of processor time for any picture; one more for each megabyte of it, and each megapixel
_COMMENTS = 1000  # in the pixels of a PNM that are written as text: Pillow copies them all for each

# By first bytes, never by name: what is not here (EPS, PDF, FITS, …) never reaches a decoder.
_DECODERS: tuple[tuple[str, re.Pattern[bytes], type[ImageFile.ImageFile] | None], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImageFile),
    ("BMP", re.compile(rb"BM"), BmpImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
    ("PNM", re.compile(rb"P[1-6][\s#]"), PpmImageFile),
    ("AVIF", re.compile(rb"....ftypavi[fs]", re.DOTALL), AvifImageFile),
    ("JPEG 2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"), Jpeg2KImageFile),
    ("HEIC", re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL), None),  # by the extra "formats"
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
    return visible(os.fsencode(path).decode("utf-8", "backslashreplace"))


def open_image(
    source: ImagePath | BinaryIO, *, channels: int = 3, scaled_to: Size | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open a picture file, fully decoded, upright, as RGB or greyscale of 8 bits.

    JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, AVIF, JPEG 2000 and, with the extra ``formats``, HEIC, recognised by content;
    of an animation the first frame. EXIF orientation is applied, transparency is laid over white, 16- and 32-bit
    integers are scaled to 8 bits (values of a 32-bit file that never exceed 65535 count as 16-bit), floats must lie in
    [0, 1]. Colour profiles are ignored. A picture with missing data is refused, never filled up with grey.

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


def limit_time(size: int) -> None:
    """Have this process ended by SIGPROF if the file of so many bytes that it decodes next takes it too long.

    Nothing else stops a decoder. It is processor time, so a slow disk or a busy machine costs nothing.
    """
    signal.setitimer(signal.ITIMER_PROF, _PATIENCE + size / 1e6)


class Decoded(NamedTuple):
    """A picture out of its file."""

    image: Image.Image  # mode L or RGB, upright
    full_size: Size  # (height, width) had it not been decoded scaled
    content: tuple[float, float, float, float]
    """Left, top, right, bottom of the picture in ``image``: scaled decoding rounds up to whole pixels."""
    warnings: tuple[str, ...] = ()  # what is odd about the file, and harmless

    @classmethod
    def whole(cls, image: Image.Image) -> Self:
        """An L or RGB picture that was not decoded scaled."""
        return cls(image, (image.height, image.width), (0, 0, image.width, image.height))


def decode(
    source: ImagePath | BinaryIO, scaled_to: Size | None = None, max_pixels: int = MAX_PIXELS, background: int = 255
) -> Decoded:
    """What `open_image` does, in the channels that the file has; what is transparent shows a grey of 0 to 255."""
    with opened_file(source) as file:
        image, jpeg = open_header(file, max_pixels)
        if jpeg is None:
            return Decoded.whole(_whole(image, background))
        width, height = image.size
        orientation = orientation_of(image)
        order = -1 if orientation >= 5 else 1
        rows, columns = (scaled_to or (height, width))[::order]
        scale = next((scale for scale in (8, 4, 2) if height >= scale * rows and width >= scale * columns), 1)
        pixels, warnings = decode_rows(jpeg, scale)
        if pixels is None:
            image.draft(None, (columns, rows))
        upright = _upright(_flat(image) if pixels is None else Image.fromarray(pixels), orientation)
        width, height = (width, height)[::order]
        right, bottom = width / scale, height / scale
        left = upright.width - right if orientation in _FLIPS_X else 0
        top = upright.height - bottom if orientation in _FLIPS_Y else 0
        return Decoded(upright, (height, width), (left, top, left + right, top + bottom), warnings)


class Box(NamedTuple):
    """A part of a picture, in its pixels: from ``left`` and ``top`` up to ``right`` and ``bottom``, without those."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left


class Part(NamedTuple):
    """A part of a picture."""

    pixels: np.ndarray  # (h, w) or (h, w, 3) uint8, upright; read-only or not
    box: Box  # what it shows, in pixels of the upright picture; the size of ``pixels`` times ``scale``
    scale: int  # 1, or 2, 4 or 8 where a JPEG was decoded scaled


def open_part(
    source: ImagePath | BinaryIO, choose: Callable[[Size], Box], scaled_to: Size, max_pixels: int = MAX_PIXELS
) -> Part:
    """A part of a picture file, decoded no further than it needs.

    ``choose`` is told the (height, width) of the upright picture and says which part of it, inside of it; the edges
    are then moved to whole decoded pixels, see `aligned`. A JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8
    at which the part still has the (height, width) ``scaled_to``, if it has as much at full scale (a 4:2:2 one at 1/2
    and 1/4 instead of 1/4 and 1/8), and no further down than the part reaches. Everything else is as in `open_image`,
    in the channels that the file has.
    """
    with opened_file(source) as file:
        image, jpeg = open_header(file, max_pixels)
        if jpeg is None:
            return part_of(_whole(image), choose, scaled_to)
        orientation = orientation_of(image)
        turned = orientation >= 5
        upright = image.size if turned else image.size[::-1]
        box = _mirrored(choose(upright), upright, orientation)
        if turned:
            box, scaled_to = _swapped(box), scaled_to[::-1]
        stored, scale = aligned(box, scaled_to, image.size[::-1])
        if scale > 2 and image.mode == "RGB" and get_sampling(image) not in (0, 2):
            scale //= 2  # 4:2:2: scaled decoding halves the width of the colours once more
        rows, _ = decode_rows(jpeg, scale, stored.bottom)
        if rows is None:
            image.draft(None, (image.width // scale, image.height // scale))
            rows = np.asarray(_flat(image))
        left, top, right, bottom = (edge // scale for edge in stored)
        pixels = rows[top:bottom, left:right]
        if turned:
            pixels = pixels.swapaxes(0, 1)
        pixels = pixels[:: -1 if orientation in _FLIPS_Y else 1, :: -1 if orientation in _FLIPS_X else 1]
        return Part(pixels, _mirrored(_swapped(stored) if turned else stored, upright, orientation), scale)


def aligned(box: Box, scaled_to: Size, picture: Size) -> tuple[Box, int]:
    """A box with its edges on multiples of the scale that leaves it enough pixels, and that scale.

    The box never leaves the ``picture``, (height, width), and its edges move by less than twice the scale.
    """
    (height, width), (rows, columns) = box.size, scaled_to
    scale = next((scale for scale in (8, 4, 2) if height >= scale * rows and width >= scale * columns), 1)
    height, width = height // scale, width // scale
    top = min(round(box.top / scale), picture[0] // scale - height)
    left = min(round(box.left / scale), picture[1] // scale - width)
    return Box(left * scale, top * scale, (left + width) * scale, (top + height) * scale), scale


@contextmanager
def opened_file(source: ImagePath | BinaryIO) -> Iterator[BinaryIO]:
    """An open file; whatever is raised while it is read becomes one error that names it."""
    try:
        if not isinstance(source, ImagePath):
            yield source
            return
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise DataError("it is not a regular file")
        with open(source, "rb") as file:
            yield file
    except Exception as error:
        # Decoders raise nearly every type there is on broken bytes, so no list of types would be complete.
        path = source if isinstance(source, ImagePath) else getattr(source, "name", None)
        name = printable(path) if isinstance(path, ImagePath) else "the picture"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name} cannot be read: {reason or type(error).__name__}") from error


def part_of(picture: Image.Image, choose: Callable[[Size], Box], scaled_to: Size) -> Part:
    """The part of a decoded L or RGB picture that `open_part` would show of its file, at full scale."""
    size = picture.height, picture.width
    box, _ = aligned(choose(size), scaled_to, size)
    return Part(np.asarray(picture.crop(box)), box, 1)


def _mirrored(box: Box, picture: Size, orientation: int) -> Box:
    """A box of an upright picture, (height, width), seen from the end where the stored one starts; and back."""
    left, top, right, bottom = box
    if orientation in _FLIPS_X:
        left, right = picture[1] - right, picture[1] - left
    if orientation in _FLIPS_Y:
        top, bottom = picture[0] - bottom, picture[0] - top
    return Box(left, top, right, bottom)


def _swapped(box: Box) -> Box:
    return Box(box.top, box.left, box.bottom, box.right)


def open_header(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[ImageFile.ImageFile, Jpeg | None]:
    """A picture whose header was read and found good; what is decoded of a JPEG."""
    start = file.tell()
    head = file.read(16)
    file.seek(start)
    # Not `Image.open`: its limit on pixels is a global setting and half of it a global warning filter.
    decoder, jpeg = decoder_of(head), None
    image: ImageFile.ImageFile
    if decoder is JpegImageFile:
        jpeg = read_jpeg(file.read())
        image = JpegImageFile(io.BytesIO(jpeg.data))
    elif decoder is PngImageFile:
        image = open_png(file.read())
    else:
        if decoder is PpmImageFile and head[1:2] in b"123" and file.read().count(b"#") > _COMMENTS:
            raise DataError(f"it is a PNM in text with more than {_COMMENTS:,} comments, which take too long to decode")
        file.seek(start)
        image = open_tiff(file) if decoder is TiffImageFile else decoder(file)
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"it has {width}×{height} pixels")
    if width * height > max_pixels:
        megapixels = width * height / 1e6
        raise DataError(f"{width}×{height} pixels are {megapixels:.0f} MP, over the limit of {max_pixels / 1e6:.0f} MP")
    left, period = signal.getitimer(signal.ITIMER_PROF)
    if left and not period:  # of `limit_time`, not of a profiler
        signal.setitimer(signal.ITIMER_PROF, left + width * height / 1e6)
    return image, jpeg


def decoder_of(head: bytes) -> type[ImageFile.ImageFile]:
    """What reads a file that begins with these bytes, at least 16 of a longer file."""
    for name, beginning, decoder in _DECODERS:
        if beginning.match(head):
            if decoder is None:
                try:
                    from pillow_heif import HeifImageFile
                except ImportError:
                    raise DataError(f"it is {name}, which takes: pip install 'maehub[formats]'") from None
            return decoder or HeifImageFile
    if not head:
        raise DataError("the file is empty")
    names = ", ".join(name for name, _, _ in _DECODERS)
    raise DataError(f"it begins with {head[:8]!r}, which none of {names} does")


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes, at least 16 of a longer one, is of a kind that is read."""
    try:
        # Two letters are few: what else a BMP has there is zero.
        return decoder_of(head) is not BmpImageFile or head[6:10] == bytes(4)
    except DataError:
        return False


def orientation_of(image: Image.Image) -> int:
    """1 to 8; a broken EXIF block is no reason to refuse the picture."""
    with suppress(Exception):
        if (value := image.getexif().get(_ORIENTATION)) in _UPRIGHT:
            return value
    return 1


def _whole(image: ImageFile.ImageFile, background: int = 255) -> Image.Image:
    """A picture whose header was read, as `plain`."""
    hidden = transparent_pixels(image) if isinstance(image, PngImageFile) else None
    if hidden is None:
        return plain(image, background)
    del image.info["transparency"]
    pixels = np.array(_flat(image))
    pixels[hidden] = background
    return _upright(Image.fromarray(pixels), orientation_of(image))


def plain(image: Image.Image, background: int = 255) -> Image.Image:
    """Any picture as L or RGB: upright, alpha over white or another grey, wide numbers scaled."""
    image.load()  # turns a TIFF itself, and takes its orientation away
    return _upright(_flat(image, background), orientation_of(image))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _UPRIGHT:
        return image
    image = image.transpose(_UPRIGHT[orientation])
    image.info.clear()  # Pillow keeps the orientation in there, and it would be applied a second time
    return image


def _flat(image: Image.Image, background: int = 255) -> Image.Image:
    """Any picture as L or RGB, not turned."""
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_to_8_bits(image))
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, (background, background, background, 255))
        return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    if image.mode not in ("L", "RGB"):
        return image.convert("L" if image.mode == "1" else "RGB")
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
    if isinstance(image, TiffImageFile) and image.tag_v2[BITSPERSAMPLE] == (12,):
        largest = 4095
    return (np.multiply(values, np.float32(255 / largest), dtype=np.float32) + np.float32(0.5)).astype(np.uint8)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An L or RGB picture as L (1) or RGB (3)."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
