"""Many processes: the same numbers as one, agreement, errors that all share, waits that end; by torchrun."""

import json
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Launch, losses, metrics, restarted, state, steps_again, words
from safetensors.torch import load_file

import maehub
from maehub.cli import command_line as cli
from maehub.errors import DistributedError, UsageError
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.train.engine.distributed import Group, joined


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of coloured noise on a ramp."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(40):
        ramp = np.linspace(0, 160, 48)[None, :, None] * generator.random(3) + generator.integers(0, 80, (40, 48, 3))
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", EncoderConfig(32, 8, 3, 32, 2, 2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """Runs that nothing disturbed: of one process; of two with DDP, with micro-batches, and with FSDP2."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", EncoderConfig(32, 8, 3, 32, 2, 2))
        torch.set_num_threads(1)
        assert cli.main(words(pictures, folder / "one")) == 0
    variants = {"ddp": {}, "micro": {"micro-batch": 3}, "fsdp": {"fsdp": True}, "views": {"masks-per-image": 2}}
    launch = Launch(folder, [{"words": words(pictures, folder / name, **more)} for name, more in variants.items()])
    assert launch.wait() == 0, launch.output()
    return folder


def weights(run, step=12):
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def close(one, other, tolerance=1e-5):
    scale = max(float(value.abs().max()) for value in one.values())
    return all(float((one[name] - other[name]).abs().max()) <= tolerance * scale for name in one)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["ddp", "micro", "fsdp"])
def test_two_processes_give_the_losses_of_one(whole, name):
    one, two = losses(whole / "one"), losses(whole / name)
    assert list(one) == list(two) == list(range(1, 13))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    assert two[12] < 0.8 * two[1]
    assert state(whole / name) == {"state": "completed", "exit_code": 0, "last_good_step": 12, "reason": ""}
    assert len([line for line in metrics(whole / name) if "loss" in line]) == 12  # one line a step, of rank 0


