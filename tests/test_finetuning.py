"""Fine-tuning: it learns, says what it does, resumes exactly, exports what loads elsewhere, and refuses clearly."""

import dataclasses
import json
import logging
import os
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import maehub
from maehub.cli import command_line as cli
from maehub.data.loader import Key
from maehub.errors import CheckpointError, DataError, DivergedError, UsageError
from maehub.models.encoder import PRESETS, Encoder, EncoderConfig
from maehub.train import FinetuneConfig, finetune
from maehub.train.engine import resume as saving
from maehub.train.finetuning import job as finetuning
from maehub.train.finetuning.classifier import Objective, class_weights
from maehub.train.finetuning.views import TrainTransform, policy_of

TINY = EncoderConfig(32, 8, 3, 32, 2, 2)
CLASSES = ("blobs", "lines", "noise")


def picture(kind, number):
    """Stripes, blobs or noise in random colours: told by texture alone."""
    generator = np.random.default_rng(1000 * number + CLASSES.index(kind))
    rows, columns = np.mgrid[:40, :40] / 40
    if kind == "lines":
        pattern = np.sin(generator.uniform(20, 40) * columns + generator.uniform(0, 6))
    elif kind == "blobs":
        x, y = generator.uniform(0.3, 0.7, 2)
        pattern = 2 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 0.02) - 1
    else:
        pattern = generator.uniform(-1, 1, (40, 40))
    colour = generator.uniform(0.4, 1, 3)
    pixels = (127.5 + 127.5 * pattern[:, :, None] * colour).astype(np.uint8)
    return Image.fromarray(pixels)


def fill(folder, numbers, classes=CLASSES):
    for kind in classes:
        (folder / kind).mkdir(parents=True)
        for number in numbers:
            picture(kind, number).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures"), range(20))


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", TINY)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model folder with an encoder, as weights to start from."""
    torch.manual_seed(0)
    return maehub.save(Encoder(TINY), tmp_path_factory.mktemp("weights") / "tiny")


def settings_of(data, out, **changes):
    usual = {"model": "untrained/vit-tiny", "steps": 8, "batch_size": 8, "workers": 0, "device": "cpu", "quiet": True}
    return FinetuneConfig(str(data), out, **(usual | {"skip_twins": True} | changes))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


FULL = {"base_lr": 5e-3, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "drop_path": 0.3, "ema": 0.8, "smoothing": 0.1}
"""Every part of the recipe at once."""


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    return finetune(settings_of(pictures, run, checkpoint_every=3, **FULL)).run


# --- it learns, and its folder is complete ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run that learns, without what makes learning slow."""
    run = tmp_path_factory.mktemp("trained") / "run"
    changes = {"steps": 60, "base_lr": 0.02, "batch_size": 16, "mixup": 0, "cutmix": 0, "randaugment": "none"}
    return finetune(settings_of(pictures, run, smoothing=0, ema=0, drop_path=0, crop_scale=(0.6, 1), **changes))


def test_it_learns(trained):
    assert trained.scores.n == 12
    assert trained.scores.top1 > 80
    values = dict(losses(trained.run))
    assert values[60] < 0.5 * values[1]
    assert values[1] == pytest.approx(np.log(3), rel=0.01)  # a head of almost zero knows nothing


def test_the_run_folder_has_what_a_run_has(trained):
    run = trained.run
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "model",
        "pictures",
        "report.html",
        "run.json",
        "scores.json",
    }
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 61))
    measured = [line for line in lines(run) if "val_top1" in line]
    assert [line["step"] for line in measured] == list(range(6, 61, 6))
    assert measured[-1]["val_top1"] == pytest.approx(trained.scores.top1)
    for name in ("step-60.png", "confusion.png"):
        Image.open(run / "pictures" / name).load()
    scores = json.loads((run / "scores.json").read_text())
    assert scores["scores"]["top1"] == pytest.approx(trained.scores.top1)
    assert scores["scores"]["n"] == 12
    assert scores["recipe"]["recipe"] == "scratch"


