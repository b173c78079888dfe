"""Pretraining: it learns, records every step, resumes exactly, stops cleanly and refuses clearly."""

import dataclasses
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import Forked
from safetensors.torch import load_file, save_file

import maehub
from maehub import files
from maehub.cli import command_line as cli
from maehub.data import loader
from maehub.data.loader import StepKeys, batches_of, worker_count
from maehub.data.sources import find_images
from maehub.errors import CheckpointError, DataError, DivergedError, MaehubError, UsageError
from maehub.images.augment import Augmentation, crop
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.models.masking import make_masks
from maehub.rng import sample_seed
from maehub.train import PretrainConfig, pretrain
from maehub.train.engine import checkpoint
from maehub.train.engine import resume as saving
from maehub.train.engine import run_log as log
from maehub.train.engine.optim import adamw, learning_rate, peak_rate
from maehub.train.engine.steps import parts
from maehub.train.pretraining import loop as pretraining
from maehub.train.pretraining import views as data
from maehub.train.pretraining.objective import Objective
from maehub.train.pretraining.validation import Validation
from maehub.train.pretraining.views import Crops, View, validation_batch

TINY = EncoderConfig(32, 8, 3, 32, 1, 2)
STEPS = 7


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """16 colour gradients of 64×48 pixels to train on, and 3 others."""
    folder = tmp_path_factory.mktemp("pictures")
    rows, columns = np.mgrid[:48, :64]
    for split, count in (("train", 16), ("val", 3)):
        (folder / split / "a").mkdir(parents=True)
        for number in range(count):
            angle = number + (0.5 if split == "val" else 0)
            ramp = (np.sin(angle) * rows / 48 + np.cos(angle) * columns / 64 + 1) / 3
            pixels = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=2) * 255
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / "a" / f"{number}.png")
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums depend on how many threads share them, so runs that are compared bit by bit have the same number: one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", TINY)


def settings_of(pictures, out, **changes):
    """A run of 7 steps of 6 pictures: epochs end within steps."""
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "target": "pixels", "model": "vit-tiny"}
    if changes.get("from_"):
        small = {}
    usual = {"steps": STEPS, "batch_size": 6, "workers": 0, "device": "cpu", "base_lr": 0.05, "quiet": True}
    return PretrainConfig(data=pictures, out=out, **(usual | small | changes))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


def state(run):
    return json.loads((run / "run.json").read_text())


