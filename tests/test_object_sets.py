"""Objects: the same ones from every format, layouts as users have them, what is refused, splits, and drawn maps."""

import base64
import contextlib
import io
import json
import logging
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from map_files import lay_maps
from object_files import CLASSES, FORMATS, HEIGHT, WIDTH, bounds, coco, lay_objects, scene
from PIL import Image

from maehub.cli import command_line as cli
from maehub.data import (
    IGNORED,
    MapClasses,
    ObjectClasses,
    check_objects,
    code_of,
    find_label_maps,
    find_objects,
    find_samples,
    is_object_set,
    split_label_maps,
    split_objects,
)
from maehub.errors import DataError, UsageError
from maehub.images import Box
from maehub.train.evaluation.dense.evaluating import in_classes

SIZE = (HEIGHT, WIDTH)
WHOLE = Box(0, 0, WIDTH, HEIGHT)


def rewritten(path, change):
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def named(labelled):
    return [labelled.samples.name(index).decode() for index in range(len(labelled))]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("outlines", [True, False])
def test_every_format_says_the_same(tmp_path, form, outlines):
    found = find_objects(lay_objects(tmp_path, form, outlines=outlines))
    assert found.testing is None
    assert found.wrong == []
    assert found.clipped == 0
    labelled, objects = found.training, found.training.objects
    assert named(labelled) == [f"{number:03}.png" for number in range(6)]
    assert labelled.classes == CLASSES == objects.classes.names
    assert objects.classes.ids == {"coco": (0, 7), "yolo": (0, 1)}.get(form, (1, 2))
    assert objects.masked == (outlines and form != "voc")
    for number, (row, occur) in enumerate(zip(objects.rows, labelled.labels, strict=True)):
        assert row.size == SIZE
        assert row.boxes.dtype == np.float32
        np.testing.assert_allclose(row.boxes, np.reshape([bounds(one) for _, one in scene(number)], (-1, 4)), atol=1e-4)
        assert [CLASSES[label] for label in row.labels] == [kind for kind, _ in scene(number)]
        assert not row.ignored.any()
        assert [name for name, has in zip(CLASSES, occur, strict=True) if has] == [kind for kind, _ in scene(number)]
        for shape, (_, polygon) in zip(row.shapes or (), scene(number), strict=objects.masked):
            np.testing.assert_allclose(shape[0], polygon, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_sides_are_taken_as_given(tmp_path, form, caplog):
    for side, numbers in (("train", range(6)), ("valid", range(6, 10)), ("test", range(10, 12))):
        lay_objects(tmp_path / side, form, numbers)
    found = find_objects(tmp_path)
    assert (len(found.training), len(found.testing)) == (6, 4)
    assert "test in" in caplog.text
    assert found.training.classes == found.testing.classes
    assert len(find_objects(tmp_path, side="testing").training) == 4
    assert not split_objects(tmp_path).made
    shutil.rmtree(tmp_path / "test")
    shutil.rmtree(tmp_path / "valid")
    assert find_objects(tmp_path).testing is None


def test_layouts_of_coco(tmp_path, caplog):
    """Its own; a file by its path; one above the pictures; one in a folder beside them; names of sides."""
    own = tmp_path / "own"
    for side, numbers in (("train2017", range(6)), ("val2017", range(6, 9))):
        lay_objects(own, "coco", numbers)
        (own / "images").rename(own / side)
        (own / "annotations").mkdir(exist_ok=True)
        (own / "instances.json").rename(own / "annotations" / f"instances_{side}.json")
    (own / "annotations" / "captions_val2017.json").write_text('{"images": [], "annotations": [], "categories": []}')
    found = find_objects(own)
    assert (len(found.training), len(found.testing)) == (6, 3)
    assert "captions_val2017.json" in caplog.text
    assert len(find_objects(own / "annotations" / "instances_val2017.json").training) == 3
    assert len(find_samples(own / "annotations" / "instances_val2017.json")) == 3
    one = lay_objects(tmp_path / "one", "coco")
    (one / "labels-v1.json").write_text(json.dumps(coco(range(2))))
    (one / "instances.json").rename(one / "boxes.json")
    with pytest.raises(DataError, match=r"several annotation files.*boxes.json.*labels-v1.json"):
        find_objects(one)
    assert len(find_objects(one / "labels-v1.json").training) == 2
    assert "4 pictures beside those of COCO's files are in none of them" in caplog.text
    (one / "labels-v1.json").unlink()
    (one / "annotations").mkdir()
    (one / "boxes.json").write_text(json.dumps(coco(range(6), prefix="images/")))
    (one / "boxes.json").rename(one / "annotations" / "_annotations.coco.json")
    assert named(find_objects(one).training)[0] == "images/000.png"
    for image in (one / "images").iterdir():
        image.rename(one / "annotations" / image.name)
    (one / "annotations" / "_annotations.coco.json").write_text(json.dumps(coco(range(6))))
    assert len(find_objects(one / "annotations").training) == 6


def test_layouts_of_yolo(tmp_path):
    for side, numbers in (("train", range(6)), ("val", range(6, 9))):
        lay_objects(tmp_path / "apart", "yolo", numbers)
        for kind in ("images", "labels"):
            (tmp_path / "whole" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "apart" / kind).rename(tmp_path / "whole" / kind / side)
    with pytest.raises(DataError, match=r"no data.yaml or classes.txt"):
        find_objects(tmp_path / "whole")
    (tmp_path / "whole" / "labels" / "train" / "classes.txt").write_text("block\nwedge\n\n")
    with pytest.raises(DataError, match=r"no data.yaml or classes.txt"):
        find_objects(tmp_path / "whole")  # the other side has no names
    (tmp_path / "whole" / "classes.txt").write_text("block\nwedge\n\n")
    found = find_objects(tmp_path / "whole")
    assert (len(found.training), len(found.testing)) == (6, 3)
    assert not is_object_set(tmp_path / "whole" / "images")


def test_layouts_of_pascal_voc(tmp_path):
    lay_objects(tmp_path, "voc", range(8))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("000\n001\n003\n")
    (lists / "val.txt").write_text("007\n002\n")
    (lists / "block_train.txt").write_text("000  1\n001 -1\n")
    found = find_objects(tmp_path)
    assert named(found.training) == ["000.png", "001.png", "003.png"]
    assert named(found.testing) == ["002.png", "007.png"]
    (lists / "val.txt").write_text("007\n012\n")
    with pytest.raises(DataError, match=r"012.* is none"):
        find_objects(tmp_path)
    shutil.rmtree(tmp_path / "ImageSets")
    for path in (tmp_path / "Annotations").iterdir():
        path.rename(tmp_path / "JPEGImages" / path.name)
    assert len(find_objects(tmp_path / "JPEGImages").training) == 8


def test_two_formats_are_refused(tmp_path):
    lay_objects(tmp_path, "coco")
    (tmp_path / "Annotations").mkdir()
    lay_objects(tmp_path / "else", "voc", range(2))
    shutil.copy(tmp_path / "else" / "Annotations" / "000.xml", tmp_path / "Annotations")
    shutil.rmtree(tmp_path / "else")
    with pytest.raises(DataError, match=r"COCO's in .*instances.json and Pascal VOC's in .*Annotations"):
        find_objects(tmp_path)
    assert len(find_objects(tmp_path / "instances.json").training) == 6


def test_layouts_of_labelme(tmp_path):
    """In a folder beside the pictures, and in several below one."""
    lay_objects(tmp_path / "a", "labelme")
    for ending, name in (("png", "images"), ("json", "annotations")):
        (tmp_path / "a" / name).mkdir()
        for path in (tmp_path / "a").glob(f"*.{ending}"):
            path.rename(path.parent / name / path.name)
    assert len(find_objects(tmp_path / "a").training) == 6
    lay_objects(tmp_path / "b" / "one", "labelme", [1])
    lay_objects(tmp_path / "b" / "two", "labelme", [2])
    assert named(find_objects(tmp_path / "b").training) == ["one/001.png", "two/002.png"]


def test_groups_and_splits(tmp_path):
    lay_objects(tmp_path, "labelme", range(36))
    for number in range(36):
        folder = tmp_path / f"site-{number // 4}"
        folder.mkdir(exist_ok=True)
        for ending in ("png", "json"):
            (tmp_path / f"{number:03}.{ending}").rename(folder / f"{number:03}.{ending}")
    split = split_objects(tmp_path, seed=3, share=0.25)
    assert split.made
    for side in split[:2]:
        assert side.counts.all()
        assert (~side.labels.any(axis=1)).any(), "pictures without objects are on both sides"
    assert set(named(split.training)).isdisjoint(named(split.testing))
    assert named(split_objects(tmp_path, seed=3, share=0.25).testing) == named(split.testing)
    grouped = split_objects(tmp_path, group="1")
    assert set(grouped.training.groups.tolist()).isdisjoint(grouped.testing.groups.tolist())
    assert set(find_objects(tmp_path, group="1").group_names.values()) == {f"site-{number}" for number in range(9)}
    with pytest.raises(DataError, match="one picture with objects"):
        split_objects(lay_objects(tmp_path / "one", "voc", [1]))


def test_classes_are_those_asked_for(tmp_path, caplog):
    lay_objects(tmp_path, "yolo")
    (tmp_path / "data.yaml").write_text("names: [block, wedge, never]\n")
    assert find_objects(tmp_path).training.classes == CLASSES
    assert "no object is of the classes never" in caplog.text
    found = find_objects(tmp_path, classes=ObjectClasses(("wedge", "cup", "block"), (4, 5, 6))).training
    assert found.counts.tolist() == [2, 0, 5]
    assert found.objects.rows[1].labels.tolist() == [2, 0]
    with pytest.raises(DataError, match="has objects of wedge; known classes are block"):
        find_objects(tmp_path, classes=ObjectClasses(("block",), (1,)))


def test_run_lengths_crowds_and_missing_boxes(tmp_path):
    mask = np.zeros(SIZE, np.uint8)
    mask[5:20, 10:30] = 1
    mask[7, 12] = 0
    runs = np.diff(np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=2, append=2))).tolist()
    packed = code_of(mask)["counts"].decode()

    def change(said):
        said["annotations"][0] |= {"segmentation": {"size": [*SIZE], "counts": packed}, "iscrowd": 1}
        said["annotations"][1] |= {"segmentation": {"size": [*SIZE], "counts": runs}}
        said["annotations"][2]["bbox"] = []
        del said["annotations"][1]["bbox"]

    rewritten(lay_objects(tmp_path, "coco") / "instances.json", change)
    rows = find_objects(tmp_path).training.objects.rows
    assert rows[0].ignored.tolist() == [True]
    assert not find_objects(tmp_path).training.labels[0].any()
    assert rows[1].boxes[0].tolist() == [10, 5, 30, 20]
    for row in rows[:2]:
        assert (row.masks(WHOLE, SIZE)[0] == mask).all()
    np.testing.assert_allclose(rows[1].boxes[1], bounds(scene(1)[1][1]))


