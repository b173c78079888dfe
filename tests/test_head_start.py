"""A head that starts as the probe: step 0 is that probe, the better of the two is kept, and runs stay exact."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import CLASSES, TINY, Killed, at_step, fill, kill, losses, picture, settings_of
from test_finetuning import tiny as tiny

import maehub
from maehub.cli import command_line as cli
from maehub.data import inner_split
from maehub.data.splits import split_labelled
from maehub.errors import DataError, UsageError
from maehub.images import read_pixels
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.train import ProbeConfig, finetune, probe
from maehub.train.engine import Group
from maehub.train.evaluation import LinearFit, paired, score
from maehub.train.finetuning import job as jobs
from maehub.train.finetuning.head_start import HeadStart, head_of, put_head

TRAINED = {"steps": 60, "base_lr": 0.02, "batch_size": 16, "mixup": 0, "cutmix": 0, "randaugment": "none"}
TRAINED |= {"smoothing": 0, "drop_path": 0, "erasing": 0, "crop_scale": (0.6, 1), "warmup": 0.2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures"), range(20))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return str(maehub.save(Encoder(TINY), tmp_path_factory.mktemp("weights") / "tiny"))


def logits_of(network, preprocess, labelled):
    """Of all pictures at once, without the library's loops."""
    pixels = [read_pixels(labelled.samples.source(place), preprocess) for place in range(len(labelled))]
    with torch.no_grad():
        return network.eval()(preprocess.normalise(torch.from_numpy(np.stack(pixels)))).numpy()


def job_of(data, **changes):
    return jobs.ClassifierJob(settings_of(data, "nowhere", head_start="probe", **changes), Group(), 0.0)


@pytest.fixture(scope="module")
def usual(weights, pictures):
    return job_of(pictures, model=weights)


# -- step 0 ------------------------------------------------------------------------------------------------------------

STARTS = {
    "class token": {"pool": "cls"},
    "mean": {"pool": "mean"},
    "one block": {"blocks": 1},
    "average": {"ema": 0.9},
    "attentive": {"recipe": "attentive"},
    "timm": {"model": "untrained/timm/vit_tiny_patch16_224", "image_size": (32,)},
    "timm's convolutions": {"model": "untrained/timm/test_convnext", "image_size": (32,)},
}


@pytest.mark.parametrize("changes", STARTS.values(), ids=STARTS)
def test_the_network_starts_as_its_probe(weights, pictures, changes):
    job = job_of(pictures, **{"model": weights} | changes)
    network, preprocess = job.measured, job.classifier.preprocess
    held = logits_of(network, preprocess, job.split.training.take(job.inner[1]))
    np.testing.assert_allclose(held, job.probe.held, atol=1e-5 * np.abs(held).max())
    again = job.build(job.open()).network
    put_head(again, job.probe.whole)
    testing = logits_of(again, preprocess, job.split.testing)
    np.testing.assert_allclose(testing, job.probe.testing, atol=1e-5 * np.abs(testing).max())
    assert (testing.argmax(axis=1) == job.split.testing.labels).mean() > 0.5  # of random features


