"""Recipe ``auto`` fitted to data, network and clock: lengths that are said and kept, warnings, heads that stay."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_finetune_recipes import B, settled
from test_finetuning import CLASSES, Killed, at_step, kill, losses, settings_of
from test_finetuning import tiny as tiny
from test_head_start import pictures as pictures
from test_head_start import weights as weights
from torch import nn

import maehub
from maehub.cli import command_line as cli
from maehub.errors import UsageError
from maehub.train import finetune
from maehub.train.engine import Group
from maehub.train.evaluation import LinearFit
from maehub.train.finetuning import fitting
from maehub.train.finetuning import job as jobs
from maehub.train.finetuning.classifier import StandardisedHead
from maehub.train.finetuning.head_start import HeadStart, head_of, look_early


@pytest.fixture
def slow(monkeypatch):
    """Steps that are said to take so many seconds."""

    def take(seconds):
        monkeypatch.setattr(jobs, "seconds_a_step", lambda *_: seconds)

    return take


def auto(pictures, out, weights, **changes):
    return settings_of(pictures, out, **{"model": weights, "steps": None, "batch_size": None} | changes)


def steps_of(run):
    return json.loads((run / "config.json").read_text())["settings"]["steps"]


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_few_pictures_take_a_recipe_of_their_own():
    found = settled((192, 5), images=800, classes=8)
    assert (found.recipe, found.head_start, found.batch_size, found.crop_scale) == ("auto", "probe", 32, (0.5, 1.0))
    assert (found.mixup, found.cutmix, found.smoothing, found.drop_path, found.randaugment) == (0, 0, 0, 0, "none")
    wide = settled(B, images=800, classes=8)
    assert wide.base_lr * 768 == pytest.approx(found.base_lr * 192)
    lengths = [settled(B, images=8 * each, classes=8) for each in (5, 20, 100, 1000)]
    assert [one.epochs for one in lengths] == sorted([one.epochs for one in lengths], reverse=True)
    assert [one.steps for one in lengths] == sorted(one.steps for one in lengths)
    assert settled(B, images=800, classes=8, crop_scale=(0.2, 1), head_start="zero").crop_scale == (0.2, 1)


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({"images": 10_000}, "official"),
        ({"images": 10_000, "size": 448}, "448"),
        ({"images": 800, "trained": False}, "scratch"),
        ({"images": 800, "class_weights": "balanced"}, "official"),
    ],
)
def test_where_nothing_was_measured_it_is_a_published_one(changes, recipe):
    found = settled(classes=8, **changes)
    assert (found.recipe, found.head_start, found.crop_scale) == (recipe, "zero", (0.08, 1.0))


def test_the_attentive_probe_starts_from_a_probe_too():
    assert settled(images=800, classes=8, recipe="attentive").head_start == "probe"
    assert settled(images=800, classes=8, recipe="linear").head_start == "zero"


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_a_run_says_how_long_it_takes_and_takes_no_more_steps_than_there_is_time_for(
    pictures, weights, tmp_path, slow, caplog
):
    caplog.set_level(logging.INFO, "maehub")
    slow(2.0)
    result = finetune(auto(pictures, tmp_path / "run", weights, minutes=0.4))
    assert 6 <= result.step <= 11  # of 24 s some go to measuring, and a margin stays
    assert f"0.4 minutes are enough for {result.step} of" in caplog.text
    assert steps_of(result.run) == result.step
    slow(0.001)
    longer = finetune(auto(pictures, tmp_path / "longer", weights, minutes=60, epochs=None))
    assert longer.step == settled((32, 2), images=39, classes=3).steps
    assert "it will take up to" in caplog.text


def test_on_a_cpu_ten_minutes_are_the_most(pictures, weights, tmp_path, slow):
    slow(60.0)
    config = auto(pictures, tmp_path / "run", weights)
    assert 4 <= jobs.ClassifierJob(config, Group(), fitting.time.monotonic()).settings.steps <= 10
    for changes in ({"steps": 50}, {"epochs": 40}, {"recipe": "official", "batch_size": 8}):
        job = jobs.ClassifierJob(
            auto(pictures, tmp_path / "run", weights, **changes), Group(), fitting.time.monotonic()
        )
        assert job.clock.minutes is None
        assert job.settings.steps >= 45


def test_what_is_too_short_for_one_pass_exports_the_probe(pictures, weights, tmp_path, slow, caplog):
    slow(1000.0)
    result = finetune(auto(pictures, tmp_path / "run", weights, minutes=1))
    assert (result.exit_code, result.step, result.kept) == (0, 0, "probe")
    assert result.scores == result.probe
    assert "too short for one pass over 39 pictures" in caplog.text
    assert maehub.load(result.run).config.class_names == tuple(sorted(CLASSES))
    assert (result.run / "report.html").is_file()


def test_without_a_probe_to_export_one_pass_is_the_least(pictures, weights, tmp_path, slow):
    slow(1000.0)
    config = auto(pictures, tmp_path / "run", weights, minutes=1, recipe="official", batch_size=8)
    with pytest.raises(UsageError, match="too short for one pass over 48 pictures"):
        finetune(config)
    assert not (tmp_path / "run").exists()


def test_what_is_too_short_for_the_features_is_refused(pictures, weights, tmp_path, capsys):
    line = ["finetune", str(pictures), "-o", str(tmp_path / "run"), "-m", weights, "--workers", "0"]
    assert cli.main([*line, "--minutes", "0.0001"]) == 2
    err = capsys.readouterr().err
    assert "too short for the features of 60 pictures" in err
    assert "give --minutes" in err
    assert not (tmp_path / "run").exists()


def test_ten_minutes_that_nobody_asked_for_refuse_nothing(pictures, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jobs, "MINUTES", 0.0001)
    result = finetune(auto(pictures, tmp_path / "run", weights))
    assert (result.step, result.kept, result.exit_code) == (0, "probe", 0)
    assert "the features of 60 pictures take about" in caplog.text
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("length", [["--steps", "3"], ["--epochs", "1"]])
def test_minutes_are_the_length(pictures, tmp_path, capsys, length):
    assert cli.main(["finetune", str(pictures), "-o", str(tmp_path / "run"), "--minutes", "1", *length]) == 2
    assert "leave out --steps and --epochs" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_length_that_it_began_with(pictures, weights, tmp_path, slow, monkeypatch):
    slow(1.0)
    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(Killed):
            finetune(auto(pictures, tmp_path / "run", weights, minutes=0.3, checkpoint_every=3))
    planned, begun = steps_of(tmp_path / "run"), losses(tmp_path / "run")
    slow(0.01)  # another machine, or the same at night
    again = finetune(auto(pictures, tmp_path / "run", weights, minutes=0.3, checkpoint_every=3, resume=True))
    assert again.step == planned
    assert losses(again.run)[:3] == begun[:3]
    assert len(losses(again.run)) == planned
    with pytest.raises(UsageError, match="minutes"):
        finetune(auto(pictures, tmp_path / "run", weights, minutes=5, resume=True))


# -- a head on standardised features -----------------------------------------------------------------------------------


def test_a_move_that_all_features_share_is_not_seen_and_not_made():
    torch.manual_seed(0)
    head = StandardisedHead(nn.Linear(6, 3), Group()).train()
    features, move = torch.randn(16, 6), torch.zeros(6, requires_grad=True)
    logits = head(features + move)
    torch.testing.assert_close(logits, head(features + 5.0), atol=1e-4, rtol=1e-4)
    torch.nn.functional.cross_entropy(logits, torch.arange(16) % 3).backward()
    assert move.grad.abs().max() < 1e-6
    head.eval()
    torch.testing.assert_close(head.folded()(features), head(features), atol=1e-5, rtol=1e-5)


# -- a classifier of the same classes ----------------------------------------------------------------------------------


def test_a_classifier_goes_on_with_its_head(pictures, weights, tmp_path, caplog):
    caplog.set_level(logging.INFO, "maehub")
    first = finetune(auto(pictures, tmp_path / "first", weights, steps=8, head_start="probe"))
    known = maehub.load(first.run)
    again = auto(pictures, tmp_path / "again", str(first.run), steps=1, base_lr=1e-7)
    job = jobs.ClassifierJob(again, Group(), 0.0)
    assert job.probe.own
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(job.classifier.network.eval()(images), known.eval()(images), atol=1e-4, rtol=1e-4)
    result = finetune(again)
    assert result.kept == "probe"
    assert "the classifier as it was is kept" in caplog.text
    before, after = (load_file(run / "model" / "model.safetensors") for run in (first.run, result.run))
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(before[name], after[name], atol=1e-6, rtol=1e-5)


# -- said early --------------------------------------------------------------------------------------------------------


def start_of(logits):
    fit = LinearFit(torch.zeros(3, 2), torch.zeros(3), 1.0)
    return HeadStart(None, torch.zeros(2, 2), fit, fit, logits, logits)


def test_a_run_that_stands_worse_than_it_began_says_so(caplog):
    truth = np.arange(12) % 3
    right, wrong = np.eye(3)[truth], np.eye(3)[(truth + 1) % 3]
    some = right.copy()
    some[0] = wrong[0]
    look_early(start_of(some), right, truth, CLASSES, 1e-3)
    look_early(start_of(some), some, truth, CLASSES, 1e-3)
    assert not caplog.text
    look_early(start_of(right), some, truth, CLASSES, 1e-3)
    assert "12 pictures to choose by the network has 91.7 %, and what it began with had 100.0 %" in caplog.text
    assert "--base-lr 0.00033" in caplog.text
    caplog.clear()
    look_early(start_of(wrong), np.eye(3)[np.zeros(12, int)], truth, CLASSES, 1e-3)
    assert "every one is taken for blobs" in caplog.text


def test_it_is_said_a_tenth_of_the_way(pictures, weights, tmp_path, caplog, monkeypatch):
    looked = []
    monkeypatch.setattr(jobs, "look_early", lambda *given: looked.append(len(given[1])))
    finetune(auto(pictures, tmp_path / "run", weights, steps=20))
    assert looked == [9]


def test_a_network_that_is_torn_down_is_not_kept(pictures, weights, tmp_path, caplog):
    result = finetune(auto(pictures, tmp_path / "run", weights, steps=20, base_lr=5.0, blocks=2))
    assert result.kept == "probe"
    assert result.scores == result.probe
    assert head_of(maehub.load(result.run)).weight.isfinite().all()
