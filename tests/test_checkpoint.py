"""Checkpoints: exact, whole or not there, the newest valid one wins, none is lost."""

import errno
import json
import logging
import os
import random
import re
import stat
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.optim.lars import Lars
from torch import nn

from maehub import files
from maehub.errors import CheckpointError, DivergedError, MaehubError
from maehub.train.engine import checkpoint, sharded
from maehub.train.engine.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from maehub.train.engine.distributed import Group
from maehub.train.engine.optim import adamw
from maehub.weights import tensorfile


def network(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2))


def train(model, optimizer, steps):
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2
        model(torch.full((2, 3), step + 1.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def progress(step):
    return Progress(step, {"model": "test", "crop_scale": [0.2, 1.0]}, "d" * 64)


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 2 and 4."""
    model = network()
    optimizer = adamw(model, 0.05)
    for step in (2, 4):
        train(model, optimizer, 2)
        save_checkpoint(tmp_path, model, optimizer, progress(step))
    return tmp_path


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_comes_back_exactly_and_training_goes_on_as_if_never_stopped(tmp_path):
    whole, first = network(), network()
    optimizer, before = adamw(whole, 0.05), adamw(first, 0.05)
    train(whole, optimizer, 3)
    train(first, before, 3)
    folder = save_checkpoint(tmp_path, first, before, progress(3))

    second = network(seed=9)
    after = adamw(second, 0.05)
    assert newest_checkpoint(tmp_path) == (folder, progress(3))
    load_checkpoint(folder, second, after)
    train(whole, optimizer, 3)
    train(second, after, 3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after.state_dict()["state"][number][key]), (number, key)


def test_the_files_are_safetensors_under_readable_names(run):
    folder = run / "checkpoints" / "step-4"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    assert set(load_file(folder / "model.safetensors")) == set(network().state_dict())
    state = load_file(folder / "optimizer.safetensors")
    assert {"exp_avg/0.weight", "exp_avg_sq/1.bias", "step/2.weight"} <= set(state)


def test_no_run_has_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


def die_at(monkeypatch, module, function, call):
    """Let the process end, as by kill -9, when a function is called for the n-th time."""
    real, calls = getattr(module, function), []

    def deadly(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os._exit(9)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, function, deadly)


@pytest.mark.parametrize("keep", [2, 1])
@pytest.mark.parametrize(
    ("module", "function", "call", "left"),
    [
        (tensorfile.os, "fsync", 1, 4),  # the weights
        (tensorfile.os, "fsync", 2, 4),  # the optimizer
        (tensorfile.os, "fsync", 3, 4),  # the manifest
        (checkpoint, "write_json", 1, 4),
        (tensorfile.os, "replace", 1, 4),  # the folder gets its name
        (tensorfile.os, "fsync", 4, 6),  # its name goes to the disk
        (checkpoint.shutil, "rmtree", 1, 6),  # the oldest is deleted
    ],
)
def test_row_29_a_kill_at_any_moment_of_a_save_leaves_the_newest_committed_one(
    run, monkeypatch, module, function, call, left, keep
):
    model = network()
    optimizer = adamw(model, 0.05)
    load_checkpoint(run / "checkpoints" / "step-4", model, optimizer)
    child = os.fork()
    if not child:
        die_at(monkeypatch, module, function, call)
        save_checkpoint(run, model, optimizer, progress(6), keep)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert {"step-2", "step-4"} <= set(names(run))  # the old ones go when the new one is committed
    assert newest_checkpoint(run)[1].step == left
    save_checkpoint(run, model, optimizer, progress(8))
    assert names(run) == [f"step-{left}", "step-8"]  # what the killed save left is gone


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_row_30_a_disk_that_fails_during_a_save_costs_only_that_save(run, monkeypatch, fault):
    real = checkpoint.write_tensors

    def failing(path, tensors):
        real(path, tensors)
        if path.name == "optimizer.safetensors":
            raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(checkpoint, "write_tensors", failing)
    model = network()
    with pytest.raises(CheckpointError, match="step-6") as caught:
        save_checkpoint(run, model, adamw(model, 0.05), progress(6))
    assert os.strerror(fault) in str(caught.value)
    assert names(run) == ["step-2", "step-4"]
    assert newest_checkpoint(run)[1].step == 4


def test_row_30_a_disk_that_is_too_full_is_noticed_before_writing(run, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 100)
    model = network()
    with pytest.raises(CheckpointError, match=r"needs 0\.0 MB, and 0\.0 MB are free"):
        save_checkpoint(run, model, adamw(model, 0.05), progress(6))
    assert newest_checkpoint(run)[1].step == 4


def test_row_31_data_are_on_the_disk_before_the_name_is(run, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(handle):
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def log_replace(source, target):
        calls.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    model = network()
    save_checkpoint(run, model, adamw(model, 0.05), progress(6))
    assert calls == [
        ("fsync", "model.safetensors"),
        ("fsync", "optimizer.safetensors"),
        ("fsync", "manifest.json"),
        ("rename", "step-6"),
        ("fsync", "checkpoints"),
    ]


def truncate(path):
    os.truncate(path, path.stat().st_size - 9)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def other_step(path):
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))


def unlisted(path):
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))


DAMAGES = [
    ("model.safetensors", truncate),
    ("model.safetensors", flip),
    ("model.safetensors", os.unlink),
    ("optimizer.safetensors", flip),
    ("optimizer.safetensors", os.unlink),
    ("manifest.json", truncate),
    ("manifest.json", lambda path: path.write_text("{}")),
    ("manifest.json", lambda path: path.write_text('{"format": 1, "progress": {"step": 4}, "files": []}')),
    ("manifest.json", other_step),
    ("manifest.json", unlisted),
    ("manifest.json", os.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_row_32_a_damaged_checkpoint_gives_way_to_the_one_before(run, caplog, name, damage):
    damage(run / "checkpoints" / "step-4" / name)
    kept = {path.name: path.read_bytes() for path in (run / "checkpoints" / "step-4").iterdir()}
    with caplog.at_level(logging.WARNING, "maehub"):
        folder, found = newest_checkpoint(run)
    assert (folder.name, found.step) == ("step-2", 2)
    assert len(caplog.records) == 1
    assert "step-4.corrupt" in caplog.text
    corrupt = run / "checkpoints" / "step-4.corrupt"
    assert {path.name: path.read_bytes() for path in corrupt.iterdir()} == kept
    caplog.clear()
    assert newest_checkpoint(run)[1].step == 2
    assert not caplog.records  # said once


def test_row_32_the_one_before_is_the_one_with_the_next_lower_number(tmp_path):
    model = network()
    optimizer = adamw(model, 0.05)
    train(model, optimizer, 1)
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, model, optimizer, progress(step), keep=4)
    assert newest_checkpoint(tmp_path)[1].step == 11
    for step in (11, 10):
        flip(tmp_path / "checkpoints" / f"step-{step}" / "model.safetensors")
    assert newest_checkpoint(tmp_path)[1].step == 9
    save_checkpoint(tmp_path, model, optimizer, progress(12))
    assert names(tmp_path) == ["step-10.corrupt", "step-11.corrupt", "step-12", "step-9"]


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
def test_row_32_a_damaged_shard_gives_way_too(tmp_path, name, damage):
    model = averaged()
    optimizer = adamw(model, 0.05)
    learn(model, optimizer)
    for step in (2, 4):
        shards(tmp_path, model, optimizer, progress(step))
    damage(tmp_path / "checkpoints" / "step-4" / name)
    assert newest_checkpoint(tmp_path)[1].step == 2
    assert names(tmp_path) == ["step-2", "step-4.corrupt"]


def test_row_32_none_valid_is_an_error_and_stays_one(run):
    for step in (2, 4):
        flip(run / "checkpoints" / f"step-{step}" / "model.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of them is whole") as caught:
            newest_checkpoint(run)
        assert names(run) == ["step-2.corrupt", "step-4.corrupt"]
    assert caught.value.exit_code == 6


def test_a_second_damage_at_the_same_step_loses_nothing(run):
    model = network()
    optimizer = adamw(model, 0.05)
    flip(run / "checkpoints" / "step-4" / "model.safetensors")
    newest_checkpoint(run)
    save_checkpoint(run, model, optimizer, progress(4))
    flip(run / "checkpoints" / "step-4" / "model.safetensors")
    assert newest_checkpoint(run)[1].step == 2
    assert names(run) == ["step-2", "step-4.2.corrupt", "step-4.corrupt"]


@pytest.mark.parametrize("version", [2, 10**6])
def test_row_33_a_newer_format_is_refused_and_left_alone(run, version):
    path = run / "checkpoints" / "step-4" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    with pytest.raises(CheckpointError, match=re.escape(f"format {version!r}, and this maehub reads 1")):
        newest_checkpoint(run)
    assert names(run) == ["step-2", "step-4"]


def everything(model, optimizer):
    """The bytes of all that a run computes with: weights, averages, state and rates of the optimizer, generators."""
    state = optimizer.state_dict()
    tensors = {f"model {name}": value for name, value in model.state_dict().items()}
    tensors |= {f"{number} {key}": v for number, kept in state["state"].items() for key, v in kept.items()}
    contents = {name: (str(value.dtype), value.numpy().tobytes()) for name, value in tensors.items()}
    generators = (torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate())
    return contents, state["param_groups"], generators


def averaged(width=4, frozen=False):
    """A network and the average of its weights, as fine-tuning keeps them; maybe without training its norm."""
    parts = nn.ModuleDict({"network": network(width=width), "average": network(5, width).requires_grad_(False)})
    parts["network"][1].requires_grad_(not frozen)
    return parts


def lars(model):
    return Lars([parameter for parameter in model.parameters() if parameter.requires_grad], momentum=0.9)


OTHERS = {  # what a run with `averaged` is not: a network, and its optimizer
    "wider": lambda: (averaged(width=8), adamw),
    "deeper": lambda: (nn.ModuleDict({**averaged(), "head": nn.Linear(2, 2)}), adamw),
    "no average": lambda: (nn.ModuleDict({"network": network()}), adamw),
    "another dtype": lambda: (averaged().double(), adamw),
    "frozen": lambda: (averaged(frozen=True), adamw),
    "another optimizer": lambda: (averaged(), lambda model, decay: lars(model)),
}


def shards(run, model, optimizer, progress):
    """As a run of several processes writes it that spreads its weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        sharded.save_shards(run, model, optimizer, progress, 2, Group())


def learn(model, optimizer):
    """One step, so that there is a state to lose."""
    optimizer.param_groups[0]["lr"] = 1e-2
    weight = next(model.parameters())
    model["network"](torch.ones(2, 3, dtype=weight.dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("written", [save_checkpoint, shards])
@pytest.mark.parametrize("other", OTHERS)
def test_row_33_a_checkpoint_of_another_network_or_optimizer_changes_nothing(tmp_path, written, other):
    model = averaged()
    optimizer = adamw(model, 0.05)
    learn(model, optimizer)
    written(tmp_path, model, optimizer, progress(1))
    load = load_checkpoint if written is save_checkpoint else partial(sharded.load_shards, group=Group())
    model, optimizer_of = OTHERS[other]()
    if other == "deeper":
        model["network"].append(model.pop("head"))
    optimizer = optimizer_of(model, 0.05)
    for _ in range(2):  # without a state, then with one
        before = everything(model, optimizer)
        with pytest.raises(CheckpointError, match=r"another network or optimizer: .* instead of .*Nothing was changed"):
            load(tmp_path / "checkpoints" / "step-1", model, optimizer)
        assert everything(model, optimizer) == before
        learn(model, optimizer)


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("model", lambda part: part.pop("2.bias"), r"2\.bias missing instead of \(2,\) torch\.float32"),
        (
            "model",
            lambda part: part.update({"9.bias": torch.ones(2)}),
            r"9\.bias \(2,\) torch\.float32 instead of nothing",
        ),
        ("model", lambda part: part.update({"2.bias": torch.ones(1)}), r"2\.bias \(1,\) "),  # which broadcasts
        ("model", lambda part: part.update({"2.bias": part["2.bias"].half()}), r"2\.bias \(2,\) torch\.float16 "),
        ("model", lambda part: part.update({"exp_avg/2.bias": torch.ones(2, dtype=torch.int64)}), "torch.int64"),
        ("optimizer", lambda part: part.pop("exp_avg_sq/2.bias"), r"exp_avg_sq/2\.bias missing"),
        ("optimizer", lambda part: part.update({"exp_avg/2.bias": torch.ones(1)}), r"exp_avg/2\.bias \(1,\) "),
        ("optimizer", lambda part: part.update({"step/2.bias": torch.ones(2)}), r"step/2\.bias \(2,\) "),
        ("optimizer", lambda part: part.update({"step/2.bias": torch.tensor(2)}), r"step/2\.bias \(\) torch\.int64 "),
        ("optimizer", lambda part: part.update({"momentum_buffer/2.bias": torch.ones(2)}), "momentum_buffer/2.bias "),
        ("optimizer", lambda part: part.update({"exp_avg/9.bias": torch.ones(2)}), "exp_avg/9.bias "),
        ("optimizer", lambda part: part.update({"exp_avg": torch.ones(2)}), "exp_avg "),
    ],
)
def test_row_33_every_name_shape_and_dtype_is_looked_at_before_the_first_number_is_taken(run, file, damage, told):
    folder, model = run / "checkpoints" / "step-4", network(9)
    optimizer = adamw(model, 0.05)
    train(model, optimizer, 1)
    path = folder / f"{file}.safetensors"
    tensors = dict(load_file(path))
    damage(tensors)
    save_file(tensors, path)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(folder, model, optimizer)
    assert everything(model, optimizer) == before


def test_row_33_an_optimizer_that_cannot_be_read_changes_no_weights(run):
    folder, model = run / "checkpoints" / "step-4", network(9)
    optimizer = adamw(model, 0.05)
    before = everything(model, optimizer)
    (folder / "optimizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MaehubError, match=r"optimizer\.safetensors"):
        load_checkpoint(folder, model, optimizer)
    assert everything(model, optimizer) == before


def test_a_parameter_that_never_had_a_gradient_has_no_state_and_comes_back(tmp_path):
    model = averaged()
    model["spare"] = nn.Linear(2, 2)
    optimizer = adamw(model, 0.05)
    learn(model, optimizer)
    folder = save_checkpoint(tmp_path, model, optimizer, progress(1))
    other = averaged()
    other["spare"] = nn.Linear(2, 2)
    after = adamw(other, 0.05)
    load_checkpoint(folder, other, after)
    for one, opt in ((model, optimizer), (other, after)):
        learn(one, opt)
    assert everything(model, optimizer)[0] == everything(other, after)[0]


def test_row_35_rotation_keeps_the_last_two_and_whatever_is_not_older(run, caplog, monkeypatch):
    model = network()
    optimizer = adamw(model, 0.05)
    (run / "checkpoints" / "step-9999").mkdir()
    (run / "checkpoints" / "step-1.corrupt").mkdir()
    (run / "checkpoints" / "mine").mkdir()
    strange = ["mine", "step-1.corrupt", "step-9999"]
    save_checkpoint(run, model, optimizer, progress(6))
    assert names(run) == sorted(["step-4", "step-6", *strange])

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    save_checkpoint(run, model, optimizer, progress(8))
    assert "cannot be deleted" in caplog.text
    assert names(run) == sorted(["step-4", "step-6", "step-8", *strange])


def test_row_36_files_have_the_mode_of_the_umask(tmp_path):
    model = network()
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path, model, adamw(model, 0.05), progress(1))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_row_58_nothing_that_is_not_finite_is_ever_saved(run, where):
    model = network()
    optimizer = adamw(model, 0.05)
    train(model, optimizer, 1)
    if where == "weights":
        model[0].weight.data[0, 0] = torch.nan
    else:
        optimizer.state[model[0].weight]["exp_avg_sq"][0, 0] = torch.inf
    with pytest.raises(DivergedError, match=r"step 6: NaN or infinity in .*0\.weight"):
        save_checkpoint(run, model, optimizer, progress(6))
    assert names(run) == ["step-2", "step-4"]
