"""What takes minutes: many kills, restarts, hosts and steps, on real photos. Run by `scripts/test --all`."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from map_files import lay_maps, name_classes
from object_files import lay_objects
from PIL import Image
from processes import WORKER, Launch, losses, restarted, state, steps_again, words
from safetensors.torch import load_file
from test_distributed import same, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Quarters of the photos that come with scikit-image, as JPEGs."""
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        picture = Image.fromarray(getattr(skimage.data, name)())
        width, height = picture.size
        for number in range(4):
            left, top = number % 2 * width // 2, number // 2 * height // 2
            picture.crop((left, top, left + width // 2, top + height // 2)).save(folder / f"{name}{number}.jpg")
    return folder


def nano(photos, out, **changes):
    """`vit-nano` in fp32."""
    usual = {
        "steps": 200,
        "batch-size": 8,
        "workers": 1,
        "checkpoint-every": 200,
        "validate-every": 1000,
        "timeout": 60,
    }
    line = ["pretrain", str(photos), "-o", str(out), "--device", "cpu", "--precision", "fp32", "--quiet"]
    for name, value in (usual | changes).items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def run(line):
    return subprocess.run([sys.executable, "-m", "maehub", *line], env=ONE_THREAD, capture_output=True, text=True)


def test_two_processes_follow_one_for_200_steps(photos, tmp_path):
    assert run(nano(photos, tmp_path / "one")).returncode == 0
    launch = Launch(tmp_path, [{"words": nano(photos, tmp_path / "two")}])
    assert launch.wait(900) == 0, launch.output()
    one, two = (np.array(list(losses(tmp_path / name).values())) for name in ("one", "two"))
    relative = np.abs(two - one) / one
    print(f"largest relative difference: {relative[:20].max():.1e} in 20 steps, {relative.max():.1e} in 200")
    assert len(one) == 200
    assert relative[:20].max() <= 1e-5
    assert relative.max() <= 1e-4


def test_row_53_ten_kills_at_random_moments_leave_no_trace(photos, tmp_path):
    short = {"steps": 40, "checkpoint-every": 5}
    assert run(nano(photos, tmp_path / "whole", **short)).returncode == 0
    expected = weights(tmp_path / "whole", 40)
    moments = random.Random(0)
    told = []
    for number in range(10):
        out = tmp_path / f"{number}"
        line = [sys.executable, "-m", "maehub", *nano(photos, out, **short)]
        with open(tmp_path / f"{number}.log", "w") as log:
            process = subprocess.Popen(line, env=ONE_THREAD, stdout=log, stderr=log, start_new_session=True)
        # A random moment after a random checkpoint, however fast the machine is just now.
        reached = out / "checkpoints" / f"step-{5 * after}" if (after := moments.randrange(7)) else out / "run.json"
        while not reached.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        told.append((len(losses(out)), state(out)["state"]))
        again = run(nano(photos, out, resume=True, **short))
        assert again.returncode == 0, again.stderr
        assert losses(out) == losses(tmp_path / "whole")
        assert same(weights(out, 40), expected)
        assert state(out)["state"] == "completed"
    print(f"killed with so many steps on record: {told}")
    assert sum(how == "running" for _, how in told) >= 8
    assert len({steps for steps, _ in told}) > 3  # the kills were at different moments


def test_row_67_restarts_inside_the_job_resume(photos, tmp_path):
    """Ten tries. In-job restart completes, or ends with an error after which the same command with --resume goes on."""
    launch = Launch(tmp_path, [{"words": words(photos, tmp_path / "whole")}])
    assert launch.wait() == 0, launch.output()
    completed = 0
    for number in range(10):
        out = tmp_path / f"{number}"
        launch = restarted(photos, tmp_path, out, number % 2)
        code = launch.wait(300)
        completed += code == 0
        if code:
            print(launch.output()[-1500:])
            again = Launch(tmp_path, [{"words": words(photos, out, resume=True)}])
            assert again.wait() == 0, again.output()
        else:
            assert steps_again(out) == list(range(4, 12))  # from the checkpoint on
        assert losses(out) == losses(tmp_path / "whole")
        assert same(weights(out), weights(tmp_path / "whole"))
    print(f"{completed} of 10 jobs completed by themselves")
    assert completed >= 5  # it is for torch to bring the processes together again


# --- two hosts --------------------------------------------------------------------------------------------------------

HOSTS = {"a": "10.231.7.1", "b": "10.231.7.2"}


def ip(*line):
    subprocess.run(["ip", *line], check=True)


@pytest.fixture
def hosts():
    """Two network namespaces of this test's own with a cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2")
    names = {host: f"maehub-{os.getpid()}-{host}" for host in HOSTS}
    try:
        for name in names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names["a"], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names["b"])
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
    except subprocess.CalledProcessError:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)
        pytest.skip("network namespaces cannot be made here")
    yield names
    for name in names.values():
        subprocess.run(["ip", "netns", "del", name], check=False)


class Hosts:
    """One process on each of two hosts, joined by torchrun's rendezvous on the first."""

    def __init__(self, names, folder, scenario):
        self.folder = folder
        number = len(list(folder.glob("*.a.log")))
        self.place = folder / f"hosts{number}.json"
        self.place.write_text(json.dumps([scenario]))
        self.processes, self.logs = {}, {}
        for host, name in names.items():
            self.logs[host] = folder / f"{number}.{host}.log"
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
            command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", f"{number}"]
            command += ["--rdzv-endpoint", f"{HOSTS['a']}:29511", "--local-addr", HOSTS[host]]
            command += ["--rdzv-conf", f"is_host={int(host == 'a')}", str(WORKER), str(self.place)]
            with open(self.logs[host], "w") as log:
                env = ONE_THREAD | {"GLOO_SOCKET_IFNAME": "cable"}
                self.processes[host] = subprocess.Popen(
                    command, stdout=log, stderr=log, env=env, start_new_session=True
                )

    def wait(self, timeout):
        """Exit codes of maehub on the hosts; torchrun itself may wait minutes for hosts that it lost."""
        until = time.monotonic() + timeout
        ended = {host: self.place.with_suffix(f".{rank}.json") for rank, host in enumerate(HOSTS)}
        while not all(path.exists() for path in ended.values()):
            assert time.monotonic() < until, self.output()
            time.sleep(0.1)
        return {host: json.loads(path.read_text())[0] for host, path in ended.items()}

    def output(self):
        return "\n".join(f"--- {host}\n{log.read_text()}" for host, log in self.logs.items())

    def kill(self):
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_row_69_two_hosts_train_and_a_cut_cable_ends_both_with_the_step(photos, tmp_path, hosts):
    launch = Launch(tmp_path, [{"words": words(photos, tmp_path / "whole")}])
    assert launch.wait() == 0, launch.output()
    out = tmp_path / "run"
    slow = {"words": words(photos, out, timeout=10), "fault": "slow", "step": 1500}
    both = Hosts(hosts, tmp_path, slow)
    try:
        until = time.monotonic() + 120
        while not (out / "run.json").exists() or state(out)["last_good_step"] != 4:
            assert time.monotonic() < until, both.output()
            time.sleep(0.1)
        time.sleep(0.7)  # into the middle of a step: a save would wait longer
        ip("-n", hosts["a"], "link", "set", "cable", "down")
        begun = time.monotonic()
        codes = both.wait(60)
        print(f"both ended {time.monotonic() - begun:.0f} s after the cut, with a timeout of 10 s: {codes}")
    finally:
        both.kill()
    assert codes == {"a": 8, "b": 8}
    ended = state(out)
    assert (ended["state"], ended["exit_code"], ended["last_good_step"]) == ("failed", 8, 4)
    assert "step " in ended["reason"]
    assert "Rank " in ended["reason"]
    print(ended["reason"])
    assert "waited for" in both.logs["b"].read_text(), both.output()

    ip("-n", hosts["a"], "link", "set", "cable", "up")
    again = Hosts(hosts, tmp_path, {"words": words(photos, out, resume=True)})
    try:
        assert again.wait(180) == {"a": 0, "b": 0}, again.output()
    finally:
        again.kill()
    assert losses(out) == losses(tmp_path / "whole")
    assert same(load_file(Path(out) / "model/model.safetensors"), load_file(tmp_path / "whole/model/model.safetensors"))


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_five_runs_of_a_dense_task_killed_twice_each_go_on_to_the_same_weights(task, tmp_path):
    data, sides = tmp_path / "data", (("train", range(24)), ("val", range(24, 36)))
    for side, numbers in sides:
        if task == "detect":
            lay_objects(data / side, "coco", numbers)
        else:
            lay_maps(data / side, len(numbers), first=numbers.start)
    if task == "segment":
        name_classes(data, ["ground", "red", "blue"])
    size = {"detect": "48", "segment": "32"}[task]
    line = ["finetune", str(data), "--task", task, "-m", "vit-nano", "--steps", "14", "--batch-size", "4"]
    line += [
        "--workers",
        "0",
        "--image-size",
        size,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--quiet",
        "--skip-twins",
    ]
    line += ["--checkpoint-every", "2", "--validate-every", "7"]

    def trained(out):
        return [path.read_bytes() for path in sorted((out / "model").glob("*.safetensors"))]

    assert run([*line, "-o", str(tmp_path / "whole")]).returncode == 0
    expected, draw = trained(tmp_path / "whole"), random.Random(0)
    for number in range(5):
        out, kills = tmp_path / f"cut{number}", 0
        for step in (draw.choice([2, 4, 6]), draw.choice([8, 10, 12]), 10**9):  # the last one never comes
            more = ["--resume"] if (out / "run.json").exists() else []
            process = subprocess.Popen([sys.executable, "-m", "maehub", *line, "-o", str(out), *more], env=ONE_THREAD)
            while process.poll() is None and not any(
                int(saved.name.removeprefix("step-")) >= step for saved in (out / "checkpoints").glob("step-*[0-9]")
            ):
                time.sleep(0.02)
            if process.poll() is None:
                time.sleep(draw.uniform(0, 0.3))  # into whatever comes after it was saved
                process.kill()
                kills += 1
            assert process.wait() == (0 if step == 10**9 else -signal.SIGKILL)
        assert kills == 2
        assert trained(out) == expected
        logged = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in logged if "loss" in row] == list(range(1, 15))
        print(f"{task}, run {number}: {kills} kills, the same weights")
