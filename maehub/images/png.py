"""PNG: opened without metadata, and the colour that a file without an alpha channel declares transparent."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL.PngImagePlugin import PngImageFile

from maehub.errors import DataError

_CHUNKS = 100  # beside the pixels, each of which costs time
_LEVELS = {"1": (1, 1), "L;2": (3, 85), "L;4": (15, 17), "L": (255, 1)}  # by raw mode: largest value, step in 8 bits


def open_png(data: bytes) -> PngImageFile:
    """The header of a PNG whose pixels have good checksums.

    Chunks that have no part in the pixels, but for the orientation, are passed over: texts, profiles and what else
    there is may be broken, or a bomb.
    """
    kept, others, at = [data[:8]], 0, 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if kind == b"eXIf" and chunk[-4:] != zlib.crc32(chunk[4:-4]).to_bytes(4, "big"):
            chunk = b""
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):  # by its first letter a chunk is critical or not
            kept.append(chunk)
            others += kind != b"IDAT"
        at += 12 + length
        if kind == b"IEND":
            break
    if others > _CHUNKS:
        raise DataError(
            f"it is a PNG with {others:,} chunks beside its pixels, and all that are known are fewer than ten"
        )
    file = io.BytesIO(b"".join(kept))
    PngImageFile(file).verify()  # the checksums of the pixels, which loading passes over
    file.seek(0)
    return PngImageFile(file)


def transparent_pixels(image: PngImageFile) -> np.ndarray | None:
    """(H, W) bool, True where a grey or RGB picture has its transparent colour; Pillow compares 8 bits alone.

    Returns:
        None if it declares none, and for a palette, whose alpha Pillow knows. Else the picture is loaded.
    """
    key = image.info.get("transparency")
    if key is None or isinstance(key, bytes):
        return None
    raw, file = image.tile[0].args, image.fp
    values = np.asarray(image)
    if raw == "RGB;16B" and file:  # Pillow keeps the upper bytes; read the other way round, it keeps the lower ones
        file.seek(0)
        lower = PngImageFile(file)
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        values = (values.astype(np.uint16) << 8) | np.asarray(lower)
    elif raw in _LEVELS:
        largest, step = _LEVELS[raw]
        key = (key & largest) * step
    return (values.reshape(*values.shape[:2], -1) == np.asarray(key)).all(axis=2)