def test_what_the_head_sees_is_standardised(usual):
    seen = []
    head_of(usual.measured).linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits_of(usual.measured, usual.classifier.preprocess, usual.split.training)
    torch.testing.assert_close(seen[0].mean(dim=0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std(dim=0), torch.ones(32), atol=1e-3, rtol=0)


def test_it_is_the_probe_of_the_command(weights, pictures, tmp_path):
    """On the same pictures: the same split, transform, features and penalty."""
    job = job_of(pictures, model=weights, pool="cls")
    found = probe(
        ProbeConfig(str(pictures), model=(weights,), pool="cls", device="cpu", quiet=True, out=tmp_path / "p")
    )
    assert job.probe.whole.strength == found.strength
    there = maehub.load(tmp_path / "p").head
    torch.testing.assert_close(job.probe.whole.weight, there.weight.detach(), atol=1e-4, rtol=1e-3)
    testing = job.split.testing
    assert score(job.probe.testing, testing.labels, testing.classes).top1 == found.scores.top1


def test_what_chooses_is_not_trained_on(usual):
    names = [
        {labelled.samples.where(place) for place in range(len(labelled))}
        for labelled in (usual.training, usual.split.training.take(usual.inner[1]))
    ]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == len(usual.split.training)
    places = inner_split(usual.split.training, seed=0)
    assert names[1] == {usual.split.training.samples.where(place) for place in places.held}


def test_several_labels(tmp_path):
    fill(tmp_path, range(12))
    rows = [f"{kind}/{number}.png,{kind}{'|odd' if number % 2 else ''}" for kind in CLASSES for number in range(12)]
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    result = finetune(settings_of(table, tmp_path / "run", steps=2, head_start="probe"))
    assert result.probe.mean_average_precision is not None
    told = json.loads((result.run / "scores.json").read_text())
    assert "paired" not in told
    assert told["kept"] == result.kept


# -- which is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept_probe(weights, pictures, tmp_path_factory):
    """A run whose optimizer makes nothing of what it trains, whatever the processor rounds."""
    run = tmp_path_factory.mktemp("kept") / "run"

    def wiped(optimizer, *args, **options):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.zero_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", wiped)
        return finetune(settings_of(pictures, run, model=weights, head_start="probe", steps=20, blocks=2))


def test_a_run_that_gains_nothing_exports_the_probe(kept_probe, weights, pictures):
    told = json.loads((kept_probe.run / "scores.json").read_text())
    assert kept_probe.kept == told["kept"] == "probe"
    assert kept_probe.scores == kept_probe.probe
    model, testing = maehub.load(kept_probe.run), split_labelled(pictures, seed=0).testing
    logits = logits_of(model, model.preprocess, testing)
    assert 100 * (logits.argmax(axis=1) == testing.labels).mean() == pytest.approx(told["probe"]["top1"])
    before, after = load_file(f"{weights}/model.safetensors"), load_file(kept_probe.run / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("blocks."))
    card = (kept_probe.run / "model" / "README.md").read_text()
    assert "A linear probe on the frozen features" in card


def test_a_run_that_gains_exports_the_network(pictures, tmp_path, caplog):
    caplog.set_level(logging.INFO, "maehub")
    data = fill(tmp_path / "data", range(60))
    blind = Encoder(EncoderConfig(32, 16, 3, 8, 1, 1))  # eight features of a few patches tell little
    torch.nn.init.zeros_(blind.patch_embed.proj.weight[2:])
    start = str(maehub.save(blind, tmp_path / "blind"))
    changes = {"steps": 200, "layer_decay": 1.0, "base_lr": 0.05}
    result = finetune(settings_of(data, tmp_path / "run", head_start="probe", **TRAINED | changes | {"model": start}))
    told = json.loads((result.run / "scores.json").read_text())
    assert result.kept == told["kept"] == "finetuned", caplog.text
    assert result.scores.top1 > result.probe.top1
    assert told["scores"] == told["finetuned"]
    assert set(told["chosen_by"]) == {"probe", "finetuned", "n", "gained", "lost"}
    model, testing = maehub.load(result.run), split_labelled(data, seed=0).testing
    logits = logits_of(model, model.preprocess, testing)
    assert 100 * (logits.argmax(axis=1) == testing.labels).mean() == pytest.approx(result.scores.top1)
    page = (result.run / "report.html").read_text()
    assert "probe → fine-tuned" in page
    assert "McNemar" in page


def logits_for(labels, wrong, classes=3):
    """One-hot logits that are right but at the places ``wrong``."""
    said = np.array(labels)
    said[wrong] = (said[wrong] + 1) % classes
    return np.eye(classes, dtype=np.float32)[said]


@pytest.mark.parametrize(
    ("probe_wrong", "network_wrong", "kept"),
    [
        (range(9), range(0), "finetuned"),
        (range(2), range(1), "finetuned"),
        (range(4), range(4, 8), "probe"),  # as many, and as sure of them
        (range(0), range(1), "finetuned"),  # one picture, and its error is one
        (range(0), range(2), "probe"),
        (range(0), range(9), "probe"),
        (range(0), range(0), "probe"),  # the same logits
    ],
)
def test_the_network_is_kept_unless_the_probe_is_better_by_more_than_chance(pictures, probe_wrong, network_wrong, kept):
    testing = split_labelled(pictures, seed=0).testing
    right = logits_for(testing.labels, [])
    truth = np.arange(30) % 3
    fit = LinearFit(torch.zeros(3, 2), torch.zeros(3), 1.0)
    start = HeadStart(None, torch.zeros(2, 2), fit, fit, logits_for(truth, list(probe_wrong)), right)
    scores = score(right, testing.labels, testing.classes)
    assert start.against(scores, right, logits_for(truth, list(network_wrong)), truth, testing).kept == kept


def test_the_paired_test_is_the_exact_one():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    generator = np.random.default_rng(0)
    for n in (1, 5, 40, 3000):
        first, second = generator.random((2, n)) < [[0.5], [0.7]]
        truth = np.zeros(n, np.int64)
        found = paired(*(np.stack([right, ~right], axis=1).astype(float) for right in (first, second)), truth)
        assert (found.gained, found.lost) == (sum(second & ~first), sum(first & ~second))
        if found.gained + found.lost:
            assert math.isclose(found.p, binomtest(found.gained, found.gained + found.lost).pvalue, rel_tol=1e-9)
    assert paired(np.eye(3), np.eye(3), np.arange(3)).p == 1


def test_the_command_tells_both(weights, pictures, tmp_path, capsys):
    line = ["finetune", str(pictures), "-o", str(tmp_path / "run"), "-m", weights, "--steps", "1", "--workers", "0"]
    assert cli.main([*line, "--head-start", "probe", "--json", "--skip-twins"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["kept"] in ("probe", "finetuned")
    assert facts["probe_top1"] == pytest.approx(json.loads((tmp_path / "run/scores.json").read_text())["probe"]["top1"])


def test_where_nothing_can_be_held_out_no_probe_begins_it(weights, tmp_path, caplog):
    for side, numbers in (("train", range(2)), ("val", range(5, 9))):
        for kind in CLASSES:
            (tmp_path / side / kind).mkdir(parents=True)
            for number in numbers:
                picture(kind, number).save(tmp_path / side / kind / f"{number}.png")
    rows = [f"train/{kind}/{n}.png,{kind},{kind},train" for kind in CLASSES for n in range(2)]
    rows += [f"val/{kind}/{n}.png,{kind},{kind}v,val" for kind in CLASSES for n in range(5, 9)]
    (tmp_path / "t.csv").write_text("path,label,patient,split\n" + "\n".join(rows) + "\n")
    config = {"model": weights, "group": "patient", "steps": 1}
    with pytest.raises(DataError, match="cannot be split once more"):  # one group a class
        finetune(settings_of(tmp_path / "t.csv", tmp_path / "run", head_start="probe", **config))
    assert not (tmp_path / "run").exists()
    result = finetune(settings_of(tmp_path / "t.csv", tmp_path / "run", **config))
    assert result.probe is None
    assert "cannot be split once more" in caplog.text
    assert json.loads((result.run / "config.json").read_text())["settings"]["recipe"] == "official"


# -- runs stay exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_killed_run_is_resumed_bit_for_bit(weights, pictures, tmp_path, monkeypatch, step):
    settings = {"model": weights, "head_start": "probe", "steps": 8, "checkpoint_every": 3, "ema": 0.8}
    settings |= {"validate_every": 8}
    whole = finetune(settings_of(pictures, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            finetune(settings_of(pictures, tmp_path / "run", **settings))
    again = finetune(settings_of(pictures, tmp_path / "run", resume=True, **settings))
    assert losses(again.run) == losses(whole.run)
    first, second = (load_file(one.run / "model" / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (again.kept, again.probe) == (whole.kept, whole.probe)


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "linear"], "neither --recipe linear nor"),
        (["--class-weights", "balanced"], "neither --recipe linear nor --class-weights balanced"),
        (["--head-start", "prob"], "probe"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(pictures, tmp_path, capsys, flags, words):
    line = ["finetune", str(pictures), "-o", str(tmp_path / "run"), "-m", "untrained/vit-tiny", "--head-start", "probe"]
    assert cli.main([*line, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_network_without_one_linear_layer_at_its_end_is_refused():
    network = torch.nn.Module()
    network.head = torch.nn.Conv2d(2, 3, 1)
    with pytest.raises(UsageError, match="one linear layer"):
        head_of(network)
