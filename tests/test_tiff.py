"""TIFF: every layout is read as tifffile and the numbers that were written say, or refused by name.

The files are written here, tag by tag, since no library writes all that is found in the wild.
"""

import io
import random
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image

import maehub
from maehub.errors import DataError
from maehub.images import open_image

CASES = Path(__file__).parent / "data" / "tiff"
RAW, DEFLATE = 1, 8
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8


class Layout(NamedTuple):
    order: str  # "<" or ">"
    meaning: int | None
    planar: int
    bits: int
    format: int
    bands: int
    compression: int
    extra: tuple[int, ...] = ()
    rows: int = 64  # in a strip
    fill_order: int = 1
    predictor: int = 1
    big: bool = False


def written(layout: Layout, values: np.ndarray, palette: np.ndarray | None = None) -> bytes:
    """A TIFF of (bands, H, W) values."""
    bands, height, width = values.shape
    planes = [values.transpose(1, 2, 0)] if layout.planar == 1 else [plane[:, :, None] for plane in values]
    strips = [
        _strip(layout, plane[row : row + layout.rows]) for plane in planes for row in range(0, height, layout.rows)
    ]
    number = "Q" if layout.big else "I"
    tags = {
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [layout.bits] * bands),
        259: ("H", [layout.compression]),
        262: ("H", [layout.meaning]),
        266: ("H", [layout.fill_order]),
        273: (number, [0] * len(strips)),
        277: ("H", [bands]),
        278: ("H", [layout.rows]),
        279: (number, [len(strip) for strip in strips]),
        284: ("H", [layout.planar]),
        317: ("H", [layout.predictor]),
        338: ("H", list(layout.extra)),
        339: ("H", [layout.format] * bands),
    }
    if palette is not None:
        tags[320] = ("H", palette.tolist())
    defaults = {262: [None], 266: [1], 284: [1], 317: [1], 338: [], 339: [UNSIGNED] * bands}
    tags = {tag: told for tag, told in tags.items() if told[1] != defaults.get(tag)}
    at = len(_directory(layout, tags))
    offsets = [at + sum(map(len, strips[:index])) for index in range(len(strips))]
    return _directory(layout, tags | {273: (number, offsets)}) + b"".join(strips)


def _strip(layout: Layout, values: np.ndarray) -> bytes:
    """Rows of (h, w, bands) samples, row after row, as bytes."""
    rows = values.reshape(len(values), -1)
    if layout.predictor == 2:  # differences of neighbours of one band, modulo the numbers' range
        spread = values.astype(np.int64)
        rows = np.diff(spread, axis=1, prepend=np.zeros_like(spread[:, :1])).reshape(len(values), -1)
        rows = rows % (1 << layout.bits)
    if layout.bits >= 8 and layout.bits != 12:
        kind = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[layout.format] if layout.predictor == 1 else "u"
        data = rows.astype(f"{layout.order}{kind}{layout.bits // 8}").tobytes()
    else:
        shifts = np.arange(layout.bits - 1, -1, -1)
        bits = (rows.astype(np.int64)[:, :, None] >> shifts) & 1
        data = np.packbits(bits.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()
    if layout.fill_order == 2 and layout.compression == RAW:
        data = np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, 8)[:, ::-1]).tobytes()
    return zlib.compress(data) if layout.compression == DEFLATE else data


def _directory(layout: Layout, tags: dict[int, tuple[str, list[int]]]) -> bytes:
    """The header and the only directory; what follows it is the strips."""
    order, big = layout.order, layout.big
    word, count, room = ("Q", "Q", 8) if big else ("I", "H", 4)
    head = {"<": b"II", ">": b"MM"}[order]
    head += struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    entry = 12 + 2 * (room - 4)
    far = len(head) + struct.calcsize("=" + count) + entry * len(tags) + room
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        entries += struct.pack(f"{order}HH{word}", tag, {"H": 3, "I": 4, "Q": 16}[kind], len(numbers))
        if len(data) > room:
            entries += struct.pack(order + word, far + len(values))
            values += data + b"\0" * (len(data) % 2)
        else:
            entries += data.ljust(room, b"\0")
    return head + struct.pack(order + count, len(tags)) + entries + struct.pack(order + word, 0) + values


