"""Labels of folders, CSVs, tar shards and tables, and what is said of data that have none or wrong ones."""

import logging
import os

import numpy as np
import pytest
from labelled_files import lay, png, read_labelled, table, words, write_csv, write_tar

from maehub import rng
from maehub.data.labels import find_labelled
from maehub.errors import DataError, UsageError
from maehub.images.decoding import open_image

# --- class folders ----------------------------------------------------------------------------------------------------


def test_class_folders_at_any_depth(tmp_path):
    folder = lay(tmp_path / "d", "cat/b.png", "cat/deep/er/a.jpg", "ant/1.png", ".hidden/x.png", "cat/.y.png")
    (folder / "notes.txt").write_text("not a picture")
    labelled = read_labelled(folder)
    assert labelled.classes == ("ant", "cat")
    assert words(labelled) == {"ant/1.png": "ant", "cat/b.png": "cat", "cat/deep/er/a.jpg": "cat"}
    assert labelled.labels.dtype == np.int64
    assert labelled.groups is None
    assert labelled.counts.tolist() == [1, 2]
    assert open_image(labelled.samples.source(0)).size == (8, 6)
    some = labelled.take(np.array([2, 0]))
    assert words(some) == {"cat/deep/er/a.jpg": "cat", "ant/1.png": "ant"}
    assert words(labelled.take(np.array([1, 2])).without_empty_classes()) == {
        "cat/b.png": "cat",
        "cat/deep/er/a.jpg": "cat",
    }


def test_a_group_is_the_name_of_one_folder(tmp_path):
    folder = lay(tmp_path / "d", "cat/p1/a.png", "dog/p1/eye/b.png", "dog/p2/c.png", "dog/p2/d/e.png")
    groups = read_labelled(folder, group="2").groups
    assert groups.dtype == np.int64
    assert groups[0] == groups[1] != groups[2] == groups[3]
    elsewhere = lay(tmp_path / "other", "ant/p2/x.png", "cat/p9/a.png")
    assert read_labelled(elsewhere, group="2").groups[0] == groups[2]
    assert find_labelled(folder, group="2").group_names == {int(groups[0]): "p1", int(groups[2]): "p2"}
    for group, match in (
        ("1", "--group 1: the folders of level 1 are the classes"),
        ("0", "--group 0 is no level"),
        ("patient", "--group patient is no level of .*from 2"),
        ("3", r"--group 3: a group is the name of folder 3, and .*cat/p1/a.png has 2 folders"),
    ):
        with pytest.raises(UsageError, match=match):
            read_labelled(folder, group=group)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["cat/a.png"], "one class, cat.*Two classes or more"),
        (["set/cat/a.png", "set/dog/a.png"], r"one class, set.*give .*d/set"),
        (["cat/a.png", "dog/a.png", "owl/", "emu/deep/"], "class folders without a picture: emu, owl"),
        (["cat/a.png", "dog/b.png", "loose.jpg"], r"a picture lies in it directly beside class folders.*loose\.jpg"),
        (["a.png", "b.png"], r"2 pictures lie in it directly, the first a\.png.*DIR/CLASS/"),
        (["cat/", "dog/"], "0 images in"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, match):
    with pytest.raises(DataError, match=match) as raised:
        read_labelled(lay(tmp_path / "d", *names))
    assert raised.value.exit_code == 5
    assert str(tmp_path) in str(raised.value)


def test_a_class_name_that_is_no_text(tmp_path):
    folder = lay(tmp_path / "d", "cat/a.png")
    os.mkdir(os.path.join(os.fsencode(folder), b"\xff"))
    with open(os.path.join(os.fsencode(folder), b"\xff", b"b.png"), "wb") as file:
        file.write(png())
    with pytest.raises(DataError, match=r"the class \\xff is not UTF-8"):
        read_labelled(folder)


def test_what_has_no_labels(tmp_path):
    folder = lay(tmp_path / "d", "cat/a.png", "dog/a.png")
    (tmp_path / "list.txt").write_text("d/cat/a.png\n")
    for place in (tmp_path / "list.txt", folder / "cat" / "a.png"):
        with pytest.raises(UsageError, match=r"says of no picture what it shows.*\.csv"):
            read_labelled(place)
    with pytest.raises(UsageError, match="--label species names a column"):
        read_labelled(folder, label="species")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_labelled(tmp_path / "gone")