def tensors(run, step=STEPS):
    folder = run / "checkpoints" / f"step-{step}"
    return {name: load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors")}


def equal(left, right):
    return all(torch.equal(left[name][key], right[name][key]) for name in left for key in left[name])


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """A run of all steps at once."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", TINY)
        pretrain(settings_of(pictures, run))
    return run


class Killed(BaseException):
    """What no handler catches."""


def at_step(monkeypatch, wanted, action):
    """Do something in the middle of a step (0 is the first)."""
    real = pretraining.engine.learning_rate

    def rate(step, *rest):
        if step == wanted:
            action()
        return real(step, *rest)

    monkeypatch.setattr(pretraining.engine, "learning_rate", rate)


def die():
    raise Killed


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_promises(pictures, tmp_path, caplog):
    run = tmp_path / "run"
    steps = 60
    with caplog.at_level(logging.INFO, "maehub"):
        result = pretrain(
            settings_of(pictures, run, steps=steps, batch_size=16, validate_every=25, checkpoint_every=40)
        )
    assert result == (run, steps, 0)
    assert "16 pictures, 3 held out, 60 steps of 16, lr 0.0125, on cpu" in caplog.text

    curve = losses(run)
    assert [step for step, _ in curve] == list(range(1, steps + 1))
    first, last = np.mean([loss for _, loss in curve[:5]]), np.mean([loss for _, loss in curve[-5:]])
    assert last < 0.5 * first
    steps_lines = [line for line in lines(run) if "loss" in line]
    names = {"step", "loss", "lr", "images_per_second", "data_wait", "grad_norm", "memory_gb"}
    assert all(set(line) == names for line in steps_lines)
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in steps_lines)
    assert all(line["grad_norm"] > 0 and 0.05 < line["memory_gb"] < 20 for line in steps_lines)
    peak = 0.05 * math.sqrt(16 / 256)
    assert [line["lr"] for line in steps_lines] == [learning_rate(step, steps, peak, 0.05) for step in range(steps)]

    validated = [line for line in lines(run) if "val_loss" in line]
    names = {"step", "val_loss", "mean_fill", "interpolation", "effective_rank"}
    assert [set(line) for line in validated] == [names] * 4
    assert [line["step"] for line in validated] == [0, 25, 50, 60]
    assert validated[-1]["val_loss"] < 0.5 * validated[0]["val_loss"]
    assert len({(line["mean_fill"], line["interpolation"]) for line in validated}) == 1
    assert 0 < validated[0]["interpolation"] < validated[0]["mean_fill"] < validated[0]["val_loss"]
    assert all(1 <= line["effective_rank"] <= 32 for line in validated)
    assert sorted(path.name for path in (run / "pictures").iterdir()) == ["step-25.png", "step-50.png", "step-60.png"]
    with Image.open(run / "pictures" / "step-60.png") as picture:
        assert picture.width > 4 * 32  # original, masked, reconstruction, pasted
        assert picture.height > 3 * 32  # of each validation picture

    assert state(run) == {"state": "completed", "exit_code": 0, "last_good_step": steps, "reason": ""}
    told = json.loads((run / "config.json").read_text())
    assert (told["model"], told["steps"], told["data"]) == ("vit-tiny", steps, str(pictures))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-40", "step-60"]
    trained = tensors(run, steps)["model.safetensors"]
    for source in (run, run / "model"):
        model = maehub.load_autoencoder(source)
        assert model.config.target == "pixels"
        assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert maehub.load(run).config.width == 32


def test_no_validation_pictures_give_no_validation_loss(pictures, tmp_path):
    run = tmp_path / "run"
    pretrain(settings_of(pictures / "train", run, steps=2))
    assert [set(line) & {"loss", "val_loss"} for line in lines(run)] == [{"loss"}, {"loss"}]
    assert (run / "pictures" / "step-2.png").is_file()


def test_the_rate_is_that_of_the_steps_alone(pictures, tmp_path, monkeypatch):
    real = pretraining._validate
    monkeypatch.setattr(pretraining, "_validate", lambda *arguments: time.sleep(0.3) or real(*arguments))
    pretrain(settings_of(pictures / "train", tmp_path / "run", steps=4, validate_every=1))
    rates = [line["images_per_second"] for line in lines(tmp_path / "run")]
    assert max(rates[1:]) > 6 / 0.3


def test_epochs_are_passes_over_the_pictures(pictures, tmp_path):
    result = pretrain(settings_of(pictures, tmp_path / "run", steps=None, epochs=0.5))
    assert result.step == math.ceil(0.5 * 16 / 6)


def test_the_global_generator_does_not_decide(pictures, tmp_path, undisturbed):
    torch.manual_seed(99)
    pretrain(settings_of(pictures, tmp_path / "same"))
    assert losses(tmp_path / "same") == losses(undisturbed)
    pretrain(settings_of(pictures, tmp_path / "other", seed=1))
    assert losses(tmp_path / "other") != losses(undisturbed)


def test_row_54_the_number_of_workers_changes_nothing(pictures, tmp_path, undisturbed):
    for workers in (1, 2):
        run = tmp_path / str(workers)
        pretrain(settings_of(pictures, run, workers=workers, cache=workers == 2))
        assert losses(run) == losses(undisturbed)
        assert equal(tensors(run), tensors(undisturbed))


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [2, 4, 6])  # before the first checkpoint of row 32, mid-epoch, the last step
def test_row_53_a_resumed_run_equals_an_undisturbed_one(
    pictures, tmp_path, monkeypatch, undisturbed, caplog, killed_at
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, killed_at, die)
        with pytest.raises(Killed):
            pretrain(settings_of(pictures, run, checkpoint_every=3))
    assert state(run)["state"] == "failed"
    result = pretrain(settings_of(pictures, run, checkpoint_every=3, resume=True))
    assert ("starting at step 0" in caplog.text) == (killed_at < 3)
    assert result == (run, STEPS, 0)
    assert losses(run) == losses(undisturbed)
    assert equal(tensors(run), tensors(undisturbed))
    assert state(run)["state"] == "completed"


@pytest.mark.parametrize("part", ["weights", "exp_avg", "exp_avg_sq", "step", "position"])
def test_row_53_the_comparison_notices_a_lost_part_of_the_state(pictures, tmp_path, monkeypatch, undisturbed, part):
    run = tmp_path / "run"
    real, found = checkpoint.load_checkpoint, checkpoint.newest_checkpoint

    def forgetful(folder, model, optimizer, spread):
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        real(folder, model, optimizer)
        if part == "weights":
            model.load_state_dict(fresh)
        for entry in optimizer.state.values():
            if part in entry:
                entry[part].zero_()

    def misplaced(folder):
        place, progress = found(folder)
        return place, dataclasses.replace(progress, step=progress.step + (part == "position"))

    with monkeypatch.context() as patch:
        at_step(patch, 4, die)
        with pytest.raises(Killed):
            pretrain(settings_of(pictures, run, checkpoint_every=3))
    monkeypatch.setattr(saving, "load_checkpoint", forgetful)
    monkeypatch.setattr(saving, "newest_checkpoint", misplaced)
    pretrain(settings_of(pictures, run, checkpoint_every=3, resume=True))
    assert losses(run)[:3] == losses(undisturbed)[:3]
    assert losses(run) != losses(undisturbed)
    assert not equal(tensors(run), tensors(undisturbed))


SCRIPT = """
import sys
import time
from pathlib import Path
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.train import PretrainConfig, pretrain
from maehub.train.pretraining import loop as pretraining
if __name__ == "__main__":
    PRESETS["vit-tiny"] = EncoderConfig(32, 8, 3, 32, 1, 2)
    real = pretraining.engine.learning_rate
    def rate(step, *rest):
        if step == 4:  # wait here to be killed
            Path(sys.argv[2], "here").touch()
            for _ in range(6000):
                time.sleep(0.01)
                if Path(sys.argv[2], "go").exists():
                    break
        return real(step, *rest)
    if "--wait" in sys.argv:
        pretraining.engine.learning_rate = rate
    result = pretrain(PretrainConfig(
        data=Path(sys.argv[1]), out=Path(sys.argv[2]), model="vit-tiny", target="pixels", decoder_width=32,
        decoder_depth=1, decoder_heads=2, steps=7, batch_size=6, workers=1, device="cpu", base_lr=0.05, quiet=True,
        checkpoint_every=3))
    sys.exit(result.exit_code)
"""


@pytest.fixture
def waiting(pictures, tmp_path):
    """A run in a process of its own that stands in its fifth step, and its folder."""
    run = tmp_path / "run"
    with open(tmp_path / "stderr", "w") as stderr:
        process = Forked(
            [sys.executable, "-c", SCRIPT, str(pictures), str(run), "--wait"],
            stderr=stderr,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    until = time.monotonic() + 60
    while not (run / "here").exists():
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    (run / "here").unlink()
    yield process, run
    process.kill()
    process.wait()


def test_row_53_and_61_kill_9_and_resume(pictures, waiting, undisturbed):
    process, run = waiting
    settings = settings_of(pictures, run, checkpoint_every=3, resume=True, workers=1)
    for flags in ({}, {"resume": False, "overwrite": True}):
        with pytest.raises(UsageError, match="another process is training"):
            pretrain(dataclasses.replace(settings, **flags))
    assert state(run) == {"state": "running", "exit_code": None, "last_good_step": 3, "reason": ""}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [step for step, _ in losses(run)] == [1, 2, 3]
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # what may lie there
    assert pretrain(settings).exit_code == 0  # the lock is gone with the process
    assert losses(run) == losses(undisturbed)
    assert equal(tensors(run), tensors(undisturbed))


def test_row_56_a_signal_to_the_whole_group_leaves_a_checkpoint(pictures, waiting, undisturbed):
    process, run = waiting
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.3)  # long enough for a process that reads pictures to die, if it took it for its own
    (run / "go").touch()
    process.wait(timeout=60)
    assert process.returncode == 75, (run.parent / "stderr").read_text()
    assert state(run) == {"state": "preempted", "exit_code": 75, "last_good_step": 5, "reason": ""}
    pretrain(settings_of(pictures, run, resume=True))
    assert losses(run) == losses(undisturbed)
    assert equal(tensors(run), tensors(undisturbed))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda value: str(value)
)
def test_row_56_a_signal_ends_the_step_and_saves(pictures, tmp_path, monkeypatch, undisturbed, number, code):
    run = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        assert pretrain(settings_of(pictures, run)) == (run, 4, code)
    assert signal.getsignal(number) is before
    assert state(run) == {"state": "preempted", "exit_code": code, "last_good_step": 4, "reason": ""}
    assert losses(run) == losses(undisturbed)[:4]
    assert not (run / "model").exists()
    with pytest.raises(UsageError, match="no exported model yet"):
        maehub.load(run)
    pretrain(settings_of(pictures, run, resume=True))
    assert losses(run) == losses(undisturbed)
    assert equal(tensors(run), tensors(undisturbed))


@pytest.mark.parametrize(("home", "where"), [(saving, "save_checkpoint"), (Validation, "measure")])
def test_row_56_a_signal_during_a_save_or_validation_loses_no_step(
    pictures, tmp_path, monkeypatch, undisturbed, home, where
):
    run = tmp_path / "run"
    real = getattr(home, where)

    def interrupted(*args):
        if (run / "metrics.jsonl").stat().st_size and not sent:  # not at step 0
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*args)

    sent = []
    with monkeypatch.context() as patch:
        patch.setattr(home, where, interrupted)
        result = pretrain(settings_of(pictures, run, checkpoint_every=3, validate_every=3))
    assert result.exit_code == 75
    assert state(run)["last_good_step"] == result.step == 4
    pretrain(settings_of(pictures, run, resume=True, checkpoint_every=3, validate_every=3))
    assert losses(run) == losses(undisturbed)
    assert [line["step"] for line in lines(run) if "val_loss" in line] == [0, 3, 6, 7]


def test_row_56_a_second_signal_stops_at_once(pictures, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(patch, 4, twice)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings_of(pictures, run, checkpoint_every=3))
    ended = state(run)
    assert (ended["state"], ended["exit_code"], ended["last_good_step"]) == ("failed", 130, 3)
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]


def test_a_stop_in_the_last_step_completes(pictures, tmp_path, monkeypatch):
    at_step(monkeypatch, STEPS - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert pretrain(settings_of(pictures, tmp_path / "run")).exit_code == 0
    assert state(tmp_path / "run")["state"] == "completed"


def test_a_thread_may_train(pictures, tmp_path):
    results = []
    worker = threading.Thread(target=lambda: results.append(pretrain(settings_of(pictures, tmp_path / "run", steps=1))))
    worker.start()
    worker.join()
    assert results[0].exit_code == 0


def test_row_32_a_damaged_checkpoint_costs_time_and_nothing_else(pictures, tmp_path, monkeypatch, undisturbed, caplog):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 5, die)
        with pytest.raises(Killed):
            pretrain(settings_of(pictures, run, checkpoint_every=2))
    os.truncate(run / "checkpoints" / "step-4" / "model.safetensors", 100)
    pretrain(settings_of(pictures, run, checkpoint_every=2, resume=True))
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert (run / "checkpoints" / "step-4.corrupt").is_dir()
    assert losses(run) == losses(undisturbed)
    assert equal(tensors(run), tensors(undisturbed))


def test_row_32_no_valid_checkpoint_is_never_a_silent_fresh_start(pictures, tmp_path):
    run = tmp_path / "run"
    pretrain(settings_of(pictures, run, steps=2))
    os.unlink(run / "checkpoints" / "step-2" / "model.safetensors")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="none of them is whole") as caught:
        pretrain(settings_of(pictures, run, steps=2, resume=True))
    assert caught.value.exit_code == 6
    assert (run / "metrics.jsonl").read_bytes() == before
    assert state(run)["state"] == "completed"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(pictures, tmp_path):
    run = tmp_path / "finished"
    pretrain(settings_of(pictures, run, steps=2))
    return run


def test_row_33_other_settings_are_refused_with_the_difference(pictures, finished, monkeypatch):
    before = contents(finished)
    with pytest.raises(UsageError) as caught:
        pretrain(settings_of(pictures, finished, steps=3, resume=True, base_lr=0.1, mask_ratio=0.5))
    for difference in ("base_lr 0.05 → 0.1", "mask_ratio 0.75 → 0.5", "steps 2 → 3"):
        assert difference in str(caught.value)
    assert "seed" not in str(caught.value)
    monkeypatch.setitem(PRESETS, "vit-tiny", dataclasses.replace(TINY, width=64))  # another network of the same name
    with pytest.raises(CheckpointError, match="another network"):
        pretrain(settings_of(pictures, finished, steps=2, resume=True, workers=1))
    assert contents(finished) == before


def test_row_51_other_pictures_need_a_word(pictures, tmp_path, caplog):
    changed, run = tmp_path / "changed", tmp_path / "run"
    for path in sorted((pictures / "train" / "a").iterdir())[:8]:
        changed.mkdir(exist_ok=True)
        (changed / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, die)
        with pytest.raises(Killed):
            pretrain(settings_of(changed, run, checkpoint_every=3))
    (changed / "new.png").write_bytes((changed / "0.png").read_bytes())
    before = contents(run)
    with pytest.raises(DataError, match="--allow-data-change") as caught:
        pretrain(settings_of(changed, run, checkpoint_every=3, resume=True))
    assert caught.value.exit_code == 5
    assert contents(run) == before
    pretrain(settings_of(changed, run, checkpoint_every=3, resume=True, allow_data_change=True))
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert pretrain(settings_of(changed, run, checkpoint_every=3, resume=True)).exit_code == 0  # they are its pictures


def test_row_61_an_existing_run_is_not_touched_unless_told(pictures, finished):
    before = contents(finished)
    with pytest.raises(UsageError, match=r"--resume.*--overwrite") as caught:
        pretrain(settings_of(pictures, finished, steps=2))
    assert caught.value.exit_code == 2
    assert contents(finished) == before

    (finished / "notes.txt").write_text("mine")
    pretrain(settings_of(pictures, finished, steps=1, overwrite=True))
    assert [step for step, _ in losses(finished)] == [1]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-1"]
    assert sorted(path.name for path in (finished / "pictures").iterdir()) == ["step-1.png"]
    assert (finished / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize("kind", ["model", "photos", "file", "strange"])
def test_row_61_what_is_no_run_folder_is_never_deleted(pictures, tmp_path, flag, kind):
    out = tmp_path / "precious"
    if kind == "model":  # it has a config.json too
        maehub.save(maehub.load("vit-nano"), out)
    elif kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("run.json" if kind == "strange" else "me.jpg")).write_text('["mine"]')
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="no run folder"):
        pretrain(settings_of(pictures, out, **{flag: True}))
    with pytest.raises(UsageError, match="exists"):
        pretrain(settings_of(pictures, out))
    assert contents(tmp_path) == before


def test_resume_without_a_folder_starts_and_says_so(pictures, tmp_path, caplog):
    assert pretrain(settings_of(pictures, tmp_path / "new", steps=1, resume=True)).exit_code == 0
    assert "no checkpoint: starting at step 0" in caplog.text


def test_row_62_a_finished_run_stays_as_it_is(pictures, finished, caplog):
    before = contents(finished)
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with caplog.at_level(logging.INFO, "maehub"):
        assert pretrain(settings_of(pictures, finished, steps=2, resume=True)) == (finished, 2, 0)
    assert "already at step 2" in caplog.text
    assert contents(finished) == before
    assert times == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_run_that_was_killed_before_its_export_is_finished_by_resume(pictures, finished):
    for path in sorted((finished / "model").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (finished / "run.json").write_text('{"state": "running", "exit_code": null, "last_good_step": 2}')
    assert pretrain(settings_of(pictures, finished, steps=2, resume=True)).exit_code == 0
    assert len(losses(finished)) == 2
    assert maehub.load_autoencoder(finished).config.target == "pixels"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def poison(monkeypatch, wanted, where):
    """NaN in the pictures or in a gradient of one step (0 is the first)."""
    real_rate, real_norm, real_normalise = (
        pretraining.engine.learning_rate,
        pretraining.engine.gradient_norm,
        Objective.normalise,
    )
    steps = []

    def rate(step, *rest):
        steps.append(step)
        return real_rate(step, *rest)

    def norm(parameters):
        if steps[-1] == wanted and where == "gradient":
            parameters[3].grad[0] = torch.nan
        return real_norm(parameters)

    def normalise(self, pixels):
        images = real_normalise(self, pixels)
        return images * torch.nan if steps and steps[-1] == wanted and where == "loss" else images

    monkeypatch.setattr(pretraining.engine, "learning_rate", rate)
    monkeypatch.setattr(pretraining.engine, "gradient_norm", norm)
    monkeypatch.setattr(Objective, "normalise", normalise)


@pytest.fixture(scope="module")
def every_step(pictures, tmp_path_factory):
    """A run that keeps the checkpoint of every step."""
    run = tmp_path_factory.mktemp("every") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", TINY)
        pretrain(settings_of(pictures, run, checkpoint_every=1, keep=STEPS))
    return run


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("step", [0, 2, 4, 5, 6])  # 2 and 5 end in a checkpoint
def test_row_58_a_run_that_diverges_stops_with_the_weights_of_before(
    pictures, tmp_path, monkeypatch, every_step, where, step
):
    run = tmp_path / "run"
    poison(monkeypatch, step, where)
    with pytest.raises(DivergedError) as caught:
        pretrain(settings_of(pictures, run, checkpoint_every=3))
    assert caught.value.exit_code == 7
    ended = state(run)
    assert (ended["state"], ended["exit_code"], ended["last_good_step"]) == ("diverged", 7, step or None)
    assert not (run / "model").exists()
    kept = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("*")]
    assert max(kept, default=0) == step
    for good in kept:  # bit for bit, though later steps of the same 16 were computed
        assert equal(tensors(run, good), tensors(every_step, good))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
    told = json.loads((run / "diverged.json").read_text())
    assert told["step"] == step + 1
    assert len(told["samples"]) == 6
    assert all(Path(name).is_file() for name in told["samples"])


def test_row_58_the_message_names_the_step_and_the_samples_are_those_of_it(pictures, tmp_path, monkeypatch):
    poison(monkeypatch, 4, "loss")
    run = tmp_path / "run"
    with pytest.raises(
        DivergedError, match=r"loss or the gradient of step 5 is not finite.*weights are those of step 4"
    ):
        pretrain(settings_of(pictures, run, checkpoint_every=3))
    assert losses(run)[-1] == (5, None)
    samples = find_images(pictures / "train")
    (keys,) = StepKeys(samples, 6, 0, 4, 5)
    assert json.loads((run / "diverged.json").read_text())["samples"] == [samples.where(key.sample) for key in keys]


def test_row_59_a_jump_of_the_loss_is_said_once(tmp_path, caplog):
    with log.RunLog(tmp_path / "run", 6) as run:
        run.begin({}, first_step=0, steps=200, hide_bar=True)
        for step in range(200):
            loss = 10.0 if step in (30, 100, 150) else 1.0  # too early to tell, told, not again
            run.log(step + 1, torch.tensor([loss, 1.0, 0.0]), 1e-3)
        run.flush()
    assert [record.getMessage() for record in caplog.records] == [
        "the loss of step 101 is 10, usually 1: a lower --base-lr?"
    ]


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (1, False), (0, True)])
def test_a_broken_picture_is_named(pictures, tmp_path, workers, cache):
    folder, run = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    whole = (pictures / "train" / "a" / "0.png").read_bytes()
    (folder / "whole.png").write_bytes(whole)
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"broken\.png cannot be read") as caught:
        pretrain(settings_of(folder, run, workers=workers, cache=cache, batch_size=2))
    assert "Traceback" not in str(caught.value)
    assert str(caught.value).count("\n") < 6
    ended = state(run)
    assert (ended["state"], ended["exit_code"]) == ("failed", 5)
    assert "broken.png" in ended["reason"]
    assert not multiprocessing.active_children()


def test_a_broken_validation_picture_is_named_before_anything_is_written(pictures, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "0.png").write_bytes((pictures / "train" / "a" / "0.png").read_bytes())
    (tmp_path / "data" / "val" / "1.png").write_text("no picture")
    with pytest.raises(DataError, match=r"val/1\.png cannot be read"):
        pretrain(settings_of(tmp_path / "data", tmp_path / "run", batch_size=1))
    assert not (tmp_path / "run").exists()


def children():
    """Processes that this one started, zombies too."""
    return {int(number) for path in Path("/proc/self/task").glob("*/children") for number in path.read_text().split()}


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_row_48_a_reading_process_that_fails_is_one_clear_error(pictures, tmp_path, monkeypatch, how):
    here, real, slept = os.getpid(), data.crop, []

    def failing(*arguments):
        if os.getpid() != here:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if not slept:  # once, or the process outlives the test
                slept.append(time.sleep(3))
        return real(*arguments)

    monkeypatch.setattr(data, "crop", failing)
    assert loader._SILENCE == 300  # seconds
    monkeypatch.setattr(loader, "_SILENCE", 1)
    before = children()
    remedies = r"If memory or /dev/shm is short, use fewer --workers; --workers 0 .*--resume"
    with pytest.raises(DataError, match=r"process that reads pictures failed: .*" + remedies) as caught:
        pretrain(settings_of(pictures, tmp_path / "run", workers=1))
    assert children() <= before  # before others are asked, who would take zombies away
    assert caught.value.exit_code == 5
    assert any(word in str(caught.value) for word in (["Killed", "exited"] if how == "dies" else ["timed out"]))
    assert str(caught.value).count("\n") < 6
    assert state(tmp_path / "run")["state"] == "failed"
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("times", "code", "good"), [(1, 0, 7), (2, 6, 2)])
def test_row_30_a_full_disk_is_borne_once_and_the_last_checkpoint_kept(
    pictures, tmp_path, monkeypatch, caplog, undisturbed, times, code, good
):
    run = tmp_path / "run"
    real, calls = checkpoint.free_space_guard, []

    def guard(path, needed):
        calls.append(path)
        real(path, 2**62 if 1 < len(calls) <= 1 + times else needed)

    monkeypatch.setattr(checkpoint, "free_space_guard", guard)
    settings = settings_of(pictures, run, checkpoint_every=2)
    if code:
        with pytest.raises(CheckpointError, match="are free") as caught:
            pretrain(settings)
        assert caught.value.exit_code == code
        assert len(losses(run)) == 6
    else:
        assert pretrain(settings).exit_code == 0
        assert losses(run) == losses(undisturbed)
    assert "goes on and tries again in 2 steps" in caplog.text
    ended = state(run)
    assert (ended["state"], ended["last_good_step"]) == ("failed" if code else "completed", good)
    assert tensors(run, good)


def test_row_30_the_last_checkpoint_of_a_run_must_succeed(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_space_guard", lambda path, needed: files.free_space_guard(path, 2**62))
    with pytest.raises(CheckpointError, match="are free"):
        pretrain(settings_of(pictures, tmp_path / "run"))


def test_a_disk_that_fails_under_the_metrics_is_a_checkpoint_error(tmp_path):
    with log.RunLog(tmp_path / "run", 6) as run:
        run.begin({}, first_step=0, steps=1, hide_bar=True)
        run._metrics.close()
        run._metrics = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written: the disk is full"):
            run.note(1, loss=1.0)


# --- settings ---------------------------------------------------------------------------------------------------------

WRONG = {
    "mask_ratio": st.one_of(st.floats(max_value=0), st.floats(min_value=1), st.just(math.nan), st.just("0.75")),
    "steps": st.one_of(st.integers(max_value=0), st.floats(), st.booleans()),
    "batch_size": st.one_of(st.integers(max_value=0), st.just(0.5), st.just(2**63)),
    "base_lr": st.one_of(st.floats(max_value=0), st.sampled_from([math.inf, math.nan, None])),
    "weight_decay": st.one_of(st.floats(max_value=-1e-9), st.sampled_from([math.inf, math.nan])),
    "warmup": st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1), st.just(math.nan)),
    "crop_scale": st.one_of(
        st.tuples(st.floats(max_value=0), st.floats(0.1, 1)),
        st.tuples(st.floats(0.6, 1), st.floats(0.1, 0.5)),
        st.tuples(st.floats(0.1, 1), st.floats(min_value=1, exclude_min=True)),
        st.sampled_from([(0.2,), (0.2, 0.5, 1.0), 0.2, None, ("a", "b")]),
    ),
    "strategy": st.sampled_from(["blocks", "", None]),
    "target": st.sampled_from(["pixel", "unknown"]),
    "precision": st.sampled_from(["fp16", None]),
    "mask_tokens": st.just("both"),
    "checkpoint_every": st.integers(max_value=0),
    "validate_every": st.integers(max_value=0),
    "workers": st.integers(max_value=-1),
    "seed": st.one_of(st.integers(max_value=-(2**63) - 1), st.integers(min_value=2**63), st.just(0.5)),
    "image_size": st.integers(max_value=0),
    "decoder_width": st.integers(max_value=0),
    "decoder_depth": st.integers(max_value=-1),
    "decoder_heads": st.integers(max_value=0),
}


@settings(max_examples=200, deadline=None)
@given(wrong=st.sampled_from(sorted(WRONG)).flatmap(lambda name: st.tuples(st.just(name), WRONG[name])))
def test_row_65_a_wrong_setting_is_refused_before_anything_is_touched(wrong):
    name, value = wrong
    with pytest.raises(UsageError) as caught:
        settings_of(Path("/nowhere"), Path("/nowhere"), **{name: value})
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith("--" + name.replace("_", "-") + " must be ")
    assert repr(value) in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": None}, "--steps or as --epochs"),
        ({"epochs": 1.0}, "--steps or as --epochs"),
        ({"steps": None, "epochs": math.inf}, "--epochs must be a number above 0"),
        ({"strategy": "grid", "mask_ratio": 0.5}, "--mask-ratio must be 0.75 with --strategy grid"),
        ({"resume": True, "overwrite": True}, "--resume .* --overwrite"),
        ({"batch_size": 10, "masks_per_image": 4}, "multiple of --masks-per-image 4, not 10"),
        ({"predict_share": 0.5, "loss_on": "all"}, "--predict-share"),
        ({"decoder_depth": 0, "mask_tokens": "decoder"}, "--decoder-depth 0 .* --mask-tokens encoder"),
        ({"rot90": True, "image_size": (32, 64)}, "--rot90 needs square crops"),
    ],
)
def test_row_65_settings_that_exclude_each_other(changes, words):
    with pytest.raises(UsageError, match=words):
        settings_of(Path("/nowhere"), Path("/nowhere"), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 33}, "--image-size must be a multiple of 8, not 33"),
        ({"model": "vit-x"}, "--model vit-x is not one of"),
        ({"decoder_width": 50, "decoder_heads": 7}, "decoder_width=50 is not divisible"),
        ({"mask_ratio": 1e-20}, "--mask-ratio 1e-20 hides none of 16 patches"),
        ({"device": "nowhere"}, "--device|device"),
        ({"corruption": (0.8, 0.1, 0.1)}, "--mask-tokens encoder"),
        ({"decoder_depth": 0}, "mask_tokens"),
        ({"batch_size": 7, "masks_per_image": 7, "from_": "vit-nanoo"}, "vit-nano"),
    ],
)
def test_row_65_what_the_network_cannot_be_is_refused_before_the_data_are_touched(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        pretrain(settings_of(Path("/nowhere"), tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_no_pictures(tmp_path):
    with pytest.raises(DataError, match="neither a file nor a folder"):
        pretrain(settings_of(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(DataError, match="0 images"):
        pretrain(settings_of(tmp_path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_that_does_not_say_its_target_needs_it(pictures, tmp_path):
    path = tmp_path / "bare.safetensors"
    model = maehub.load_autoencoder("vit-nano")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    with pytest.raises(MaehubError):  # an unpublished shape without heads
        pretrain(settings_of(pictures, tmp_path / "run", from_=str(path)))


# --- variants ---------------------------------------------------------------------------------------------------------


def test_training_goes_on_from_the_embedded_weights_and_leaves_them_alone(pictures, tmp_path):
    asset = Path(maehub.__file__).parent / "assets" / "vit-nano.safetensors"
    before = hashlib.sha256(asset.read_bytes()).digest()
    run = tmp_path / "run"
    result = pretrain(settings_of(pictures, run, from_="vit-nano", image_size=32, steps=2, base_lr=1e-3, warmup=0.0))
    assert result.exit_code == 0
    assert hashlib.sha256(asset.read_bytes()).digest() == before
    model = maehub.load_autoencoder(run)
    assert model.config.encoder.size == (32, 32)
    assert model.config.target == "pixels"
    assert model.encoder.origin.licence == "Apache-2.0"
    given = maehub.load_autoencoder("vit-nano", image_size=32)
    assert not torch.equal(model.encoder.patch_embed.proj.weight, given.encoder.patch_embed.proj.weight)
    assert torch.equal(model.encoder.pos_embed, given.encoder.pos_embed)


def test_training_goes_on_from_a_run(pictures, tmp_path, undisturbed):
    before = contents(undisturbed)
    pretrain(settings_of(pictures, tmp_path / "run", from_=str(undisturbed), steps=1, warmup=0.0))
    assert contents(undisturbed) == before
    assert losses(tmp_path / "run")[0][1] < losses(undisturbed)[0][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "block"},
        {"strategy": "grid"},
        {"strategy": "block", "mask_ratio": 0.5},
        {"mask_tokens": "encoder"},
        {"decoder_depth": 0, "mask_tokens": "encoder"},
        {"image_size": 48},
        {"image_size": (32, 48)},
        {"channels": 1},
        {"target": "pca", "pca_components": 7},
        {"target": "tokens"},
        {"loss_on": "all"},
        {"mask_tokens": "encoder", "corruption": (0.5, 0.25, 0.25)},
        {"predict_share": 0.5},
        {"masks_per_image": 3},
        {"augment": "none"},
        {"augment": "fixed-crop"},
        {"augment": "colour-jitter", "vflip": True, "rot90": True, "rotate": 20.0},
        {"micro_batch": 4},
        {"checkpoint_activations": True},
        {"clip_grad": 0.1},
        {"image_size": 40, "strategy": "grid"},  # 5 by 5 patches
        {"target": "normalised_pixels"},
        {"target": None},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_every_variant_trains_and_loads(pictures, tmp_path, changes):
    run = tmp_path / "run"
    assert pretrain(settings_of(pictures, run, steps=2, **changes)).exit_code == 0
    model = maehub.load_autoencoder(run)
    assert model.config.target == (changes.get("target", "pixels") or "normalised_pixels")
    assert model.config.mask_tokens == changes.get("mask_tokens", "decoder")
    assert model.config.decoder_depth == changes.get("decoder_depth", 1)
    size = changes.get("image_size", 32)
    assert model.config.encoder.size == (size if isinstance(size, tuple) else (size, size))
    assert model.config.encoder.channels == changes.get("channels", 3)
    assert all(math.isfinite(loss) for _, loss in losses(run))
    assert {value.dtype for value in tensors(run, 2)["model.safetensors"].values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_run_gives_the_same_losses(pictures, tmp_path, undisturbed):
    pretrain(settings_of(pictures, tmp_path / "run", compile=True))
    compiled, eager = (np.array(losses(run))[:, 1] for run in (tmp_path / "run", undisturbed))
    np.testing.assert_allclose(compiled, eager, rtol=1e-4)


def test_the_command_line_takes_the_flags_of_the_embedded_model(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    words = f"pretrain {pictures} -o {run} --model vit-tiny --target pixels --batch-size 6 --base-lr 3.75e-4 "
    words += "--crop-scale 0.02 1 --cache --workers 1 --seed 0 --steps 2 --validate-every 400 --checkpoint-every 800 "
    words += "--decoder-width 32 --decoder-depth 1 --decoder-heads 2 --device cpu"
    assert cli.main([*words.split(), "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"run": str(run), "step": 2, "exit_code": 0, "passed_over": {}}
    told = json.loads((run / "config.json").read_text())
    assert (told["crop_scale"], told["base_lr"], told["cache"]) == ([0.02, 1.0], 3.75e-4, True)
    assert cli.main(words.split()) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words.split(), "--mask-tokens", "decoder", "--decoder-depth", "0"]) == 2
    assert "--mask-tokens encoder" in capsys.readouterr().err


# --- pure functions ---------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_papers():
    """Linear over 40 of 800 epochs to 2.4e-3, then half a cosine to 0 (table 8), here with 1000 steps an epoch."""
    steps, rise, peak = 800_000, 40_000, 1.5e-4 * 4096 / 256
    assert peak == pytest.approx(2.4e-3)
    for step in (0, 1, 20_000, 39_999):
        assert learning_rate(step, steps, peak, 0.05) == pytest.approx(2.4e-3 * step / 40_000)
    for step in (40_000, 123_456, 420_000, 799_999):
        share = (step - rise) / (steps - rise)
        assert learning_rate(step, steps, peak, 0.05) == pytest.approx(1.2e-3 * (1 + math.cos(math.pi * share)))
    assert learning_rate(40_000, steps, peak, 0.05) == peak
    assert learning_rate(420_000, steps, peak, 0.05) == pytest.approx(1.2e-3)


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.99), peak=st.floats(1e-6, 1))
def test_the_schedule_rises_once_and_falls_once_within_its_bounds(steps, warmup, peak):
    rates = [learning_rate(step, steps, peak, warmup) for step in range(steps)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate(steps, steps, peak, warmup) == pytest.approx(0, abs=1e-12)


def test_the_optimizer_decays_matrices_alone_and_leaves_frozen_positions_out():
    model = maehub.MaskedAutoencoder(maehub.AutoencoderConfig(TINY, 32, 1, 2))
    optimizer = adamw(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} < decayed  # 3-D tokens too
    assert {"encoder.norm.weight", "encoder.blocks.0.attn.qkv.bias", "decoder.pred.bias"} < plain
    assert decayed | plain == set(names.values()) - {"encoder.pos_embed", "decoder.pos_embed"}
    assert not decayed & plain


VIEW = View((32, 32), 8, 3, Augmentation(), "random", 0.75)


def test_the_rate_grows_with_the_batch_as_published_and_by_the_root_below():
    assert peak_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert peak_rate(1.5e-4, 256) == pytest.approx(1.5e-4)
    assert peak_rate(1.5e-4, 64) == pytest.approx(0.75e-4)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_every_epoch_visits_every_picture_once_however_batches_are_cut(count, batch_size, seed):
    samples = find_images([f"{number}.png" for number in range(count)])
    steps = math.ceil(4 * count / batch_size)
    batches = list(StepKeys(samples, batch_size, seed, 0, steps))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    keys = [key for batch in batches for key in batch]
    singly = [key for batch in StepKeys(samples, 1, seed, 0, 4 * count) for key in batch]
    assert keys[: 4 * count] == singly
    epochs = [singly[start : start + count] for start in range(0, 4 * count, count)]
    assert all(sorted(key.sample for key in epoch) == list(range(count)) for epoch in epochs)
    assert len({key.crop for key in singly}) == 4 * count
    assert all(key.crop == key.mask for key in singly)
    if count > 20:
        assert len({tuple(key.sample for key in epoch) for epoch in epochs}) == 4
    assert list(StepKeys(samples, batch_size, seed, steps // 2, steps)) == batches[steps // 2 :]


@given(count=st.integers(1, 9), size=st.integers(1, 4), share=st.integers(1, 6), masks=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_processes_share_the_views_of_a_step_and_masks_the_crop(count, size, share, masks):
    samples = find_images([f"{number}.png" for number in range(count)])
    batch = size * share
    whole = list(StepKeys(samples, batch, 3, 1, 5, masks))
    parts = [list(StepKeys(samples, batch, 3, 1, 5, masks, rank, size)) for rank in range(size)]
    assert [[key for part in parts for key in part[step]] for step in range(4)] == whole
    views = [key for keys in StepKeys(samples, masks, 3, 0, 2 * count, masks) for key in keys]
    for start in range(0, len(views), masks):  # one picture after the other
        of_one = views[start : start + masks]
        assert len({(key.sample, key.crop) for key in of_one}) == 1
        assert len({key.mask for key in of_one}) == masks


def test_a_sample_is_known_by_its_name_not_by_its_place():
    one, other = find_images(["a.png", "b.png"]), find_images(["b.png", "a.png"])
    first, second = (
        {samples.name(key.sample): key.crop for batch in StepKeys(samples, 2, 5, 0, 1) for key in batch}
        for samples in (one, other)
    )
    assert first == second


def test_a_batch_holds_crops_and_masks_of_its_keys(pictures):
    samples = find_images(pictures / "train")
    keys = StepKeys(samples, 5, 3, 2, 3)
    with batches_of(Crops(samples, VIEW, False), keys, workers=0, pin=False) as batches:
        (batch,) = batches
    (wanted,) = keys
    assert batch.pixels.shape == (5, 32, 32, 3)
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.masked, make_masks("random", torch.tensor([key.mask for key in wanted]), (4, 4), 0.75))
    assert batch.seeds.tolist() == [key.mask for key in wanted]
    for pixels, key in zip(batch.pixels, wanted, strict=True):
        assert np.array_equal(pixels.numpy(), crop(samples.path(key.sample), (32, 32), 3, VIEW.augmentation, key.crop))
    halves = [half for half, _ in parts(batch, 3)]
    assert [len(half.pixels) for half in halves] == [3, 2]
    assert torch.equal(torch.cat([half.masked for half in halves]), batch.masked)


def test_validation_crops_take_pictures_in_turn_and_few_of_many(pictures, monkeypatch):
    samples = find_images(pictures / "val")
    first, again = (validation_batch(samples, VIEW, 8, 0) for _ in range(2))
    assert first.pixels.shape == (8, 32, 32, 3)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.masked, again.masked)
    assert len({pixels.numpy().tobytes() for pixels in first.pixels}) == 8

    opened = []
    real = data.open_image
    monkeypatch.setattr(data, "open_image", lambda path, **options: opened.append(path) or real(path, **options))
    validation_batch(find_images(pictures / "train"), VIEW, 4, 0)
    assert len(opened) == 4


def test_workers_fit_the_machine():
    assert worker_count(5) == 5
    assert worker_count(0) == 0
    assert 1 <= worker_count(None) <= (os.cpu_count() or 1)


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_shuffling_place_by_place_is_a_permutation(count, seed):
    found = loader.shuffled(np.arange(count), count, seed)
    assert sorted(found.tolist()) == list(range(count))
    some = np.arange(0, count, 7)
    assert np.array_equal(loader.shuffled(some, count, seed), found[some])


@pytest.mark.slow
def test_shuffling_looks_random_and_needs_no_memory_for_a_billion():
    orders = np.stack([loader.shuffled(np.arange(100), 100, sample_seed(seed, 0, 0)) for seed in range(3000)])
    counts = np.zeros((100, 100))
    for order in orders:
        counts[np.arange(100), order] += 1
    chi = ((counts - 30) ** 2 / 30).sum()  # every picture in every place equally often: 99² degrees of freedom
    assert abs(chi - 99**2) < 5 * math.sqrt(2 * 99**2)
    follows = np.mean(orders[:, 1:] == orders[:, :-1] + 1)  # neighbours stay neighbours by chance alone
    assert abs(follows - 1 / 100) < 0.002
    places = np.arange(10**9 - 1000, 10**9)
    found = loader.shuffled(places, 10**9, 5)
    assert len(set(found.tolist())) == 1000
    assert 0 <= found.min() < found.max() < 10**9
    assert abs(found.mean() / 10**9 - 0.5) < 0.05


# --- little data -----------------------------------------------------------------------------------------------------


def test_the_batch_is_fitted_to_little_data(pictures, tmp_path):
    """What is asked for is not fitted: it is refused where an epoch has fewer views."""
    count = 16
    result = pretrain(settings_of(pictures, tmp_path / "run", batch_size=None, steps=None, epochs=2, holdout=0))
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["batch_size"] == 8
    assert result.step == written["steps"] == 4
    with pytest.raises(UsageError, match=r"more than the \d+ views of an epoch"):
        pretrain(settings_of(pictures, tmp_path / "more", batch_size=4 * count, holdout=0))
    assert not (tmp_path / "more").exists()


def test_a_run_of_few_steps_has_a_rate_from_the_first_on():
    for steps in range(1, 10):
        rates = [learning_rate(step, steps, 1.0, warmup) for warmup in (0.0, 0.05, 0.5) for step in range(steps)]
        assert min(rates) > 0
        assert max(rates) <= 1
    assert learning_rate(0, 10, 1.0, 0.5) == 0


def test_a_run_that_changes_nothing_fails(pictures, tmp_path):
    with pytest.raises(DivergedError, match="all weights are those of the start") as caught:
        pretrain(settings_of(pictures, tmp_path / "run", steps=2, base_lr=1e-300, weight_decay=0.0))
    assert caught.value.exit_code == 7
    assert state(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run" / "model").exists()


def test_row_32_a_run_whose_checkpoints_are_gone_does_not_start_anew(pictures, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(CheckpointError, match=r"run\.json names step 2 as the last good one") as caught:
        pretrain(settings_of(pictures, finished, steps=4, resume=True))
    assert caught.value.exit_code == 6
    assert (finished / "metrics.jsonl").read_bytes() == before
