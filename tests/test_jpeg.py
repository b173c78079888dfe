"""Parts of pictures out of their files, beside Pillow's decoding of the whole, with and without the fast decoder."""

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import maehub
from maehub.errors import DataError
from maehub.images import jpeg
from maehub.images.decoding import Box, aligned, open_image, open_part, part_of

FAST = jpeg.simplejpeg
END = b"\xff\xd9"


@pytest.fixture(autouse=True, params=["fast", "pillow"])
def decoder(request, monkeypatch):
    if request.param == "fast":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    return request.param


def photo(width=301, height=403):
    return Image.open(Path(maehub.__file__).parent / "assets/coffee.jpg").convert("RGB").resize((width, height))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


KINDS = {
    "4:4:4": encoded(photo(), quality=92, subsampling=0),
    "4:2:2": encoded(photo(), quality=92, subsampling=1),
    "4:2:0": encoded(photo(), quality=92, subsampling=2),
    "progressive": encoded(photo(), quality=92, progressive=True),
    "greyscale": encoded(photo().convert("L"), quality=92),
    "restarts": encoded(photo(), quality=92, restart_marker_rows=1),
    "RGB": encoded(photo(), quality=92, keep_rgb=True),
    "CMYK": encoded(photo().convert("CMYK"), quality=92),
    "followed": encoded(photo(), quality=92) + b"a film may follow",
}
BOXES = [Box(0, 0, 301, 403), Box(13, 7, 290, 104), Box(160, 270, 301, 403), Box(77, 160, 140, 201)]


def whole(data, **options):
    return np.asarray(open_image(io.BytesIO(data), **options))


def shown(part, channels=3):
    pixels = part.pixels if part.pixels.ndim == 3 else np.stack([part.pixels] * 3, axis=2)
    assert part.pixels.dtype == np.uint8
    return pixels.astype(int)


def cut(pixels, box):
    return pixels[box.top : box.bottom, box.left : box.right].astype(int)


def resized(pixels, size, box=None):
    image = Image.fromarray(pixels.astype(np.uint8))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box), int)