def test_fsdp_exports_what_ddp_does(whole):
    ddp, fsdp = (maehub.load_autoencoder(whole / name).state_dict() for name in ("ddp", "fsdp"))
    assert close(ddp, fsdp)
    files = sorted(path.name for path in (whole / "fsdp" / "checkpoints" / "step-12").iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"]
    listed = json.loads((whole / "fsdp" / "checkpoints" / "step-12" / "manifest.json").read_text())["files"]
    assert sorted(listed) == files[:3]


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(pictures, tmp_path_factory):
    """Runs of two processes that were told to stop after their sixth step, DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("interrupted")
    scenarios = [
        {"words": words(pictures, folder / name, **more), "fault": "terminate", "rank": 1, "step": 5}
        for name, more in {"ddp": {}, "fsdp": {"fsdp": True}}.items()
    ]
    launch = Launch(folder, scenarios)
    launch.wait()
    assert launch.codes(0) == launch.codes(1) == [75, 75], launch.output()
    return folder


def copy(source, target):
    subprocess.run(["cp", "-r", source, target], check=True)
    return target


def test_row_56_a_signal_to_one_process_stops_all_at_the_same_step(interrupted, whole):
    for name in ("ddp", "fsdp"):
        stopped = state(interrupted / name)
        assert (stopped["state"], stopped["exit_code"]) == ("preempted", 75)
        last = stopped["last_good_step"]
        assert last in (6, 7)  # the others hear of it at the beginning of the next step
        assert list(losses(interrupted / name)) == list(range(1, last + 1))
        assert (interrupted / name / "checkpoints" / f"step-{last}" / "manifest.json").is_file()


def test_row_53_two_processes_resume_bit_for_bit(pictures, interrupted, whole, tmp_path):
    ddp, fsdp = copy(interrupted / "ddp", tmp_path / "ddp"), copy(interrupted / "fsdp", tmp_path / "fsdp")
    scenarios = [
        {"words": words(pictures, ddp, resume=True)},
        {"words": words(pictures, fsdp, fsdp=True, resume=True)},
    ]
    launch = Launch(tmp_path, scenarios)
    assert launch.wait() == 0, launch.output()
    assert losses(ddp) == losses(whole / "ddp")
    assert same(weights(ddp), weights(whole / "ddp"))
    assert losses(fsdp) == losses(whole / "fsdp")
    assert same(
        load_file(fsdp / "model" / "model.safetensors"), load_file(whole / "fsdp" / "model" / "model.safetensors")
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_row_55_one_process_goes_on_with_the_samples_of_two(pictures, interrupted, whole, tmp_path, name):
    run = copy(interrupted / name, tmp_path / "run")
    assert cli.main(words(pictures, run, resume=True)) == 0
    np.testing.assert_allclose(list(losses(run).values()), list(losses(whole / "one").values()), rtol=1e-5)
    assert close(weights(run), weights(whole / "one"), 1e-3)  # Adam's step enlarges the rounding of small gradients


@pytest.mark.slow
def test_row_55_two_processes_go_on_with_the_samples_of_one_and_shards_with_those_of_copies(
    pictures, interrupted, whole, tmp_path
):
    one = tmp_path / "one"
    assert cli.main(words(pictures, one, time_limit=1e-6)) == 75  # the limit is over after the first step
    assert list(losses(one)) == [1]
    ddp = copy(interrupted / "ddp", tmp_path / "ddp")
    fsdp = copy(interrupted / "fsdp", tmp_path / "fsdp")
    scenarios = [
        {"words": words(pictures, one, resume=True)},
        {"words": words(pictures, ddp, resume=True, fsdp=True)},  # a whole checkpoint into shards
        {"words": words(pictures, fsdp, resume=True)},  # and the other way
    ]
    launch = Launch(tmp_path, scenarios)
    assert launch.wait() == 0, launch.output()
    for run in (one, ddp, fsdp):
        np.testing.assert_allclose(list(losses(run).values()), list(losses(whole / "one").values()), rtol=1e-5)
    assert close(weights(one), weights(whole / "one"), 1e-3)
    assert close(weights(fsdp), weights(whole / "one"), 1e-3)


def test_row_55_a_batch_that_processes_cannot_share_is_refused(pictures, whole, interrupted, tmp_path):
    run = copy(interrupted / "ddp", tmp_path / "run")
    scenarios = [
        {"words": words(pictures, run, resume=True, **{"batch-size": 6})},
        {"words": words(pictures, tmp_path / "odd", **{"batch-size": 7})},
    ]
    launch = Launch(tmp_path, scenarios)
    launch.wait()
    assert launch.codes(0) == launch.codes(1) == [2, 2]
    assert "batch_size 8 → 6" in launch.output()
    assert "--batch-size 7 counts the views of all processes: it must be a multiple of 2" in launch.output()
    assert state(run)["state"] == "preempted"
    assert not (tmp_path / "odd").exists()


# --- what goes wrong in one process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed(pictures, interrupted, tmp_path_factory):
    """Runs that one process of two ended, all in one launch: no error left the other process waiting."""
    folder = tmp_path_factory.mktemp("failed")
    copy(interrupted / "ddp", folder / "blind")
    scenarios = {
        "nan": {"fault": "nan", "rank": 1, "step": 5},
        "disk0": {"fault": "disk_full", "rank": 0},
        "disk1": {"words": {"fsdp": True}, "fault": "disk_full", "rank": 1},
        "mistake": {"words": {"fsdp": True}, "fault": "mistake_in_save", "rank": 1},
        "picture": {"fault": "bad_picture", "rank": 1, "step": 5},
        "code": {"fault": "other_code", "rank": 1},
        "seed": {"rank": 1, "fault": "at_all", "more": ["--seed", "1"]},
        "ratio": {"rank": 1, "more": ["--mask-ratio", "0.5"]},
        "blind": {"words": {"resume": True}, "fault": "blind", "rank": 1},
        "data": {"rank": 1, "more": ["--holdout", "3"]},
    }
    listed = []
    for name, scenario in scenarios.items():
        scenario = {key: value for key, value in scenario.items() if value != "at_all"}
        listed.append(scenario | {"words": words(pictures, folder / name, **scenario.get("words", {}))})
    launch = Launch(folder, listed)
    launch.wait()
    codes = [dict(zip(scenarios, launch.codes(rank), strict=True)) for rank in (0, 1)]
    return folder, codes, launch.output()


def reason(folder, name):
    return state(folder / name)["reason"]


def test_row_58_what_is_not_finite_in_one_process_stops_all_before_the_update(failed, whole):
    folder, codes, _ = failed
    assert [one["nan"] for one in codes] == [7, 7]
    assert state(folder / "nan")["state"] == "diverged"
    assert "gradient of step 6 is not finite" in reason(folder, "nan")
    assert state(folder / "nan")["last_good_step"] == 5
    before = {step: loss for step, loss in losses(whole / "ddp").items() if step < 6}
    assert {step: loss for step, loss in losses(folder / "nan").items() if step < 6} == before
    assert all(value.isfinite().all() for value in weights(folder / "nan", 5).values())


@pytest.mark.parametrize(("name", "rank"), [("disk0", 0), ("disk1", 1)])
def test_row_68_a_save_that_fails_in_one_process_is_the_same_error_in_all(failed, name, rank):
    folder, codes, output = failed
    assert [one[name] for one in codes] == [6, 6]
    assert reason(folder, name) == f"rank {rank}: the disk of this host is full"
    assert "goes on and tries again in 4 steps" in output
    assert list(losses(folder / name)) == list(range(1, 9))  # the second failure in a row ends the run
    assert not list((folder / name).glob("checkpoints/*"))


def test_row_68_a_mistake_in_one_process_is_told_by_all_and_nothing_is_committed(failed):
    folder, codes, _ = failed
    assert [one["mistake"] for one in codes] == [8, 8]
    assert reason(folder, "mistake") == "rank 1: saving step 4 failed: ZeroDivisionError: a mistake"
    assert not list((folder / "mistake").glob("checkpoints/*"))


def test_a_broken_picture_of_one_process_ends_all_with_its_name(failed):
    folder, codes, _ = failed
    assert [one["picture"] for one in codes] == [5, 5]
    assert reason(folder, "picture").startswith("rank 1: ")
    assert ".png: this picture is broken" in reason(folder, "picture")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("code", r"the code of maehub: rank 0 has [0-9a-f]+, rank 1 has 0{64}"),
        ("seed", r"--seed: rank 0 has 0, rank 1 has 1"),
        ("ratio", r"--mask-ratio: rank 0 has 0.75, rank 1 has 0.5"),
        ("data", r"--holdout: rank 0 has None, rank 1 has 3; the data: rank 0 has"),
    ],
)
def test_row_70_processes_that_disagree_are_told_what_about(failed, name, words):
    folder, codes, output = failed
    assert [one[name] for one in codes] == [8, 8]
    assert re.search(f"the processes do not agree: .*{words}", output)
    assert not (folder / name).exists()


def test_row_71_a_host_that_does_not_see_the_checkpoint_is_named(failed):
    folder, codes, output = failed
    assert [one["blind"] for one in codes] == [8, 8]
    assert "rank 1 on " in output
    assert f"does not see {folder}/blind/checkpoints/step-" in output
    assert state(folder / "blind")["state"] == "preempted"


def test_an_error_that_all_have_is_printed_once(failed):
    _, _, output = failed
    assert output.count("this picture is broken") == 1
    assert output.count("the processes do not agree: --mask-ratio") == 1
    assert "Traceback" not in output.split("ChildFailedError")[0].split("torch/distributed")[0]


# --- a process that is gone -------------------------------------------------------------------------------------------


def test_row_67_a_job_that_is_restarted_goes_on_from_the_checkpoint(pictures, whole, tmp_path):
    """To bring the processes together again is torch's part and may fail: then another job; see `test_endurance`."""
    for number in range(3):
        run = tmp_path / f"{number}"
        launch = restarted(pictures, tmp_path, run, 1)
        if launch.wait() == 0:
            break
    assert launch.process.returncode == 0, launch.output()
    assert steps_again(run) == list(range(4, 12))
    assert losses(run) == losses(whole / "ddp")
    assert same(weights(run), weights(whole / "ddp"))
    assert state(run)["state"] == "completed"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_row_66_a_killed_process_ends_the_job_which_resumes_bit_for_bit(pictures, whole, tmp_path, rank):
    run = tmp_path / "run"
    launch = Launch(tmp_path, [{"words": words(pictures, run), "fault": "kill", "rank": rank, "step": 6}])
    begun = time.monotonic()
    assert launch.wait() == 1
    assert time.monotonic() - begun < 120  # only that nothing hangs
    assert "exitcode  : -9" in launch.output()
    if rank == 1:  # the one that writes is left
        ended = state(run)
        assert (ended["state"], ended["exit_code"], ended["last_good_step"]) == ("failed", 8, 4)
        assert "Rank 1 died or was killed: last seen at step" in ended["reason"]
        assert "--resume" in ended["reason"]
    again = Launch(tmp_path, [{"words": words(pictures, run, resume=True)}])
    assert again.wait() == 0, again.output()
    assert losses(run) == losses(whole / "ddp")
    assert same(weights(run), weights(whole / "ddp"))


def test_row_56_a_signal_to_torchrun_leaves_a_checkpoint(pictures, tmp_path):
    run = tmp_path / "run"
    launch = Launch(tmp_path, [{"words": words(pictures, run, steps=2000), "fault": "slow", "step": 20}], fresh=True)
    until = time.monotonic() + 60
    while not (run / "checkpoints" / "step-4").exists():
        assert time.monotonic() < until, launch.output()
        time.sleep(0.05)
    launch.process.send_signal(signal.SIGTERM)
    launch.wait(60)
    stopped = state(run)
    assert (stopped["state"], stopped["exit_code"]) == ("preempted", 75), launch.output()
    assert (run / "checkpoints" / f"step-{stopped['last_good_step']}").is_dir()


@pytest.mark.slow
def test_row_69_a_process_that_hangs_is_named_with_its_step(pictures, tmp_path):
    run = tmp_path / "run"
    scenario = {"words": words(pictures, run, timeout=5), "fault": "hang", "rank": 1, "step": 6}
    launch = Launch(tmp_path, [scenario])
    assert launch.wait(120) == 1
    ended = state(run)
    assert (ended["state"], ended["exit_code"]) == ("failed", 8)
    assert "Rank 1 hangs or cannot be reached: last seen at step 7" in ended["reason"]


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "kind", "text"),
    [
        ({"RANK": "0"}, UsageError, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"),
        ({"WORLD_SIZE": "2"}, UsageError, "RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, UsageError, "RANK no number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, UsageError, "below WORLD_SIZE=2"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"},
            DistributedError,
            "cannot meet the others at nowhere.invalid:29500",
        ),
    ],
)
def test_row_73_a_half_told_start_says_what_is_missing(monkeypatch, env, kind, text):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=text), joined("cpu", 5.0):
        pass