def drawn(source: random.Random) -> tuple[Layout, np.ndarray, np.ndarray | None]:
    """A layout out of the product of all tags, and values for it."""
    meaning = source.choice([WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB, None])
    kinds = [(bits, UNSIGNED) for bits in (1, 2, 4, 8, 8, 12, 16, 16, 32)]
    bits, format = source.choice(
        [*kinds, *((bits, SIGNED) for bits in (8, 16, 32)), (16, FLOAT), (32, FLOAT), (64, FLOAT)]
    )
    own = {RGB: 3, YCBCR: 3, LAB: 3, CMYK: 4}.get(meaning, 1) if source.random() < 0.7 else source.randint(1, 5)
    added = source.choice([0, 0, 0, 1, 1, 2])
    layout = Layout(
        order=source.choice("<>"),
        meaning=meaning,
        planar=source.choice([1, 1, 2]),
        bits=bits,
        format=format,
        bands=own + added,
        compression=source.choice([RAW, DEFLATE]),
        extra=tuple(source.choice([0, 1, 2]) for _ in range(added)) if source.random() < 0.8 else (),
        rows=source.choice([64, 3, 1]),
        fill_order=source.choice([1, 1, 1, 2]),
        predictor=source.choice([1, 1, 2]),
        big=source.random() < 0.2,
    )
    if layout.format == FLOAT or layout.bits not in (8, 16, 32) or layout.compression == RAW:
        layout = layout._replace(predictor=1)
    numbers = np.random.default_rng(source.getrandbits(32))
    shape = layout.bands, source.choice([1, 5, 7]), source.choice([1, 8, 13])
    if format == FLOAT:
        values = numbers.random(shape).astype(np.float16).astype(np.float64)
    else:
        low, high = (0, 1 << bits) if format == UNSIGNED else (-(1 << (bits - 1)), 1 << (bits - 1))
        values = numbers.integers(max(low, -3) if source.random() < 0.5 else low, high, shape)
        if bits in (16, 32) and source.random() < 0.3:
            values = abs(values) % 4096
    if layout.extra == (1,) and format != FLOAT:  # colours multiplied by alpha are never above it
        values[:-1] = np.minimum(values[:-1], values[-1:])
    palette = numbers.integers(0, 65536, 3 << bits) if meaning == PALETTE and bits <= 8 else None
    return layout, values, palette


def expected(layout: Layout, values: np.ndarray, palette: np.ndarray | None) -> np.ndarray | None:
    """(H, W, 3) of 0 to 255 that is right, or None where only a refusal is."""
    if layout.format == FLOAT:
        full = 1.0
    elif layout.format == SIGNED:
        if values.min() < 0:
            return None
        full = 65535 if values.max() <= 65535 else (1 << 31) - 1
    else:
        full = 65535 if layout.bits == 32 and values.max() <= 65535 else (1 << layout.bits) - 1
    scaled = values / full * 255
    own = {RGB: 3, YCBCR: 3, CMYK: 4}.get(layout.meaning, 1)
    alpha = None
    if len(values) == own + 1 and layout.extra in ((1,), (2,)):
        scaled, alpha = scaled[:-1], scaled[-1:]
    if len(scaled) != own or layout.meaning in (None, LAB, YCBCR):
        return None
    if layout.meaning == WHITE_IS_ZERO:
        scaled = 255 - scaled
    elif layout.meaning == CMYK:
        scaled = (255 - scaled[:3]) * (255 - scaled[3:]) / 255
    elif layout.meaning == PALETTE:
        if palette is None:
            return None
        scaled = palette.reshape(3, -1)[:, values[0]] / 257
    if alpha is not None:
        scaled = scaled + 255 - alpha if layout.extra == (1,) else 255 + (scaled - 255) * alpha / 255
    return np.broadcast_to(scaled, (3, *scaled.shape[1:])).transpose(1, 2, 0)


def read(data: bytes) -> np.ndarray | str:
    """Pixels, or what is told instead."""
    try:
        return np.asarray(open_image(io.BytesIO(data))).astype(float)
    except DataError as error:
        return str(error)