# --- the part is what it says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
def test_at_full_scale_a_part_has_the_pixels_of_the_whole_decoding(kind, box):
    part = open_part(io.BytesIO(KINDS[kind]), lambda _: box, box.size)
    assert (part.box, part.scale) == (box, 1)
    assert np.array_equal(shown(part), cut(whole(KINDS[kind]), box))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_parts_are_within_three_grey_levels_of_the_whole_decoding(kind, scale):
    for box in BOXES[:3]:  # the mean over a few pixels says little
        wanted = box.size[0] // scale, box.size[1] // scale
        part = open_part(io.BytesIO(KINDS[kind]), lambda _, box=box: box, wanted)
        assert part.scale == (scale // 2 if kind == "4:2:2" and scale > 2 else scale)
        assert part.box.size == (part.pixels.shape[0] * part.scale, part.pixels.shape[1] * part.scale)
        assert part.pixels.shape[:2] >= wanted
        expected = resized(whole(KINDS[kind]), wanted, part.box)
        assert np.abs(resized(shown(part), wanted) - expected).mean() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_decoder_and_pillow_agree(kind, monkeypatch):
    if FAST is None:
        pytest.skip("simplejpeg is not installed")
    for box in BOXES:
        for scale in (1, 2, 4, 8):
            wanted = box.size[0] // scale, box.size[1] // scale
            parts = []
            for decoder in (FAST, None):
                monkeypatch.setattr(jpeg, "simplejpeg", decoder)
                parts.append(open_part(io.BytesIO(KINDS[kind]), lambda _, box=box: box, wanted))
            assert parts[0].box == parts[1].box
            difference = np.abs(shown(parts[0]) - shown(parts[1]))
            assert difference.mean() < 3  # the promise; of one version of libjpeg-turbo they are equal
            assert difference.max() <= 8


def test_the_fast_decoder_is_used_where_it_should(monkeypatch, decoder):
    if decoder == "pillow":
        return
    calls = []

    class Counting:
        @staticmethod
        def decode_jpeg(*arguments, **options):
            calls.append(options)
            return FAST.decode_jpeg(*arguments, **options)

    monkeypatch.setattr(jpeg, "simplejpeg", Counting)
    for kind, data in KINDS.items():
        calls.clear()
        open_part(io.BytesIO(data), lambda _: Box(0, 0, 100, 100), (40, 40))
        assert len(calls) == (kind != "CMYK"), kind
        if calls:
            assert calls[0]["min_factor"] == 2
            assert calls[0]["strict"] == (kind in ("progressive", "followed")), kind


def test_what_lies_below_is_not_decoded():
    data = bytearray(encoded(photo(400, 800), quality=92))
    box = Box(10, 20, 300, 200)
    before = open_part(io.BytesIO(bytes(data)), lambda _: box, (50, 50))
    place = len(data) * 3 // 4
    data[place : place + 400] = b"\x12" * 400
    assert not np.array_equal(whole(bytes(data)), whole(encoded(photo(400, 800), quality=92)))
    after = open_part(io.BytesIO(bytes(data)), lambda _: box, (50, 50))
    assert np.array_equal(before.pixels, after.pixels)


def test_row_42_a_part_of_a_turned_picture_is_the_part_of_the_upright_one():
    upright = photo(320, 193)
    turns = Image.Transpose
    for orientation, turn in enumerate(
        [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE, turns.ROTATE_90,
         turns.TRANSVERSE, turns.ROTATE_270], start=1
    ):  # fmt: skip
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(stored, quality=95, exif=exif)
        told = []

        def choose(size, told=told):
            told.append(size)
            return Box(30, 10, 270, 130)

        full = whole(data)
        part = open_part(io.BytesIO(data), choose, (120, 240))
        assert told == [(193, 320)]
        assert np.array_equal(shown(part), cut(full, part.box)), orientation
        assert part.box == Box(30, 10, 270, 130)
        scaled = open_part(io.BytesIO(data), choose, (30, 60))
        assert scaled.scale == 4
        assert scaled.pixels.shape[:2] == (30, 60)
        assert np.abs(np.array(scaled.box) - np.array(part.box)).max() <= 4
        expected = resized(full, (30, 60), scaled.box)
        assert np.abs(shown(scaled) - expected).mean() < 3, orientation


def test_other_kinds_are_opened_as_ever(tmp_path):
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    wide = Image.fromarray((np.arange(403 * 301).reshape(403, 301) % 65536).astype(np.uint16))
    for name, image in {"rgb.png": photo(), "alpha.png": rgba, "16.png": wide, "a.webp": photo(), "a.tif": photo(),
                        "a.gif": photo(), "a.bmp": photo(), "grey.png": photo().convert("L")}.items():  # fmt: skip
        path = tmp_path / name
        image.save(path)
        part = open_part(path, lambda _: Box(40, 50, 240, 350), (20, 20))
        assert part.scale == 1
        assert np.array_equal(shown(part), cut(np.asarray(open_image(path)), part.box)), name


def test_a_part_of_a_decoded_picture_is_the_same_part():
    data = KINDS["4:2:0"]
    picture = open_image(io.BytesIO(data))
    for box in BOXES:
        for wanted in ((200, 200), (60, 40), (17, 8)):
            from_file = open_part(io.BytesIO(data), lambda _, box=box: box, wanted)
            decoded = part_of(picture, lambda _, box=box: box, wanted)
            assert decoded.box == from_file.box
            assert decoded.scale == 1
            assert np.array_equal(shown(decoded), cut(np.asarray(picture), decoded.box))


sides = st.integers(1, 300)


@given(picture=st.tuples(sides, sides), wanted=st.tuples(sides, sides), places=st.tuples(*[st.floats(0, 1)] * 4))
@settings(max_examples=300, deadline=None)
def test_an_aligned_box_is_inside_large_enough_and_close(picture, wanted, places):
    height, width = (max(1, round(share * side)) for share, side in zip(places, picture, strict=False))
    top, left = round(places[2] * (picture[0] - height)), round(places[3] * (picture[1] - width))
    box = Box(left, top, left + width, top + height)
    found, scale = aligned(box, wanted, picture)
    assert scale in (1, 2, 4, 8)
    assert all(edge % scale == 0 for edge in found)
    assert 0 <= found.left < found.right <= picture[1]
    assert 0 <= found.top < found.bottom <= picture[0]
    assert max(abs(a - b) for a, b in zip(found, box, strict=True)) < 2 * scale
    if scale == 1:
        assert found == box
    else:
        assert found.size[0] >= scale * wanted[0]
        assert found.size[1] >= scale * wanted[1]
    larger = [2 * scale * side for side in wanted]
    assert scale == 8 or height < larger[0] or width < larger[1]


# --- broken files --------------------------------------------------------------------------------------------------


def readable(action):
    try:
        action()
    except DataError:
        return False
    return True


def test_row_39_whatever_is_cut_off_is_refused_as_pillow_does(tmp_path):
    data = encoded(photo(200, 160), quality=90)
    for missing in [*range(1, 12), *range(20, len(data) - 2, 97)]:
        for box in (Box(0, 0, 16, 16), Box(0, 0, 200, 160)):
            part = readable(lambda: open_part(io.BytesIO(data[:-missing]), lambda _, box=box: box, (8, 8)))  # noqa: B023
            assert part == readable(lambda: open_image(io.BytesIO(data[:-missing]))), missing  # noqa: B023
            assert not part
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[:3000])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read: .*truncated"):
        open_part(path, lambda _: Box(0, 0, 16, 16), (8, 8))


