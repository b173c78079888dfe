"""Fine-tuning in many processes: the numbers of one, shards, resuming; by torchrun."""

import json

import numpy as np
import pytest
import torch
from processes import Launch, losses, metrics, state
from safetensors.torch import load_file
from test_finetuning import FULL, fill
from test_finetuning import tiny as tiny
from test_numbers import fill as fill_numbers

import maehub
from maehub.cli import command_line as cli


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("pictures"), range(17))


PLAIN = {"mixup": 0, "cutmix": 0, "erasing": 0, "drop_path": 0}


def words(data, out, **changes):
    usual = {"model": "untrained/vit-tiny", "steps": 8, "batch-size": 8, "workers": 0, "base-lr": 0.01, "timeout": 20}
    line = ["finetune", str(data), "-o", str(out), "--device", "cpu", "--quiet", "--skip-twins", "--precision", "fp32"]
    for name, value in (usual | {"checkpoint-every": 3} | changes).items():
        line += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return line


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """Runs that nothing disturbed: one process; two with DDP, with FSDP2, with everything random, linear probing."""
    folder = tmp_path_factory.mktemp("whole")
    linear = {"recipe": "linear", "base-lr": 2.0}
    assert cli.main(words(pictures, folder / "one", **PLAIN)) == 0
    assert cli.main(words(pictures, folder / "one-linear", **linear)) == 0
    assert cli.main(words(pictures, folder / "one-probe", **PLAIN, head_start="probe")) == 0
    table, numbers = fill_numbers(folder / "numbers", 30), PLAIN | {"task": "regression", "label": "year,angle"}
    assert cli.main(words(table, folder / "one-numbers", **numbers)) == 0
    variants = {
        "ddp": PLAIN,
        "fsdp": PLAIN | {"fsdp": True},
        "average": PLAIN | {"fsdp": True, "ema": 0.8},
        "average-ddp": PLAIN | {"ema": 0.8},
        "full": FULL,
        "linear": linear,
        "probe": PLAIN | {"head_start": "probe"},
        "probe-fsdp": PLAIN | {"head_start": "probe", "fsdp": True},
    }
    lines = [words(pictures, folder / name, **more) for name, more in variants.items()]
    lines += [words(table, folder / "numbers-fsdp", **numbers, fsdp=True)]
    launch = Launch(folder, [{"words": line} for line in lines])
    assert launch.wait() == 0, launch.output()
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(whole, name):
    one, two = losses(whole / "one"), losses(whole / name)
    assert list(one) == list(two) == list(range(1, 9))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    assert state(whole / name)["state"] == "completed"
    measured = [[line["val_loss"] for line in metrics(whole / run) if "val_loss" in line] for run in ("one", name)]
    np.testing.assert_allclose(measured[1], measured[0], rtol=1e-5)


def test_two_processes_export_what_one_does(whole):
    one, ddp, fsdp = (load_file(whole / name / "model" / "model.safetensors") for name in ("one", "ddp", "fsdp"))
    for other in (ddp, fsdp):
        scale = max(float(value.abs().max()) for value in one.values())
        assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-5 * scale


def test_an_average_of_sharded_weights_is_that_of_copies(whole):
    shards, copies = (maehub.load(whole / name).state_dict() for name in ("average", "average-ddp"))
    assert max(float((shards[name] - copies[name]).abs().max()) for name in copies) < 1e-5