def test_the_exported_model_knows_its_classes_and_gives_the_scores_again(trained, pictures):
    model = maehub.load(trained.run)
    assert model.config.class_names == CLASSES
    assert model.config.pool == "mean"
    right = 0
    split = finetuning.split_labelled(str(pictures), seed=0, share=0.2).testing
    for index in range(len(split)):
        image = Image.open(split.samples.source(index).decode())
        right += int(model(model.preprocess(image)[None]).argmax()) == split.labels[index]
    assert 100 * right / len(split) == pytest.approx(trained.scores.top1)


@pytest.mark.skipif(not hasattr(timm.models._factory, "_MODEL_SOURCES"), reason="this timm reads no local-dir:")
def test_the_exported_model_is_timms(trained):
    model = maehub.load(trained.run)
    other = timm.create_model(f"local-dir:{trained.run / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, theirs = model(images), other(images)
    assert (mine - theirs).abs().max() / theirs.abs().max() < 1e-5
    assert json.loads((trained.run / "model" / "config.json").read_text())["label_names"] == list(CLASSES)


def test_the_card_and_metrics_carry_n_and_an_interval_and_no_names_of_pictures(trained):
    card = (trained.run / "model" / "README.md").read_text()
    assert "95 % interval" in card
    assert "12 held-out pictures" in card
    for path in (trained.run / "model").iterdir():
        if path.suffix != ".safetensors":
            assert ".png" not in path.read_text()


def test_the_run_says_what_it_does(pictures, tmp_path, caplog):
    caplog.set_level(logging.INFO, "maehub")
    finetune(settings_of(pictures, tmp_path / "run", steps=1))
    text = caplog.text
    assert "48 pictures of 3 classes to train on, 12 to measure on (split by --seed)" in text
    assert "recipe scratch" in text
    assert "at a batch of 8" in text


def test_class_folders_given_as_train_and_val(tmp_path):
    fill(tmp_path / "data" / "train", range(6))
    fill(tmp_path / "data" / "val", range(6, 9))
    result = finetune(settings_of(tmp_path / "data", tmp_path / "run", steps=1))
    assert result.scores.n == 9


# --- resuming ---------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler catches."""


def at_step(monkeypatch, wanted, action):
    real = finetuning.engine.learning_rate

    def rate(step, *rest):
        if step == wanted:
            action()
        return real(step, *rest)

    monkeypatch.setattr(finetuning.engine, "learning_rate", rate)


def kill():
    raise Killed


def tensors(run, step=8):
    folder = run / "checkpoints" / f"step-{step}"
    return {name: load_file(folder / name) for name in ("model.safetensors", "optimizer.safetensors")}


def equal(left, right):
    return all(torch.equal(left[name][key], right[name][key]) for name in left for key in left[name])


@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_killed_run_is_resumed_bit_for_bit_with_the_whole_recipe(pictures, tmp_path, undisturbed, monkeypatch, step):
    config = settings_of(pictures, tmp_path / "run", checkpoint_every=3, **FULL)
    with monkeypatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            finetune(config)
    result = finetune(settings_of(pictures, tmp_path / "run", checkpoint_every=3, resume=True, **FULL))
    assert equal(tensors(tmp_path / "run"), tensors(undisturbed))
    assert losses(tmp_path / "run") == losses(undisturbed)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (result.run, undisturbed))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_row_56_a_signal_stops_after_the_step_and_the_run_goes_on_bit_for_bit(
    pictures, tmp_path, undisturbed, monkeypatch
):
    config = settings_of(pictures, tmp_path / "run", checkpoint_every=3, **FULL)
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = finetune(config)
    assert (result.step, result.exit_code, result.scores) == (5, 75, None)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "preempted"
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "model").exists()
    finetune(dataclasses.replace(config, resume=True))
    assert equal(tensors(tmp_path / "run"), tensors(undisturbed))