def test_shapes_of_labelme(tmp_path, caplog):
    small = np.zeros((4, 6), bool)
    small[1:, 2:] = True
    file = io.BytesIO()
    Image.fromarray(small.astype(np.uint8) * 255).save(file, "PNG")
    packed = base64.b64encode(file.getvalue()).decode()
    shapes = [
        {"label": "a", "shape_type": "circle", "points": [[20, 20], [20, 25]]},
        {
            "label": "a",
            "shape_type": "mask",
            "points": [[3, 4], [8, 7]],
            "mask": packed,
        },
        {"label": "b", "shape_type": "rectangle", "points": [[30, 30], [40, 35]]},
        {"label": "b", "points": [[0, 0], [4, 0], [0, 4]], "group_id": 1},
        {"label": "b", "points": [[10, 0], [14, 0], [10, 4]], "group_id": 1},
        {"label": "a", "points": [[20, 0], [24, 0], [20, 4]], "group_id": 1},
        {"label": "__ignore__", "points": [[40, 0], [48, 0], [48, 8]]},
        {"label": "a", "shape_type": "point", "points": [[1, 1]]},
        {"label": "a", "shape_type": "linestrip", "points": [[1, 1], [5, 5]]},
    ]
    lay_objects(tmp_path, "labelme", [5])
    rewritten(tmp_path / "005.json", lambda said: said.update(shapes=shapes))
    (row,) = find_objects(tmp_path).training.objects.rows
    assert row.labels.tolist() == [0, 0, 1, 1, 0, -1]
    assert row.ignored.tolist() == [False] * 5 + [True]
    boxes = [[15, 15, 25, 25], [5, 5, 9, 8], [30, 30, 40, 35], [0, 0, 14, 4], [20, 0, 24, 4], [40, 0, 48, 8]]
    np.testing.assert_allclose(row.boxes, boxes, atol=0.02)
    assert row.masks(WHOLE, SIZE)[1].sum() == small.sum()
    assert abs(int(row.masks(WHOLE, SIZE)[0].sum()) - np.pi * 25) < 4
    assert [len(row.shapes[place]) for place in (2, 3, 4)] == [1, 2, 1]
    assert "2 points and lines have no area" in caplog.text
    assert "1 rectangles among outlines" in caplog.text


