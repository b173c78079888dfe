"""What `maehub data` finds in a data set."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import maehub
from maehub.cli.command_line import main
from maehub.data import inspection
from maehub.data import workers as processes
from maehub.data.inspection import BadPicture, check_data, data_statistics
from maehub.errors import DataError, UsageError


@pytest.fixture
def photos(tmp_path):
    """Thirty good pictures of several kinds, and four that cannot be read."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        pixels = generator.integers(0, 256, (20 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    for number in range(20, 30):
        Image.fromarray(generator.integers(0, 200, (16, 24), np.uint8)).save(folder / f"{number}.webp", lossless=True)
    whole = (folder / "03.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"no picture")
    (folder / "gone.gif").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("workers", [0, 2, None])
def test_row_39_what_cannot_be_read_is_listed_in_order(photos, workers):
    told = []
    found = check_data(photos, workers=workers, on_bad=told.append)
    assert found.images == 34
    assert found.formats == {"PNG": 20, "WEBP": 10}
    assert [os.path.basename(picture.where) for picture in found.bad] == [
        "cut.png", "empty.jpg", "gone.gif", "text.jpg"
    ]  # fmt: skip
    assert found.bad[1:3] == (
        BadPicture(str(photos / "empty.jpg"), "the file is empty"),
        BadPicture(str(photos / "gone.gif"), "No such file or directory"),
    )
    assert "begins with b'no pictu'" in found.bad[3].reason
    assert tuple(told) == found.bad
    assert found.describe() == "34 pictures: 30 readable (20 PNG, 10 WEBP), 4 not"


def test_all_readable(photos):
    for name in ("cut.png", "empty.jpg", "text.jpg", "gone.gif"):
        (photos / name).unlink()
    assert check_data(os.fsencode(photos)).describe() == "30 pictures, all readable: 20 PNG, 10 WEBP"


@pytest.mark.parametrize("workers", [0, 2])
def test_statistics_are_those_of_the_pixels(photos, workers):
    found = data_statistics(photos, workers=workers)
    assert (found.images, found.looked_at, found.unreadable) == (34, 30, 4)
    pictures = []
    for path in sorted(photos.iterdir()):
        if path.stem.isdigit():
            pictures.append(np.asarray(Image.open(path).convert("RGB")) / 255)
    means = np.mean([picture.mean(axis=(0, 1)) for picture in pictures], axis=0)
    squares = np.mean([(picture**2).mean(axis=(0, 1)) for picture in pictures], axis=0)
    assert found.mean == pytest.approx(tuple(means), abs=1e-12)
    assert found.std == pytest.approx(tuple(np.sqrt(squares - means**2)), abs=1e-12)
    assert found.width == (24, 30, 30)
    assert found.height == (16, float(np.median([p.shape[0] for p in pictures])), 39)
    assert found.megapixels.greatest == pytest.approx(39 * 30 / 1e6)
    assert found.modes == {"RGB (8 bits)": 30}  # Pillow reads a grey WebP as colour
    assert found.value_range == (0, 255)
    assert found.bytes.greatest == max(p.stat().st_size for p in photos.iterdir() if p.stem.isdigit())
    preprocess = eval(found.python())  # noqa: S307
    assert preprocess.mean == pytest.approx(found.mean, abs=1e-4)
    assert preprocess.std == pytest.approx(found.std, abs=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_grey_pictures_of_16_bits(tmp_path):
    values = np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "scan.png")
    found = data_statistics(tmp_path)
    assert found.modes == {"I;16 (16 bits)": 1}
    assert found.value_range == (0, 4095)
    assert found.mean == pytest.approx((values.mean() / 65535,), abs=1 / 255)
    assert len(eval(found.python()).mean) == 1  # noqa: S307
    assert "0 to 4095; 16 bits can hold 65535, and are scaled by that: these pictures will be dark" in found.describe()
    assert "grey" in found.describe()
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "full.png")
    assert "dark" not in data_statistics(tmp_path).describe()


def test_a_sample_is_always_the_same(photos):
    first = data_statistics(photos, sample=10)
    assert first.looked_at + first.unreadable == 10
    assert "10 of them, chosen by their names" in first.describe()
    moved = photos.with_name("moved")
    photos.rename(moved)
    assert data_statistics(moved, sample=10, workers=2) == first
    assert data_statistics(moved, sample=0) == data_statistics(moved)
    with pytest.raises(UsageError, match="0 or more"):
        data_statistics(moved, sample=-1)


