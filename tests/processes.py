"""Processes of their own, forked from one that has imported torch, and runs of several that torchrun starts."""

import atexit
import ctypes
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import types
from importlib import import_module
from pathlib import Path

WORKER = Path(__file__).parent / "worker.py"
IMPORTED = (
    *("torch.distributed.launcher.api", "maehub.cli.command_line", "maehub.features.extraction"),
    *("maehub.train.pretraining.loop", "maehub.train.finetuning.loop"),
)
PR_SET_CHILD_SUBREAPER = 36
TINY = (
    "--model vit-tiny --decoder-width 32 --decoder-depth 1 --decoder-heads 2 --target pixels --device cpu --quiet "
    "--precision fp32"
)


def words(data, out, **changes):
    """A tiny run: 12 steps of 8 pictures, with a checkpoint every 4."""
    usual = {"steps": 12, "batch-size": 8, "workers": 0, "base-lr": 0.02, "checkpoint-every": 4, "timeout": 20}
    flags = [flag for flag, value in changes.items() if value is True]
    values = usual | {name: value for name, value in changes.items() if value is not True}
    line = ["pretrain", str(data), "-o", str(out), *TINY.split()]
    for name, value in values.items():
        line += [f"--{name.replace('_', '-')}", str(value)]
    return line + [f"--{name.replace('_', '-')}" for name in flags]


class Forked(subprocess.Popen):
    """``subprocess.Popen`` of ``[sys.executable, ...]`` without the seconds in which an interpreter imports torch.

    It is a child of this process and has its own files, folder and environment. What an interpreter reads from the
    environment when it starts (PYTHON*, the locale) is the old: such tests start a fresh process.
    """

    _parent = None  # the process that has imported everything, and the socket to it

    @classmethod
    def _connect(cls):
        if cls._parent is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(theirs.fileno())]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            parent = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
            theirs.close()
            cls._parent = parent, ours
            atexit.register(lambda: (parent.kill(), parent.wait()))
        return cls._parent[1]

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, flags, shell,
                       p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                       start_new_session, process_group):  # fmt: skip
        assert args[0] == sys.executable, args
        assert not any((shell, preexec_fn, pass_fds))
        request = {
            "words": [os.fspath(word) for word in args[1:]],
            "folder": os.fspath(cwd or os.getcwd()),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        outputs = [own if file == -1 else file for own, file in enumerate((p2cread, c2pwrite, errwrite))]
        parent = self._connect()
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # whose parent ends while this holds is our child
        socket.send_fds(parent, [json.dumps(request).encode()], outputs)
        self.pid = int(parent.recv(100))
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


if sys.platform != "linux":
    Forked = subprocess.Popen


def forked(command, **options):
    """``subprocess.run`` by a forked process, with its outputs as text."""
    with Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _serve(requests):
    """Fork for each request; comes back in what was forked, with its words."""
    for name in IMPORTED:
        import_module(name)
    while True:
        told, files, *_ = socket.recv_fds(requests, 1 << 18, 3)
        if not told:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if not between:
            between = os.getpid()
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os._exit(0)
            break
        os.waitpid(between, 0)
        requests.send(os.read(reading, 100))
        for file in (reading, writing, *files):
            os.close(file)
    while os.getppid() == between:
        time.sleep(0.001)
    request = json.loads(told)
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in (reading, writing, *files):
        os.close(file)
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # the old ones know whether their file can be sought
        old = getattr(sys, name)
        raw = os.fdopen(number, "wb" if number else "rb", closefd=False)
        new = io.TextIOWrapper(raw, old.encoding, old.errors, line_buffering=number == 2)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    requests.close()
    if request["session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]  # it reads HF_* when it is imported
    return request["words"]


def _run(words):
    """What the interpreter does with its words."""
    kind, *rest = words
    sys.path[0] = "" if kind in ("-c", "-m") else os.path.dirname(kind)
    sys.argv = words[1:] if kind == "-m" else words
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        runpy.run_path(kind, run_name="__main__")


class Launch:
    """torchrun with some processes on this host; ``scenarios`` as in worker.py.

    ``fresh`` is torchrun as users start it, with processes that import everything; others are forked.
    """

    def __init__(self, folder, scenarios, processes=2, *, options=(), env=None, fresh=False):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.scenarios")))
        self.place = folder / f"{number}.scenarios"
        self.place.write_text(json.dumps(scenarios))
        self.log = folder / f"{number}.log"
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += list(options) or ["--standalone"]
        start = subprocess.Popen
        if not fresh and (not options or "--max-restarts" in options):
            start = Forked
            command += ["--run-path", "--start-method", "fork"]
        command += ["--nproc-per-node", str(processes), str(WORKER), str(self.place)]
        with open(self.log, "w") as log:
            self.process = start(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
            )

    def wait(self, timeout=240):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.output()}") from None

    def output(self):
        return self.log.read_text()

    def codes(self, rank=0):
        """Exit codes of the scenarios that a process finished."""
        path = self.place.with_suffix(f".{rank}.json")
        return json.loads(path.read_text()) if path.exists() else []


def restarted(data, folder, out, rank):
    """A job of which a process is killed in the step after 6, and which torchrun then starts again, once."""
    scenario = {"words": words(data, out, resume=True), "fault": "kill_once", "rank": rank, "step": 6}
    scenario["out"] = f"{out}.steps"
    return Launch(folder, [scenario], options=("--standalone", "--max-restarts", "1"))


def steps_again(out):
    """The steps that the process did which is killed, after the restart."""
    return [int(line) for line in Path(f"{out}.steps").read_text().split()]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def state(run):
    return json.loads((run / "run.json").read_text())


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
