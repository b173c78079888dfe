"""Numbers as labels: read, measured against scipy and scikit-learn, predicted by ridge, neighbours and fine-tuning."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.torch import load_file
from sklearn import linear_model, metrics
from test_finetuning import Killed, at_step, kill, losses, settings_of
from test_head_start import logits_of
from test_head_start import weights as weights
from test_publishing import REPO, held
from test_publishing import hub as hub

import maehub
from maehub.cli import command_line as cli
from maehub.data.labels import find_labelled
from maehub.data.splits import folds, inner_split, split_labelled
from maehub.errors import DataError, UsageError
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.publishing.pushing import push
from maehub.train import CompareConfig, EvaluateConfig, KnnConfig, ProbeConfig, compare, evaluate, finetune, knn, probe
from maehub.train.engine import Group
from maehub.train.evaluation import fit_at, paired, score, score_of, surely_better, sweep
from maehub.train.evaluation.numbers import score_numbers
from maehub.train.finetuning import job as jobs
from maehub.train.finetuning.head_start import put_head

stats = pytest.importorskip("scipy.stats")

QUIET = {"device": "cpu", "quiet": True, "workers": 0, "skip_twins": True}
YEAR = 1990.0  # far from 0, beside how much it differs


def drawn(brightness, angle):
    """Stripes of an angle and a brightness."""
    rows, columns = np.mgrid[:40, :40] / 40
    wave = np.sin(12 * (np.cos(angle) * columns + np.sin(angle) * rows))
    return Image.fromarray((brightness * (127.5 + 120 * wave)).astype(np.uint8)).convert("RGB")


def fill(folder, count):
    """A CSV of pictures with two numbers of different size, a grade, a patient and a class."""
    (folder / "pictures").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        brightness, angle = generator.uniform(0.3, 1), generator.uniform(0, 1.5)
        drawn(brightness, angle).save(folder / "pictures" / f"{number}.png")
        grade = round(4 * (brightness - 0.3) / 0.7)
        rows.append([f"pictures/{number}.png", YEAR + 5 * brightness, angle / 1000, grade, f"p{number % 12}"])
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "year", "angle", "grade", "patient"], *rows])
    return folder / "table.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("numbers"), 60)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def regression(data, out, **changes):
    return settings_of(data, out, **{"task": "regression", "label": "year,angle"} | changes)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(folder, text, **given):
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "t.csv").write_text(text)
    return find_labelled(folder / "t.csv", numeric=True, **given).labelled


def test_columns_become_numbers(tmp_path):
    found = read(tmp_path, "path,x,label,y\na.png,-1.5,0,2e3\nb.png, 7 ,1,0\n", label="y, x")
    assert found.numeric
    assert not found.multi_label
    assert found.classes == ("y", "x")
    assert (found.labels == [[2000, -1.5], [0, 7]]).all()
    assert read(tmp_path, "path,label\na.png,3\nb.png,4\n").labels.tolist() == [[3], [4]]


@pytest.mark.parametrize("cell", ["", "n/a", "NaN", "inf", '"1,5"', "0x10", "1|2", "1_000"])
def test_a_cell_without_a_number_is_named(tmp_path, cell):
    with pytest.raises(DataError, match=r"1 cells hold no finite number: line 3, age") as caught:
        read(tmp_path, f"path,age\na.png,1\nb.png,{cell}\nc.png,2\n", label="age")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("text", "label", "error", "words"),
    [
        ("path,x\na.png,1\na.png,2\n", "x", DataError, "with the x '1' there and '2' here"),
        ("path,x\na.png,1\nb.png,2\n", "x,x", UsageError, "names a column twice"),
        ("path,x\na.png,1\nb.png,2\n", "x,z", UsageError, "has no column 'z'"),
        ("path,x\na.png,1\nb.png,2\n", None, DataError, "has no column 'label'"),
    ],
)
def test_columns_that_cannot_be(tmp_path, text, label, error, words):
    with pytest.raises(error, match=words):
        read(tmp_path, text, label=label)


def test_numbers_come_from_a_csv(tmp_path):
    (tmp_path / "red").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "red" / "a.png")
    with pytest.raises(UsageError, match=r"numbers are read from a \.csv"):
        split_labelled(tmp_path, numeric=True)
    for side in ("train", "val"):
        (tmp_path / "two" / side / "red").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "two" / side / "red" / "a.png")
    with pytest.raises(UsageError, match=r"numbers are read from a \.csv"):
        split_labelled(tmp_path / "two", numeric=True)


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_number_that_is_always_the_same_is_refused(tmp_path, side):
    rows = [f"{name}.png,{1 if where == side else number},{where}" for number, (name, where) in enumerate(
        zip("abcd", ("train", "train", "val", "val"), strict=True))]  # fmt: skip
    read(tmp_path, "path,x,split\n" + "\n".join(rows) + "\n", label="x")
    what = "train" if side == "train" else "measure"
    with pytest.raises(DataError, match=f"x is the same for all 2 pictures to {what} on"):
        split_labelled(tmp_path / "t.csv", label="x", numeric=True)


def test_splits_keep_groups_whole(table):
    split = split_labelled(table, label="year", group="patient", numeric=True)
    assert not set(split.training.groups) & set(split.testing.groups)
    assert 0.1 < len(split.testing) / 60 < 0.3
    inner = inner_split(split.training)
    assert not set(split.training.groups[inner.train]) & set(split.training.groups[inner.held])
    parts = folds(split.training, 5, 0)
    assert sorted(np.concatenate([part.held for part in parts]).tolist()) == list(range(len(split.training)))


# -- measuring ---------------------------------------------------------------------------------------------------------

GRADES = arrays.arrays(np.float64, 30, elements=st.integers(0, 6).map(float))
NUMBERS = arrays.arrays(np.float64, 30, elements=st.floats(-1e3, 1e3).map(lambda value: round(value, 2)))


@settings(max_examples=30, deadline=None)
@given(true=GRADES | NUMBERS, said=GRADES | NUMBERS)
def test_measures_are_those_of_scikit_learn_and_scipy(true, said):
    if np.ptp(true) == 0:
        with pytest.raises(DataError, match="is the same for all 30 pictures"):
            score_numbers(said[:, None], true[:, None], ["x"])
        return
    found = score_numbers(said[:, None], true[:, None], ["x"]).columns[0]
    assert found.r2.value == pytest.approx(metrics.r2_score(true, said), rel=1e-9, abs=1e-9)
    assert found.mae.value == pytest.approx(metrics.mean_absolute_error(true, said))
    assert found.rmse.value == pytest.approx(metrics.root_mean_squared_error(true, said))
    if np.ptp(said):
        assert found.spearman.value == pytest.approx(stats.spearmanr(true, said).statistic, abs=1e-9)
    else:
        assert found.spearman.value == 0
    if (true == true.round()).all() and np.ptp(true) <= 20:
        whole = [one.round().astype(int) for one in (true, said)]
        grades = list(range(min(map(min, whole)), max(map(max, whole)) + 1))
        expected = metrics.cohen_kappa_score(*whole, weights="quadratic", labels=grades)
        assert found.quadratic_kappa.value == pytest.approx(expected, abs=1e-9)
    else:
        assert found.quadratic_kappa is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator, inside = np.random.default_rng(0), 0
    for _ in range(25):
        true = generator.normal(size=80)
        found = score_numbers((true + generator.normal(size=80))[:, None], true[:, None], ["x"]).columns[0].mae
        inside += found.low <= math.sqrt(2 / math.pi) <= found.high
    assert inside >= 21


def test_intervals_are_over_groups(table):
    generator = np.random.default_rng(0)
    offsets = np.repeat(generator.normal(size=20), 10)  # of a patient, the same for all of its pictures
    true = generator.normal(size=200)
    apart = score_numbers((true + offsets)[:, None], true[:, None], ["x"])
    together = score_numbers((true + offsets)[:, None], true[:, None], ["x"], np.repeat(np.arange(20), 10))
    widths = [found.columns[0].mae.high - found.columns[0].mae.low for found in (apart, together)]
    assert widths[1] > 1.5 * widths[0]
    assert "20 groups" in together.interval
    few = score_numbers((true + offsets)[:, None], true[:, None], ["x"], np.repeat(np.arange(5), 40))
    assert few.columns[0].mae.low is None
    assert "fewer than 10 groups" in str(few)
    assert json.loads(json.dumps(few.to_dict()))["columns"][0]["r2"]["low"] is None


def test_grades_that_are_classes_have_a_kappa():
    generator = np.random.default_rng(0)
    truth, said = generator.integers(0, 5, (2, 80))
    found = score(np.eye(5)[said], truth, [str(number) for number in range(5)])
    assert found.quadratic_kappa == pytest.approx(metrics.cohen_kappa_score(truth, said, weights="quadratic"))
    assert "quadratic kappa" in str(found)
    assert score(np.eye(5)[said], truth, list("abcde")).quadratic_kappa is None


def test_who_is_nearer():
    truth = np.arange(20.0)[:, None]
    near, far = truth + 0.1, truth + np.where(np.arange(20) < 15, 1, 0.01)[:, None]
    found = paired(far, near, truth)
    assert (found.gained, found.lost) == (15, 5)
    assert "nearer in 15 pictures and further off in 5" in found.describe(numeric=True)
    assert surely_better(near, far, truth)
    assert not surely_better(far, near, truth)
    assert not surely_better(near, near, truth)


# -- ridge and neighbours ----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-3, 0.1, 10.0]), st.integers(1, 3))
def test_ridge_is_that_of_scikit_learn(seed, strength, columns):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(40, 6)) * 10.0 ** generator.integers(-2, 3, 6) + 5
    truth = features @ generator.normal(size=(6, columns)) + generator.normal(size=(40, columns)) + YEAR
    fit = fit_at(torch.from_numpy(features), truth, columns, strength)
    standardised = (features - features.mean(0)) / features.std(0)
    peer = linear_model.Ridge(alpha=strength * 40).fit(standardised, truth)
    said = fit.logits(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(said, peer.predict(standardised).reshape(40, columns), rtol=2e-4, atol=2e-2)


def test_a_sweep_finds_the_penalty_that_predicts_best():
    generator = np.random.default_rng(0)
    features, noise = generator.normal(size=(60, 50)), generator.normal(size=(60, 1))
    truth = features[:, :1] + 2 * noise
    parts = [(np.arange(40), np.arange(40, 60))]
    trials = sweep(torch.from_numpy(features), truth, 1, parts)
    for trial in trials[:3]:
        fit = fit_at(torch.from_numpy(features[:40]), truth[:40], 1, trial.strength)
        said = fit.logits(torch.from_numpy(features[40:])).numpy()
        assert trial.accuracy == pytest.approx(100 * metrics.r2_score(truth[40:], said), abs=0.05)
    best = max(trials, key=lambda trial: trial.accuracy)
    assert best.accuracy > trials[-1].accuracy + 10  # 50 features of 40 pictures need a penalty


def test_probe_and_neighbours(table, weights, tmp_path):
    common = QUIET | {"task": "regression", "label": "year,angle"}
    found = probe(ProbeConfig(str(table), (weights,), out=tmp_path / "probe", pool="cls", **common))
    assert found.scores.columns[0].r2.value > 0.8  # brightness is told by random features
    assert "ridge regression" in (tmp_path / "probe/model/README.md").read_text()
    split = split_labelled(table, label="year,angle", numeric=True)
    model = maehub.load(tmp_path / "probe")
    assert model.config.numeric
    assert model.config.class_names == ("year", "angle")
    said = logits_of(model, model.preprocess, split.testing)
    again = score_of(said, split.testing.labels, split.testing.classes)
    assert again.r2.value == pytest.approx(found.scores.r2.value, abs=1e-3)
    near = knn(KnnConfig(str(table), weights, neighbours=1, pool="cls", **common))
    assert 0.3 < near.scores.columns[0].r2.value <= 1
    assert "R²" in str(near)
    with pytest.raises(UsageError, match="--method lars is for classes"):
        ProbeConfig(str(table), (weights,), method="lars", out=tmp_path / "x", **common)
    both = compare(CompareConfig(str(table), (weights, "baseline/colours"), seeds=(0, 1), **common))
    cell = both.cell(weights, "probe")
    assert cell.to_dict()["r2"] == pytest.approx(100 * np.mean([run.scores.r2.value for run in cell.runs]))
    assert "R² in percent and its 95 % interval" in str(both)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"model": "untrained/timm/vit_tiny_patch16_224", "image_size": (32,)},
                                     {"recipe": "attentive"}, {"recipe": "official"}])  # fmt: skip
def test_the_network_starts_as_its_ridge(table, weights, changes):
    job = jobs.ClassifierJob(regression(table, "nowhere", **{"model": weights} | changes), Group(), 0.0)
    assert job.settings.head_start == "probe"
    held = job.split.training.take(job.inner[1])
    said = logits_of(job.measured, job.classifier.preprocess, held)
    spread = held.labels.std(axis=0)
    np.testing.assert_allclose(said / spread, job.probe.held / spread, atol=5e-3)
    again = job.build(job.open()).network
    put_head(again, job.probe.whole)
    testing = logits_of(again, job.classifier.preprocess, job.split.testing)
    np.testing.assert_allclose(testing / spread, job.probe.testing / spread, atol=5e-3)


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    """A run whose features tell little at first."""
    folder = tmp_path_factory.mktemp("trained")
    blind = Encoder(EncoderConfig(32, 16, 3, 8, 1, 1))
    torch.nn.init.zeros_(blind.patch_embed.proj.weight[2:])
    start = str(maehub.save(blind, folder / "blind"))
    changes = {"steps": 150, "batch_size": 16, "base_lr": 0.05, "layer_decay": 1.0, "validate_every": 150}
    return finetune(regression(table, folder / "run", model=start, **changes))


def test_a_run_predicts_better_than_its_ridge(trained, table):
    told = json.loads((trained.run / "scores.json").read_text())
    assert told["kept"] == trained.kept == "finetuned", told["chosen_by"]
    assert trained.scores.r2.value > trained.probe.r2.value
    assert (trained.run / "pictures/scatter.png").exists()
    page = (trained.run / "report.html").read_text()
    assert "exact sign test" in page
    assert "Predicted and true" in page
    assert "classes" not in json.loads((trained.run / "run.json").read_text())
    model, split = maehub.load(trained.run), split_labelled(table, label="year,angle", numeric=True)
    said = logits_of(model, model.preprocess, split.testing)
    assert score_of(said, split.testing.labels, ("year", "angle")).r2.value == pytest.approx(trained.scores.r2.value)


def test_what_a_run_exports_loads_in_timm(trained, table):
    timm = pytest.importorskip("timm")
    model = maehub.load(trained.run)
    peer = timm.create_model(f"local-dir:{trained.run / 'model'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(peer(images), model(images), rtol=1e-5, atol=1e-4)


def test_bf16_leaves_all_digits_of_a_number(trained):
    model, images = maehub.load(trained.run), torch.rand(8, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        years = model(images)[:, 0]
    assert years.dtype == torch.float32
    assert len(set(years.tolist())) == 8
    assert not torch.equal(years, years.bfloat16().float())


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_killed_run_is_resumed_bit_for_bit(table, weights, tmp_path, monkeypatch, step):
    changes = {"model": weights, "checkpoint_every": 3, "validate_every": 8}
    whole = finetune(regression(table, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            finetune(regression(table, tmp_path / "run", **changes))
    again = finetune(regression(table, tmp_path / "run", resume=True, **changes))
    assert losses(again.run) == losses(whole.run)
    first, second = (load_file(one.run / "model" / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UsageError, match="task"):
        finetune(settings_of(table, tmp_path / "run", resume=True, label="grade", **changes))


@pytest.mark.parametrize(
    "flags",
    [["--recipe", "linear"], ["--head-start", "zero"], ["--mixup", "0.2"], ["--smoothing", "0.1"],
     ["--class-weights", "balanced"]],
)  # fmt: skip
def test_what_is_for_classes_is_refused(table, tmp_path, capsys, flags):
    line = ["finetune", str(table), "-o", str(tmp_path / "run"), "-m", "untrained/vit-tiny", "--task", "regression"]
    assert cli.main([*line, "--label", "year", *flags]) == 2
    assert f"{flags[0]} {flags[1]} is for classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_too_few_pictures_are_refused(tmp_path):
    read(tmp_path, "path,x\na.png,1\nb.png,2\n", label="x")
    with pytest.raises(DataError, match=r"cannot be split|is the same for all 1 pictures"):
        finetune(regression(tmp_path / "t.csv", tmp_path / "run", label="x"))
    assert not (tmp_path / "run").exists()


# -- after it ----------------------------------------------------------------------------------------------------------


def test_a_model_is_evaluated_on_other_numbers(trained, table, tmp_path, caplog):
    found = evaluate(EvaluateConfig(str(table), str(trained.run), out=tmp_path / "e", device="cpu", quiet=True))
    assert found.scores.r2.value == pytest.approx(trained.scores.r2.value, abs=1e-6)  # the part that it held out
    rows = rows_of(tmp_path / "e" / "predictions.csv")
    assert list(rows[0]) == ["name", "true year", "predicted year", "true angle", "predicted angle"]
    assert len(rows) == found.scores.n
    assert (tmp_path / "e" / "scatter.png").exists()
    assert not (tmp_path / "e" / "confusion.png").exists()
    facts = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert facts["r2"] == found.scores.r2.value
    assert "<img" in found._repr_html_()
    on_model = {"device": "cpu", "quiet": True}
    whole = evaluate(EvaluateConfig(str(table), str(trained.run / "model"), **on_model))
    assert whole.scores.n == 60
    with pytest.raises(UsageError, match="predicts 2 numbers"):
        evaluate(EvaluateConfig(str(table), str(trained.run / "model"), label="year", **on_model))
    with pytest.raises(UsageError, match="of one class each"):
        evaluate(EvaluateConfig(str(table), str(trained.run / "model"), corruptions=True, **on_model))


def test_predictions_are_numbers(trained, table, tmp_path, capsys):
    pictures = [str(table.parent / "pictures" / f"{number}.png") for number in range(3)]
    assert cli.main(["predict", *pictures, "-m", str(trained.run), "-o", str(tmp_path / "p.csv")]) == 0
    rows = rows_of(tmp_path / "p.csv")
    assert list(rows[0]) == ["path", "year", "angle"]
    model = maehub.load(trained.run)
    split = find_labelled(table, label="year,angle", numeric=True).labelled
    said = logits_of(model, model.preprocess, split.take(np.arange(3)))
    assert [float(row["year"]) for row in rows] == pytest.approx(said[:, 0], abs=0.1)  # features may be bf16
    capsys.readouterr()
    assert cli.main(["predict", pictures[0], "-m", str(trained.run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["predictions"][0]["numbers"]) == {"year", "angle"}
    assert cli.main(["predict", pictures[0], "-m", str(trained.run)]) == 0
    assert "year" in capsys.readouterr().out


def test_the_command_tells_what_it_found(table, weights, tmp_path, capsys):
    line = [
        "finetune",
        str(table),
        "-o",
        str(tmp_path / "r"),
        "-m",
        weights,
        "--steps",
        "1",
        "--workers",
        "0",
        "--json",
    ]
    assert cli.main([*line, "--task", "regression", "--label", "grade", "--skip-twins", "--group", "patient"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"r2", "mae", "rmse", "spearman", "quadratic_kappa", "probe_r2", "kept", "n"} <= set(facts)


def test_a_configuration_of_both_kinds_is_refused():
    with pytest.raises(UsageError, match="one true at most"):
        EncoderConfig(32, 8, 3, 32, 2, 2, classes=2, multi_label=True, numeric=True)


def test_a_card_tells_what_is_predicted(trained, hub):
    push(trained.run, REPO, licence="mit", progress=False)
    card = ModelCard(held(hub)["README.md"].decode())
    (result,) = card.data.to_dict()["model-index"]
    (metric,) = result["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("r_squared", pytest.approx(trained.scores.r2.value, abs=1e-4))
    assert "For predicting year, angle" in card.text
    assert "| R² |" in card.text
    assert "top-1" not in card.text
    assert "--task regression" in card.text
    assert "--label COLUMN" in card.text