def test_the_two_sides_of_a_split_are_no_classes(tmp_path):
    folder = lay(tmp_path / "d", "train/cat/a.png", "train/dog/a.png", "test/cat/a.png")
    with pytest.raises(UsageError, match=r"holds the two sides of a split: name one, such as .*d/test"):
        read_labelled(folder)
    assert read_labelled(folder / "train").classes == ("cat", "dog")
    trains = lay(tmp_path / "vehicles", "train/a.png", "bus/a.png")
    assert read_labelled(trains).classes == ("bus", "train")


def test_known_classes(tmp_path, caplog):
    folder = lay(tmp_path / "d", "cat/a.png", "dog/a.png", "dog/b.png", "owl/")
    labelled = read_labelled(folder, classes=["dog", "emu", "cat", "owl"])
    assert labelled.classes == ("dog", "emu", "cat", "owl")
    assert labelled.labels.tolist() == [2, 0, 0]
    assert "class folders without a picture: owl" in caplog.text
    assert read_labelled(lay(tmp_path / "one", "dog/a.png"), classes=["cat", "dog"]).labels.tolist() == [1]
    with pytest.raises(DataError, match=r"not among the 2 known ones: dog \(pictures: 2\)\. Known are cat, owl"):
        read_labelled(folder, classes=["cat", "owl"])
    with pytest.raises(DataError, match="2 of the known classes are called cat"):  # as ImageNet has two cranes
        read_labelled(folder, classes=["cat", "dog", "cat"])


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    return lay(tmp_path, "in/a.png", "in/b.png", "in/c.png", "in/d, e.png", "ü.png")


def test_a_csv(pictures):
    text = f'path,label,patient\nin/a.png, cat ,p1\n"in/d, e.png",dog,p2\n\n{pictures}/in/c.png,cat,p1\nü.png,dög,p2\n'
    for encoding in ("utf-8", "utf-8-sig"):
        path = write_csv(pictures, text.replace("\n", "\r\n"), encoding=encoding, newline="")
        labelled = read_labelled(path, group="patient")
        assert words(labelled) == {
            "in/a.png": "cat",
            "in/d, e.png": "dog",
            f"{pictures}/in/c.png": "cat",
            "ü.png": "dög",
        }
        assert labelled.classes == ("cat", "dog", "dög")
        first, second, third, fourth = labelled.groups
        assert first == third != second == fourth
        assert open_image(labelled.samples.source(2)).size == (8, 6)
    assert read_labelled(path).groups is None
    assert read_labelled(path, label="patient").classes == ("p1", "p2")
    assert labelled.samples.sample_id(0) == rng.sample_id(b"in/a.png")


def test_a_csv_with_several_labels(pictures, caplog):
    text = "path,label\nin/a.png,cat|dog\nin/b.png,\nin/c.png, dog | owl|\n"
    with caplog.at_level(logging.WARNING, "maehub"):
        labelled = read_labelled(write_csv(pictures, text))
    assert "1 have none" not in caplog.text
    assert "of 3 pictures 2 have several labels (the first in line 2)" in caplog.text
    assert labelled.multi_label
    assert labelled.labels.tolist() == [[True, True, False], [False, False, False], [False, True, True]]
    assert labelled.counts.tolist() == [1, 2, 1]
    mapped = read_labelled(write_csv(pictures, text), classes=["owl", "ant", "dog", "cat"])
    assert words(mapped) == {"in/a.png": ["dog", "cat"], "in/b.png": [], "in/c.png": ["owl", "dog"]}
    assert labelled.take(np.array([2])).without_empty_classes().classes == ("dog", "owl")
    one = read_labelled(write_csv(pictures, "path,label\nin/a.png,cat\nin/b.png,\n"))
    assert (one.classes, one.labels.tolist()) == (("cat",), [[True], [False]])
    assert "of 2 pictures 1 have none (the first in line 3)" in caplog.text
    with pytest.raises(DataError, match="of one class, cat"):  # nothing to tell it from
        read_labelled(write_csv(pictures, "path,label\nin/a.png,cat|cat\nin/b.png,cat\n"))
    with pytest.raises(DataError, match="none of 1 pictures has a label"):
        read_labelled(write_csv(pictures, "path,label\nin/a.png,\n"))