def test_row_32_a_damaged_checkpoint_is_passed_over(pictures, tmp_path, undisturbed, monkeypatch, caplog):
    config = settings_of(pictures, tmp_path / "run", checkpoint_every=3, **FULL)
    with monkeypatch.context() as patch:
        at_step(patch, 7, kill)
        with pytest.raises(Killed):
            finetune(config)
    with open(tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    finetune(dataclasses.replace(config, resume=True))
    assert "step-6.corrupt" in caplog.text
    assert equal(tensors(tmp_path / "run"), tensors(undisturbed))


def test_the_average_is_exported_and_is_not_the_network(undisturbed):
    stored = tensors(undisturbed)["model.safetensors"]
    exported = load_file(undisturbed / "model" / "model.safetensors")
    assert torch.equal(exported["head.weight"], stored["average.head.weight"])
    assert not torch.equal(exported["head.weight"], stored["network.head.weight"])


def test_samples_do_not_depend_on_workers(pictures, tmp_path, undisturbed):
    finetune(settings_of(pictures, tmp_path / "run", checkpoint_every=3, **(FULL | {"workers": 2})))
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_micro_batches_give_the_same_sums(pictures, tmp_path):
    plain = {"mixup": 0, "cutmix": 0, "drop_path": 0, "ema": 0, "base_lr": 5e-3}
    finetune(settings_of(pictures, tmp_path / "one", **plain))
    finetune(settings_of(pictures, tmp_path / "parts", micro_batch=2, **plain))
    for (_, one), (_, other) in zip(losses(tmp_path / "one"), losses(tmp_path / "parts"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_another_number_of_classes_is_refused_on_resume(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    finetune(settings_of(tmp_path / "data", tmp_path / "run", steps=2))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.copytree(tmp_path / "data" / "noise", tmp_path / "data" / "other")
    with pytest.raises(UsageError, match="classes 3 → 4"):
        finetune(settings_of(tmp_path / "data", tmp_path / "run", steps=2, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_other_labels_of_the_same_pictures_are_other_data(tmp_path):
    fill(tmp_path / "data", range(6))
    names = [f"{kind}/{number}.png" for kind in CLASSES for number in range(6)]
    table = tmp_path / "data" / "labels.csv"
    table.write_text("path,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in names))
    finetune(settings_of(table, tmp_path / "run", steps=2))
    changed = names[0], "noise"
    rows = [f"{name},{changed[1] if name == changed[0] else name.split('/')[0]}\n" for name in names]
    table.write_text("path,label\n" + "".join(rows))
    with pytest.raises(DataError, match="--allow-data-change"):
        finetune(settings_of(table, tmp_path / "run", steps=2, resume=True))


def test_one_picture_fewer_is_other_data_and_can_be_accepted(pictures, tmp_path, monkeypatch, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    config = settings_of(tmp_path / "data", tmp_path / "run", steps=None, epochs=1.0, checkpoint_every=2)
    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(Killed):
            finetune(config)
    (tmp_path / "data" / "noise" / "0.png").unlink()
    with pytest.raises(DataError, match="--allow-data-change"):
        finetune(dataclasses.replace(config, resume=True))
    with pytest.raises(UsageError, match=r"epochs 1.0 → 2.0\."):
        finetune(dataclasses.replace(config, resume=True, epochs=2.0))
    assert finetune(dataclasses.replace(config, resume=True, allow_data_change=True)).step == 6


def test_evaluating_a_run_on_its_own_data_measures_what_it_held_out(trained, pictures, caplog):
    from maehub.train import EvaluateConfig, evaluate

    caplog.set_level(logging.INFO, "maehub")
    found = evaluate(EvaluateConfig(str(pictures), str(trained.run), workers=0, device="cpu"))
    assert found.scores.n == 12
    assert found.scores.top1 == pytest.approx(trained.scores.top1)
    assert "the 12 pictures that it held out" in caplog.text
    one_class = evaluate(EvaluateConfig(str(pictures), str(trained.run / "model"), workers=0, device="cpu"))
    assert one_class.scores.n == 60  # a model folder does not know what it was trained on


def test_a_finished_run_is_not_done_again(trained, pictures, caplog):
    caplog.set_level(logging.INFO, "maehub")
    changes = {"steps": 60, "base_lr": 0.02, "batch_size": 16, "mixup": 0, "cutmix": 0, "randaugment": "none"}
    config = settings_of(
        pictures, trained.run, smoothing=0, ema=0, drop_path=0, crop_scale=(0.6, 1), resume=True, **changes
    )
    assert finetune(config).step == 60
    assert "nothing to do" in caplog.text


# --- variations -------------------------------------------------------------------------------------------------------


def test_weights_are_fine_tuned_with_layer_decay(weights, pictures, tmp_path):
    """The stem moves least."""
    settings = {"model": str(weights), "recipe": "official", "steps": 3, "layer_decay": 0.1}
    finetune(settings_of(pictures, tmp_path / "run", **settings))
    before, after = (
        load_file(weights / "model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    names = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight")
    moved = [(after[name] - before[name]).abs().mean().item() for name in names]
    assert 0 < moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize(
    ("blocks", "moving"),
    [(0, set()), (0.5, {"blocks.1.mlp.fc1.weight"}), (1, {"blocks.1.mlp.fc1.weight", "blocks.1.attn.qkv.weight"})],
)
def test_partial_fine_tuning_leaves_the_rest_as_it_was(weights, pictures, tmp_path, blocks, moving):
    settings = {"model": str(weights), "recipe": "official", "steps": 2, "blocks": blocks, "base_lr": 0.05}
    finetune(settings_of(pictures, tmp_path / "run", **settings))
    before, after = (
        load_file(weights / "model.safetensors"),
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
    )
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    watched = {f"blocks.{block}.{part}.weight" for block in (0, 1) for part in ("mlp.fc1", "attn.qkv")}
    assert moved & (watched | {"pos_embed", "cls_token", "patch_embed.proj.weight"}) == moving


def test_the_published_linear_probe_leaves_the_network_alone_and_folds_its_normalisation(weights, pictures, tmp_path):
    config = settings_of(
        pictures, tmp_path / "run", model=str(weights), recipe="linear", steps=40, batch_size=24, base_lr=100.0
    )
    result = finetune(config)
    before, after = load_file(weights / "model.safetensors"), load_file(result.run / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = maehub.load(result.run)
    assert model.config.pool == "cls"
    assert result.scores.top1 > 50  # of random features
    split = finetuning.split_labelled(str(pictures), seed=0, share=0.2).testing
    images = [model.preprocess(Image.open(split.samples.source(index).decode())) for index in range(len(split))]
    right = (model(torch.stack(images)).argmax(dim=1).numpy() == split.labels).mean()
    assert 100 * right == pytest.approx(result.scores.top1)


def test_the_attentive_probe(weights, pictures, tmp_path, caplog):
    caplog.set_level(logging.INFO, "maehub")
    config = settings_of(
        pictures, tmp_path / "run", model=str(weights), recipe="attentive", steps=60, batch_size=24, base_lr=0.02
    )
    result = finetune(config)
    assert result.scores.top1 > 50
    assert not (result.run / "model").exists()
    assert "no model folder" in caplog.text


def test_a_backbone_of_timm(pictures, tmp_path):
    config = settings_of(
        pictures, tmp_path / "run", model="untrained/timm/vit_tiny_patch16_224", image_size=(32,), steps=2
    )
    result = finetune(config)
    assert result.scores.n == 12
    assert json.loads((result.run / "model" / "config.json").read_text())["num_classes"] == 3
    if hasattr(timm.models._factory, "_MODEL_SOURCES"):  # or this timm reads no local-dir:
        assert timm.create_model(f"local-dir:{result.run / 'model'}", pretrained=True).num_classes == 3


def test_several_labels(tmp_path):
    fill(tmp_path, range(8))
    rows = [f"{kind}/{number}.png,{kind}{'|odd' if number % 2 else ''}" for kind in CLASSES for number in range(8)]
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    result = finetune(settings_of(table, tmp_path / "run", steps=4, class_weights="balanced"))
    model = maehub.load(result.run)
    assert model.config.multi_label
    assert set(model.config.class_names) == {*CLASSES, "odd"}
    assert result.scores.mean_average_precision is not None


def test_balanced_classes_count_alike(tmp_path):
    labels = np.array([0] * 8 + [1] * 2)
    weights = class_weights(labels, 2)
    assert weights.tolist() == pytest.approx([10 / 16, 10 / 4])
    assert sum(weights[label] for label in labels) == pytest.approx(10)


def test_groups_stay_on_one_side(tmp_path, caplog):
    caplog.set_level(logging.INFO, "maehub")
    for kind in CLASSES:
        for patient in range(5):
            folder = tmp_path / "data" / kind / f"patient-{patient}"
            folder.mkdir(parents=True)
            for number in range(3):
                picture(kind, 10 * patient + number).save(folder / f"{number}.png")
    result = finetune(settings_of(tmp_path / "data", tmp_path / "run", steps=1, group="2"))
    assert result.scores.n % 3 == 0
    assert result.scores.interval != "Wilson"
    sides = "4 and 1 groups"
    assert f"(split by --seed, {sides})" in caplog.text
    assert sides in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_same_picture_on_both_sides_is_told(tmp_path, caplog):
    fill(tmp_path / "data" / "train", range(6))
    fill(tmp_path / "data" / "val", range(6, 9))
    shutil.copy(tmp_path / "data" / "train" / "noise" / "0.png", tmp_path / "data" / "val" / "noise" / "copy.png")
    finetune(settings_of(tmp_path / "data", tmp_path / "run", steps=1, skip_twins=False))
    assert "twins.csv" in caplog.text
    assert "copy.png" in (tmp_path / "run" / "twins.csv").read_text()


def test_crops_are_a_function_of_their_seed(pictures):
    from maehub.images.augment import Augmentation
    from maehub.images.preprocess import Preprocess

    preprocess = Preprocess.evaluation(32, 3, 8)
    transform = TrainTransform(
        preprocess, Augmentation(crop_scale=(0.08, 1)), policy_of("rand-m9-mstd0.5-inc1", preprocess)
    )
    source = pictures / "lines" / "0.png"
    crops = [transform.crop(str(source), Key(0, seed, 0)) for seed in range(40)]
    again = [transform.crop(str(source), Key(0, seed, 0)) for seed in reversed(range(40))]
    assert all(np.array_equal(one, other) for one, other in zip(crops, reversed(again), strict=True))
    assert len({one.tobytes() for one in crops}) > 35
    grey = TrainTransform(Preprocess.evaluation(32, 1, 8), Augmentation(), transform.policy)
    assert grey.crop(str(source), Key(0, 3, 0)).shape == (32, 32, 1)


@pytest.mark.parametrize("words", ["rand-m10-inc1", "augmix-m3-w3", "original-mstd0.5", "v0"])
def test_every_policy_of_timm_runs(pictures, words):
    from maehub.images.preprocess import Preprocess

    policy = policy_of(words, Preprocess.evaluation(32, 3, 8))
    for seed in range(60):
        from maehub.rng import seeded

        with seeded(seed):
            assert policy(picture("lines", seed)).size == (40, 40)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_weights_before(pictures, tmp_path, monkeypatch):
    real = Objective.forward
    calls = []

    def forward(self, images, targets):
        calls.append(1)
        return real(self, images, targets) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(Objective, "forward", forward)
    monkeypatch.setattr(finetuning.engine, "pictures_fit", lambda *_, **__: lambda size: True)
    with pytest.raises(DivergedError, match="step 6"):
        finetune(settings_of(pictures, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "diverged"
    assert (tmp_path / "run" / "checkpoints" / "step-5").is_dir()
    facts = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert len(facts["samples"]) == 8
    assert "checkpoint of step 5 is kept" in facts["reason"]
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("side", ["train", "val"])
def test_row_39_a_broken_picture_ends_the_run_with_its_name(tmp_path, capsys, side):
    fill(tmp_path / "data" / "train", range(4))
    fill(tmp_path / "data" / "val", range(4, 6))
    (tmp_path / "data" / side / "noise" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    line = ["finetune", str(tmp_path / "data"), "-o", str(tmp_path / "run"), "--model", "untrained/vit-tiny"]
    assert cli.main([*line, "--steps", "4", "--batch-size", "8", "--workers", "0", "--skip-twins"]) == 5
    assert "broken.png" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def test_a_class_that_is_only_measured_on_is_refused(tmp_path, capsys):
    fill(tmp_path / "data" / "train", range(3), classes=("noise", "lines"))
    fill(tmp_path / "data" / "val", range(3, 5))
    line = ["finetune", str(tmp_path / "data"), "-o", str(tmp_path / "run"), "--model", "untrained/vit-tiny"]
    assert cli.main([*line, "--steps", "1"]) == 5
    assert "blobs" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_checkpoint(pictures, tmp_path, monkeypatch):
    def full(*_):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(CheckpointError, match="full"):
        finetune(settings_of(pictures, tmp_path / "run", steps=2))


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "baseline/pixels"], 2, "no network"),
        (["--model", "timm/no_such_network"], 2, "no_such_network"),
        (["--blocks", "9"], 2, "more than the 2 blocks"),
        (["--batch-size", "7", "--mixup", "1"], 2, "multiple of 2"),
        (["--randaugment", "nonsense"], 2, "--randaugment nonsense"),
        (["--recipe", "scratch", "--model", "vit-nano"], 2, "untrained/NAME"),
        (["--channels", "1"], 2, "--channels"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(pictures, tmp_path, capsys, flags, code, words):
    line = ["finetune", str(pictures), "-o", str(tmp_path / "run"), "--steps", "1", "--device", "cpu", "--skip-twins"]
    if "--model" not in flags:
        line += ["--model", "untrained/vit-tiny"]
    assert cli.main([*line, *flags]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_data_that_cannot_be(tmp_path, capsys):
    fill(tmp_path / "one", range(3), classes=("noise",))
    line = ["-o", str(tmp_path / "run"), "--model", "untrained/vit-tiny", "--steps", "1"]
    assert cli.main(["finetune", str(tmp_path / "one"), *line]) == 5
    fill(tmp_path / "flat", range(3))
    picture("noise", 9).save(tmp_path / "flat" / "loose.png")
    assert cli.main(["finetune", str(tmp_path / "flat"), *line]) == 5
    told = capsys.readouterr().err
    assert "class" in told
    assert "loose.png" in told or "level" in told


def test_the_command_prints_scores_and_json(pictures, tmp_path, capsys):
    line = ["finetune", str(pictures), "-o", str(tmp_path / "run"), "--model", "untrained/vit-tiny", "--steps", "1"]
    assert cli.main([*line, "--workers", "0", "--json", "--skip-twins"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["n"] == 12
    assert facts["low"] <= facts["top1"] <= facts["high"]
    assert facts["exit_code"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixup": 0.8, "micro_batch": 3}, "odd number of pictures, and they are mixed in pairs"),
        ({"mixup": 0.8, "batch_size": 6, "micro_batch": 4, "cutmix": 0}, None),
        ({"recipe": "linear", "batch_size": 1}, "batch normalisation needs two pictures at once"),
        ({"recipe": "linear", "batch_size": 5, "micro_batch": 4}, "batch normalisation needs two pictures at once"),
    ],
)
def test_parts_of_a_step_on_which_a_library_would_stumble(pictures, weights, tmp_path, changes, words):
    config = settings_of(pictures, tmp_path / "run", model=str(weights), **{"steps": 1} | changes)
    if words is None:
        assert finetune(config).step == 1
        return
    with pytest.raises(UsageError, match=words) as caught:
        finetune(config)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()
