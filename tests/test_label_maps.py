"""Label maps: files of every kind, what their values mean, folders as users have them, and what is refused."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from map_files import lay_maps, name_classes, scene
from PIL import Image

from maehub.cli import command_line as cli
from maehub.data import check_label_maps, find_label_maps, split_label_maps
from maehub.data.maps.label_maps import MapClasses, read_classes
from maehub.errors import DataError, UsageError
from maehub.images import nearest, read_label_map, upright_size

PLACES = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)


def stored(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def narrow_png(values, bits):
    """A grey PNG of so few bits, which Pillow does not write."""
    height, width = values.shape

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def in_palette(places):
    picture = Image.fromarray(places)
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9] + [0] * 756)
    return picture


@pytest.mark.parametrize(
    "file",
    [
        stored(Image.fromarray(PLACES)),
        stored(in_palette(PLACES)),
        stored(Image.fromarray(PLACES), "TIFF"),
        stored(Image.fromarray(PLACES), "BMP"),
        stored(Image.fromarray(PLACES.astype(np.uint16))),
        stored(Image.fromarray(PLACES.astype(np.uint16)), "TIFF"),
        stored(Image.merge("LA", [Image.fromarray(PLACES), Image.new("L", (3, 2), 255)])),
        narrow_png(PLACES, 2),
        narrow_png(PLACES, 4),
    ],
    ids=["grey", "palette", "tiff", "bmp", "16 bits", "16 bits, tiff", "opaque alpha", "2 bits", "4 bits"],
)
def test_values_are_read_as_they_are(file):
    assert read_label_map(file).tolist() == PLACES.tolist()


def test_colours_and_single_bits_are_read_as_they_are():
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert read_label_map(stored(Image.fromarray(colours))).tolist() == colours.tolist()
    assert read_label_map(stored(Image.fromarray(PLACES > 0))).tolist() == (PLACES > 0).astype(int).tolist()


def test_what_changes_values_is_refused():
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.merge("LA", [Image.fromarray(PLACES), Image.new("L", (3, 2), 120)])
    for file, word in (
        (stored(Image.fromarray(PLACES), "JPEG"), "JPEG"),
        (stored(Image.fromarray(PLACES), exif=exif), "EXIF"),
        (stored(half), "transparent"),
        (stored(Image.fromarray(PLACES.astype(np.float32)), "TIFF"), "mode F"),
        (io.BytesIO(b"nothing"), "begins with"),
    ):
        with pytest.raises(DataError, match=word):
            read_label_map(file)


def test_the_size_of_a_picture_is_that_of_what_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert upright_size(stored(Image.new("RGB", (30, 20)), "JPEG", exif=exif)) == (30, 20)
    assert upright_size(stored(Image.new("RGB", (30, 20)))) == (20, 30)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
def test_nearest_is_pillows(height, width, rows, columns):
    values = np.random.default_rng(height * 41 + width).integers(0, 9, (height, width)).astype(np.uint8)
    theirs = np.asarray(Image.fromarray(values).resize((columns, rows), Image.Resampling.NEAREST))
    middles = [(2 * np.arange(new) + 1) * old % (2 * new) for old, new in ((height, rows), (width, columns))]
    clear = (middles[0] > 0)[:, None] & (middles[1] > 0)  # a middle that falls between two goes either way
    assert (nearest(values, (rows, columns)) == theirs)[clear].all()


# -- what values mean


@pytest.mark.parametrize(
    ("said", "names", "values", "places"),
    [
        (["sky", "tree"], ("sky", "tree"), (0, 1), (0, 1)),
        ([None, "wall", "floor"], ("wall", "floor"), (0, 1, 2), (-1, 0, 1)),
        ({"7": "road", "255": "sky"}, ("road", "sky"), (7, 255), (0, 1)),
        ({"0": None, "3": "a", "9": "b"}, ("a", "b"), (0, 3, 9), (-1, 0, 1)),
        ({"a": 4, "b": [5, 6]}, ("a", "b"), (4, 5, 6), (0, 1, 1)),
        ({"a": 4, "b": 5, "ignored": 0}, ("a", "b"), (4, 5, 0), (0, 1, -1)),
        ({"a": [0, 0, 7], "b": [[1, 0, 0], [0, 1, 0]]}, ("a", "b"), (7, 65536, 256), (0, 1, 1)),
    ],
)
def test_classes_are_named_in_several_ways(tmp_path, said, names, values, places):
    found = read_classes(name_classes(tmp_path, said) / "classes.json")
    assert (found.names, found.values, found.places) == (names, values, places)


def test_lines_of_a_text_file_name_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\ntree \n\n")
    assert read_classes(tmp_path / "classes.txt").names == ("sky", "tree")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ('{"1": "a", "2": "a"}', "twice"),
        ('{"a": 1, "b": 1}', "twice"),
        ('{"a": 1, "b": [1, 2, 3]}', "some have colours"),
        ('{"a": 1, "b": 70000}', "neither a number"),
        ('{"a": 1, "b": [1, 2, 300]}', "neither a number"),
        ('["a"]', "names 1 classes"),
        ('["a", ""]', "names 1 classes"),
        ('["", "a", "b"]', "empty name"),
        ("7", "must be a list"),
        ("{", "cannot be read"),
    ],
)
def test_class_files_that_say_something_else_are_refused(tmp_path, text, word):
    lay_maps(tmp_path)
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError, match=word):
        find_label_maps(tmp_path)


def test_values_are_decoded_and_written_again():
    classes = MapClasses(("a", "b"), (3, 300, 7), (0, 1, -1))
    values = np.array([[3, 300], [7, 255]], np.uint16)
    assert classes.decode(values).tolist() == [[0, 1], [-1, -1]]
    assert classes.written(np.array([[0, 1]])).tolist() == [[3, 300]]
    with pytest.raises(DataError, match="value 4 are of no known class"):
        classes.decode(np.array([[4]]))
    with pytest.raises(DataError, match="value 40000 are"):
        classes.decode(np.array([[40000]]))
    coloured = MapClasses(("a", "b"), (0x010203, 0xFFFFFF), (0, 1), coloured=True)
    assert coloured.decode(np.array([[[1, 2, 3], [255, 255, 255]]], np.uint8)).tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"\[1, 2, 4\]"):
        coloured.decode(np.array([[[1, 2, 4]]], np.uint8))
    with pytest.raises(DataError, match="pixels are numbers"):
        coloured.decode(values)


# -- folders


def counted(labelled):
    return {name: int(count) for name, count in zip(labelled.classes, labelled.counts, strict=True)}


def test_maps_are_found_beside_pictures(tmp_path):
    found = find_label_maps(lay_maps(tmp_path, 5)).training
    assert found.classes == ("0", "1", "2")
    assert len(found) == 5
    for index in range(5):
        assert (found.maps.read(index) == scene(index)[1]).all()
    part = found.take(np.array([3, 1]))
    assert (part.maps.read(0) == scene(3)[1]).all()


def test_sides_are_taken_as_given(tmp_path, caplog):
    lay_maps(tmp_path / "train", 4)
    lay_maps(tmp_path / "val", 3, first=4)
    lay_maps(tmp_path / "test", 2, first=7)
    split = split_label_maps(name_classes(tmp_path, ["ground", "red", "blue"]))
    assert (len(split.training), len(split.testing), split.made) == (4, 3, False)
    assert split.testing.classes == ("ground", "red", "blue")
    assert "test in" in caplog.text
    assert (split.testing.maps.read(0) == scene(4)[1]).all()


def test_sides_may_lie_below_the_kinds(tmp_path):
    for side, count, first in (("training", 4, 0), ("validation", 2, 4)):
        lay_maps(tmp_path / "x", count, first=first)
        for kind, name in (("images", "images"), ("masks", "annotations")):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / "x" / kind).rename(tmp_path / name / side)
    split = split_label_maps(tmp_path)
    assert (len(split.training), len(split.testing)) == (4, 2)


def test_a_split_is_made_by_the_seed_and_keeps_groups(tmp_path):
    for patient in range(6):
        lay_maps(tmp_path / "x", 3, first=3 * patient)
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / "x" / kind).rename(tmp_path / kind / f"p{patient}")
    split = split_label_maps(tmp_path, seed=3, group="1", share=0.3)
    assert split.made
    assert not set(split.training.groups) & set(split.testing.groups)
    again = split_label_maps(tmp_path, seed=3, group="1", share=0.3)
    assert again.testing.samples.digest() == split.testing.samples.digest()
    with pytest.raises(UsageError, match="--group 2"):
        split_label_maps(tmp_path, group="2")


def test_pictures_without_a_map_are_left_out_and_said(tmp_path, caplog):
    lay_maps(tmp_path, 5)
    (tmp_path / "masks" / "002.png").unlink()
    (tmp_path / "images" / "003.png").unlink()
    Image.new("L", (48, 40), 255).save(tmp_path / "masks" / "004.png")
    assert len(find_label_maps(tmp_path).training) == 2
    assert "1 pictures have no label map" in caplog.text
    assert "1 label maps have no picture" in caplog.text
    assert "every pixel is ignored" in caplog.text


def larger(places):
    return Image.fromarray(places).resize((96, 80), Image.Resampling.NEAREST)


def turned(places):
    return Image.fromarray(places.T)


def coloured(places):
    return Image.fromarray(np.stack([places, places * 2, places], axis=2))


def beyond(places):
    return Image.fromarray(places + np.uint8(90) * (places == 2))


@pytest.mark.parametrize(
    ("write", "named", "word"),
    [
        (larger, True, "96×80 pixels, and its picture"),
        (turned, True, "turned by its EXIF"),
        (coloured, True, "colours, and classes are known by numbers"),
        (coloured, False, "Name them in classes.json"),
        (beyond, True, "value 92 are of no known class"),
        (lambda places: Image.fromarray(places * 0), False, "0 alone"),
        (lambda places: Image.fromarray((places > 0) * np.uint8(255)), False, "255, which is ignored"),
        (lambda places: Image.fromarray(np.full_like(places, 255)), True, "no label map holds a class"),
    ],
    ids=["larger", "turned", "colours", "unnamed colours", "beyond", "one class", "0 and 255", "ignored"],
)
def test_bad_maps_are_refused(tmp_path, capsys, write, named, word):
    lay_maps(tmp_path, 4, write=write)
    if named:
        name_classes(tmp_path, ["ground", "red", "blue"])
    line = ["finetune", str(tmp_path), "--task", "segment", "-m", "vit-nano", "-o", str(tmp_path / "run")]
    assert cli.main(line) == DataError.exit_code
    assert word in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_jpeg_maps_are_refused(tmp_path):
    with pytest.raises(DataError, match="it is a JPEG"):
        find_label_maps(name_classes(lay_maps(tmp_path, 3, suffix=".jpg"), ["a", "b", "c"]))


def test_names_that_are_there_twice_are_refused(tmp_path):
    lay_maps(tmp_path, 3)
    Image.new("L", (48, 40)).save(tmp_path / "masks" / "001.tif")
    with pytest.raises(DataError, match="several files called 001"):
        find_label_maps(tmp_path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="DIR/images and DIR/masks"):
        find_label_maps(tmp_path)
    lay_maps(tmp_path / "a" / "train", 3)
    lay_maps(tmp_path / "a" / "training", 3)
    with pytest.raises(DataError, match="which is for training"):
        find_label_maps(tmp_path / "a")
    lay_maps(tmp_path / "b", 1)
    with pytest.raises(DataError, match="one picture"):
        split_label_maps(tmp_path / "b")
    lay_maps(tmp_path / "c", 2)
    for path in (tmp_path / "c" / "masks").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(DataError, match="none share a name"):
        find_label_maps(tmp_path / "c")


def test_a_class_that_a_side_lacks_is_said(tmp_path, caplog):
    lay_maps(tmp_path / "train", 4, classes=2)
    lay_maps(tmp_path / "val", 3, first=4)
    split = split_label_maps(name_classes(tmp_path, ["ground", "red", "blue", "none"]))
    assert counted(split.training) == {"ground": 4, "red": 4, "blue": 0, "none": 0}
    assert "no picture to train on of the classes blue, none" in caplog.text
    assert "no picture to measure on of the classes none" in caplog.text


def test_data_check_names_every_bad_map(tmp_path, capsys):
    lay_maps(tmp_path, 5)
    name_classes(tmp_path, ["ground", "red", "blue"])
    assert cli.main(["data", "check", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["label_maps"]["classes"][1] == {"name": "red", "training": 5, "testing": None}
    Image.new("L", (9, 9)).save(tmp_path / "masks" / "001.png")
    Image.new("L", (48, 40), 9).save(tmp_path / "masks" / "003.png")
    assert len(check_label_maps(tmp_path).wrong) == 2
    assert cli.main(["data", "check", str(tmp_path)]) == DataError.exit_code
    said = capsys.readouterr().out
    assert "001.png" in said
    assert "003.png: pixels of the value 9" in said
