"""Every example runs offline with the embedded model and photos, and writes what it says."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import forked

import maehub

EXAMPLES = Path(__file__).parent.parent / "examples"
ASSETS = Path(maehub.__file__).parent / "assets"


def example(name, monkeypatch, *arguments):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def assert_figures(folder, names):
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(names)
    for name in names:
        with Image.open(folder / name) as figure:
            assert figure.width > 400
            assert len(figure.convert("L").getcolors(maxcolors=2**20)) > 50  # a picture, not a blank page


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_tested(path):
    assert len(path.read_text().splitlines()) < 60
    assert f'"{path.name}"' in Path(__file__).read_text()


def test_reconstruct(monkeypatch, tmp_path, capsys):
    example("reconstruct.py", monkeypatch, ASSETS / "cat.jpg", tmp_path / "figures")
    names = ["reconstruction.png", "ratios.png", "hole.png", "errors.png", "attention.png"]
    assert_figures(tmp_path / "figures", names)
    assert "108 of 144 patches hidden" in capsys.readouterr().out


def test_features(monkeypatch, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    example("features.py", monkeypatch, ASSETS, out)
    table = maehub.FeatureTable.load(out)
    assert [Path(path).name for path in table.paths] == ["cat.jpg", "coffee.jpg"]
    assert table.features.shape == (2, 192)
    assert "cat.jpg      +1.00" in capsys.readouterr().out


def test_attention(monkeypatch, tmp_path, capsys):
    example("attention.py", monkeypatch, ASSETS / "coffee.jpg", tmp_path / "figures")
    assert_figures(tmp_path / "figures", ["blocks.png", "heads.png"])
    rows = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("block")]
    shares = [float(word) for row in rows for word in row.split()]
    assert len(shares) == 5 * 6
    assert all(0 < share <= 1 for share in shares)


def test_pretrain(tmp_path):
    # A process of its own: training forks workers and takes the signals.
    run = tmp_path / "run"
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), str(ASSETS), str(run), "2"]
    done = forked(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 steps, loss ")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "run.json").read_text())["state"] == "completed"
    assert maehub.load(run).config.width == 192
    assert_figures(run, ["reconstruction.png"])


def test_finetune_folder(tmp_path):
    data, run = tmp_path / "labelled", tmp_path / "run"
    command = [sys.executable, str(EXAMPLES / "finetune_folder.py"), str(data), str(run), "2"]
    done = forked(command)
    assert done.returncode == 0, done.stderr
    assert [len(list((data / name).iterdir())) for name in ("cat", "coffee")] == [24, 24]
    assert "95 % interval" in done.stdout
    assert "classes: cat, coffee" in done.stdout
    assert maehub.load(run).config.class_names == ("cat", "coffee")
    assert (run / "report.html").is_file()
