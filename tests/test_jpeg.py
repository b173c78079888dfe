"""JPEGs, whole and in parts, beside Pillow's decoding of the whole; damage of every kind is seen."""

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
from maehub.images.decoding import MAX_PIXELS, Box, aligned, decode, open_image, open_part, part_of

END = b"\xff\xd9"


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
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_pixels_are_those_of_pillow(kind, scale):
    """Of one version of libjpeg-turbo they are equal."""
    image = Image.open(io.BytesIO(KINDS[kind]))
    image.draft(None, (image.width // scale, image.height // scale))
    needed = (403 // scale, 301 // scale) if scale > 1 else None
    decoded = decode(io.BytesIO(KINDS[kind]), needed, MAX_PIXELS)
    difference = np.asarray(decoded.image, int) - np.asarray(image.convert(decoded.image.mode), int)
    assert np.abs(difference).mean() < 3
    assert np.abs(difference).max() <= 8
    assert decoded.full_size == (403, 301)
    assert decoded.content == (0, 0, 301 / scale, 403 / scale)


def test_what_lies_below_is_not_decoded():
    data = bytearray(encoded(photo(400, 800), quality=92))
    box = Box(10, 20, 300, 200)
    before = open_part(io.BytesIO(bytes(data)), lambda _: box, (50, 50))
    place = len(data) * 3 // 4
    data[place : place + 400] = b"\x12" * 400
    damaged = Image.open(io.BytesIO(bytes(data)))
    assert not np.array_equal(np.asarray(damaged), whole(encoded(photo(400, 800), quality=92)))
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


@pytest.mark.parametrize("kind", KINDS)
def test_row_39_whatever_is_cut_off_is_refused(kind):
    """With an end marker or without one, wherever the cut is; Pillow fills up a picture that has an end marker."""
    body = KINDS[kind].removesuffix(b"a film may follow")
    scan = body.index(b"\xff\xda")
    for length in [*range(20, scan, 97), *range(scan + 14, len(body) - 3, 331), len(body) - 3]:
        for end in (b"", END):
            data = body[:length] + end
            if length == len(body) - 3 and np.array_equal(np.asarray(Image.open(io.BytesIO(body[:-2] + END))), 0):
                continue
            with pytest.raises(DataError, match=r"the picture cannot be read: (it ends before|its picture data is)"):
                open_image(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["4:2:0", "greyscale", "restarts"])
def test_row_39_a_part_with_missing_rows_is_refused(kind):
    body = KINDS[kind]
    scan = body.index(b"\xff\xda")
    whole_part = open_part(io.BytesIO(body), lambda _: Box(0, 0, 301, 120), (40, 40))
    read = 0
    for length in range(scan + 14, len(body), 397):
        try:
            part = open_part(io.BytesIO(body[:length] + END), lambda _: Box(0, 0, 301, 120), (40, 40))
        except DataError:
            continue
        assert np.array_equal(part.pixels, whole_part.pixels), length  # what is missing lies below
        read += 1
    assert 0 < read < (len(body) - scan) // 397


def fuzzed(seed: int) -> int:
    """How often a drawn JPEG whose end is missing is refused; an AssertionError where it is read, and read wrong."""
    draw = random.Random(seed)
    noise = np.random.default_rng(seed).integers(0, 256, (draw.randrange(2, 7), draw.randrange(2, 7), 3), np.uint8)
    size = draw.randrange(1, 160), draw.randrange(1, 160)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(draw.choice(["RGB", "L", "CMYK"]))
    options = {"quality": draw.randrange(5, 100), "progressive": draw.random() < 0.4, "optimize": draw.random() < 0.4}
    if draw.random() < 0.4:
        options |= {"restart_marker_blocks": draw.randrange(1, 40)}
    if image.mode == "RGB":
        options |= {"keep_rgb": True} if draw.random() < 0.2 else {"subsampling": draw.randrange(3)}
    data = encoded(image, **options)
    right, refused = whole(data), 0
    end = data.rindex(END)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for _ in range(6):
        begin = draw.randrange(scans[0] + 14, end) if end > scans[0] + 14 else end
        damaged = {
            "cut": data[:begin] + draw.choice([b"", END, b"\xff", bytes(9), END + bytes(9), END + data]),
            "scans left out": data[: draw.choice(scans)] + END,
            "header": data[: draw.randrange(2, scans[0])] + data[end:],
        }
        kind = draw.choice(list(damaged))
        try:
            pixels = whole(damaged[kind])
        except DataError:
            refused += 1
            continue
        assert np.array_equal(pixels, right), f"seed {seed}, {kind} at {begin} of {len(data)}: {options}, {image}"
    return refused


def test_row_39_drawn_files_that_lack_something_are_refused():
    assert sum(map(fuzzed, range(60))) > 200


@pytest.mark.slow
def test_row_39_many_drawn_files_that_lack_something_are_refused():
    assert sum(map(fuzzed, range(60, 6000))) > 20_000


def test_row_39_a_cut_picture_names_its_file(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(KINDS["4:2:0"][:3000])
    with pytest.raises(DataError, match=r"cut\.jpg cannot be read: its picture data is damaged: Premature end"):
        open_part(path, lambda _: Box(0, 0, 16, 16), (8, 8))


def test_the_case_of_a_picture_whose_lower_half_is_missing():
    cut_file = Path(__file__).parent / "data" / "cut_eoi.jpg"
    assert Image.open(cut_file).convert("RGB").getbbox()  # Pillow reads it, grey below
    with pytest.raises(DataError, match="its picture data is damaged"):
        open_image(cut_file)


@pytest.mark.parametrize("script", ["0;1;2;", "progressive"])
def test_missing_scans_are_damage(script):
    """As made by cjpeg of libjpeg-turbo 2.1: three scans of a channel each, and ten progressive ones."""
    data = (Path(__file__).parent / "data" / f"scans-{script[0]}.jpg").read_bytes()
    expected = whole(data)
    assert expected.shape == (48, 64, 3)
    at = len(data)
    scans = 0
    while (at := data.rfind(b"\xff\xda", 0, at)) > 0:
        scans += 1
        with pytest.raises(DataError, match=r"scans are missing|ends before its picture"):
            open_image(io.BytesIO(data[:at] + END))
    assert scans == (3 if script[0] == "0" else 10)


def test_arithmetic_coding_is_refused_since_its_damage_cannot_be_seen():
    with pytest.raises(DataError, match="arithmetic coding, in which damage cannot be seen"):
        open_image(Path(__file__).parent / "data" / "arithmetic.jpg")


ODD = {
    "between": (
        "bytes between its segments",
        lambda d: d[: d.index(b"\xff\xc4")] + b"z\0z" + d[d.index(b"\xff\xc4") :],
    ),
    "before the end": ("bytes before its end", lambda d: d[:-2] + b"zzzz" + END),
    "after the end": ("bytes after its end", lambda d: d + b"\0\0"),
    "version": ("", lambda d: d[:11] + b"\7" + d[12:]),
    "padding": ("", lambda d: d.replace(b"\xff\xc4", b"\xff\xff\xff\xc4", 1)),
    "broken EXIF": ("", lambda d: d[:2] + b"\xff\xe1\0\x0cExif\0\0\1\2\3\4" + d[2:]),
    "bad profile": ("", lambda d: d[:2] + b"\xff\xe2\0\x10ICC_PROFILE\0\7\1" + d[2:]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cameras_do_is_sound_and_said(name):
    warning, change = ODD[name]
    data = change(KINDS["4:2:0"])
    decoded = decode(io.BytesIO(data), None, MAX_PIXELS)
    assert np.array_equal(np.asarray(decoded.image), whole(KINDS["4:2:0"]))
    assert decoded.warnings == ((warning,) if warning else ())
    if name != "before the end":  # damage behind something odd is seen
        with pytest.raises(DataError, match="its picture data is damaged"):
            open_image(io.BytesIO(change(KINDS["4:2:0"][:-4000] + END)))


def test_a_picture_of_very_many_scans_is_refused_before_it_is_decoded():
    data = (Path(__file__).parent / "data" / "scans-p.jpg").read_bytes()
    frame, scan = data.index(b"\xff\xc2"), data.rindex(b"\xff\xda")
    large = data[: frame + 5] + (8000).to_bytes(2, "big") * 2 + data[frame + 9 : -2] + data[scan:-2] * 40 + END
    with pytest.raises(DataError, match="8000×8000 pixels in 50 scans"):
        open_image(io.BytesIO(large))


@pytest.mark.parametrize("tail", [b"\0" * 7, END, b"\xff", KINDS["greyscale"]])
def test_what_follows_the_end_does_not_matter(tail):
    box = BOXES[1]
    part = open_part(io.BytesIO(KINDS["4:2:0"] + tail), lambda _: box, box.size)
    assert np.array_equal(shown(part), cut(whole(KINDS["4:2:0"]), box))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_row_39_damaged_files_are_refused_in_one_error(seed):
    rng = random.Random(seed)
    data = bytearray(KINDS[rng.choice(["4:2:0", "4:4:4", "greyscale", "restarts"])])
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(2, len(data))] = rng.choice([rng.randrange(256), 0xFF, 0])
    size = []

    def choose(picture):
        size.append(picture)
        return Box(0, 0, picture[1], (picture[0] + 1) // 2)

    parts = []
    opened = readable(lambda: open_image(io.BytesIO(bytes(data))))
    part_opened = readable(lambda: parts.append(open_part(io.BytesIO(bytes(data)), choose, (32, 32))))
    assert part_opened or not opened  # the damage may lie below the part
    for part in parts:
        assert part.pixels.shape[0] * part.scale == part.box.size[0]
        assert part.pixels.shape[1] * part.scale == part.box.size[1]


@given(data=st.binary(max_size=400), known=st.sampled_from([b"", b"\xff\xd8\xff", KINDS["4:2:0"][:700]]))
@settings(max_examples=60, deadline=None)
def test_bytes_of_any_kind_are_read_or_end_in_one_error(data, known):
    def action():
        return open_part(io.BytesIO(known + data), lambda size: Box(0, 0, *size[::-1]), (8, 8))

    if readable(lambda: open_image(io.BytesIO(known + data))):
        assert action().pixels.size
    else:
        with pytest.raises(DataError, match="the picture cannot be read"):
            action()


@given(data=st.binary(max_size=60), rows=st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_headers_of_any_kind_end_in_one_error(data, rows):
    try:
        read = jpeg.read_jpeg(b"\xff\xd8\xff" + data + END)
    except (DataError, IndexError):
        return
    shortened = jpeg.first_rows(read, rows)
    assert shortened is None or len(shortened) == len(read.data)


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