def test_nothing_readable(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert check_data(tmp_path).describe() == "1 picture: 0 readable, 1 not"
    with pytest.raises(DataError, match=r"none of 1 picture can be read; .*a\.jpg: the file is empty"):
        data_statistics(tmp_path)


def test_row_47_shards_are_checked_member_by_member(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "JPEG")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("a.jpg", file.getvalue()), ("b.jpg", file.getvalue()[:200]), ("c.jpg", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for workers in (0, 1):
        found = check_data(tmp_path / "s.tar", workers=workers)
        assert [picture.where for picture in found.bad] == [f"{tmp_path}/s.tar, member {name}.jpg" for name in "bc"]
        assert found.formats == {"JPEG": 1}
    assert data_statistics(tmp_path / "s.tar").width == (9, 9, 9)


def test_row_48_a_decoder_that_crashes_takes_one_picture_along(photos, monkeypatch):
    start = processes._START.replace("serve()", "").rstrip("; ")
    crashing = (
        "import os, maehub.data.workers as module; plain = module.examine\n"
        "def examine(picture, statistics):\n"
        "    if isinstance(picture, bytes) and picture.endswith(b'07.png'): os.kill(os.getpid(), 9)\n"
        "    return plain(picture, statistics)\n"
        "module.examine = examine; module.serve()"
    )
    monkeypatch.setattr(processes, "_START", start + "\n" + crashing)
    for workers in (1, 2):
        found = check_data(photos, workers=workers)
        assert BadPicture(str(photos / "07.png"), "the process that decoded it died by signal 9") in found.bad
        assert len(found.bad) == 5
        assert Counter(found.formats) == Counter({"PNG": 19, "WEBP": 10})


def test_row_48_a_process_that_hangs(photos, monkeypatch):
    monkeypatch.setattr(processes, "_START", "import time; time.sleep(60)")
    monkeypatch.setattr(processes, "_SILENCE", 0.5)
    started = []
    start = processes.subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda *words, **options: started.append(start(*words, **options)) or started[-1]
    )
    with pytest.raises(DataError, match="no picture was decoded for"):
        check_data(photos, workers=1)
    assert [os.path.exists(f"/proc/{process.pid}") for process in started] == [False]  # neither asleep nor a zombie


def test_wrong_numbers_of_workers(photos):
    with pytest.raises(UsageError, match="workers must be 0 or more"):
        check_data(photos, workers=-1)


# -- the command


def test_check(photos, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", "photos", "-o", "bad.csv"]) == 5
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5
    assert out[1] == "photos/empty.jpg: the file is empty"
    assert out[-1] == "34 pictures: 30 readable (20 PNG, 10 WEBP), 4 not"
    lines = (tmp_path / "bad.csv").read_text().splitlines()
    assert lines[0] == "path,reason"
    assert lines[2] == "photos/empty.jpg,the file is empty"
    assert len(lines) == 5
    assert main(["data", "check", "photos", "-o", "bad.csv"]) == 2
    assert main(["data", "check", "photos", "-o", "bad.csv", "--overwrite", "--json"]) == 5
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["readable"], len(facts["bad"])) == (34, 30, 4)
    assert main(["data", "check", "photos", "--quiet"]) == 5
    assert capsys.readouterr().out == ""
    assert main(["data", "check", "photos/03.png"]) == 0
    assert main(["data", "check", "photo"]) == 5
    assert "neither a file nor a folder" in capsys.readouterr().err


def test_stats(photos, capsys):
    assert main(["data", "stats", str(photos), "--sample", "0"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == data_statistics(photos).python()
    assert main(["data", "stats", str(photos), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == data_statistics(photos).to_dict()
    assert main(["data", "stats", str(photos), "-o", "x.csv"]) == 2
    assert main(["data", "check", str(photos), "--sample", "4"]) == 2
    assert "--sample is for stats" in capsys.readouterr().err


def test_public_names():
    assert (maehub.check_data, maehub.data_statistics) == (inspection.check_data, inspection.data_statistics)


def test_row_83_ctrl_c_ends_it_and_its_processes(tmp_path):
    Image.effect_noise((1500, 1500), 50).save(tmp_path / "0.png")
    for number in range(1, 300):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    command = [sys.executable, "-m", "maehub", "data", "check", str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(300):
        started = children.read_text().split() if children.exists() else []
        if len(started) == 2:
            break
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "maehub: interrupted")
    assert "Traceback" not in err
    assert not any(os.path.exists(f"/proc/{child}") for child in started)
