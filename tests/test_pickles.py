"""Checkpoints of other training programs: what they keep beside the weights is passed over, never called."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from maehub.errors import IntegrityError
from maehub.weights import official_names, read_pickle

STATE = {"cls_token": torch.arange(8.0).reshape(1, 1, 8)}

WRITER = """
import sys, types
import numpy as np, torch
for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
    sys.modules[name] = types.ModuleType(name)
class HistoryBuffer:
    def __init__(self):
        self._log_history, self._count_history = np.arange(3.0), np.float64(2)
HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
state = {"cls_token": torch.arange(8.0).reshape(1, 1, 8)}
hub = {"log_scalars": {"loss": HistoryBuffer()}, "runtime_info": {"epoch": np.int64(3)}}
torch.save({"state_dict": state, "message_hub": hub, "meta": {"seed": np.uint32(1)}}, sys.argv[1])
"""


def test_mmengines_history_is_passed_over(tmp_path):
    path = tmp_path / "epoch_3.pth"
    subprocess.run([sys.executable, "-c", WRITER, path], check=True)  # its classes are not here
    read = read_pickle(path)
    assert torch.equal(read.tensors["cls_token"], STATE["cls_token"])
    assert (read.entry, read.beside) == ("state_dict", ("message_hub", "meta"))
    assert "mmengine" not in sys.modules


@pytest.mark.parametrize("wrapper", ["module", "net", "model_ema", "state_dict_ema", "teacher"])
def test_wrappers_are_unpacked(tmp_path, wrapper):
    torch.save({wrapper: STATE, "lr": np.float32(0.1), "sizes": np.arange(4)}, tmp_path / "a.pth")
    read = read_pickle(tmp_path / "a.pth")
    assert (read.entry, list(read.tensors)) == (wrapper, ["cls_token"])


def test_of_several_copies_it_is_said_which_was_taken(tmp_path, caplog):
    torch.save({"student": {"cls_token": torch.zeros(1)}, "teacher": STATE}, tmp_path / "a.pth")
    assert torch.equal(read_pickle(tmp_path / "a.pth").tensors["cls_token"], STATE["cls_token"])
    assert "under 'teacher' are taken; other copies are student" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "net.", "teacher.", "_fsdp_wrapped_module.", "module.net."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    names = official_names([f"{prefix}cls_token", f"{prefix}pos_embed"]).names
    assert list(names.values()) == ["cls_token", "pos_embed"]


class Calls:
    def __init__(self, function, *arguments):
        self.asked = function, arguments

    def __reduce__(self):
        return self.asked


@pytest.mark.parametrize(
    "evil",
    [
        Calls(os.system, "touch OWNED"),
        Calls(eval, "open('OWNED', 'w')"),
        Calls(exec, "open('OWNED', 'w')"),
        Calls(getattr, "", "join"),
        Calls(open, "OWNED", "w"),
    ],
)
def test_whatever_would_run_code_is_refused(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "args": evil}, "a.pth")
    with pytest.raises(IntegrityError, match="No code in it was run"):
        read_pickle("a.pth")
    assert not (tmp_path / "OWNED").exists()