def test_a_picture_that_stands_there_twice(pictures, caplog):
    labelled = read_labelled(write_csv(pictures, "path,label\nin/a.png,cat\nin/b.png,dog\n./in//a.png,cat\n"))
    assert words(labelled) == {"in/a.png": "cat", "in/b.png": "dog"}
    assert "1 lines name a picture again" in caplog.text
    with pytest.raises(DataError, match=r"line 4: in/a\.png stands in line 2 too, with the label 'cat'.*'dog'.*\|"):
        read_labelled(write_csv(pictures, "path,label\nin/a.png,cat\nin/b.png,dog\nin/a.png,dog\n"))
    with pytest.raises(DataError, match=r"line 3: in/a\.png stands in line 2 too, with the who 'x' there and 'y' here"):
        read_labelled(write_csv(pictures, "path,label,who\nin/a.png,cat,x\nin/a.png,cat,y\n"), group="who")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("path,class\nin/a.png,cat\n", "no column 'label'; its first line names 'path', 'class'.*--label"),
        ("in/a.png,cat\nin/b.png,dog\n", "no column 'path'; its first line names 'in/a.png', 'cat'"),
        ("path;label\nin/a.png;cat\n", "no column 'path'.*put commas between columns"),
        ("path,label,label\nin/a.png,cat,x\n", "line 1: the column 'label' stands there twice"),
        ("path,label\nin/a.png,cat\nin/gone.png,dog\n", r"line 3: there is no file .*in/gone\.png"),
        ("path,label\nin/a.png,cat\nin/b.png,dog,x\n", "line 3: it has 3 cells and the first line 2"),
        ("path,label\nin/a.png\n", "line 2: it has 1 cells"),
        ("path,label\n,cat\n", "line 2: its column 'path' is empty"),
        ("path,label\nin/a\0.png,cat\n", "line 2: .*(no file|NUL)"),
        ('path,label\nin/a.png,"cat\n', "line 2: unexpected end of data"),
        ("path,label\n", "0 images in .*labels.csv"),
        ("", "0 images in .*labels.csv"),
        ("path,label\nin/a.png,cat\nin/b.png,cat\n", "of one class, cat"),
        ("path,label,split\nin/a.png,cat,train\nin/b.png,dog,maybe\n", "line 3: the split 'maybe' is not one of train"),
        ("path,label,split\nin/a.png,cat,\nin/b.png,dog,val\n", "line 2: its column 'split' is empty"),
    ],
)
def test_csvs_that_cannot_be_used(pictures, text, match):
    path = write_csv(pictures, text)
    with pytest.raises(DataError, match=match) as raised:
        read_labelled(path)
    assert raised.value.exit_code == 5
    assert str(path) in str(raised.value)