@pytest.mark.parametrize("tail", [b"\0" * 7, END, b"\xff", KINDS["greyscale"]])
def test_what_follows_the_end_does_not_matter(tail):
    box = BOXES[1]
    part = open_part(io.BytesIO(KINDS["4:2:0"] + tail), lambda _: box, box.size)
    assert np.array_equal(shown(part), cut(whole(KINDS["4:2:0"]), box))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_row_39_damaged_files_are_refused_exactly_where_pillow_refuses_them(seed):
    rng = random.Random(seed)
    data = bytearray(KINDS[rng.choice(["4:2:0", "4:4:4", "greyscale", "restarts"])])
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(2, len(data))] = rng.choice([rng.randrange(256), 0xFF, 0])
    size = []

    def choose(picture):
        size.append(picture)
        return Box(0, 0, picture[1], (picture[0] + 1) // 2)

    opened = readable(lambda: open_image(io.BytesIO(bytes(data))))
    parts = []
    assert readable(lambda: parts.append(open_part(io.BytesIO(bytes(data)), choose, (32, 32)))) == opened
    for part in parts:
        assert part.pixels.shape[0] * part.scale == part.box.size[0]
        assert part.pixels.shape[1] * part.scale == part.box.size[1]


@given(data=st.binary(max_size=400), known=st.sampled_from([b"", b"\xff\xd8\xff", KINDS["4:2:0"][:700]]))
@settings(max_examples=60, deadline=None)
def test_bytes_of_any_kind_are_read_as_pillow_does_or_end_in_one_error(data, known):
    def action():
        return open_part(io.BytesIO(known + data), lambda size: Box(0, 0, *size[::-1]), (8, 8))

    if readable(lambda: open_image(io.BytesIO(known + data))):  # it fills up what a marker cuts short
        assert action().pixels.size
    else:
        with pytest.raises(DataError, match="the picture cannot be read"):
            action()


@given(data=st.binary(max_size=60), rows=st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_headers_of_any_kind_are_left_alone(data, rows):
    result = jpeg.first_rows(b"\xff\xd8\xff" + data + END, rows)
    assert result is None or len(result) == len(data) + 5


def test_row_40_too_many_pixels_are_refused_before_they_are_decoded():
    with pytest.raises(DataError, match="over the limit of 0 MP"):
        open_part(io.BytesIO(KINDS["4:2:0"]), lambda _: BOXES[1], (8, 8), max_pixels=1000)


def test_errors_name_the_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match=r"pipe\.jpg cannot be read: it is not a regular file"):
        open_part(tmp_path / "pipe.jpg", lambda _: BOXES[1], (8, 8))
    member = io.BytesIO(b"")
    member.name = "shard-000.tar: a/b.jpg"
    with pytest.raises(DataError, match=r"shard-000\.tar: a/b\.jpg cannot be read: the file is empty"):
        open_part(member, lambda _: BOXES[1], (8, 8))
    behind = io.BytesIO(b"something before" + KINDS["4:2:0"])
    behind.seek(16)
    assert open_part(behind, lambda _: BOXES[1], (8, 8)).pixels.size