def test_row_73_a_port_in_use_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(DistributedError, match="choose another MASTER_PORT"), joined("cpu", 5.0):
            pass


def test_one_process_of_torchrun_needs_no_others(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with joined("cpu", 5.0) as group:
        assert (group.rank, group.size, group.is_main) == (0, 1, True)


def test_a_group_of_one_passes_everything_through():
    group = Group()
    assert group.first("x", "it") == "x"
    assert group.all("x", "it") == ["x"]
    group.agree({"seed": 1})
    assert group.exchange(75, False) == (75, False)
    with pytest.raises(ZeroDivisionError), group.together("dividing"):
        print(1 / 0)


def test_row_72_sets_of_any_size_are_shared_evenly(pictures, tmp_path):
    scenarios = []
    sizes = 8, 13, 17
    for count in sizes:
        folder = tmp_path / f"{count}"
        folder.mkdir()
        for path in sorted(pictures.iterdir())[:count]:
            (folder / path.name).write_bytes(path.read_bytes())
        scenarios.append(
            {"words": words(folder, tmp_path / f"run{count}", steps=3, json=True, **{"validate-every": 3})}
        )
    launch = Launch(tmp_path, scenarios)
    assert launch.wait() == 0, launch.output()
    assert launch.output().count('"exit_code": 0') == 3  # each is told once
    for count in sizes:
        assert cli.main(words(tmp_path / f"{count}", tmp_path / f"one{count}", steps=3)) == 0
        one, two = losses(tmp_path / f"one{count}"), losses(tmp_path / f"run{count}")
        np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