def test_columns_of_a_csv_that_are_not_there(pictures):
    path = write_csv(pictures, "path,label,who\nin/a.png,cat,x\nin/b.png,dog,\n")
    with pytest.raises(UsageError, match="no column 'patient'; its first line names 'path', 'label', 'who'"):
        read_labelled(path, group="patient")
    with pytest.raises(UsageError, match="no column 'species'"):
        read_labelled(path, label="species")
    with pytest.raises(DataError, match="line 3: its column 'who' is empty"):
        read_labelled(path, group="who")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_labelled(write_csv(pictures, "path,label\nü.png,x\n", encoding="latin-1"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_labelled(pictures / "gone.csv")


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards(tmp_path):
    write_tar(tmp_path / "s" / "0.tar", [("p1/a", 3), ("p2/b", 10), ("p1/c", 3)])
    write_tar(tmp_path / "s" / "1.tar", [("p1/d", 10)])
    labelled = read_labelled(tmp_path / "s", index_dir=tmp_path / "index")
    assert labelled.classes == ("3", "10")  # by number, not by letter
    assert labelled.labels.tolist() == [0, 1, 0, 1]
    shard = read_labelled(f"{tmp_path}/s/{{0,1}}.tar", group="shard").groups
    assert shard[0] == shard[1] == shard[2] != shard[3]
    folder = read_labelled(tmp_path / "s", group="1").groups
    assert folder[0] == folder[2] == folder[3] != folder[1]
    names = [f"class {number}" for number in range(12)]
    (tmp_path / "s" / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8-sig")
    assert read_labelled(tmp_path / "s").classes == ("class 3", "class 10")
    assert read_labelled(tmp_path / "s", classes=names).labels.tolist() == [3, 10, 3, 10]
    for group, match in (("2", "has 1 folders in its name"), ("who", "--group who is no level of shards")):
        with pytest.raises(UsageError, match=match):
            read_labelled(tmp_path / "s", group=group)


def test_shards_that_cannot_be_used(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a", 0), ("b", None)])
    with pytest.raises(DataError, match=r"0\.tar, member b\.png: it has no \.cls member"):
        read_labelled(path)
    write_tar(path, [("a", 0), ("b", -1)])
    with pytest.raises(DataError, match=r"member b\.png: it has the class -1"):
        read_labelled(path)
    write_tar(path, [("a", 0), ("b", "cat")])
    with pytest.raises(DataError, match="not a whole number"):
        read_labelled(path)
    write_tar(path, [("a", 0), ("b", 2)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"member b\.png: it has the class 2, and classes\.txt .* names 2"):
        read_labelled(path)
    (tmp_path / "classes.txt").write_text("cat\ndog\ncat\n")
    with pytest.raises(DataError, match=r"classes\.txt, line 3: 'cat' stands there twice"):
        read_labelled(path)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield datasets
    datasets.enable_progress_bars()


def test_tables(tmp_path, quiet):
    names = quiet.ClassLabel(names=["zebra", "ant", "bee"])
    made = table({"label": [2, 0, 2, 0], "who": ["x", "y", "y", "x"]}, label=names)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "file.parquet")
    for place in (tmp_path / "saved", tmp_path / "file.parquet"):
        labelled = read_labelled(place, group="who", index_dir=tmp_path / "index")
        assert labelled.classes == ("zebra", "bee")  # in the order of the ClassLabel, those with a picture
        assert labelled.labels.tolist() == [1, 0, 1, 0]
        first, second, third, fourth = labelled.groups
        assert first == fourth != second == third
        assert labelled.samples.source(3).getvalue() == png(3)
        assert read_labelled(place, classes=["ant", "bee", "zebra"]).labels.tolist() == [1, 2, 1, 2]
    with pytest.raises(UsageError, match="no column 'patient' beside the pictures; it has: label, who"):
        read_labelled(tmp_path / "saved", group="patient")
    made.select([3, 0]).save_to_disk(tmp_path / "some")  # an index over the table
    assert words(read_labelled(tmp_path / "some")) == {"0": "zebra", "1": "bee"}


@pytest.mark.parametrize(
    ("cells", "classes", "labels"),
    [
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([["b", "a"], [], ["b"]], ("a", "b"), [[True, True], [False, False], [False, True]]),
    ],
)
def test_kinds_of_labels_in_a_table(tmp_path, quiet, cells, classes, labels):
    table({"class": cells}).save_to_disk(tmp_path / "saved")
    labelled = read_labelled(tmp_path / "saved")
    assert labelled.classes == classes
    assert labelled.labels.tolist() == labels


def test_the_column_of_labels(tmp_path, quiet):
    names = quiet.ClassLabel(names=["a", "b"])
    table({"kind": [0, 1], "id": [7, 8]}, kind=names).save_to_disk(tmp_path / "one")
    assert read_labelled(tmp_path / "one").classes == ("a", "b")
    assert read_labelled(tmp_path / "one", label="id").classes == ("7", "8")
    table({"fine_label": [0, 1], "coarse_label": [0, 0]}, fine_label=names, coarse_label=names).save_to_disk(
        tmp_path / "cifar"
    )
    assert read_labelled(tmp_path / "cifar").labels.tolist() == [0, 1]
    table({"kind": [0, 1], "sort": [0, 1]}, kind=names, sort=names).save_to_disk(tmp_path / "two")
    table({"id": [0, 1]}).save_to_disk(tmp_path / "none")
    with pytest.raises(
        UsageError, match=r"two \(kind, sort\) several may hold labels: kind, sort\. Name one by --label"
    ):
        read_labelled(tmp_path / "two")
    with pytest.raises(UsageError, match=r"none \(id\) none is known to hold labels"):
        read_labelled(tmp_path / "none")
    with pytest.raises(UsageError, match="no column 'gone'"):
        read_labelled(tmp_path / "none", label="gone")


def test_rows_without_a_label(tmp_path, quiet):
    table({"label": ["a", None, "b"]}).save_to_disk(tmp_path / "null")
    with pytest.raises(DataError, match="null, row 1: its column 'label' holds nothing"):
        read_labelled(tmp_path / "null")
    table({"label": [0, -1]}, label=quiet.ClassLabel(names=["a"])).save_to_disk(tmp_path / "hidden")
    with pytest.raises(DataError, match="hidden, row 1: its column 'label' holds -1, no label"):
        read_labelled(tmp_path / "hidden")
    table({"label": [0.5, 1.5]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match=r"numbers, row 0: its column 'label' holds 0\.5, no label"):
        read_labelled(tmp_path / "numbers")
    table({"label": ["a", "b"], "who": ["x", None]}).save_to_disk(tmp_path / "nobody")
    with pytest.raises(DataError, match="nobody, row 1: its column 'who' holds nothing"):
        read_labelled(tmp_path / "nobody", group="who")
