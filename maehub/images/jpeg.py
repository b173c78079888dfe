"""The first rows of a JPEG, scaled: what a crop needs, and no more.

A JPEG is one stream from top to bottom, so what lies below a crop need not be decoded. No decoder that installs from a
package index offers that, but every one stops where the header says that the picture ends: `first_rows` writes a
smaller height into it. simplejpeg, a thin layer over libjpeg-turbo, is the fast decoder, if it is installed.
"""

from __future__ import annotations

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

try:
    import simplejpeg
except ImportError:  # the extra "fast"
    simplejpeg = None

_BASELINE = (0xC0, 0xC1)  # frame headers of coding in one pass, by Huffman codes
_SCAN = 0xDA  # a row of all blocks begins
_END = b"\xff\xd9"
_BELOW = 16  # rows that colour of half the resolution is smoothed over, and more


def first_rows(data: bytes, rows: int) -> bytearray | None:
    """A JPEG whose header says that it ends a little below ``rows``, so that decoders stop there.

    The rows asked for are decoded exactly as in the whole picture. None where nothing is gained, and where the file is
    not one scan from its header to its end marker: it is truncated, damaged, progressive or followed by something, and
    a decoder that stops early would not see that.
    """
    if not data.endswith(_END):
        return None
    offset, frame = 2, 0
    while offset + 9 < len(data) and data[offset] == 0xFF and data[offset + 1] != _SCAN:
        if data[offset + 1] in _BASELINE:
            frame = offset
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    if not frame or _end(rows) >= int.from_bytes(data[frame + 5 : frame + 7], "big"):
        return None
    offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    scan = np.frombuffer(data, np.uint8)[offset : -len(_END)]
    markers = scan[1:][scan[:-1] == 0xFF]
    if not np.all((markers == 0) | ((markers & 0xF8) == 0xD0)):  # a byte that is no marker, or a restart of the codes
        return None
    shortened = bytearray(data)
    shortened[frame + 5 : frame + 7] = _end(rows).to_bytes(2, "big")
    return shortened


def _end(rows: int) -> int:
    """Where to stop: whole blocks, so that scaled rows stay where they were."""
    return -(-(rows + _BELOW) // 8) * 8


def fast_rows(data: bytes, header: JpegImageFile, rows: int, scale: int) -> np.ndarray | None:
    """At least the first ``rows`` of a stored JPEG at 1/``scale`` by the fast decoder; ``header`` is Pillow's.

    (h, w) or (h, w, 3) uint8, h at least ``rows / scale``, w as the picture's width divided by ``scale``, rounded up.
    None where Pillow has to decide: the fast decoder is not installed, does not take the kind, or complains.
    """
    if simplejpeg is None or header.mode not in ("L", "RGB"):
        return None
    less = first_rows(data, rows)
    shape = -(-(header.height if less is None else _end(rows)) // scale), -(-header.width // scale)
    try:
        # The bytes that are left over below count as a flaw, so strict is only what was not shortened.
        pixels = simplejpeg.decode_jpeg(
            data if less is None else less,
            "GRAY" if header.mode == "L" else "RGB",
            min_height=shape[0],
            min_width=shape[1],
            min_factor=scale,
            strict=less is None,
        )
    except ValueError:
        return None
    if pixels.shape[:2] != shape:
        return None
    return pixels[:, :, 0] if header.mode == "L" else pixels
