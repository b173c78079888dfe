"""JPEG: decoded whole or in its first rows, scaled, and never with grey where data is missing.

simplejpeg, a thin layer over libjpeg-turbo, tells of the first flaw that the library sees; Pillow decodes the same
pixels, but what is missing is filled up without a word. A JPEG is one stream from top to bottom, so what lies below a
crop need not be decoded: every decoder stops where the header says that the picture ends, and `first_rows` writes a
smaller height into it.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np
import simplejpeg

from maehub.errors import DataError

_BASELINE = (0xC0, 0xC1)  # frame headers of coding in one pass, by Huffman codes
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_TABLES = (0xC4, 0xCC, 0xDB)  # of codes, of their conditioning, of quantisation
_INTERVAL = 0xDD  # of restarts
_JFIF, _EXIF, _ADOBE = 0xE0, 0xE1, 0xEE  # the first and the last decide on the colour space
_SCAN = 0xDA  # a row of all blocks begins
_END = b"\xff\xd9"
_FRAME = struct.Struct(">HHB")  # height, width and channels, 5 bytes behind the beginning of its header
# What is no marker, a marker after its padding, and how long its segment is; linear, since nothing is tried again.
_MARKER = re.compile(rb"([^\xff]*+)\xff++(.)(..)", re.DOTALL)
_SCAN_OR_END = re.compile(rb"\xff(?:\xda(?=(..)(.))|\xd9)", re.DOTALL)  # how long a header is, of how many channels
_BELOW = 16  # rows that colour of half the resolution is smoothed over, and more
_GROUP = 32  # rows and columns of the largest group of blocks, which is decoded whole
_SCANS = 16  # of a progressive picture, more than encoders write
_SCANNED = 1_000_000_000  # pixels times scans past which a picture with more scans is an attack


class Jpeg(NamedTuple):
    """A JPEG without what its pixels do not depend on."""

    data: bytes  # the segments that count, the orientation among them, then all scans
    frame: int  # where the frame header begins
    scan: int  # where the header of the first scan begins
    restarts: int  # after how many groups of blocks the codes begin anew; 0 is never
    warnings: tuple[str, ...]  # what is odd about it, and harmless


def read_jpeg(data: bytes) -> Jpeg:
    """Passes over metadata, which may hold anything, and over bytes between the segments, which some cameras write.

    Raises:
        DataError: there is no picture in it, or one in which damage cannot be seen, or one that costs too much.
    """
    kept, warnings = bytearray(b"\xff\xd8"), []
    offset, frame, channels, restarts = 2, 0, 3, 0
    while True:
        marker = _MARKER.match(data, offset)
        if not marker or (code := marker[2][0]) == _END[1] or (code == _SCAN and not frame):
            raise DataError("it ends before its picture")
        if marker[1] or code == 0:
            warnings.append("bytes between its segments")
        start, offset = marker.end(2) - 2, marker.end(2)
        if code <= 1 or code & 0xF8 == 0xD0:  # no segment
            continue
        offset += int.from_bytes(marker[3], "big")
        segment = bytearray(data[start:offset])
        if code == _SCAN:
            break
        if code in _ARITHMETIC:
            raise DataError(
                "it is a JPEG of arithmetic coding, in which damage cannot be seen; save it as another JPEG"
            )
        if code >> 4 == 0xC and code not in _TABLES:
            frame, channels = len(kept), segment[9]
        elif code == _INTERVAL:
            restarts = int.from_bytes(segment[4:6], "big")
        elif code == _JFIF and segment[4:9] == b"JFIF\0":
            segment[9] = 1  # the only version there is; libjpeg complains of others, and then of nothing else
        elif code == _ADOBE and segment[4:9] == b"Adobe" and segment[15] > 2:
            segment[15] = 1 if channels == 3 else 2  # what libjpeg takes an unknown transform for
        elif code not in _TABLES and not (code == _EXIF and segment[4:10] == b"Exif\0\0"):
            segment.clear()
        kept += segment
    if _check_scans(data, start, kept[frame:]) + len(_END) < len(data):
        warnings.append("bytes after its end")
    return Jpeg(bytes(kept + data[start:]), frame, len(kept), restarts, tuple(dict.fromkeys(warnings)))


def _check_scans(data: bytes, start: int, frame: bytearray) -> int:
    """Each scan adds bits of coefficients of some channels: in the end all of them must have come.

    Gives where the end is; what follows may be another picture, with its own scans.
    """
    height, width, channels = _FRAME.unpack_from(frame, 5)
    headers, end = [], len(data)
    for mark in _SCAN_OR_END.finditer(data, start):
        if mark[1] is None:
            end = mark.start()
            break
        headers.append(mark)
    if len(headers) > _SCANS and len(headers) * max(height, _GROUP) * max(width, _GROUP) > _SCANNED:
        scans = f"{len(headers):,} scans"
        raise DataError(f"it is a JPEG of {width}×{height} pixels in {scans}, which take too long to decode")
    bits_left = np.full((256, 64), 16, np.uint8)  # by the number of a channel; of each coefficient, lowest first
    for header in headers:
        length = int.from_bytes(header[1], "big")
        if length == 6 + 2 * header[2][0] <= end - header.end():
            *names, first, last, bits = data[header.end() + 3 : header.end() + length]
            bits_left[names[::2], first : last + 1] = bits & 15
    if bits_left[list(frame[10 : 10 + 3 * channels : 3])].any():
        raise DataError("its picture data is damaged: scans are missing")
    return end


def first_rows(jpeg: Jpeg, rows: int) -> bytearray | None:
    """A JPEG whose header says that it ends a little below ``rows``, so that decoders stop there.

    The rows asked for are decoded exactly as in the whole picture.

    Returns:
        None where nothing is gained, and where the file is not one scan from its header to its end marker: it is
        truncated, damaged, progressive or followed by something, and a decoder that stops early would not see that.
    """
    data, frame = jpeg.data, jpeg.frame
    height, width, channels = _FRAME.unpack_from(data, frame + 5)
    stop = -(-(rows + _BELOW) // 8) * 8  # whole blocks, so that scaled rows stay where they were
    if not data.endswith(_END) or data[frame + 1] not in _BASELINE or height <= stop:
        return None
    begin = jpeg.scan + 2 + int.from_bytes(data[jpeg.scan + 2 : jpeg.scan + 4], "big")
    end = len(data) - len(_END)
    scan = np.frombuffer(data, np.uint8)[begin:end]
    markers = np.flatnonzero((scan[:-1] == 0xFF) & (scan[1:] != 0))
    if not np.all((scan[markers + 1] & 0xF8) == 0xD0):  # one that is no restart of the codes
        return None
    if jpeg.restarts:  # whole runs of groups of blocks between restarts are enough
        samplings = data[frame + 11 : frame + 10 + 3 * channels : 3] if channels > 1 else b"\x11"
        across, down = (8 * max(sampling >> shift & 15 for sampling in samplings) for shift in (4, 0))
        needed = -(-(-(-width // across) * -(-stop // down)) // jpeg.restarts)
        if needed <= len(markers):
            end = begin + int(markers[needed - 1])
    shortened = bytearray(data[:end]) + _END
    shortened[frame + 5 : frame + 7] = stop.to_bytes(2, "big")
    return shortened


def decode_rows(jpeg: Jpeg, scale: int, rows: int | None = None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """A JPEG, or at least its first rows.

    Args:
        jpeg: the file.
        scale: 1, 2, 4 or 8; the picture is decoded at 1/scale, width and height rounded up.
        rows: of the stored picture that are needed; None is all.

    Returns:
        (h, w) or (h, w, 3) uint8, or None of four channels, which only Pillow decodes; what is odd about the file.

    Raises:
        DataError: picture data is missing or damaged.
    """
    less = None if rows is None else first_rows(jpeg, rows)
    height, width, channels = _FRAME.unpack_from(less or jpeg.data, jpeg.frame + 5)
    pixels = np.empty((-(-height // scale), -(-width // scale), channels), np.uint8)
    warnings = jpeg.warnings
    try:
        simplejpeg.decode_jpeg(
            less or jpeg.data,
            {1: "GRAY", 3: "RGB"}.get(channels, "CMYK"),
            min_height=pixels.shape[0],
            min_width=pixels.shape[1],
            min_factor=scale,
            buffer=pixels,
        )
    except ValueError as error:
        # All pixels are there when the end marker is met; what a shortened picture has left over counts as such bytes.
        if not str(error).endswith("extraneous bytes before marker 0xd9"):
            raise DataError(f"its picture data is damaged: {error}") from error
        if less is None:
            warnings = (*warnings, "bytes before its end")
    if channels > 3:
        return None, warnings
    return pixels[:, :, 0] if channels == 1 else pixels, warnings
