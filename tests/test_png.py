"""PNG: transparency by a colour at every depth, metadata that is not used, and mask pictures."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maehub.errors import DataError, UsageError
from maehub.figures.masks import mask_from_image, open_mask
from maehub.images import open_image

CASES = Path(__file__).parent / "data" / "png"
GREY, RGB = 0, 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def written(values: np.ndarray, bits: int, colour: int, *more: bytes) -> bytes:
    """A PNG of (H, W) or (H, W, 3) values, with more chunks before its pixels."""
    height, width = values.shape[:2]
    rows = b""
    for row in values.reshape(height, -1):
        if bits >= 8:
            rows += b"\0" + row.astype(f">u{bits // 8}").tobytes()
        else:
            shifts = np.arange(bits - 1, -1, -1)
            rows += b"\0" + np.packbits(((row[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1)).tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("bits", "colour"), [(1, GREY), (2, GREY), (4, GREY), (8, GREY), (16, GREY), (8, RGB), (16, RGB)]
)
def test_the_transparent_colour_shows_white_at_every_depth(bits, colour):
    numbers = np.random.default_rng(bits + colour)
    largest = (1 << bits) - 1
    for _ in range(20):
        values = numbers.integers(0, largest + 1, (6, 9, 3) if colour == RGB else (6, 9, 1))
        values[:3] = values[0, 0]  # a good part is transparent
        values[1, 1] ^= 1  # and its neighbour by the lowest bit is not
        key = values[0, 0].tolist()
        data = written(values, bits, colour, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
        expected = np.broadcast_to(values * (255 / largest), (6, 9, 3)).copy()
        hidden = (values == key).all(axis=2)
        assert 0 < hidden.sum() < hidden.size
        expected[hidden] = 255
        assert np.abs(np.asarray(open_image(io.BytesIO(data)), float) - expected).max() <= 1


def test_only_the_bits_of_the_depth_count():
    data = written(np.array([[3, 9]]), 4, GREY, chunk(b"tRNS", struct.pack(">H", 0xFF03)))
    assert np.asarray(open_image(io.BytesIO(data), channels=1)).tolist() == [[255, 153]]


def test_the_case_of_a_grey_picture_reads_the_same_at_16_bits():
    eight = Image.open(CASES / "grey8_nodata.png")
    values, key = np.asarray(eight, int), eight.info["transparency"]
    sixteen = written(values * 257, 16, GREY, chunk(b"tRNS", struct.pack(">H", key * 257)))
    there, here = (np.asarray(open_image(file)) for file in (CASES / "grey8_nodata.png", io.BytesIO(sixteen)))
    assert (there[values == key] == 255).all()
    assert np.array_equal(there, here)


@pytest.mark.parametrize("name", ["icc", "icc2MB", "itxt2MB", "ztxt2MB", "many_text", "badcrc_text"])
def test_row_40_metadata_is_passed_over(name):
    plain = np.asarray(Image.open(CASES / "icc.png").convert("RGB"))
    assert np.array_equal(np.asarray(open_image(CASES / f"{name}.png")), plain)


def test_orientation_is_applied_and_a_broken_one_passed_over():
    values = np.arange(12).reshape(3, 4) * 20
    exif = Image.Exif()
    exif[0x0112] = 6
    good = chunk(b"eXIf", exif.tobytes()[6:])
    turned = np.asarray(open_image(io.BytesIO(written(values, 8, GREY, good)), channels=1))
    assert np.array_equal(turned, np.rot90(values, -1))
    broken = np.asarray(open_image(io.BytesIO(written(values, 8, GREY, good[:-1] + b"?")), channels=1))
    assert np.array_equal(broken, values)


def test_row_39_pixels_with_a_bad_checksum_are_refused():
    data = bytearray(written(np.zeros((5, 5), int), 8, GREY))
    data[data.index(b"IDAT") + 6] ^= 1
    with pytest.raises(DataError, match="cannot be read"):
        open_image(io.BytesIO(bytes(data)))


def test_a_painted_mask_is_the_same_in_command_and_python():
    drawn = Image.open(CASES / "mask_rgba.png")
    assert drawn.mode == "RGBA"
    for grid in [(6, 6), (14, 14), (3, 9)]:
        in_python = mask_from_image(drawn, grid)
        assert np.array_equal(mask_from_image(open_mask(CASES / "mask_rgba.png"), grid), in_python)
        assert 0 < in_python.sum() < in_python.size


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_of_zeros_and_ones_is_refused(dtype, tmp_path):
    values = np.zeros((20, 20), dtype)
    values[:10] = 1
    with pytest.raises(UsageError, match="white that hides is 255"):
        mask_from_image(values, (4, 4))
    Image.fromarray(values).save(tmp_path / "mask.png")
    if dtype == np.uint8:
        with pytest.raises(UsageError, match="white that hides is 255"):
            mask_from_image(open_mask(tmp_path / "mask.png"), (4, 4))
    assert mask_from_image(values == 1, (4, 4)).sum() == 8
    assert not mask_from_image(values * 0, (4, 4)).any()
