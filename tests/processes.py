"""Runs of several real processes, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "worker.py"
TINY = "--model vit-tiny --decoder-width 32 --decoder-depth 1 --decoder-heads 2 --target pixels --device cpu --quiet"


def words(data, out, **changes):
    """A tiny run: 12 steps of 8 pictures, with a checkpoint every 4."""
    usual = {"steps": 12, "batch-size": 8, "workers": 0, "base-lr": 0.02, "checkpoint-every": 4, "timeout": 20}
    flags = [flag for flag, value in changes.items() if value is True]
    values = usual | {name: value for name, value in changes.items() if value is not True}
    line = ["pretrain", str(data), "-o", str(out), *TINY.split()]
    for name, value in values.items():
        line += [f"--{name.replace('_', '-')}", str(value)]
    return line + [f"--{name.replace('_', '-')}" for name in flags]


class Launch:
    """torchrun with some processes on this host; ``scenarios`` as in worker.py."""

    def __init__(self, folder, scenarios, processes=2, *, options=(), env=None):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.scenarios")))
        self.place = folder / f"{number}.scenarios"
        self.place.write_text(json.dumps(scenarios))
        self.log = folder / f"{number}.log"
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += list(options) or ["--standalone"]
        command += ["--nproc-per-node", str(processes), str(WORKER), str(self.place)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
            )

    def wait(self, timeout=120):
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


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def state(run):
    return json.loads((run / "run.json").read_text())