def fuzzed(seed: int) -> bool:
    """Whether the layout of this seed was read; an AssertionError where it was read wrong."""
    layout, values, palette = drawn(random.Random(seed))
    data = written(layout, values, palette)
    if layout.bits in (8, 16, 32, 64) and layout.fill_order == 1 and layout.meaning not in (YCBCR, None):
        page = tifffile.TiffFile(io.BytesIO(data)).pages[0].asarray()  # a second opinion on the file
        stored = values if layout.planar == 2 or len(values) == 1 else values.transpose(1, 2, 0)
        np.testing.assert_array_equal(page.reshape(stored.shape), stored.astype(page.dtype), f"seed {seed}: {layout}")
    pixels = read(data)
    if isinstance(pixels, str):
        return False
    right = expected(layout, values, palette)
    assert right is not None, f"seed {seed}: {layout} was read"
    # 16 bits are cut to their upper byte, and alpha and black are laid over in 8 bits.
    off, most = np.abs(pixels - right).max(), 3 if layout.extra or layout.meaning == CMYK else 1
    assert off <= most, f"seed {seed}: {off:.2f} off: {layout}"
    return True


def test_drawn_layouts_are_read_right_or_refused():
    read = sum(map(fuzzed, range(1500)))
    assert read > 40  # of the product of all tags most is refused


@pytest.mark.slow
def test_many_drawn_layouts_are_read_right_or_refused():
    assert sum(map(fuzzed, range(1500, 20_000))) > 500


RAMP = np.broadcast_to(np.arange(64)[None], (64, 64))
READ = {
    "a_minwhite_u8": 255 - 4 * RAMP,
    "d_rgb16_planar_deflate": np.stack([1040 * RAMP / 257, 1040 * RAMP.T / 257, 520 * (RAMP + RAMP.T) / 257], axis=2),
    "j_f32_be_raw": 4 * RAMP / 256 * 255,
}
REFUSED = {
    "b_minwhite_u16": "grey whose zero is white, 1 band of 16-bit unsigned integers",
    "c_rgb16_planar": "RGB, 3 bands of 16-bit unsigned integers, plane after plane",
    "e_5band_u16_planar_deflate": "5 bands of 16-bit unsigned integers, plane after plane, with extra samples",
    "f_5band_u16_planar_raw": "5 bands of 16-bit unsigned integers, plane after plane",
    "g_3band_u8_planar_deflate": "3 bands of 8-bit unsigned integers, plane after plane",
    "h_int8_negative": "1 band of 8-bit signed integers",
    "n_f32_minwhite": "grey whose zero is white, 1 band of 32-bit floating-point numbers",
    "o_5band_u8_contig": "5 bands of 8-bit unsigned integers, with extra samples",
}


@pytest.mark.parametrize("name", READ)
def test_the_cases_that_are_certain_are_read(name):
    pixels = np.asarray(open_image(CASES / f"{name}.tif", channels=3 if READ[name].ndim == 3 else 1), float)
    assert np.abs(pixels - READ[name]).max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_the_cases_that_are_not_are_refused_by_their_layout(name):
    with pytest.raises(DataError) as caught:
        open_image(CASES / f"{name}.tif")
    assert REFUSED[name] in str(caught.value)
    assert "not read with certainty" in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK"])
def test_damage_of_a_jpeg_inside_is_seen(mode):
    file = io.BytesIO()
    ramp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    ramp.convert(mode).save(file, "TIFF", compression="jpeg")
    data = bytearray(file.getvalue())
    assert not isinstance(read(bytes(data)), str)
    tags = Image.open(file).tag_v2
    middle = tags[273][0] + tags[279][0] // 2
    data[middle : middle + 2] = b"\xff\xd9"
    assert "its picture data is damaged" in read(bytes(data))


def test_damage_of_compressed_values_is_seen():
    """libtiff takes what a damaged stream gives as long as it is long enough."""
    file = io.BytesIO()
    photo = Image.open(Path(maehub.__file__).parent / "assets/coffee.jpg").resize((301, 203))
    photo.save(file, "TIFF", compression="tiff_adobe_deflate")
    data = file.getvalue()
    assert not isinstance(read(data), str)
    tags = Image.open(file).tag_v2
    middle = tags[273][0] + tags[279][0] // 2
    damaged = data[:middle] + bytes(200) + data[middle + 200 :]
    assert not np.array_equal(Image.open(io.BytesIO(damaged)), photo)
    assert "its picture data is damaged" in read(damaged)


def test_a_cut_file_says_so():
    whole = written(Layout("<", BLACK_IS_ZERO, 1, 8, UNSIGNED, 1, RAW), np.zeros((1, 8, 8), int))
    assert not isinstance(read(whole), str)
    for length in range(len(whole)):
        assert isinstance(read(whole[:length]), str)
