"""What must stay as it is: files beside a result, and files outside of a cache, with decoys in temporary folders."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maehub
from maehub.cli import command_line as cli
from maehub.errors import IntegrityError, UsageError
from maehub.hub.verification import discard
from maehub.models import EncoderConfig


@pytest.fixture
def cached(tmp_path):
    """A file of the Hub's cache, and something outside."""
    repo = tmp_path / "hub" / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "c0ffee" / "timm").mkdir(parents=True)
    outside = tmp_path / "outside.txt"
    outside.write_text("keep me")
    return repo, repo / "snapshots" / "c0ffee" / "timm" / "model.safetensors", outside


def test_a_blob_goes_with_its_file(cached, tmp_path):
    repo, path, _ = cached
    blob = repo / "blobs" / ("0" * 64)
    blob.write_bytes(b"broken")
    path.symlink_to(os.path.relpath(blob, path.parent))
    discard(path, tmp_path / "own")
    assert not path.is_symlink()
    assert not blob.exists()


def test_a_blob_that_is_a_link_takes_nothing_with_it(cached, tmp_path):
    repo, path, outside = cached
    blob = repo / "blobs" / ("0" * 64)
    blob.symlink_to(outside)
    path.symlink_to(os.path.relpath(blob, path.parent))
    discard(path, tmp_path / "own")
    assert outside.read_text() == "keep me"
    assert not path.is_symlink()
    assert not blob.is_symlink()


def test_a_snapshot_that_leads_out_takes_nothing_with_it(cached, tmp_path):
    _, path, outside = cached
    path.symlink_to(outside)
    discard(path, tmp_path / "own")
    assert outside.read_text() == "keep me"
    assert not path.is_symlink()


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    network = maehub.Encoder(EncoderConfig(width=48, depth=1, heads=3, image_size=16, patch_size=8))
    maehub.save(network, tmp_path / "encoder")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").write_bytes(b"no picture")
    return network


def features(tmp_path, out, *more):
    words = ["features", str(tmp_path / "photos"), "-m", str(tmp_path / "encoder"), "-o", str(out), "--skip-bad", *more]
    return cli.main([*words, "--quiet", "--workers", "0"])


def test_a_table_is_not_called_like_the_list_of_skipped_pictures(encoder, tmp_path):
    assert features(tmp_path, tmp_path / "bad_files.csv") == 2
    assert not (tmp_path / "bad_files.csv").exists()
    with pytest.raises(UsageError, match="choose another name"):
        maehub.extract_features(encoder, tmp_path / "photos", out=tmp_path / "bad_files.csv", skip_bad=True)


def test_a_list_that_is_there_is_not_replaced(encoder, tmp_path):
    (tmp_path / "bad_files.csv").write_text("mine")
    assert features(tmp_path, tmp_path / "table.csv") == 2
    assert (tmp_path / "bad_files.csv").read_text() == "mine"
    assert not (tmp_path / "table.csv").exists()
    assert features(tmp_path, tmp_path / "table.csv", "--overwrite") == 9
    assert "b.png" in (tmp_path / "bad_files.csv").read_text()


def test_a_pipe_or_a_device_is_no_configuration(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    os.mkfifo(folder / "config.json")
    with pytest.raises(IntegrityError, match="no regular file"):
        maehub.load(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(IntegrityError, match="no regular file"):
        maehub.load(folder)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "2>&- >&-"])
def test_closed_outputs_are_no_error(tmp_path, closed):
    photos = Path(maehub.__file__).parent / "assets"
    words = f"{sys.executable} -m maehub features {photos} -m vit-nano -o {tmp_path / 'table.npz'} --workers 0 {closed}"
    assert subprocess.run(["sh", "-c", words], check=False, stdin=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "table.npz").exists()
    wrong = f"{sys.executable} -m maehub info nothing {closed}"
    assert subprocess.run(["sh", "-c", wrong], check=False, stdin=subprocess.DEVNULL).returncode == 2


def test_no_spreadsheet_takes_a_name_for_a_formula(encoder, tmp_path):
    names = ["=1+1.png", "-x.png", "@a.png", "+b.png", "'=c.png", "plain.png"]
    maehub.FeatureTable(names, torch.zeros(6, 2)).save(tmp_path / "names.csv")
    cells = [line.split(",")[0] for line in (tmp_path / "names.csv").read_text().splitlines()[2:]]
    assert cells == ["'=1+1.png", "'-x.png", "'@a.png", "'+b.png", "''=c.png", "plain.png"]
    assert maehub.FeatureTable.load(tmp_path / "names.csv").paths == names
    (tmp_path / "photos" / "=bad.png").write_bytes(b"no picture")
    code = cli.main(["data", "check", str(tmp_path / "photos"), "-o", str(tmp_path / "list.csv"), "--quiet"])
    assert code == 5
    assert "photos/=bad.png" in (tmp_path / "list.csv").read_text()  # a whole path is no formula


COMMANDS = """
import sys
from maehub.cli.command_line import main
for line in (
    *(f"features data -m vit-nano -o fe\\u0301.{ending}" for ending in ("csv", "npz", "parquet", "safetensors")),
    "probe data -m vit-nano -o probe-\\u6f22 --pool cls",
    "probe data -m vit-nano -o probe-\\u6f22.json --pool cls",
    "predict data -m probe-\\u6f22/model -o pre\\u0301dit.csv",
    "evaluate data -m probe-\\u6f22/model -o e\\u0301valuation",
):
    words = [word.encode().decode(sys.getfilesystemencoding(), "surrogateescape") for word in line.split()]
    print(main(words), line.encode("ascii", "backslashreplace").decode(), flush=True)
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("environment", "names", "refused"),
    [
        (ASCII, ["Blüte", "漢字"], False),
        (ASCII, ["Blüte", b"fl\xe8che"], True),
        ({"PYTHONUTF8": "1"}, ["Blüte", b"fl\xe8che"], True),
    ],
    ids=["ASCII", "ASCII and Latin 1", "Latin 1"],
)
def test_names_that_the_system_cannot_encode(tmp_path, environment, names, refused):
    """Commands work on them, or refuse before they write; none ends in an error of its own encoding."""
    for number, name in enumerate(names):
        folder = os.path.join(os.fsencode(tmp_path), b"data", name if isinstance(name, bytes) else name.encode())
        os.makedirs(folder)
        for kind in range(4):
            pixels = np.random.default_rng(kind).integers(0, 100, (32, 32, 3)) + 100 * number
            with open(os.path.join(folder, f"é{kind}.png".encode()), "wb") as file:
                Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    before = {"PYTHONIOENCODING", "LC_ALL", "LANG", "PYTHONUTF8"}
    env = {name: value for name, value in os.environ.items() if name not in before} | environment
    done = subprocess.run([sys.executable, "-c", COMMANDS], cwd=tmp_path, env=env, capture_output=True, check=False)
    said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    codes = [line.split()[0] for line in said.splitlines() if line[:2].strip().isdigit() and " -m " in line]
    assert done.returncode == 0, said
    assert codes == ["0"] * 4 + (["5", "5", "2", "2"] if refused else ["0"] * 4), said
    assert "did not expect" not in said
    assert "codec" not in said
    assert not [path for path in os.listdir(os.fsencode(tmp_path)) if path.startswith(b".") or b"partial" in path]
