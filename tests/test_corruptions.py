"""Robustness to common corruptions: errors counted again by hand, a baseline to divide by, and what is refused."""

import json
import statistics
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluating import measured
from test_evaluating import model as model
from test_evaluating import photos as photos
from test_predicting import CLASSES
from test_predicting import tiny as tiny

import maehub
from maehub.cli.command_line import main
from maehub.errors import IntegrityError, UsageError
from maehub.images import Preprocess, read_pixels
from maehub.train.evaluation.corruptions import SEVERITIES, read_baseline, spoilt_pixels

library = pytest.importorskip("imagecorruptions")
NAMES = library.get_corruption_names()


@pytest.fixture(scope="module")
def found(photos, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations") / "one"
    return measured(photos / "val", model, corruptions=True, out=folder, workers=0)


def test_errors_are_those_of_a_plain_forward_on_spoilt_pictures(found, photos, model):
    errors = found.robustness.errors
    assert tuple(errors) == tuple(NAMES)
    assert len(NAMES) == 15
    encoder = maehub.load(model)
    paths = sorted((photos / "val").rglob("*.png"))
    truth = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    for name, severity in (("gaussian_noise", 5), ("fog", 3), ("contrast", 5), ("pixelate", 1)):
        pixels = [spoilt_pixels(path, encoder.preprocess, name=name, severity=severity) for path in paths]
        with torch.no_grad():
            logits = encoder(encoder.preprocess.normalise(torch.from_numpy(np.stack(pixels))))
        wrong = 100 * (logits.argmax(dim=1) != truth).float().mean().item()
        assert errors[name][severity - 1] == pytest.approx(wrong)
    assert found.robustness.clean == pytest.approx(100 - found.scores.top1)
    everything = [value for row in errors.values() for value in row]
    assert len(everything) == 75
    assert found.robustness.mean_error == pytest.approx(statistics.mean(everything))
    assert found.robustness.mean_corruption_error is None


def test_a_picture_is_spoilt_the_same_way_each_time_and_more_at_higher_severities(photos):
    path, preprocess = next((photos / "val").rglob("*.png")), Preprocess.evaluation(64)
    clean = read_pixels(path, preprocess).astype(float)
    for name in NAMES:
        one, again = (spoilt_pixels(path, preprocess, name=name, severity=3) for _ in range(2))
        assert np.array_equal(one, again)
        assert (one.shape, one.dtype) == ((64, 64, 3), np.uint8)
        assert not np.array_equal(one, clean)
    noise = [spoilt_pixels(path, preprocess, name="gaussian_noise", severity=number) - clean for number in SEVERITIES]
    assert np.all(np.diff([np.abs(one).mean() for one in noise]) > 0)


def test_it_prints_a_table_and_writes_a_picture(found):
    text = str(found)
    assert "SEVERITY 5" in text
    assert "jpeg compression" in text
    assert f"{found.robustness.mean_error:.1f} % of spoilt ones" in text
    folder = found.files[0].parent
    told = json.loads((folder / "evaluation.json").read_text())["corruptions"]
    assert told["errors"]["fog"] == list(found.robustness.errors["fog"])
    assert told["mean_error"] == pytest.approx(found.robustness.mean_error)
    with Image.open(folder / "corruptions.png") as picture:
        assert picture.size[0] > 400


def test_the_mean_corruption_error_is_relative_to_a_named_baseline(found, photos, model):
    folder = found.files[0].parent
    told = json.loads((folder / "evaluation.json").read_text())
    told["model"] = "twice-as-bad"
    told["corruptions"]["errors"] = {name: [2.0 * number for number in SEVERITIES] for name in NAMES}
    other = folder.parent / "other"
    other.mkdir()
    (other / "evaluation.json").write_text(json.dumps(told))
    errors = dict.fromkeys(NAMES, (1.0, 2.0, 3.0, 4.0, 5.0)) | {"fog": (0.0, 0.0, 0.0, 0.0, 30.0)}
    compared = read_baseline(other, NAMES, 18).compare(10.0, errors)
    assert compared.relative["snow"] == pytest.approx(50)
    assert compared.relative["fog"] == pytest.approx(100)
    assert compared.mean_corruption_error == pytest.approx((14 * 50 + 100) / 15)
    assert "mean corruption error 53.3 % of twice-as-bad's" in str(compared)
    assert "OF THE BASELINE'S" in str(compared)
    with pytest.raises(UsageError, match="18 pictures and this on 17"):
        read_baseline(other, NAMES, 17)
    told["corruptions"] = None
    (other / "evaluation.json").write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="no evaluation with --corruptions"):
        read_baseline(other, NAMES, 18)
    told["corruptions"] = {"errors": dict.fromkeys(NAMES, [0.0] * 5)}
    (other / "evaluation.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match="no errors"):
        read_baseline(other, NAMES, 18)


def test_what_cannot_be_spoilt_is_refused_before_any_work(photos, model, tmp_path, capsys, monkeypatch):
    line = ["evaluate", str(photos / "val"), "-m", str(model), "-o", str(tmp_path / "out")]
    assert main([*line, "--corruptions", "--image-size", "16"]) == 2
    assert "32 pixels or more" in capsys.readouterr().err
    grey = maehub.Encoder(maehub.EncoderConfig(32, 8, 1, 16, 1, 2, classes=3, class_names=CLASSES))
    maehub.save(grey, tmp_path / "grey")
    assert main([*line[:3], str(tmp_path / "grey"), "--corruptions"]) == 2
    assert "these have 1 channels" in capsys.readouterr().err
    monkeypatch.setattr(maehub.Encoder, "forward", lambda *_: pytest.fail("computed"))
    assert main([*line, "--baseline", str(tmp_path)]) == 4  # which is no evaluation
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert main([*line, "--corruptions"]) == 2
    assert "maehub[corruptions]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
