"""What torchrun starts in the tests: `maehub` with a tiny preset, and with faults that the test asks for.

    worker.py SCENARIOS

SCENARIOS is a JSON file: a list of {"words": [...] of the command line, "fault": "name", "rank": 1, "step": 3}. They
run one after the other; each process writes what came of each to SCENARIOS.RANK.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from maehub.cli import command_line as cli
from maehub.errors import CheckpointError, DataError
from maehub.models.encoder import PRESETS, EncoderConfig

PRESETS["vit-tiny"] = EncoderConfig(32, 8, 3, 32, 2, 2)
RANK = int(os.environ.get("RANK", "0"))


class Faults:
    """Things that go wrong in one process, each put in place for one scenario."""

    def __init__(self, scenario):
        self.step = scenario.get("step", 0)
        self.out = scenario.get("out")
        self.undo = []

    def patch(self, owner, name, value):
        real = getattr(owner, name)
        self.undo.append(lambda: setattr(owner, name, real))
        setattr(owner, name, value)
        return real

    def at_step(self, action):
        """In the middle of a step (0 is the first), once."""
        from maehub.train import engine

        done = []

        def rate(step, *rest):
            if step == self.step and not done:
                done.append(action())
            return real(step, *rest)

        real = self.patch(engine, "learning_rate", rate)

    def kill(self):
        self.at_step(lambda: os.kill(os.getpid(), signal.SIGKILL))

    def kill_once(self):
        """In the first of torchrun's tries alone; of the second the step where it begins is written to ``out``."""
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            self.kill()
            return
        from maehub.train import engine

        def rate(step, *rest):
            with open(self.out, "a") as file:
                file.write(f"{step}\n")
            return real(step, *rest)

        real = self.patch(engine, "learning_rate", rate)

    def terminate(self):
        self.at_step(lambda: os.kill(os.getpid(), signal.SIGTERM))

    def hang(self):
        self.at_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))

    def sleep(self):
        """Be slow enough for the test to do something from outside."""
        self.at_step(lambda: (Path(self.out).touch(), time.sleep(60)))

    def keep_channels(self):
        """No dropout: what it draws differs between processes."""
        from torch.nn import Dropout2d

        self.patch(Dropout2d, "forward", lambda part, x: x)

    def slow(self):
        """Every step takes a while, so that it can be met in its middle."""
        from maehub.train import engine

        def rate(step, *rest):
            time.sleep(self.step / 1000)
            return real(step, *rest)

        real = self.patch(engine, "learning_rate", rate)

    def nan(self):
        from maehub.train import engine
        from maehub.train.pretraining.objective import Objective

        at = []

        def rate(step, *rest):
            at.append(step)
            return real_rate(step, *rest)

        def normalise(self_, pixels):
            images = real(self_, pixels)
            return images * float("nan") if at and at[-1] == self.step else images

        real_rate = self.patch(engine, "learning_rate", rate)
        real = self.patch(Objective, "normalise", normalise)

    def disk_full(self):
        from maehub.train.engine import resume as saving
        from maehub.train.engine import sharded

        def failing(*arguments):
            raise CheckpointError("the disk of this host is full")

        self.patch(saving, "save_checkpoint", failing)
        self.patch(sharded, "check_converging", failing)

    def mistake_in_save(self):
        from maehub.train.engine import resume as saving
        from maehub.train.engine import sharded

        def failing(*arguments):
            raise ZeroDivisionError("a mistake")

        self.patch(saving, "save_checkpoint", failing)
        self.patch(sharded, "check_converging", failing)

    def bad_picture(self):
        from maehub.train.pretraining import views as data

        def failing(*arguments):
            raise DataError("this picture is broken")

        self.at_step(lambda: self.patch(data, "crop", failing))

    def other_code(self):
        from maehub.train.engine import resume as saving

        self.patch(saving, "code_digest", lambda: "0" * 64)

    def blind(self):
        """A host without the shared filesystem."""
        real = self.patch(Path, "is_dir", lambda path: False if path.name.startswith("step-") else real(path))


def run(scenario):
    faults = Faults(scenario)
    words = scenario["words"]
    if scenario.get("fault") and scenario.get("rank", RANK) == RANK:
        getattr(faults, scenario["fault"])()
    if scenario.get("rank", RANK) == RANK:
        words = words + scenario.get("more", [])
    try:
        return cli.main(words)
    finally:
        for undo in reversed(faults.undo):
            undo()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    codes = []
    for one in json.loads(place.read_text()):
        codes.append(run(one))
        place.with_suffix(f".{RANK}.json").write_text(json.dumps(codes))
    sys.exit(codes[-1])
