"""What a search takes, what it passes over and says so; layouts that are a split, and those that only look like one."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from labelled_files import lay, png, read_labelled, table, write_csv
from PIL import Image

from maehub.cli import command_line as cli
from maehub.data.inspection import check_data
from maehub.data.label_sources import split_word
from maehub.data.labels import given_folders
from maehub.data.shards import find_shards
from maehub.data.sources import find_images, find_samples
from maehub.data.splits import measured_folder, measured_part, split_labelled
from maehub.errors import DataError

CASES = Path(__file__).parent / "data" / "cases"


def encoded(kind, **options):
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).resize((32, 32)).save(file, kind, **options)
    return file.getvalue()


def heic():
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.open(io.BytesIO(encoded("PNG")))).save(file)
    return file.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """As phones, browsers and rotating programs leave them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    files = {
        "a.JPG": encoded("JPEG"),
        "b.avif": encoded("AVIF"),
        "c.jp2": encoded("JPEG2000"),
        "noending": encoded("PNG"),
        "d.png.1": encoded("PNG"),
        "e.jpg?width=200": encoded("JPEG"),
        "f.HEIC": heic(),
        "g.heif": heic(),
        "notes": b"BMW and other cars, P3 too",
        "list.txt": b"a.JPG",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


READ = [b"a.JPG", b"b.avif", b"c.jp2", b"d.png.1", b"e.jpg?width=200", b"f.HEIC", b"g.heif", b"noending"]
PASSED_OVER = {".txt": 1, "": 1}


def test_pictures_are_known_by_content_where_the_ending_says_nothing(mixed, caplog):
    samples = find_images(mixed)
    assert [samples.names[index] for index in range(len(samples))] == READ
    assert samples.passed_over == PASSED_OVER
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "passed over: 1 " in record.getMessage()
    assert "1 .txt" in record.getMessage()
    assert "1 without an ending" in record.getMessage()


def test_data_check_says_what_was_passed_over(mixed, capsys):
    assert cli.main(["data", "check", str(mixed), "--json", "--workers", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"], told["readable"]) == (8, 8)
    assert told["passed_over"] == PASSED_OVER
    assert told["formats"] == {"JPEG": 2, "PNG": 2, "HEIF": 2, "AVIF": 1, "JPEG2000": 1}


def test_heic_names_the_extra_where_it_is_not_installed(mixed):
    hidden = "import sys; sys.modules['pillow_heif'] = None; "
    code = hidden + "from maehub.cli.command_line import main; sys.exit(main(sys.argv[1:]))"
    check = [sys.executable, "-c", code, "data", "check", "--workers", "0", "--json"]
    done = subprocess.run([*check, mixed], capture_output=True, text=True)
    assert json.loads(done.stdout)["passed_over"] == {".heic": 1, ".heif": 1, **PASSED_OVER}
    assert "(to read HEIC: pip install 'maehub[formats]')" in done.stderr
    (mixed / "f.HEIC").rename(mixed / "f.jpg")
    done = subprocess.run([*check, mixed], capture_output=True, text=True)
    assert done.returncode == 5
    (bad,) = json.loads(done.stdout)["bad"]
    assert bad["reason"].endswith("it is HEIC, which takes: pip install 'maehub[formats]'")


COMMANDS = {
    "features": ["features", "DATA/train", "-m", "vit-nano", "-o", "OUT.npz"],
    "knn": ["knn", "DATA", "-m", "vit-nano", "--neighbours", "1"],
    "predict": ["predict", "DATA/train", "-m", "untrained/vit-nano", "--classes", "2"],
    "pretrain": ["pretrain", "DATA/train", "-o", "OUT", "--model", "vit-nano", "--steps", "1", "--workers", "0"],
}


@pytest.mark.parametrize("command", ["features", "knn", "pretrain"])
def test_commands_say_what_was_passed_over(tmp_path, capsys, caplog, command):
    for part in ("train", "val"):
        lay(tmp_path / part, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
        for name in ("notes.txt", "more.txt", "clip.mov"):
            (tmp_path / part / "a" / name).write_bytes(b"")
    words = [word.replace("DATA", str(tmp_path)).replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command]]
    assert cli.main([*words, "--json"]) == 0
    parts = 2 if command == "knn" else 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["passed_over"] == {".txt": 2 * parts, ".mov": parts}
    assert caplog.text.count("passed over: 2 .txt, 1 .mov") == parts


def test_harmless_oddities_are_counted(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG") + b"a film")
    (tmp_path / "b.jpg").write_bytes(encoded("JPEG"))
    for workers in (0, 1):
        found = check_data(tmp_path, workers=workers)
        assert found.warnings == {"bytes after its end": 1}
        assert found.to_dict()["warnings"] == 1
        assert "1 with bytes after its end, which does no harm" in found.describe()


def test_junk_of_storage_boxes_is_passed_over_and_named(tmp_path, caplog):
    folder = lay(tmp_path / "d", "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    lay(folder, "@eaDir/cat/0.png/thumb.png", "cat/@eaDir/1.png/thumb.png", "__MACOSX/dog/0.png")
    assert read_labelled(folder).classes == ("cat", "dog")
    assert find_samples(folder).passed_over == {"@eaDir/": 2, "__MACOSX/": 1}
    assert "passed over: 2 @eaDir/, 1 __MACOSX/" in caplog.text


# --- shards


def test_members_whose_names_have_more_dots_are_counted_with_the_rule(caplog):
    with pytest.raises(DataError, match=r"0 images .*found 20 \.\*\.jpg, .*a\.b\.jpg is no \.jpg"):
        find_shards(str(CASES / "dots.tar"))
    samples = find_shards(str(CASES / "somedots.tar"))
    assert len(samples) == 4
    assert samples.passed_over[".*.jpg"] == 16
    assert "16 .*.jpg" in caplog.text
    assert "name it a_b.jpg" in caplog.text


def test_what_was_passed_over_is_kept_with_the_index(tmp_path):
    for _ in range(2):
        assert find_shards(str(CASES / "somedots.tar"), tmp_path).passed_over[".*.jpg"] == 16


def test_an_archive_behind_another_is_refused():
    with pytest.raises(DataError, match=r"behind its end more follows, .*join tars by `tar -A`"):
        find_shards(str(CASES / "concat.tar"))


def test_an_archive_inside_another_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("a.png", "inner.tar"):
            data = png()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert find_shards(str(tmp_path / "s.tar")).passed_over == {".tar": 1}


# --- one class, however it is written


def test_white_space_and_unicode_forms_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folder = lay(tmp_path / "d", f"{decomposed}/0.png", f"{composed}/1.png", "tea/0.png", "tea/1.png")
    assert read_labelled(folder).classes == (composed, "tea")
    text = f"path,label\n{decomposed}/0.png,{decomposed}\n{composed}/1.png,{composed}\ntea/0.png,tea\n"
    assert read_labelled(write_csv(folder, text)).classes == (composed, "tea")


def test_the_case_of_a_table_with_spaces():
    labelled = read_labelled(CASES / "spaces.parquet")
    assert len(labelled.classes) == 2
    assert all(name == name.strip() for name in labelled.classes)
    assert labelled.counts.min() > 0


def test_a_negative_number_in_a_table_is_no_label(tmp_path):
    table({"label": [0, 1, -1]}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"holds -1, no label"):
        read_labelled(tmp_path / "d")


# --- splits


@pytest.mark.parametrize(
    ("name", "word"),
    [
        *(("train", "train"), ("Training", "training"), ("seg_train", "train"), ("val2017", "val"), ("TEST", "test")),
        *(("train-set", "train"), ("Dev", "dev"), ("my.eval", "eval"), ("testing_data", "testing")),
        *(("trains", None), ("strain", None), ("contest", None), ("validity", None), ("seg_pred", None)),
    ],
)
def test_words_of_a_split(name, word):
    assert split_word(name) == word


@pytest.mark.parametrize(
    ("training", "testing"), [("Training", "Testing"), ("seg_train", "seg_test"), ("TRAIN", "Val"), ("train", "dev")]
)
def test_a_split_in_other_words(tmp_path, training, testing):
    folder = lay(tmp_path / "d", *(f"{training}/{name}/{n}.png" for name in ("ant", "cat") for n in range(3)))
    lay(folder, *(f"{testing}/{name}/9.png" for name in ("ant", "cat")), "@eaDir/x.png")
    split = split_labelled(folder)
    assert not split.made
    assert split.training.classes == ("ant", "cat")
    assert (len(split.training), len(split.testing)) == (6, 2)
    assert measured_folder(str(folder)) == os.path.join(folder, testing)
    assert len(measured_part(folder)) == 2


def test_val_is_for_measuring_and_test_only_without_it(tmp_path, caplog):
    folder = lay(tmp_path / "d", *(f"{side}/{name}/1.png" for side in ("train", "test", "valid") for name in "ab"))
    assert given_folders(str(folder)).testing.endswith("valid")
    split_labelled(folder)
    assert "test in" in caplog.text
    assert "is not read" in caplog.text


def test_a_train_is_a_thing_in_pictures(tmp_path, caplog):
    """Not every folder beside it is a word of a split, or they hold pictures themselves."""
    vehicles = lay(tmp_path / "v", *(f"{name}/{n}.png" for name in ("bus", "train", "tram") for n in range(3)))
    assert read_labelled(vehicles).classes == ("bus", "train", "tram")
    assert "the folders train are taken for classes" in caplog.text
    flat = lay(tmp_path / "f", *(f"{name}/{n}.png" for name in ("train", "test") for n in range(3)))
    assert given_folders(str(flat)) is None
    assert read_labelled(flat).classes == ("test", "train")
    deep = lay(tmp_path / "e", *(f"{name}/x/{n}.png" for name in ("bus", "train", "test") for n in range(3)))
    assert read_labelled(deep).classes == ("bus", "test", "train")


def test_parts_of_a_split_that_do_not_fit_together_are_refused(tmp_path):
    folder = lay(tmp_path / "d", *(f"{side}/{name}/1.png" for side in ("val", "test") for name in "ab"))
    with pytest.raises(DataError, match="all are called like parts of a split, and which"):
        split_labelled(folder)
    twice = lay(tmp_path / "t", *(f"{side}/{name}/1.png" for side in ("train", "train2017", "val") for name in "ab"))
    with pytest.raises(DataError, match="train, train2017, val: all are called"):
        split_labelled(twice)