def test_the_batch_of_all_processes_is_normalised(whole):
    one, two = losses(whole / "one-linear"), losses(whole / "linear")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    first, second = (maehub.load(whole / name).state_dict() for name in ("one-linear", "linear"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4


def test_scores_count_every_picture_once(whole):
    """Nine pictures in two processes."""
    for name in ("one", "ddp", "fsdp"):
        assert json.loads((whole / name / "scores.json").read_text())["scores"]["n"] == 9


@pytest.mark.parametrize("name", ["probe", "probe-fsdp", "numbers-fsdp"])
def test_two_processes_start_at_the_probe_of_one(whole, name):
    alone, measure = ("one-numbers", "r2") if "numbers" in name else ("one-probe", "loss")
    one, two = losses(whole / alone), losses(whole / name)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    first, second = (json.loads((whole / run / "scores.json").read_text()) for run in (alone, name))
    assert first["kept"] == second["kept"]
    assert first["probe"][measure] == pytest.approx(second["probe"][measure], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [FULL, PLAIN | {"fsdp": True, "ema": 0.8}], ids=["ddp", "fsdp"])
def test_two_processes_resume_bit_for_bit(pictures, whole, tmp_path, more):
    run = tmp_path / "run"
    line = words(pictures, run, **more)
    launch = Launch(tmp_path / "launch", [{"words": line, "fault": "kill", "rank": 1, "step": 5}])
    assert launch.wait() != 0
    assert Launch(tmp_path / "launch", [{"words": [*line, "--resume"]}]).wait() == 0
    undisturbed = whole / ("full" if more is FULL else "average")
    assert losses(run) == losses(undisturbed)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_fit_to_one_clock(pictures, tmp_path):
    run = tmp_path / "run"
    line = words(pictures, run, **PLAIN, **{"model": "vit-nano", "image-size": 32, "minutes": 30})  # more than it needs
    place = line.index("--steps")
    launch = Launch(tmp_path / "launch", [{"words": line[:place] + line[place + 2 :]}])
    assert launch.wait() == 0, launch.output()
    planned = json.loads((run / "config.json").read_text())["settings"]["steps"]
    assert state(run)["state"] == "completed"
    assert len(losses(run)) == planned > 0


@pytest.mark.slow
def test_row_55_one_process_goes_on_with_the_samples_of_two(pictures, whole, tmp_path):
    run = tmp_path / "run"
    line = words(pictures, run, **PLAIN)
    launch = Launch(tmp_path / "launch", [{"words": line, "fault": "kill", "rank": 1, "step": 5}])
    assert launch.wait() != 0
    assert cli.main([*line, "--resume"]) == 0
    one, two = losses(whole / "one"), losses(run)
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


@pytest.mark.slow
def test_a_batch_that_cannot_be_mixed_in_two_processes_is_refused(pictures, tmp_path):
    line = words(pictures, tmp_path / "run", **(FULL | {"batch-size": 6}))
    launch = Launch(tmp_path / "launch", [{"words": line}])
    assert launch.wait() != 0
    assert launch.codes() == [2]
    assert "--batch-size 6 must be a multiple of 4" in launch.output()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_with_the_whole_recipe_are_as_good_as_one(tmp_path):
    """Mixup and stochastic depth differ, so only the accuracy can be compared: three seeds each, on real digits."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = tmp_path / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{number}.png")
    more = {"steps": 400, "batch-size": 64, "base-lr": 0.004, "seed": 0, "checkpoint-every": 1000, "hflip": False}
    more |= {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "drop-path": 0.1, "ema": 0.98, "crop-scale": "0.5 1"}

    def line(name, seed):
        out = words(tmp_path / "digits", tmp_path / f"{name}-{seed}", **(more | {"seed": seed}))
        place = out.index("--crop-scale")
        out[place + 1 : place + 2] = ["0.5", "1"]
        place = out.index("--hflip")
        return [*out[:place], "--no-hflip", *out[place + 2 :], "--val-share", "0.3"]

    # The split follows from the seed too, so each seed is one pair.
    for seed in range(3):
        assert cli.main(line("one", seed)) == 0
    launch = Launch(tmp_path / "launch", [{"words": line("two", seed)} for seed in range(3)])
    assert launch.wait(1500) == 0, launch.output()
    top1 = {
        name: [
            json.loads((tmp_path / f"{name}-{seed}" / "scores.json").read_text())["scores"]["top1"] for seed in range(3)
        ]
        for name in ("one", "two")
    }
    print(top1)
    assert min(top1["one"]) > 50  # of ten classes
    spread = max(np.std(values, ddof=1) for values in top1.values())
    assert abs(np.mean(top1["one"]) - np.mean(top1["two"])) <= max(2 * spread, 1.0)
