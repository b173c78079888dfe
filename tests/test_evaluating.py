"""Evaluation of a classifier that tells colours: against a plain forward and scikit-learn; files; what is refused."""

import csv
import json
import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics
from test_predicting import CLASSES, one_by_one, painted, tiny, trained

import maehub
from maehub.cli.parsing import parsed
from maehub.errors import DataError, UsageError
from maehub.train.evaluation.config import EvaluateConfig
from maehub.train.evaluation.evaluating import MEMBERS, evaluate, worst_mistakes
from maehub.train.evaluation.scores import wilson

SORTED = ("blue", "green", "red")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of pictures, the second with some in the wrong class: nobody can be right about those."""
    root = tmp_path_factory.mktemp("data")
    painted(root / "set" / "train", 4)
    painted(root / "set" / "val", 6, seed=1)
    for number in range(3):
        os.rename(root / f"set/val/red/{number}.png", root / f"set/val/green/red-{number}.png")
    return root / "set"


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    """A model folder."""
    place = tmp_path_factory.mktemp("models") / "colours"
    maehub.save(trained(photos / "train"), place)
    return place


def measured(data, model, **more):
    return evaluate(EvaluateConfig(data=str(data), model=str(model), device="cpu", quiet=True, **more))


# --- what is measured


def test_it_measures_what_a_plain_forward_gives(photos, model):
    found = measured(photos / "val", model)
    paths = sorted((photos / "val").rglob("*.png"))
    logits = one_by_one(maehub.load(model), paths)
    truth = np.array([CLASSES.index(path.parent.name) for path in paths])
    assert found.scores.n == len(paths) == 18
    assert (
        found.scores.top1 == pytest.approx(100 * metrics.accuracy_score(truth, logits.argmax(dim=1))) == 100 * 15 / 18
    )
    assert (found.scores.low, found.scores.high) == wilson(15, 18)
    assert np.array_equal(found.scores.confusion, metrics.confusion_matrix(truth, logits.argmax(dim=1)))
    assert found.scores.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(truth)).item(), rel=1e-4)  # fmt: skip  # noqa: E501
    assert [row.name for row in found.scores.per_class] == list(CLASSES)  # in the order of the head
    assert found.scores.per_class[1] == ("green", 9, 6, pytest.approx(100 * 6 / 9), 100, None, "red", 3)
    assert found.files == ()


def test_val_is_what_is_measured_where_there_is_one(photos, model, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "maehub"):
        found = measured(photos, model)
    assert found.scores == measured(photos / "val", model).scores
    assert found.data == str(photos / "val")
    assert f"measured on {photos / 'val'}, 18 pictures" in caplog.text
    assert measured(photos / "train", model).scores.n == 12
    os.symlink(photos / "val", tmp_path / "val")
    assert measured(tmp_path, model).scores == found.scores  # no train beside it


def test_of_a_csv_the_rows_that_are_not_train(photos, model, tmp_path):
    rows = [
        (path, path.parent.name, side) for side in ("train", "val") for path in sorted((photos / side).rglob("*.png"))
    ]
    for header, name in (("path,label,split", "sides.csv"), ("path,what,site", "groups.csv")):
        (tmp_path / name).write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    assert measured(tmp_path / "sides.csv", model).scores == measured(photos / "val", model).scores
    every = measured(tmp_path / "groups.csv", model, label="what", group="site")
    assert every.scores.n == 30
    assert every.scores.interval == "Wilson over 2 groups"


def test_a_class_without_pictures_is_no_hindrance(photos, model, tmp_path):
    os.symlink(photos / "val" / "green", tmp_path / "green")
    found = measured(tmp_path, model)
    assert found.scores.top1 == pytest.approx(100 * 6 / 9)
    assert [row.n for row in found.scores.per_class] == [0, 9, 0]
    assert found.scores.balanced_accuracy == pytest.approx(100 * 6 / 9)


def test_another_size_and_other_batches(photos, model):
    usual = measured(photos / "val", model).scores
    in_small_batches = measured(photos / "val", model, batch_size=4, workers=1).scores
    for name, value in usual.summary().items():
        assert getattr(in_small_batches, name) == (
            pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        )
    larger = measured(photos / "val", model, image_size=(48, 40)).scores
    assert larger.n == 18
    assert larger.loss != pytest.approx(usual.loss, rel=1e-5)


def test_pictures_of_their_own_size(photos, model, tmp_path):
    encoder = maehub.load(model)
    encoder.preprocess = replace(encoder.preprocess, resize="native")
    maehub.save(encoder, tmp_path / "native")
    paths = sorted((photos / "val").rglob("*.png"))
    found = measured(photos / "val", tmp_path / "native")
    wanted = one_by_one(encoder, paths).argmax(dim=1)
    assert found.scores.top1 == pytest.approx(100 * np.mean([CLASSES[w] == p.parent.name for w, p in zip(wanted, paths, strict=True)]))  # fmt: skip  # noqa: E501


# --- classes


def test_classes_that_the_model_does_not_know_are_listed(photos, model, tmp_path):
    for name in ("red", "teal", "violet"):
        os.symlink(photos / "val" / "red", tmp_path / name)
    with pytest.raises(DataError, match=r"teal.*violet") as caught:
        measured(tmp_path, model)
    assert "blue" in str(caught.value)


def test_a_model_without_names_is_not_guessed_about(photos, model, tmp_path):
    """Folders called by words have no certain order; `test_foreign_classifiers` has those that have."""
    encoder = trained(photos / "train")
    encoder.config = replace(encoder.config, class_names=())
    maehub.save(encoder, tmp_path / "unnamed")
    with pytest.raises(DataError, match=r"does not name its 3 classes, and .* has 3: blue, green, red.*--classes-from"):
        measured(photos / "val", tmp_path / "unnamed")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    found = measured(photos / "val", tmp_path / "unnamed", classes_from=tmp_path / "names.txt")
    assert found.scores == measured(photos / "val", model).scores
    (tmp_path / "two").mkdir()
    for name in ("green", "red"):
        os.symlink(photos / "val" / name, tmp_path / "two" / name)
    with pytest.raises(DataError, match=r"does not name its 3 classes, and .* has 2"):
        measured(tmp_path / "two", tmp_path / "unnamed")


def test_a_model_without_a_head_is_told_what_trains_one(photos, tmp_path):
    maehub.save(tiny(0, ()), tmp_path / "encoder")
    with pytest.raises(UsageError, match="no head") as caught:
        measured(photos, tmp_path / "encoder")
    assert "maehub finetune DATA -m MODEL -o RUN" in str(caught.value)


def several(photos, place):
    """A CSV in which a picture has its colour and whether its number is odd."""
    rows = [
        f"{path},{path.parent.name}{'|odd' if int(path.stem) % 2 else ''}" for path in (photos / "train").rglob("*.png")
    ]
    place.write_text("\n".join(["path,label", *rows]))
    return place


def test_several_labels(photos, tmp_path):
    data = several(photos, tmp_path / "several.csv")
    encoder = tiny(4, ("blue", "green", "odd", "red"), multi_label=True, seed=2)
    encoder.head.weight.data *= 5
    maehub.save(encoder, tmp_path / "model")
    found = measured(data, tmp_path / "model", out=tmp_path / "out")
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    paths = [row["name"] for row in rows]
    truth = np.array([[name in row["true"].split("|") for name in encoder.config.class_names] for row in rows])
    assert truth.sum() == 12 + 6
    shares = one_by_one(encoder, paths).sigmoid().numpy()
    assert found.scores.mean_average_precision == pytest.approx(100 * metrics.average_precision_score(truth, shares), rel=1e-5)  # fmt: skip  # noqa: E501
    assert found.scores.macro_f1 == pytest.approx(100 * metrics.f1_score(truth, shares >= 0.5, average="macro", zero_division=0))  # fmt: skip  # noqa: E501
    said = [
        [name for name, share in zip(encoder.config.class_names, row, strict=True) if share >= 0.5] for row in shares
    ]
    assert [row["predicted"] for row in rows] == ["|".join(names) for names in said]
    assert [path.name for path in found.files] == ["evaluation.json", "mistakes.png", "predictions.csv"]
    # Class folders are a case of it: one label each.
    assert measured(photos / "train", tmp_path / "model").scores.n == 12


def test_a_head_for_one_class_does_not_fit_several_labels(photos, model, tmp_path):
    data = several(photos, tmp_path / "several.csv")
    (tmp_path / "known.csv").write_text(data.read_text().replace("odd", "red"))
    with pytest.raises(UsageError, match="its head does not fit"):
        measured(tmp_path / "known.csv", model)


# --- mistakes


def test_the_worst_mistakes_come_first():
    logits = np.array([[2, 0, 0], [5, 1, 0], [0, 3, 0], [9, 0, 0], [0, 0, 1]], np.float32)
    labels = np.array([0, 1, 2, 1, 0])
    assert worst_mistakes(logits, labels).tolist() == [3, 1, 2, 4]
    assert worst_mistakes(logits, labels, 2).tolist() == [3, 1]
    assert worst_mistakes(logits, logits.argmax(axis=1)).tolist() == []
    truth = np.eye(3, dtype=bool)[labels]
    assert worst_mistakes(logits * 2 - 1, truth).tolist() == [3, 1, 2, 4]


# --- files


def test_a_folder_gets_everything(photos, model, tmp_path):
    found = measured(photos, model, out=tmp_path / "out")
    usual = [name for name in MEMBERS if name not in ("corruptions.png", "scatter.png")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(usual)
    assert found.files == tuple(tmp_path / "out" / name for name in usual)
    facts = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert facts == json.loads(json.dumps(found.to_dict()))
    assert (facts["n"], facts["model"], facts["top1"]) == (18, str(model), found.scores.top1)
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [
        str(p.relative_to(photos / "val")) for p in sorted((photos / "val").rglob("*.png"))
    ]
    wrong = [row["name"] for row in rows if row["true"] != row["predicted"]]
    assert wrong == [f"green/red-{number}.png" for number in range(3)]
    shares = one_by_one(maehub.load(model), [photos / "val" / row["name"] for row in rows]).softmax(dim=1).amax(dim=1)
    assert np.allclose([float(row["probability"]) for row in rows], shares, rtol=1e-4)
    for name in ("confusion.png", "mistakes.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.mode == "RGB"
            assert min(picture.size) > 200


def test_equal_evaluations_are_equal_files(photos, model, tmp_path):
    for name in ("a", "b"):
        measured(photos, model, out=tmp_path / name)
    for name in (name for name in MEMBERS if name not in ("corruptions.png", "scatter.png")):
        both = [(tmp_path / out / name).read_bytes().replace(os.fsencode(tmp_path / out), b"") for out in "ab"]
        assert both[0] == both[1]


def test_no_mistakes_no_sheet(photos, model, tmp_path):
    measured(photos, model, out=tmp_path / "out")
    found = measured(photos / "train", model, out=tmp_path / "out", overwrite=True)
    assert found.scores.top1 == 100
    assert found.mistakes is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "confusion.png",
        "evaluation.json",
        "predictions.csv",
    ]


def test_a_folder_in_use_is_refused_before_any_work(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match="exists and is not empty"):
        measured(photos, tmp_path / "no model", out=tmp_path / "out")
    with pytest.raises(UsageError, match="so it is not overwritten"):
        measured(photos, tmp_path / "no model", out=tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_nothing_is_left_where_a_picture_is_broken(photos, model, tmp_path):
    bad = painted(tmp_path / "more", 1) / "red" / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match="bad"):
        measured(tmp_path / "more", model, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- as one sees it


def test_it_prints_as_a_table_and_draws_itself(photos, model, tmp_path):
    found = measured(photos, model, out=tmp_path / "out")
    text = str(found)
    assert text.startswith(f"{model} on {photos / 'val'}\n\ntop-1 ")
    assert "83.3 %" in text
    assert "red (3)" in text
    assert str(tmp_path / "out" / "mistakes.png") in text
    html = found._repr_html_()
    assert html.count("data:image/png;base64,") == 2
    assert "83.3 %" in html


def test_the_flags_of_the_command():
    words = ["photos/", "-m", "runs/x", "-o", "out", "--image-size", "64", "48", "--group", "2", "--overwrite"]
    config = parsed("evaluate", EvaluateConfig, words)
    assert (config.data, config.model, str(config.out), config.image_size) == ("photos/", "runs/x", "out", (64, 48))
    assert (config.group, config.label, config.overwrite, config.device) == ("2", None, True, "auto")
    for wrong in (["photos/"], ["-m", "x"], [*words, "--batch-size", "0"], [*words, "--workers", "-1"], ["d", "-m", "x", "--image-size", "0"]):  # fmt: skip  # noqa: E501
        with pytest.raises(UsageError):
            parsed("evaluate", EvaluateConfig, wrong)
