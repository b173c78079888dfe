"""TIFF: which layouts Pillow reads right.

A TIFF may hold anything in nearly any order, and Pillow maps what it knows of that to a raw mode without a word about
the rest: it inverts white-is-zero at 8 bits but not at 16, reads signed bytes as unsigned ones, and takes the first of
several planes for the picture. So the tags are looked at first, and what is not certain is refused with its layout.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from typing import BinaryIO

from PIL import TiffImagePlugin as tiff

from maehub.errors import DataError
from maehub.images.jpeg import decode_rows, read_jpeg

# Values of the tags, as TIFF 6.0 numbers them.
_RAW, _OLD_JPEG, _JPEG = 1, 6, 7  # the old way has many dialects, and damage in it cannot be seen
_DEFLATE = (8, 32946)
_LARGEST_PART = 2**29  # bytes of a strip or tile
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_MEANINGS = {
    -1: "no photometric interpretation",
    _WHITE_IS_ZERO: "grey whose zero is white",
    _BLACK_IS_ZERO: "grey",
    _RGB: "RGB",
    _PALETTE: "palette",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    8: "CIELAB",
    32803: "colour filter array",
    34892: "linear raw",
}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_FORMATS = {_UNSIGNED: "unsigned integers", _SIGNED: "signed integers", _FLOAT: "floating-point numbers"}
_EXTRA = ((), (1,), (2,), (999,))  # none, or alpha: associated, unassociated, and Corel Draw's own number for it
_BANDS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _PALETTE: 1, _RGB: 3, _YCBCR: 3, _CMYK: 4}  # without extra ones


def open_tiff(file: BinaryIO) -> tiff.TiffImageFile:
    """The header of the first picture of a TIFF, if its pixels are certain to be read right.

    Raises:
        DataError: its layout, which the text names with bands, type and order, is not certain.
    """
    start = file.tell()
    head = file.read(16)
    tags = tiff.ImageFileDirectory_v2(head if head[2:4] in (b"+\0", b"\0+") else head[:8])
    file.seek(start + tags.next)
    tags.load(file)
    file.seek(start)
    if tiff.IMAGEWIDTH not in tags:
        raise DataError("its directory is missing")
    compression, meaning = tags.get(tiff.COMPRESSION, _RAW), tags.get(tiff.PHOTOMETRIC_INTERPRETATION, -1)
    planes = tags.get(tiff.PLANAR_CONFIGURATION, 1) == 2
    extra = tuple(tags.get(tiff.EXTRASAMPLES, ()))
    # JPEG inside may leave out what its own header says.
    bands = tags.get(tiff.SAMPLESPERPIXEL, 3 if compression == _JPEG and meaning in (_RGB, _YCBCR) else 1)
    bits, formats = set(tags.get(tiff.BITSPERSAMPLE, (1,))), set(tags.get(tiff.SAMPLEFORMAT, (_UNSIGNED,)))
    kind = (*bits, *formats)
    with contextlib.suppress(SyntaxError):  # what Pillow raises for a layout that it does not know
        # Bits that run from right to left are a habit of fax; compressed numbers are not always brought into order.
        turned = tags.get(tiff.FILLORDER, 1) != 1 and kind != (1, _UNSIGNED)
        swapped = (
            head.startswith(b"MM") and compression != _RAW and kind in ((16, _SIGNED), (32, _SIGNED), (32, _FLOAT))
        )
        if not turned and not swapped and _certain(meaning, kind, bands, extra, planes, compression):
            image = tiff.TiffImageFile(file)
            if compression in (_JPEG, *_DEFLATE):
                _check_parts(file, tags, compression)
            return image
    numbers = " and ".join(_FORMATS.get(number, f"numbers of format {number}") for number in sorted(formats))
    raise DataError(
        f"it is a TIFF of {_MEANINGS.get(meaning, f'photometric interpretation {meaning}')}, {bands} "
        f"band{'s' * (bands != 1)} of {'/'.join(map(str, sorted(bits)))}-bit {numbers}"
        f"{', plane after plane' if planes else ''}{f', with extra samples {extra}' if extra else ''}, a layout that "
        f"is not read with certainty; save it as 8-bit grey or RGB, or give its pixels as an array"
    )


def _check_parts(file: BinaryIO, tags: tiff.ImageFileDirectory_v2, compression: int) -> None:
    """Refuse damage in strips or tiles that are JPEGs, which share their tables, or have a checksum, which libtiff
    passes over."""
    offsets, lengths = (273, 279) if tiff.STRIPOFFSETS in tags else (324, 325)
    tables = bytes(tags.get(tiff.JPEGTABLES, b""))[2:-2]  # without start and end
    if sum(tags[lengths]) > file.seek(0, os.SEEK_END):  # or a few bytes could be decoded over and over
        raise DataError("its strips or tiles are more bytes than the file has")
    for offset, length in zip(tags[offsets], tags[lengths], strict=True):
        file.seek(offset)
        data = file.read(length)
        if compression == _JPEG:
            decode_rows(read_jpeg(data[:2] + tables + data[2:]), 8)
            continue
        inflated = zlib.decompressobj()
        try:
            inflated.decompress(data, _LARGEST_PART)
        except zlib.error as error:
            raise DataError(f"its picture data is damaged: {error}") from error
        if not inflated.eof:
            raise DataError("its picture data ends too early")
    file.seek(0)


def _certain(
    meaning: int, kind: tuple[int, ...], bands: int, extra: tuple[int, ...], planes: bool, compression: int
) -> bool:
    """Whether Pillow's pixels are known to be the file's; ``kind`` is (bits, format) where samples have the same."""
    if compression == _OLD_JPEG or extra not in _EXTRA or bands - len(extra) != _BANDS.get(meaning):
        return False
    match kind:
        case (1 | 2 | 4, 1):
            return bands == 1 and not planes and meaning in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _PALETTE)
        case (8, 1) if meaning == _YCBCR:  # uncompressed, its subsampling is passed over
            return not extra and compression == _JPEG
        case (8, 1):
            return meaning == _RGB if planes else not (extra and meaning in (_WHITE_IS_ZERO, _CMYK))
        case (16, 1) if meaning == _CMYK:
            return not extra and not planes
        case (16, 1) if meaning == _RGB:
            return not planes or (compression != _RAW and not extra)
        case (12 | 16 | 32, 1) | (16 | 32, 2) | (32, 3):
            return meaning == _BLACK_IS_ZERO and bands == 1 and not planes
    return False
