"""Runs of segmenters and detectors by the command: how they are asked for, told of and compared."""

import json

import numpy as np
import pytest
import torch
from processes import Launch, losses
from safetensors.torch import load_file

from maehub.cli import command_line as cli

USUAL = {"model": "vit-nano", "batch-size": 4, "workers": 0, "checkpoint-every": 3, "timeout": 30}


def finetune_words(data, out, **changes):
    line = ["finetune", str(data), "-o", str(out), "--device", "cpu", "--quiet", "--skip-twins", "--precision", "fp32"]
    for name, value in (USUAL | changes).items():
        if value is not False:
            line += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return line


def scores_of(run):
    return json.loads((run / "scores.json").read_text())["scores"]


def check_killed(words, folder, beside, **changes):
    """A run that is killed goes on bit for bit."""
    whole, cut = folder / "whole", folder / "cut"
    assert cli.main(words(whole, **changes)) == 0
    line = words(cut, **changes)
    launch = Launch(folder / "launch", [{"words": line, "fault": "kill", "rank": 0, "step": 5}], processes=1)
    assert launch.wait() != 0
    assert cli.main([*line, "--resume"]) == 0
    assert losses(whole) == losses(cut)
    for name in ("model.safetensors", beside):
        found, expected = (load_file(run / "model" / name) for run in (cut, whole))
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def check_close(runs, **bounds):
    np.testing.assert_allclose(*(list(losses(run).values()) for run in runs), **bounds)


def check_micro_batches(words, folder, rtol, **changes):
    for name, micro in (("whole", 4), ("parts", 1)):
        assert cli.main(words(folder / name, steps=3, micro_batch=micro, **changes)) == 0
    check_close([folder / "whole", folder / "parts"], rtol=rtol)


def check_held_out(line, data, run, number, told):
    """Of a split that was made by the seed, not the pictures that it was trained on; gives how many there are."""
    assert cli.main(line) == 0
    scores = scores_of(run)
    code, facts = told("evaluate", data, "-m", run, "--precision", "fp32")
    assert code == 0
    assert (facts["n"], facts[number]) == (scores["n"], pytest.approx(scores[number]))
    return facts["n"]
