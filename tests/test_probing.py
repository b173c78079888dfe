"""Probes of frozen features, and their comparison, on pictures whose classes are textures."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import maehub
from maehub.cli.parsing import parsed
from maehub.data import inner_parts, splits
from maehub.errors import DataError, UsageError
from maehub.models.encoder import PRESETS, Encoder, EncoderConfig
from maehub.train.evaluation.linear import sweep
from maehub.train.probing import probing
from maehub.train.probing.comparing import compare
from maehub.train.probing.config import CompareConfig, KnnConfig, ProbeConfig
from maehub.train.probing.probing import extract, fast_probe, knn, open_for, probe, probe_sweep, read_split

TINY, CLASSES = "untrained/vit-tiny", ("dots", "plain", "stripes")
PLAIN = {"quiet": True, "workers": 0, "device": "cpu"}
QUIET = PLAIN | {"skip_twins": True}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", EncoderConfig(32, 8, 3, 32, 2, 2))
    monkeypatch.setattr(probing, "sweep", partial(sweep, strengths=(1.0, 0.1, 0.01)))  # a fifth of the time


def texture(name, generator):
    """A picture of (32, 32, 3): the class is in the texture, and the colour says nothing."""
    rows, columns = np.mgrid[:32, :32] / 32
    phase = generator.uniform(0, 6.28)
    wave = {
        "plain": 0 * columns,
        "stripes": np.sin(phase + 25 * columns),
        "dots": np.sin(phase + 25 * columns) * np.sin(25 * rows),
    }[name]
    picture = generator.uniform(80, 170, 3) + 60 * wave[..., None] + generator.normal(0, 12, (32, 32, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def write(folder, count, seed=0):
    generator = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            texture(name, generator).save(folder / name / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 training and 12 test pictures a class, the split given."""
    base = tmp_path_factory.mktemp("textures")
    write(base / "train", 16, 1)
    write(base / "val", 12, 2)
    return base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny encoder in a folder, so that it does not follow from a seed."""
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("models") / "tiny"
    maehub.save(Encoder(EncoderConfig(32, 8, 3, 32, 2, 2)), place)
    return str(place)


class TestProbe:
    def test_it_finds_textures_in_a_network_and_not_in_colours(self, folder, model):
        found = probe(ProbeConfig(folder, model, **QUIET))
        assert found.scores.n == 36
        assert found.scores.top1 > 70
        assert found.scores.low < found.scores.top1 < found.scores.high
        assert found.n_train == 48
        assert probe(ProbeConfig(folder, "baseline/colours", **QUIET)).scores.top1 < found.scores.top1

    def test_it_is_what_the_parts_give_by_hand(self, folder, model):
        found = probe(ProbeConfig(folder, model, pool="mean", layer=(0,), **QUIET))
        encoder = maehub.load(model)

        def features(side):
            paths = [path for name in CLASSES for path in sorted((folder / side / name).iterdir())]
            images = torch.stack([encoder.preprocess(Image.open(path)) for path in paths])
            return encoder.features(images, pool="mean", layers=[0])[:, 0].detach().double().numpy()

        train, test = features("train"), features("val")
        scaler = StandardScaler().fit(train)
        peer = LogisticRegression(C=1 / (found.strength * 48), tol=1e-8, max_iter=10_000)
        peer.fit(scaler.transform(train), np.repeat([0, 1, 2], 16))
        right = peer.predict(scaler.transform(test)) == np.repeat([0, 1, 2], 12)
        assert found.scores.top1 == pytest.approx(100 * right.mean())
        assert (found.pool, found.layer) == ("mean", 0)

    def test_nothing_is_chosen_on_the_test_pictures(self, folder, model):
        config = ProbeConfig(folder, model, sweep=True, **QUIET)
        backbone, split = open_for(config, model, 0), read_split(config, 0)
        features = extract(config, backbone, split, range(2))
        honest, fit = fast_probe(config, backbone, split, features, 0)
        generator = np.random.default_rng(0)
        lied = replace(split.testing, labels=generator.permutation(split.testing.labels))
        other = features._replace(testing=torch.randn_like(features.testing))
        misled, other_fit = fast_probe(config, backbone, split._replace(testing=lied), other, 0)
        assert torch.equal(fit.weight, other_fit.weight)
        assert honest.chosen == misled.chosen
        assert honest.scores.top1 > misled.scores.top1

    def test_the_best_combination_on_the_training_pictures_is_taken(self, folder, model):
        found = probe(ProbeConfig(folder, model, **QUIET))
        assert [row.pool for row in found.chosen.combinations] == ["cls", "mean", "cls+mean"]
        assert {row.layer for row in found.chosen.combinations} == {1}
        taken = max(found.chosen.combinations, key=lambda row: row.accuracy)
        assert (found.pool, found.layer, found.strength) == (taken.pool, taken.layer, taken.setting)
        assert found.inner_accuracy == taken.accuracy
        assert "5-fold cross-validation of 48" in found.chosen.by

    def test_with_many_training_pictures_one_inner_split_decides(self, folder, model, monkeypatch):
        monkeypatch.setattr(splits, "_FEW", 40)
        found = probe(ProbeConfig(folder, model, pool="mean", **QUIET))
        assert found.chosen.by == "9 of 48 training pictures, which were not fitted to"

    def test_a_group_is_on_one_side_of_every_inner_split(self, folder):
        config = ProbeConfig(folder, TINY, **QUIET)
        training = read_split(config, 0).training
        training = replace(training, groups=np.arange(48) % 8)
        for fitted, held in inner_parts(training, 0)[0]:
            assert not set(training.groups[fitted]) & set(training.groups[held])

    def test_the_seed_is_that_of_the_split_that_is_made(self, folder):
        config = ProbeConfig(folder / "train", TINY, val_share=0.25, **QUIET)
        one, same, other = (probe(replace(config, seed=seed)) for seed in (0, 0, 1))
        assert one.scores.n == 12
        assert one.scores == same.scores
        assert one.scores != other.scores

    def test_twins_across_the_split_are_told(self, folder, tmp_path, caplog):
        for side in ("train", "val"):
            (tmp_path / side).mkdir()
            for name in CLASSES:
                (tmp_path / side / name).symlink_to(folder / "train" / name)
        probe(ProbeConfig(tmp_path, "baseline/colours", **PLAIN))
        assert "100.0 % are in training too" in caplog.text
        caplog.clear()
        probe(ProbeConfig(tmp_path, "baseline/colours", **QUIET))
        assert "in training" not in caplog.text

    def test_several_labels_a_picture(self, folder, tmp_path):
        rows = ["path,label"]
        for side in ("train", "val"):
            for name in CLASSES:
                labels = {"dots": "dots|waves", "stripes": "waves", "plain": ""}[name]
                rows += [f"{path},{labels}" for path in sorted((folder / side / name).iterdir())]
        (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
        found = probe(ProbeConfig(tmp_path / "labels.csv", TINY, **QUIET))
        assert found.scores.multi_label
        assert found.scores.mean_average_precision > 60
        near = knn(KnnConfig(tmp_path / "labels.csv", TINY, **QUIET))
        assert near.scores.multi_label

    def test_it_prints_and_draws_itself_and_is_json(self, folder, model):
        found = probe(ProbeConfig(folder, model, **QUIET))
        text = str(found)
        assert "n = 36" in text
        assert "95 % interval" in text
        assert "48 training pictures" in text
        assert [line.split()[-1] for line in text.splitlines() if line.endswith("*")] == ["*"]
        assert found._repr_html_().count("<table>") == 5
        facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert {"top1", "n", "low", "high", "strength", "pool", "layer", "combinations"} <= set(facts)


class TestModelFolder:
    def test_what_is_written_classifies_as_the_probe_did(self, folder, model, tmp_path):
        from maehub.train import EvaluateConfig, evaluate

        found = probe(ProbeConfig(folder, model, pool="cls", out=tmp_path / "probe", **QUIET))
        assert json.loads((tmp_path / "probe" / "probe.json").read_text()) == found.to_dict()
        classifier = maehub.load(tmp_path / "probe")
        assert classifier.config.class_names == CLASSES
        again = evaluate(EvaluateConfig(folder, tmp_path / "probe", **PLAIN))
        assert again.scores.confusion.tolist() == found.scores.confusion.tolist()
        assert again.scores.loss == pytest.approx(found.scores.loss, abs=1e-4)
        assert "Top-1" in (tmp_path / "probe" / "model" / "README.md").read_text()

    def test_of_an_encoder_that_was_trained_on_the_mean(self, folder, tmp_path):
        torch.manual_seed(0)
        maehub.save(Encoder(EncoderConfig(32, 8, 3, 32, 2, 2, classes=5, pool="mean")), tmp_path / "model")
        found = probe(ProbeConfig(folder, tmp_path / "model", out=tmp_path / "probe", **QUIET))
        assert found.pool == "mean"
        classifier = maehub.load(tmp_path / "probe")
        assert classifier.config.classes == 3
        backbone = open_for(ProbeConfig(folder), str(tmp_path / "model"), 0)
        images = torch.randn(4, 3, 32, 32)
        expected = backbone.features(images) @ classifier.head.weight.T + classifier.head.bias
        assert torch.allclose(classifier(images), expected, atol=1e-4)

    @pytest.mark.parametrize(
        ("flags", "why"),
        [
            ({"pool": "mean"}, "--pool cls gives one"),
            ({"pool": "cls", "layer": (0,)}, "the probe sees layer 0"),
            ({"model": "baseline/pixels"}, "not one of maehub's own"),
        ],
    )
    def test_what_is_no_one_network_is_not_written(self, folder, model, tmp_path, flags, why):
        found = probe(ProbeConfig(folder, **({"model": model, "out": tmp_path / "probe"} | flags), **QUIET))
        assert why in found.note
        assert why in str(found)
        assert [path.name for path in (tmp_path / "probe").iterdir()] == ["probe.json"]

    def test_a_folder_in_use_is_refused_before_any_work(self, folder, tmp_path):
        (tmp_path / "probe.json").write_text("{}")
        with pytest.raises(UsageError, match="exists and is not empty"):
            probe(ProbeConfig("no-such-data", "no-such-model", out=tmp_path, **QUIET))
        found = probe(ProbeConfig(folder, "baseline/colours", out=tmp_path, overwrite=True, **QUIET))
        assert json.loads((tmp_path / "probe.json").read_text())["top1"] == found.scores.top1


class TestSweep:
    def test_a_row_of_each_and_one_test_score_a_model(self, folder, model, tmp_path):
        names = (model, "baseline/pixels")
        found = probe_sweep(ProbeConfig(folder, names, sweep=True, out=tmp_path / "s", **QUIET))
        assert [result.model for result in found.results] == list(names)
        rows = {(row.layer, row.pool) for row in found.results[0].chosen.combinations}
        assert rows == {(layer, pool) for layer in (0, 1) for pool in ("cls", "mean", "cls+mean")}
        lines = str(found).splitlines()
        assert sum("n = 36" in line for line in lines) == 2
        for result in found.results:
            accuracies = {(row.pool, row.layer): row.accuracy for row in result.chosen.combinations}
            assert accuracies[result.pool, result.layer] == max(accuracies.values())
            alone = probe(ProbeConfig(folder, result.model, pool=result.pool, layer=(result.layer,), **QUIET))
            assert alone.scores == result.scores
        assert json.loads((tmp_path / "s" / "probe.json").read_text()) == json.loads(json.dumps(found.to_dict()))
        assert found._repr_html_().count("<tr>") == 1 + 6 + 1

    def test_only_the_layers_and_the_pool_that_are_named(self, folder, model):
        found = probe_sweep(ProbeConfig(folder, model, sweep=True, layer=(-1, 0), pool="mean", **QUIET))
        assert [(row.layer, row.pool) for row in found.results[0].chosen.combinations] == [(1, "mean"), (0, "mean")]

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ({"model": (TINY, "no-such-model")}, "no-such-model"),
            ({"model": (TINY, "baseline/pixels"), "pool": "mean"}, "offers the pools own, and not --pool mean"),
            ({"model": (TINY, "baseline/pixels"), "layer": (1,)}, "layers from -1 to 0, and 1"),
        ],
    )
    def test_what_the_last_model_lacks_is_said_before_any_work(self, folder, monkeypatch, flags, words):
        monkeypatch.setattr(probing, "extract", lambda *_: pytest.fail("worked"))
        with pytest.raises(UsageError, match=words):
            probe_sweep(ProbeConfig(folder, sweep=True, **flags, **QUIET))


class TestKnn:
    def test_votes_and_choices(self, folder, model, tmp_path):
        found = knn(KnnConfig(folder, model, out=tmp_path / "knn.json", **QUIET))
        assert found.scores.n == 36
        assert found.scores.top1 > 50
        taken = max(found.inner, key=lambda trial: (trial.accuracy, trial.neighbours))
        assert found.neighbours == taken.neighbours
        assert [trial.neighbours for trial in found.inner] == [1, 5, 10, 20]  # below 48
        assert {row.pool for row in found.chosen.combinations} == {"cls", "mean", "cls+mean"}
        assert json.loads((tmp_path / "knn.json").read_text())["neighbours"] == found.neighbours
        named = knn(KnnConfig(folder, model, pool=found.pool, neighbours=found.neighbours, **QUIET))
        assert named.scores == found.scores
        assert knn(KnnConfig(folder, model, neighbours=1000, **QUIET)).neighbours == 48  # no more can vote
        assert "n = 36" in str(found)
        assert "NEIGHBOURS" in found._repr_html_()

    def test_a_picture_that_is_known_is_its_own_neighbour(self, folder, tmp_path):
        for side in ("train", "val"):
            (tmp_path / side).symlink_to(folder / "train")
        assert knn(KnnConfig(tmp_path, TINY, neighbours=1, **QUIET)).scores.top1 == 100


class TestCompare:
    def test_the_cells_are_what_the_protocols_give(self, folder, model, tmp_path):
        found = compare(CompareConfig(folder, (model, "baseline/pixels"), out=tmp_path / "c", **QUIET))
        assert found.cell(model, "probe").top1 == probe(ProbeConfig(folder, model, **QUIET)).scores.top1
        near = knn(KnnConfig(folder, "baseline/pixels", **QUIET)).scores
        cell = found.cell("baseline/pixels", "knn")
        assert (cell.top1, *cell.interval, cell.n) == (near.top1, near.low, near.high, 36)
        assert "n = 36 test pictures; 48 training pictures, the split that was given" in str(found)
        assert json.loads((tmp_path / "c" / "compare.json").read_text()) == json.loads(json.dumps(found.to_dict()))
        assert found._repr_html_().count("<tr>") == 3

    def test_several_seeds(self, folder):
        config = CompareConfig(folder / "train", (TINY,), protocol="probe", seeds=(0, 1), val_share=0.25, **QUIET)
        cell = compare(config).cell(TINY, "probe")
        single = [
            probe(ProbeConfig(folder / "train", TINY, val_share=0.25, seed=seed, **QUIET)).scores for seed in range(2)
        ]
        assert cell.top1 == pytest.approx(np.mean([scores.top1 for scores in single]))
        assert cell.deviation == pytest.approx(np.std([scores.top1 for scores in single], ddof=1))
        assert cell.interval.low == pytest.approx(np.mean([scores.low for scores in single]))

    def test_trained_weights_on_a_given_split_are_computed_once(self, folder, model, monkeypatch):
        from maehub.train.probing import comparing

        calls = []
        monkeypatch.setattr(comparing, "extract", lambda config, backbone, *rest: calls.append(backbone.name) or extract(config, backbone, *rest))  # fmt: skip  # noqa: E501
        compare(CompareConfig(folder, (model, TINY), protocol="knn", seeds=(0, 1), **QUIET))
        assert calls == [model, TINY, TINY]

    def test_fine_tuning_is_a_column(self, folder, model, tmp_path):
        config = CompareConfig(
            folder, (model, "baseline/pixels"), protocol="finetune,knn", steps=2, out=tmp_path / "c", **QUIET
        )
        found = compare(config)
        cell = found.cell(model, "finetune")
        run = tmp_path / "c" / cell.runs[0].settings["run"]
        assert cell.top1 == json.loads((run / "scores.json").read_text())["scores"]["top1"]
        assert found.cell("baseline/pixels", "finetune") is None
        assert str(found).splitlines()[2].split()[1] == "–"
        assert str(found).splitlines()[0].split() == ["MODEL", "FINE-TUNED", "K-NN"]
        with pytest.raises(UsageError, match="not empty"):
            compare(config)

    def test_data_or_a_model_that_is_not_there_leaves_no_folder(self, folder, tmp_path):
        with pytest.raises(DataError):
            compare(CompareConfig(tmp_path / "missing", out=tmp_path / "new", **QUIET))
        with pytest.raises(UsageError):
            compare(CompareConfig(folder, ("vit-nothing",), out=tmp_path / "new", **QUIET))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lars", "attentive"])
def test_the_probes_that_are_trained(folder, model, tmp_path, method):
    found = probe(ProbeConfig(folder, model, method=method, out=tmp_path / "run", **QUIET))
    assert found.scores.n == 36
    assert found.scores.top1 > 50
    assert (found.method, found.out, found.strength) == (method, tmp_path / "run", None)
    assert f"{method}" in str(found)
    assert (tmp_path / "run" / "report.html").exists()


def test_one_class_cannot_be_probed(folder, tmp_path):
    (tmp_path / "only").symlink_to(folder / "train" / "dots")
    with pytest.raises(DataError):
        probe(ProbeConfig(tmp_path, TINY, **QUIET))


class TestFlags:
    def read(self, kind, words):
        return parsed("probe", kind, ["DATA", *words.split()])

    def test_models_and_layers(self):
        assert self.read(ProbeConfig, "").model == ("vit-nano",)
        config = self.read(ProbeConfig, "--sweep -m a -m timm/b@c.pth --layer 0 -1 --image-size 96")
        assert (config.model, config.layer, config.image_size) == (("a", "timm/b@c.pth"), (0, -1), (96,))
        assert self.read(KnnConfig, "-k 5").neighbours == 5
        compared = self.read(CompareConfig, "-m a -m b --protocol probe,knn --seeds 0 1")
        assert (compared.model, compared.protocols, compared.seeds) == (("a", "b"), ("probe", "knn"), (0, 1))
        assert self.read(CompareConfig, "--seed 4").seeds == (4,)

    @pytest.mark.parametrize(
        ("kind", "words", "why"),
        [
            (ProbeConfig, "-m a -m b", "several --model need --sweep"),
            (ProbeConfig, "--layer 0 1", "several --layer need --sweep"),
            (ProbeConfig, "--method lars", "name one by --out"),
            (ProbeConfig, "--method attentive -o x --layer 0", "the last layer of one model"),
            (ProbeConfig, "--val-share 1", "above 0 and below 1"),
            (ProbeConfig, "--image-size 0", "--image-size must be"),
            (KnnConfig, "-k 0", "--neighbours must be"),
            (KnnConfig, "--temperature 0", "--temperature must be"),
            (KnnConfig, "-o x.csv", "written as .json"),
            (CompareConfig, "--protocol probe,svm", "probe, knn, finetune with commas"),
            (CompareConfig, "--protocol finetune", "by --out"),
            (CompareConfig, "--seeds 1 1", "different whole numbers"),
            (CompareConfig, "--epochs 1 --steps 1", "not both"),
        ],
    )
    def test_what_cannot_be(self, kind, words, why):
        with pytest.raises(UsageError, match=why):
            self.read(kind, words)

    def test_a_sweep_has_a_function_of_its_own(self, folder):
        with pytest.raises(UsageError, match="probe_sweep"):
            probe(ProbeConfig(folder, sweep=True, **QUIET))
