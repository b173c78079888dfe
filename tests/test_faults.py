"""What goes wrong around a training run: the disk, memory, terminals, the environment, downloads of many processes."""

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Launch, forked, losses, metrics, state, words

import maehub
from maehub.cli import command_line as cli
from maehub.data import loader
from maehub.errors import CheckpointError
from maehub.images.augment import Augmentation
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.train import PretrainConfig, pretrain
from maehub.train.engine import micro_batch as fitting
from maehub.train.engine import resume as saving
from maehub.train.engine import run_log as log
from maehub.train.engine.preemption import Stop
from maehub.train.networks import costs
from maehub.train.pretraining import loop as pretraining_loop
from maehub.train.pretraining import network
from maehub.train.pretraining import views as data
from maehub.train.pretraining.objective import Objective

TINY = EncoderConfig(32, 8, 3, 32, 2, 2)
PRESET = """
from maehub.cli import command_line as cli
from maehub.models.encoder import PRESETS, EncoderConfig
PRESETS["vit-tiny"] = EncoderConfig(32, 8, 3, 32, 2, 2)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", TINY)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", TINY)
        torch.set_num_threads(1)
        assert cli.main(words(pictures, out)) == 0
    return out


def config_of(pictures, out, **changes):
    usual = {"steps": 6, "batch_size": 4, "workers": 0, "device": "cpu", "quiet": True, "target": "pixels"}
    network = {"model": "vit-tiny", "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    return PretrainConfig(data=pictures, out=out, **(usual | network | changes))


def script(pictures, out, before="", after="", env=None, **changes):
    """A run in a process of its own."""
    code = (
        f"{PRESET}\n{before}\nimport sys\ncode = cli.main({words(pictures, out, **changes)!r})\n{after}\nsys.exit(code)"
    )
    command, env = [sys.executable, "-c", code], os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    if "PYTHONUTF8" in env:  # an interpreter looks for it when it starts
        return subprocess.run(command, env=env, capture_output=True, text=True)
    return forked(command, env=env)


def test_row_34_a_save_that_fails_is_told_at_once_and_the_newest_checkpoint_stays(pictures, tmp_path, monkeypatch):
    """Saves are not in the background: when a step begins, the one before is on the disk, or its error told."""
    out, real, seen = tmp_path / "run", saving.save_checkpoint, []

    def failing(run, model, optimizer, progress, keep):
        if progress.step >= 4:
            raise CheckpointError(f"step {progress.step} cannot be written")
        return real(run, model, optimizer, progress, keep)

    def rate(step, *rest):
        seen.append((step, sorted(path.name for path in out.glob("checkpoints/*"))))
        return 1e-4

    monkeypatch.setattr(saving, "save_checkpoint", failing)
    monkeypatch.setattr("maehub.train.pretraining.loop.engine.learning_rate", rate)
    with pytest.raises(CheckpointError, match="step 6 cannot be written"):
        pretrain(config_of(pictures, out, checkpoint_every=2))
    assert seen[2:] == [(2, ["step-2"]), (3, ["step-2"]), (4, ["step-2"]), (5, ["step-2"])]
    assert state(out)["last_good_step"] == 2


def test_row_38_a_file_system_that_cannot_rename_is_noticed_before_the_first_step(pictures, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("maehub.train.pretraining.loop.engine.learning_rate", pytest.fail)
    with pytest.raises(CheckpointError, match="cannot rename") as caught:
        pretrain(config_of(pictures, tmp_path / "run"))
    assert caught.value.exit_code == 6
    left = [path for path in (tmp_path / "run").iterdir() if path.stat().st_size]
    assert not left


def test_row_49_too_little_shared_memory_is_said_with_numbers(monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(64 << 20, 0, 64 << 20))
    view = data.View((224, 224), 16, 3, Augmentation(), "random", 0.75)
    loader.check_shared_memory(view.batch_bytes(256), 256, 8)
    assert "8 processes that read may need 1.23 GB of /dev/shm, and 0.07 GB are free" in caplog.text
    caplog.clear()
    loader.check_shared_memory(view.batch_bytes(256), 256, 0)
    loader.check_shared_memory(view.batch_bytes(4), 4, 2)
    assert not caplog.records


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root to mount")
def test_row_49_a_shared_memory_that_is_full_ends_in_one_clear_error(pictures, tmp_path):
    line = words(pictures, tmp_path / "run", workers=2, **{"batch-size": 12, "image-size": 96})
    code = f"{PRESET}\nimport sys\nsys.exit(cli.main({line!r}))"
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, code], capture_output=True, text=True, timeout=120
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("mounts are not allowed here")
    assert done.returncode == 5, done.stderr
    assert "a batch of 12 views needs 0.3 MB of /dev/shm" in done.stderr
    assert "Traceback" not in done.stderr


def test_row_57_a_slow_save_is_warned_about_and_the_time_limit_leaves_room_for_it(tmp_path, monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(saving, "save_checkpoint", lambda *arguments: clock.__setitem__(0, clock[0] + 25))
    stop = Stop(deadline=1000.0)
    model = torch.nn.Linear(2, 2)
    with log.RunLog(tmp_path / "run", 4) as run:
        run.begin({}, first_step=0, steps=10, hide_bar=True)
        saver = saving.Checkpoints(
            saving.Group(),
            run,
            stop,
            model=model,
            optimizer=None,
            start=None,
            steps=10,
            every=1000,
            keep=2,
            shard=False,
        )
        monkeypatch.setattr(saving, "replace", lambda progress, step: progress)
        for step in (1, 2):
            saver.save(step, must=False)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1
    assert "a checkpoint takes 25 s, and torchrun kills 30 s after a SIGTERM" in warned[0]
    clock[0] = 1000 - 2 * 25 - 6
    assert stop.exit_code is None
    clock[0] += 2
    assert stop.exit_code == 75


@pytest.mark.parametrize("kind", ["device", "host", "allocator"])
def test_row_60_memory_that_runs_out_says_what_helps(pictures, tmp_path, monkeypatch, kind):
    errors = {
        "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "host": MemoryError(),
        "allocator": RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory"),
    }

    def failing(*arguments):
        raise errors[kind]

    monkeypatch.setattr("maehub.train.pretraining.loop.engine.gradient_norm", failing)
    with pytest.raises(CheckpointError, match=r"ran out with 4 views at once.*--micro-batch") as caught:
        pretrain(config_of(pictures, tmp_path / "run"))
    assert caught.value.exit_code == 6
    assert (state(tmp_path / "run")["state"], state(tmp_path / "run")["exit_code"]) == ("failed", 6)


def test_row_60_a_real_limit_on_memory(pictures, tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    grow = (
        "from maehub.train.pretraining import loop as pretraining\nimport torch\n"
        "pretraining.engine.gradient_norm = lambda parameters: torch.ones(1 << 32).norm()\n"  # 16 GiB
    )
    done = script(pictures, tmp_path / "run", before=limit + grow)
    assert done.returncode == 6, done.stderr
    assert "ran out with 8 views at once" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS) != (6 << 30, 6 << 30)


def test_a_batch_that_does_not_fit_is_accumulated(pictures, tmp_path, monkeypatch, caplog):
    pretrain(config_of(pictures, tmp_path / "whole", batch_size=12))
    network = AutoencoderConfig(TINY, 32, 1, 2, "pixels")
    fixed = costs.fixed_bytes(costs.count_parameters(network), "fp32")
    room = fixed + 2 * 5 * costs.activation_bytes(
        network, costs.work_of(network, 4), "fp32"
    )  # half of what is left is for five views
    monkeypatch.setattr("maehub.train.engine.micro_batch.available_bytes", lambda: room)
    with caplog.at_level("INFO", "maehub"):
        pretrain(config_of(pictures, tmp_path / "parts", batch_size=12))
    assert "12 views do not fit at once: gradients are accumulated over 3 × 4" in caplog.text
    np.testing.assert_allclose(
        list(losses(tmp_path / "parts").values()), list(losses(tmp_path / "whole").values()), rtol=1e-5
    )
    monkeypatch.setattr("maehub.train.engine.micro_batch.available_bytes", lambda: fixed)
    with pytest.raises(CheckpointError, match=r"not even one view of 32×32 fits"):
        pretrain(config_of(pictures, tmp_path / "none", batch_size=12))
    assert not (tmp_path / "none").exists()


def test_a_device_that_runs_out_is_asked_for_less(monkeypatch):
    model = MaskedAutoencoder(AutoencoderConfig(TINY, 32, 1, 2, "pixels"))
    objective = Objective(model, model.preprocess, kept=4)
    view = data.View((32, 32), 8, 3, Augmentation(), "random", 0.75)
    real = Objective.forward

    def small(self, pixels, *rest):
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels, *rest)

    monkeypatch.setattr(Objective, "forward", small)
    cpu = torch.device("cpu")
    found = [
        fitting.pass_fits(objective, network._blank(view, size, cpu), cpu, contextlib.nullcontext()) for size in (6, 3)
    ]
    assert found == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("method", "error"),
    [(method, error) for method in ("__init__", "add_scalar") for error in (FULL, ValueError("queue shut"))]
    + [("close", FULL)],
)
def test_row_63_a_failing_tensorboard_is_a_warning(pictures, tmp_path, monkeypatch, caplog, method, error):
    from torch.utils.tensorboard import SummaryWriter

    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(SummaryWriter, method, failing)
    assert pretrain(config_of(pictures, tmp_path / "run", tensorboard=True)).exit_code == 0
    warned = [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()]
    assert len(warned) == (method != "close")  # when all is written nothing is lost
    assert all(f"{error}; the run goes on" in line for line in warned)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_tensorboard_gets_the_numbers(pictures, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(config_of(pictures, tmp_path / "run", tensorboard=True, holdout=2))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "val_loss", "mean_fill"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
        [event.value for event in events.Scalars("loss")], list(losses(tmp_path / "run").values())
    )


class Gone(io.StringIO):
    """A terminal whose window was closed."""

    tried = 0

    def write(self, text):
        type(self).tried += 1
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def isatty(self):
        return True


def test_row_63_a_terminal_that_goes_away_does_not_end_the_run(pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Gone())
    assert pretrain(config_of(pictures, tmp_path / "run", quiet=False)).exit_code == 0
    assert Gone.tried
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_row_63_closed_outputs_do_not_end_the_run(pictures, whole, tmp_path):
    code = f"{PRESET}\nimport sys\nsys.exit(cli.main({words(pictures, tmp_path / 'run')!r}))"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code], env=env, timeout=120)
    assert done.returncode == 0
    assert losses(tmp_path / "run") == losses(whole)


def test_row_63_lines_of_steps_that_are_done_again_are_dropped(pictures, tmp_path, monkeypatch):
    """Those behind the checkpoint, whether they are whole or not; none stands there twice."""
    run, real = tmp_path / "run", saving.Checkpoints.after_step

    def after_step(checkpoints, step, stop_signal):
        return real(checkpoints, step, stop_signal) if step < 5 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(saving.Checkpoints, "after_step", after_step)
        with pytest.raises(ZeroDivisionError):
            pretrain(config_of(pictures, run, checkpoint_every=3))
    before = [line["step"] for line in metrics(run) if "loss" in line]
    assert max(before) > 3
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9}\n{"step": 5, "lo')
    pretrain(config_of(pictures, run, checkpoint_every=3, resume=True))
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"TMPDIR": "/dev/shm", "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent/cache"},
        {"TZ": "Asia/Kathmandu"},
    ],
    ids=["locale", "folders", "zone"],
)
def test_row_64_the_environment_changes_nothing(pictures, whole, tmp_path, env):
    clock = "import time\nreal = time.time\ntime.time = lambda: real() - 1e8 * (int(real() * 10) % 2)\n"  # it jumps
    mask = "import os\nos.umask(0o077)\n"
    done = script(pictures, tmp_path / "run", before=clock + mask, env=env)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(whole)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_row_74_one_process_of_a_host_downloads(pictures, tmp_path, hub):
    torch.manual_seed(0)
    model = MaskedAutoencoder(AutoencoderConfig(TINY, 32, 1, 2, "pixels"))
    maehub.save(model, tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    hub.add_repo("me/tiny", files)
    line = ["pretrain", str(pictures), "-o", str(tmp_path / "run"), "--from", "me/tiny", "--steps", "2", "--quiet"]
    line += ["--batch-size", "4", "--workers", "0", "--device", "cpu", "--timeout", "20"]
    missing = [word.replace("me/tiny", "me/missing").replace("/run", "/none") for word in line]
    launch = Launch(tmp_path, [{"words": line}, {"words": missing}], env=hub.env())
    launch.wait()
    assert launch.codes(0) == launch.codes(1) == [0, 3], launch.output()
    assert len(hub.asked("GET", "/model.safetensors")) == 1
    assert launch.output().count("me/missing") >= 1
    assert "Traceback" not in launch.output().split("torch/distributed")[0]
    assert not (tmp_path / "none").exists()
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]


def test_row_56_a_signal_while_the_processes_part_changes_nothing(pictures, tmp_path, monkeypatch):
    """torchrun sends one to all others when the first has ended, with the run done and the group being left."""
    real = pretraining_loop.engine.joined

    @contextlib.contextmanager
    def joined(*arguments):
        with real(*arguments) as group:
            yield group
        os.kill(os.getpid(), signal.SIGTERM)

    def ended(*_):
        raise AssertionError("the signal ended the process")

    before = signal.signal(signal.SIGTERM, ended)
    try:
        monkeypatch.setattr(pretraining_loop.engine, "joined", joined)
        assert pretrain(config_of(pictures, tmp_path / "run")).exit_code == 0
    finally:
        assert signal.signal(signal.SIGTERM, before) is ended