def set_value(*path):
    """A change of one value in JSON."""

    def change(said):
        for key in path[:-2]:
            said = said[key]
        said[path[-2]] = path[-1]

    return change


def copied(key):
    return lambda said: said[key].append(dict(said[key][0]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (copied("images"), "stands there twice"),
        (copied("annotations"), "annotation 0 stands there twice"),
        (copied("categories"), "a category needs a number and a name that no other has"),
        (set_value("images", 0, "file_name", "none.png"), r"none.png, is not there: looked in"),
        (set_value("images", 0, "file_name", "../../000.png"), "has no file_name below"),
        (set_value("images", 0, "file_name", "\ud800.png"), "has no file_name below"),
        (set_value("images", 0, "width", HEIGHT), "it says 40×40 pixels, and the picture itself has 48×40"),
        (lambda said: said["images"][0].update(width=HEIGHT, height=WIDTH), "turned by its EXIF orientation"),
        (set_value("annotations", 0, "image_id", 99), "annotations of images that it does not list: 99"),
        (set_value("annotations", 0, "category_id", 3), "is of the category 3, which the file does not name"),
        (set_value("annotations", 0, "bbox", [1, 2, float("nan"), 4]), "NaN"),
        (set_value("annotations", 0, "bbox", [1, 2, 1e999, 4]), "infinity"),
        (set_value("annotations", 0, "bbox", [1, 2, 10**400, 4]), "infinity"),
        (set_value("annotations", 0, "bbox", [1, 2, 0, 4]), "annotation 0 has no area"),
        (set_value("annotations", 0, "bbox", [1, 2, -3, 4]), "annotation 0 has no area"),
        (set_value("annotations", 0, "bbox", [50, 2, 3, 4]), "lies outside of the picture, which is 48×40"),
        (set_value("annotations", 0, "bbox", [1, 2, 3]), "must be 4 numbers"),
        (set_value("annotations", 0, "bbox", "1 2 3 4"), "must be 4 numbers"),
        (set_value("annotations", 0, "iscrowd", 2), "iscrowd"),
        (set_value("annotations", 0, "segmentation", [[1, 2, 3, 4]]), "3 points are 6"),
        (set_value("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6]]), "outline without an area"),
        (set_value("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "3 points are 6"),
        (set_value("annotations", 0, "segmentation", {"size": [9, 9], "counts": [81]}), "mask is of the size"),
        (set_value("annotations", 0, "segmentation", {"size": [40, 48], "counts": [81]}), "runs of its mask are 81"),
        (set_value("annotations", 0, "segmentation", {"size": [40, 48], "counts": "o"}), "cut off"),
        (set_value("annotations", 0, "segmentation", {"size": [40, 48], "counts": "~"}), "letters that mean nothing"),
        (set_value("annotations", 0, "segmentation", {"size": [40, 48], "counts": [1920]}), "without an area"),
        (set_value("annotations", {}), "annotations must be a list of objects"),
    ],
)  # fmt: skip
def test_bad_files_of_coco(tmp_path, change, word, capsys):
    path = lay_objects(tmp_path, "coco") / "instances.json"
    rewritten(path, change)
    with pytest.raises(DataError, match=word) as caught:
        find_objects(path)
    assert "instances.json" in str(caught.value)
    assert cli.main(["data", "check", str(path)]) == DataError.exit_code
    said = capsys.readouterr()
    assert "instances.json" in said.out + said.err


def replaced(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new, 1))


def wrote(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


ONE = "Annotations/000.xml"


@pytest.mark.parametrize(
    ("form", "change", "word"),
    [
        ("yolo", wrote("labels/000.txt", "2 .5 .5 .2 .2"), r"000.txt: line 1 is of the class 2, which has no name"),
        ("yolo", wrote("labels/000.txt", "0.5 .5 .5 .2 .2"), "class 0.5"),
        ("yolo", wrote("labels/000.txt", "0 .5 .5 .2 1.2"), "outside of 0 to 1"),
        ("yolo", wrote("labels/000.txt", "0 .5 .5 .2 nan"), "outside of 0 to 1"),
        ("yolo", wrote("labels/000.txt", "0 .5 .5 .2 .2 .9"), "a sixth is the confidence"),
        ("yolo", wrote("labels/000.txt", "0 .5 .5"), "has 3 numbers"),
        ("yolo", wrote("labels/000.txt", "0 .5 .5 0 .2"), "has no area"),
        ("yolo", wrote("labels/000.txt", "block .5 .5 .2 .2"), "something else than numbers"),
        ("yolo", wrote("labels/000.txt", b"\xff\xfe"), "no text"),
        ("yolo", wrote("labels/777.txt", "0 .5 .5 .2 .2"), "777.txt: one picture is called so; in .* is none"),
        ("yolo", wrote("data.yaml", "names: [yes, no]"), "put it in quotes"),
        ("yolo", wrote("data.yaml", "names: {a: 1}"), "names by their numbers"),
        ("yolo", wrote("data.yaml", "names: [a, a]"), "several classes are called a"),
        ("yolo", wrote("data.yaml", "names: [a, "), "data.yaml cannot be read"),
        ("voc", replaced(ONE, "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>'), "it has a DOCTYPE"),
        ("voc", wrote(ONE, '<?xml version="1.0"?><!DOCTYPE a><annotation/>'.encode("utf-16")), "DOCTYPE"),
        ("voc", replaced(ONE, "</annotation>", ""), "000.xml: it is no well-formed XML"),
        ("voc", wrote(ONE, "<other/>"), "other"),
        ("voc", replaced(ONE, "<width>48", "<width>40"), "it says 40×40 pixels"),
        ("voc", replaced(ONE, "<difficult>0", "<difficult>yes"), "difficult is 'yes'"),
        ("voc", replaced(ONE, "<name>block</name>", ""), "object 1 has no name"),
        ("voc", replaced(ONE, "<xmax>", "<xmax>x"), "must be 4 numbers"),
        ("voc", replaced(ONE, "<xmax>", "<xmax>-"), "has no area"),
        ("labelme", replaced("000.json", '"imageWidth": 48', '"imageWidth": 40'), "000.json: it says 40×40 pixels"),
        ("labelme", wrote("000.json", "{"), "000.json is no well-formed JSON"),
        ("labelme", wrote("000.json", "[" * 100_000), "000.json is no well-formed JSON"),
        ("labelme", wrote("000.json", "[]"), "000.json holds a list"),
        ("labelme", replaced("000.json", '"polygon"', '"blob"'), "'blob', which is not known"),
        ("labelme", replaced("000.json", '"polygon"', '"circle"'), "is a circle of 4 points"),
        ("labelme", replaced("000.json", '"label": "block"', '"label": ""'), "shape 1 has no label"),
        ("labelme", lambda folder: (folder / "000.png").unlink(), "000.json: one picture is called so"),
        ("labelme", lambda folder: shutil.copy(folder / "000.png", folder / "000.bmp"), "000.bmp, 000.png"),
        ("labelme", wrote("000.png", b"\x89PNG"), "000.png"),
    ],
)  # fmt: skip
def test_bad_files_of_the_others(tmp_path, form, change, word, capsys):
    change(lay_objects(tmp_path, form))
    with pytest.raises(DataError, match=word):
        find_objects(tmp_path)
    assert cli.main(["data", "check", str(tmp_path)]) == DataError.exit_code


def test_what_is_wrong_is_told_and_left_out(tmp_path, caplog, capsys):
    lay_objects(tmp_path, "voc")
    replaced(ONE, "<xmin>", "<xmin>9")(tmp_path)
    wrote("Annotations/001.xml", "<annotation>")(tmp_path)
    found = find_objects(tmp_path, strict=False)
    assert named(found.training) == [f"{number:03}.png" for number in (2, 3, 4, 5)]
    assert [reason.split(": ")[0].rpartition("/")[2] for reason in found.wrong] == ["000.xml", "001.xml"]
    with pytest.raises(DataError, match="and 1 more such things"):
        find_objects(tmp_path)
    assert cli.main(["data", "check", str(tmp_path), "--json"]) == DataError.exit_code
    facts = json.loads(capsys.readouterr().out)["objects"]
    assert len(facts["wrong"]) == 2
    assert facts["pictures"] == 4
    assert facts["empty"] == 1
    assert not facts["masked"]
    assert facts["classes"][1] == facts["counts"][1] == {"name": "wedge", "training": 1, "testing": None}


def test_boxes_over_an_edge_are_cut_and_counted(tmp_path, caplog):
    lay_objects(tmp_path, "yolo", outlines=False)
    wrote("labels/000.txt", "0 .05 .5 .2 .2\n0 .5 .5 .2 .2\n")(tmp_path)
    found = find_objects(tmp_path)
    assert found.clipped == 1
    np.testing.assert_allclose(found.training.objects.rows[0].boxes[0], [0, 16, 7.2, 24], rtol=1e-6)
    assert "1 objects reach over the edges" in caplog.text
    assert "000.txt" in caplog.text
    assert check_objects(tmp_path).clipped == 1


def test_files_of_pascal_voc_that_count_from_0_are_asked_about(tmp_path, caplog):
    lay_objects(tmp_path, "voc")
    text = (tmp_path / ONE).read_text()
    left = text.split("<xmin>")[1].split("<")[0]
    (tmp_path / ONE).write_text(text.replace(f"<xmin>{left}", "<xmin>0"))
    assert find_objects(tmp_path).training.objects.rows[0].boxes[0][0] == 0
    assert "is that a file that counts from 0?" in caplog.text


def test_outlines_over_an_edge_are_cut_where_they_cross_it(tmp_path):
    lay_objects(tmp_path, "labelme", [0])
    rewritten(tmp_path / "000.json", set_value("shapes", 0, "points", [[-10, 0], [10, 0], [10, 20], [-10, 0]]))
    (row,) = find_objects(tmp_path).training.objects.rows
    np.testing.assert_allclose(row.boxes, [[0, 0, 10, 20]])
    assert {(0, 10), (0, 0), (10, 0), (10, 20)} == {tuple(corner) for corner in row.shapes[0][0].tolist()}


def test_boxes_that_do_not_fit_their_outlines_are_said(tmp_path, caplog):
    """As when COCO's bbox is written as its four edges."""
    path = lay_objects(tmp_path, "coco") / "instances.json"

    def as_edges(said):
        for note in said["annotations"]:
            left, top, width, height = note["bbox"]
            note["bbox"] = [left, top, left + width, top + height]

    rewritten(path, as_edges)
    find_objects(path)
    assert "have less than half in common" in caplog.text


def test_pictures_that_nothing_is_said_of_are_left_out_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "maehub")
    lay_objects(tmp_path / "a", "voc")
    (tmp_path / "a" / "Annotations" / "003.xml").unlink()
    assert len(find_objects(tmp_path / "a").training) == 5
    assert "1 pictures have no .xml" in caplog.text
    assert "1 of 5 pictures show no object" in caplog.text
    lay_objects(tmp_path / "b", "yolo")
    assert len(find_objects(tmp_path / "b").training) == 6
    assert "count as showing no object: 005" in caplog.text


def test_sets_of_another_kind_are_refused(tmp_path):
    assert not is_object_set(tmp_path)
    assert not is_object_set(tmp_path / "missing")
    with pytest.raises(UsageError, match=r"holds no pictures with objects\. Objects are said by"):
        find_objects(tmp_path)
    lay_maps(tmp_path / "maps", 3)
    (tmp_path / "maps" / "masks").rename(tmp_path / "maps" / "labels")
    (tmp_path / "maps" / "labels" / "readme.txt").write_text("by hand")
    assert not is_object_set(tmp_path / "maps")
    with pytest.raises(UsageError, match="--task segment"):
        find_objects(tmp_path / "maps")
    lay_objects(tmp_path / "empty", "voc", [5])
    with pytest.raises(DataError, match="not one of its pictures shows an object"):
        find_objects(tmp_path / "empty")
    lay_objects(tmp_path / "boxes", "voc")
    with pytest.raises(DataError, match=r"boxes alone.*--task detect"):
        find_label_maps(tmp_path / "boxes")


def test_a_set_may_have_both_objects_and_label_maps(tmp_path, capsys):
    """As Pascal VOC's own."""
    lay_objects(tmp_path, "voc")
    (tmp_path / "SegmentationClass").mkdir()
    for number in range(6):
        places = np.full(SIZE, number % 2, np.uint8)
        Image.fromarray(places).save(tmp_path / "SegmentationClass" / f"{number:03}.png")
    assert len(find_label_maps(tmp_path).training) == 6
    assert len(find_objects(tmp_path).training) == 6
    assert cli.main(["data", "check", str(tmp_path), "--json"]) == 0
    assert {"label_maps", "objects"} <= json.loads(capsys.readouterr().out).keys()


def within(polygon):
    """(H, W) bool, pixels whose middles lie in a polygon: to their right it is crossed an odd number of times."""
    across, down = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    inside = np.zeros(SIZE, bool)
    for (left, top), (right, bottom) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if top != bottom:
            crossed = (top > down) != (bottom > down)
            inside ^= crossed & (across < left + (down - top) / (bottom - top) * (right - left))
    return inside


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme"])
def test_label_maps_are_drawn_from_outlines(tmp_path, form, caplog):
    """Those whose middles lie within, but for the borders."""
    lay_objects(tmp_path, form, range(12))
    found = find_label_maps(tmp_path).training
    assert found.classes == ("background", *CLASSES) == found.maps.classes.names
    assert "the rest is background" in caplog.text
    for number in range(12):
        expected, drawn = np.zeros(SIZE, int), found.maps.read(number)
        for kind, polygon in scene(number):  # the block has 300 pixels, and the wedge 285
            expected[within(polygon)] = 1 + CLASSES.index(kind)
        inner = np.ones(SIZE, bool)
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= expected == np.roll(expected, step, axis)
        assert drawn.shape == SIZE
        assert drawn.dtype == np.int16
        assert (drawn == expected)[inner].all()
        assert set(np.unique(drawn).tolist()) == set(np.flatnonzero(found.labels[number]).tolist())
    split = split_label_maps(tmp_path)
    assert len(split.training) + len(split.testing) == 12
    assert split.training.maps.files.digest() != split.testing.maps.files.digest()


def test_drawn_maps_in_the_order_of_a_model(tmp_path):
    found = find_label_maps(lay_objects(tmp_path, "coco")).training
    order = MapClasses(("wedge", "cup", "background", "block"), (5, 6, 7, 8), (0, 1, 2, 3))
    moved = find_label_maps(tmp_path, classes=order).training
    assert in_classes(moved, order, "it") is moved
    assert (moved.maps.read(1) == np.array([2, 3, 0])[found.maps.read(1)]).all()
    assert moved.labels[1].tolist() == [True, False, True, True]
    other = in_classes(found, MapClasses(("wedge", "background", "block"), (0, 1, 2), (0, 1, 2)), "it")
    assert (other.maps.read(1) == np.array([1, 2, 0])[found.maps.read(1)]).all()
    for names in (("background", "block"), ("wedge", "block")):
        with pytest.raises(DataError, match="known"):
            find_label_maps(tmp_path, classes=MapClasses(names, (0, 1), (0, 1)))


def test_smaller_objects_lie_on_larger_ones_and_crowds_are_ignored(tmp_path):
    path = lay_objects(tmp_path, "coco", [0, 1]) / "instances.json"

    def change(said):
        shapes = [[10, 10, 12, 10, 12, 12, 10, 12], [0, 0, 40, 0, 40, 30, 0, 30], [20, 20, 30, 20, 30, 30, 20, 30]]
        for note, shape in zip(said["annotations"], shapes, strict=True):
            note |= {"image_id": 1, "segmentation": [shape], "iscrowd": int(shape[0] == 20), "bbox": None}
        said["annotations"][1]["category_id"] = 7
        said["categories"][1]["name"] = "background"

    rewritten(path, change)
    found = find_label_maps(tmp_path).training
    assert found.classes == ("background", "block")
    drawn = found.maps.read(1)
    assert (drawn == 1).sum() == 4
    assert (drawn == IGNORED).sum() == 100
    assert (drawn == 0).sum() == HEIGHT * WIDTH - 104
    assert found.labels.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("form", FORMATS)
def test_annotations_are_not_passed_over(tmp_path, form, capsys):
    for side in ("train", "val"):
        lay_objects(tmp_path / side, form)
    (tmp_path / "train" / "notes.md").write_text("seen")
    assert cli.main(["data", "check", str(tmp_path), "--json"]) == 0
    left = json.loads(capsys.readouterr().out.splitlines()[-1])["passed_over"]
    assert left.pop(".md") == 1
    assert set(left) <= {".yaml"} | ({".txt"} if form != "yolo" else set())
    ending = {"yolo": ".txt", "voc": ".xml"}.get(form, ".json")
    assert find_samples(tmp_path).passed_over[ending]  # of those who do not read annotations they are


def test_data_check_shows_objects(tmp_path, capsys):
    for side, numbers in (("train", range(6)), ("val", [6, 8, 11])):
        lay_objects(tmp_path / side, "coco", numbers)
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "9 pictures show 9 objects of 2 classes, with outlines; 2 show none" in said
    assert said.count("5 to train, 2 to test") == 2
    assert said.count("2 to train, 0 to test   (a side has none)") == 2
    path = tmp_path / "train" / "instances.json"
    assert cli.main(["data", "check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objects"]["pictures"] == 6


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 50) | st.floats() | st.sampled_from(["", "a", "block", "1", "mask"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
    max_leaves=6,
)
NOTE = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd", "name"), VALUES)
    | {"file_name": st.just("000.png") | VALUES, "label": VALUES, "points": VALUES, "shape_type": VALUES},
)
SAID = st.fixed_dictionaries(
    {key: st.lists(NOTE, max_size=3) | VALUES for key in ("images", "annotations", "categories", "shapes")}
).map(json.dumps)
SHARED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("coco", "instances.json"),
        ("yolo", "labels/000.txt"),
        ("yolo", "data.yaml"),
        ("voc", ONE),
        ("labelme", "000.json"),
    ],
)
def test_nothing_in_a_file_makes_another_error(tmp_path, form, name):
    lay_objects(tmp_path, form)
    whole = (tmp_path / name).read_bytes()

    @SHARED
    @given(st.data())
    def corrupt(data):
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
        odd = [b"NaN", b"-1", b"1e999", b'"', b"null", b"{}", b"[]"]
        inner = data.draw(st.binary(max_size=8) | st.sampled_from(odd))
        end = data.draw(st.sampled_from([end, at + len(inner)]))
        text = whole[:at] + inner + whole[end:]
        if name.endswith(".json"):
            text = data.draw(st.just(text) | SAID.map(str.encode))
        (tmp_path / name).write_bytes(text)
        for find in (find_objects, find_label_maps, check_objects):
            with contextlib.suppress(DataError, UsageError):
                find(tmp_path / name if form == "coco" else tmp_path)

    corrupt()
