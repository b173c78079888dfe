"""Predictions of a classifier that can tell colours: against a plain forward, in files, and what is refused."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import maehub
from maehub.cli.parsing import parsed
from maehub.errors import DataError, UsageError
from maehub.images.preprocess import read_pixels
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.train.evaluation.config import PredictConfig
from maehub.train.evaluation.predicting import Predictions, predict

CLASSES = ("red", "green", "blue")


def tiny(classes=3, names=CLASSES, *, pool="mean", multi_label=False, seed=0):
    torch.manual_seed(seed)
    config = EncoderConfig(32, 8, 3, 32, 2, 2, classes=classes, class_names=names, pool=pool, multi_label=multi_label)
    return Encoder(config).eval()


def painted(folder, count=4, seed=0):
    """Noisy pictures of one colour each, and folders of them by the name of the colour."""
    rng = np.random.default_rng(seed)
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 90, (36, 40 + number, 3))
            pixels[:, :, place] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


def trained(folder, encoder=None):
    """The encoder with a head that least squares found for the pictures of a folder."""
    encoder = encoder or tiny()
    table = maehub.extract_features(encoder, folder, progress=False)
    truth = [CLASSES.index(os.path.basename(os.path.dirname(path))) for path in table.paths]
    rows = torch.cat([table.features, torch.ones(len(truth), 1)], dim=1).double()
    wanted = 6 * torch.eye(3, dtype=torch.float64)[truth]
    solution = torch.linalg.lstsq(rows.T @ rows + 1e-3 * torch.eye(rows.shape[1]), rows.T @ wanted).solution.float()
    encoder.head.weight.data, encoder.head.bias.data = solution[:-1].T.contiguous(), solution[-1]
    return encoder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return painted(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="module")
def model(photos):
    return trained(photos)


def one_by_one(encoder, paths):
    with torch.inference_mode():
        pixels = [torch.from_numpy(read_pixels(path, encoder.preprocess))[None] for path in paths]
        return torch.cat([encoder(encoder.preprocess.normalise(one)) for one in pixels]).double()


# --- what is predicted


def test_probabilities_are_those_of_a_plain_forward(model, photos, tmp_path):
    maehub.save(model, tmp_path / "model")
    found = predict(maehub.load(tmp_path / "model"), photos, batch_size=5)
    assert found.paths == [str(path) for path in sorted(photos.rglob("*.png"))]
    assert found.classes == CLASSES
    assert (len(found), found.probabilities.dtype, found.multi_label, found.skipped) == (12, np.float32, False, [])
    assert np.allclose(found.probabilities, one_by_one(model, found.paths).softmax(dim=1), atol=1e-6)
    named = [guesses[0].name for guesses in found.top(1)]
    assert named == [os.path.basename(os.path.dirname(path)) for path in found.paths]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_several_labels_have_a_probability_each(photos, pool):
    model = tiny(5, tuple("abcde"), pool=pool, multi_label=True)
    model.head.weight.data *= 8
    paths = sorted(photos.rglob("*.png"))
    found = predict(model, paths)
    assert found.multi_label
    assert np.allclose(found.probabilities, one_by_one(model, paths).sigmoid(), atol=1e-6)
    assert abs(found.probabilities.sum(axis=1) - 1).max() > 0.1


def test_every_source(model, photos):
    paths = sorted(photos.rglob("*.png"))[::3]
    images = [Image.open(path) for path in paths]
    with torch.inference_mode():
        wanted = model(torch.stack([model.preprocess(image) for image in images])).softmax(dim=1)
    for source in (images, [np.asarray(image) for image in images], torch.stack([model.preprocess(image) for image in images])):  # fmt: skip  # noqa: E501
        found = predict(model, source)
        assert np.allclose(found.probabilities, wanted, atol=1e-5)
        assert found.paths == ["0", "1", "2", "3"]
    assert np.allclose(predict(model, images[1]).probabilities, wanted[1:2], atol=1e-6)
    # A file goes through the quicker transform, which moves some pixels by a grey level.
    assert np.allclose(predict(model, str(paths[1])).probabilities, wanted[1:2], atol=1e-3)


def test_a_model_in_half_precision_predicts(photos):
    whole, half = (predict(tiny(seed=1).to(dtype), photos).probabilities for dtype in (torch.float32, torch.bfloat16))
    assert np.allclose(whole, half, atol=0.05)
    assert not np.array_equal(whole, half)


def test_classes_without_names_are_called_by_their_places(photos):
    found = predict(tiny(7, ()), photos, top=3)
    assert found.classes == tuple("0123456")
    assert [len(guesses) for guesses in found.top()] == [3] * 12


def test_the_order_of_guesses_is_that_of_probabilities_then_of_classes():
    rows = np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], np.float32)
    found = Predictions(["a", "b"], CLASSES, rows, False, [])
    assert [[guess.name for guess in guesses] for guesses in found.top()] == [["green", "red", "blue"], ["blue", "red", "green"]]  # fmt: skip  # noqa: E501
    assert found.top(1)[0][0] == ("green", 0.5)
    assert found.top(99) == found.top(3)


def test_bad_pictures_stop_it_or_are_skipped(model, photos, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    paths = [*sorted(photos.rglob("*.png"))[:2], bad]
    with pytest.raises(DataError, match="bad"):
        predict(model, paths)
    found = predict(model, paths, skip_bad=True)
    assert (len(found), [picture.path for picture in found.skipped]) == (2, [str(bad)])
    assert "1 skipped" in str(found)
    found.save(tmp_path / "found.csv")
    with open(tmp_path / "bad_files.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["path", str(bad)]
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["skipped"][0]["path"] == str(bad)


# --- in files and on paper


def test_a_csv_has_a_row_a_picture(model, photos, tmp_path):
    found = predict(model, photos, top=2)
    found.save(tmp_path / "found.csv")
    with open(tmp_path / "found.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "class1", "probability1", "class2", "probability2"]
    assert [row[0] for row in rows] == found.paths
    assert [row[1::2] for row in rows] == [[guess.name for guess in guesses] for guesses in found.top()]
    assert np.allclose([float(row[2]) for row in rows], found.probabilities.max(axis=1), rtol=1e-5)
    assert not (tmp_path / "bad_files.csv").exists()


def test_json_has_the_same(model, photos, tmp_path):
    found = predict(model, photos, top=2)
    found.save(tmp_path / "found.json")
    back = json.loads((tmp_path / "found.json").read_text())
    assert back == found.to_dict()
    assert (back["images"], back["classes"], back["multi_label"]) == (12, 3, False)
    assert [row["path"] for row in back["predictions"]] == found.paths
    assert [len(row["top"]) for row in back["predictions"]] == [2] * 12


def test_names_that_are_not_text_survive_in_files(model, photos, tmp_path):
    names = [b"caf\xe9.png", "猫,\n.png".encode()]
    paths = [os.path.join(os.fsencode(tmp_path), name) for name in names]
    for path in paths:
        Image.new("RGB", (40, 40)).save(os.fsdecode(path))
    found = predict(model, paths)
    for ending in ("csv", "json"):
        found.save(tmp_path / f"found.{ending}")
    with open(tmp_path / "found.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [os.fsencode(row[0]) for row in csv.reader(file)][1:] == paths
    back = json.loads((tmp_path / "found.json").read_text())
    assert [os.fsencode(row["path"]) for row in back["predictions"]] == paths
    str(found).encode()
    found._repr_html_().encode()


def test_a_file_is_only_replaced_when_asked_for(model, photos, tmp_path):
    found = predict(model, photos)
    place = tmp_path / "found.csv"
    place.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        found.save(place)
    assert place.read_text() == "mine"
    found.save(place, overwrite=True)
    assert place.read_text().startswith("path,class1")
    for wrong in ("found.txt", "found", "nowhere/found.csv"):
        with pytest.raises(UsageError):
            found.save(tmp_path / wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.csv"]


def test_the_table_has_the_first_pictures():
    rows = np.tile(np.array([[0.7, 0.2, 0.1]], np.float32), (50, 1))
    found = Predictions([f"{'deep/' * 20}{n}.png" for n in range(50)], ("<b>", "猫", "\udcff"), rows, False, [], 2)
    lines = str(found).splitlines()
    assert lines[0].split() == ["PICTURE", "TOP", "1", "2"]
    assert lines[1].startswith("…")
    assert "/0.png" in lines[1]
    assert "70.0 % <b>" in lines[1]
    assert lines[-1] == "… and 30 more pictures"
    assert len(lines) == 22
    html = found._repr_html_()
    assert "<b>" not in html
    assert "70.0 % &lt;b&gt;" in html


# --- what is refused


def test_a_model_without_a_head_predicts_nothing(photos):
    with pytest.raises(UsageError, match="maehub finetune"):
        predict(tiny(0, ()), photos)
    with pytest.raises(UsageError, match="top"):
        predict(tiny(), photos, top=0)
    with pytest.raises(DataError):
        predict(tiny(), photos / "nothing")


def test_the_flags_of_the_command(tmp_path):
    words = [
        "a.png",
        "b/",
        "-m",
        "runs/x",
        "-o",
        str(tmp_path / "p.csv"),
        "--top",
        "3",
        "--skip-bad",
        "--image-size",
        "64",
    ]
    config = parsed("predict", PredictConfig, words)
    assert config == PredictConfig(
        pictures=("a.png", "b/"), model="runs/x", out=tmp_path / "p.csv", top=3, skip_bad=True, image_size=(64,)
    )
    (tmp_path / "p.csv").touch()
    for wrong in (
        words,
        ["-m", "runs/x"],
        ["a.png"],
        ["a.png", "-m", "x", "--top", "0"],
        ["a.png", "-m", "x", "-o", "a.txt"],
    ):
        with pytest.raises(UsageError):
            parsed("predict", PredictConfig, wrong)
    assert parsed("predict", PredictConfig, [*words, "--overwrite"]).overwrite
