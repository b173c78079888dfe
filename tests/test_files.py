"""Files that are whole or not there."""

import errno
import hashlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from maehub import files
from maehub.errors import CheckpointError, UsageError
from maehub.files import atomic_write, free_space_guard, is_left, own_folder, sha256_file, whole_folder


def write_and_raise(path, error):
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "x.txt"
    for text in ("old", "new"):
        with atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(text)
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["x.txt"]


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_and_raise(path, KeyError("mine"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_errors_of_the_block_keep_their_type(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "x"):
        (tmp_path / "something else").read_text()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota"),
                                   RuntimeError("I/O error: No space left on device (os error 28)")])  # fmt: skip
def test_row_30_a_full_disk_is_named_and_the_old_file_is_intact(tmp_path, error):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"disk is full, [\d,.]+ MB free") as caught:
        write_and_raise(path, error)
    assert caught.value.__cause__ is error
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a small tmpfs")
def test_row_30_a_really_full_disk(tmp_path):
    code = (
        "import sys, torch; from safetensors.torch import save_file; from maehub.files import atomic_write\n"
        "for size in (1000, 10**6):\n"
        "    with atomic_write(sys.argv[1] + '/m.safetensors') as path: save_file({'x': torch.ones(size)}, path)"
    )
    script = f'mount -t tmpfs -o size=2m none {tmp_path} && {sys.executable} -c "$0" {tmp_path}; ls -al {tmp_path}'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, code], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("no right to mount here")
    assert "CheckpointError" in done.stderr
    assert "the disk is full" in done.stderr
    lines = [line for line in done.stdout.splitlines() if "safetensors" in line or "tmp" in line.split()[-1]]
    assert len(lines) == 1  # the first file, and nothing temporary
    assert int(lines[0].split()[4]) < 5000


def test_row_30_read_only_and_missing_folders(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="No such file or directory"), atomic_write(tmp_path / "no" / "x"):
        pass

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(CheckpointError, match="Read-only"), atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == []


def test_row_31_data_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []

    def logged(name, original):
        def call(*arguments):
            first = arguments[0]
            where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            calls.append((name, os.path.basename(where)))
            return original(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, logged(name, getattr(os, name)))
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
        calls.append(("written", temporary.name))
    name = temporary.name
    assert calls == [("written", name), ("fsync", name), ("replace", name), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_row_36_and_64_the_mode_follows_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        with atomic_write(tmp_path / "x") as temporary:
            save_file({"x": torch.ones(3)}, temporary)  # on its own it leaves 0600
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~umask


def test_row_37_saving_onto_what_is_mapped(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(10_000.0)}, path)
    for _ in range(2):
        mapped = load_file(path)
        with atomic_write(path) as temporary:
            save_file(mapped, temporary)
        assert torch.equal(mapped["x"], torch.arange(10_000.0))
    assert torch.equal(load_file(path)["x"], torch.arange(10_000.0))


def test_row_64_the_temporary_lies_beside_its_target_whatever_tmpdir_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with atomic_write(tmp_path / ("n" * 250)) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("x")
    assert (tmp_path / ("n" * 250)).read_text() == "x"


def test_a_network_folder_that_cannot_sync_is_no_error(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_free_space(tmp_path):
    free_space_guard(tmp_path / "not" / "yet", 1000)
    with pytest.raises(CheckpointError, match=r"needs 1,000,000,000,000.0 MB, and [\d,.]+ MB are free"):
        free_space_guard(tmp_path / "x", 10**18)


def test_sha256(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


# -- what killed processes leave ---------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, tempfile
from pathlib import Path
from maehub import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

kind, target = sys.argv[1], Path(sys.argv[2])
if kind == "file":
    files.os.replace = die  # all bytes are written, the name is not
    with files.atomic_write(target) as temporary:
        temporary.write_text("half")
elif kind == "scratch":
    with files.own_folder(target, 0o700) as folder:
        (folder / "weights").write_text("half")
        die()
else:
    real, calls = os.replace, []
    def replace(*names):
        calls.append(names)
        if len(calls) == int(kind):
            die()
        real(*names)
    files.os.replace = replace
    with files.whole_folder(target, overwrite=True, members=["a"]) as folder:
        (folder / "a").write_text("new")
"""


def killed(kind, target):
    """What a process leaves that was killed while it wrote, by name."""
    before = set(os.listdir(target.parent))
    done = subprocess.run([sys.executable, "-c", KILLED, kind, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    return sorted(set(os.listdir(target.parent)) - before)


def write_whole(target, kind):
    if kind == "file":
        with atomic_write(target) as temporary:
            temporary.write_text("new")
    elif kind == "scratch":
        with own_folder(target, 0o700) as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
    else:
        with whole_folder(target, overwrite=True, members=["a"]) as folder:
            (folder / "a").write_text("newer")


@pytest.mark.parametrize("kind", ["file", "scratch", "1"])
def test_the_next_write_removes_what_a_killed_process_left(tmp_path, kind):
    target, other = tmp_path / "x.bin", tmp_path / "x.bin.2"
    (rest,) = killed(kind, target)
    (foreign,) = killed(kind, other)
    decoys = {
        rest.replace(files._processes(), "0" * 8),  # of another machine or container
        f".x.bin.{rest.split('.')[3]}.txt",
        ".x.bin.1a2b3c4d.tmp",  # as version 0.1 named them: whose it is cannot be seen
        ".x.bin.partial",
    }
    for name in decoys:
        (tmp_path / name).write_text("decoy")
    assert is_left(tmp_path / rest)
    write_whole(target, kind)
    assert {path.name for path in tmp_path.iterdir()} - {"x.bin"} == {foreign} | decoys
    write_whole(other, kind)
    assert {path.name for path in tmp_path.iterdir()} - {"x.bin", "x.bin.2"} == decoys


@pytest.mark.parametrize("kind", ["file", "scratch", "1"])
def test_a_write_that_is_under_way_is_left_alone(tmp_path, kind):
    target = tmp_path / "x"
    context = atomic_write(target) if kind == "file" else own_folder(target)
    with context as unfinished:
        if kind == "file":
            unfinished.write_text("mine")
        child = f"from maehub.files import *; from pathlib import Path; path = Path({str(target)!r})\n"
        child += (
            "with atomic_write(path) as file: file.write_text('new')"
            if kind == "file"
            else "with own_folder(path): pass"
        )
        subprocess.run([sys.executable, "-c", child], check=True)
        assert unfinished.exists()
        assert not is_left(unfinished)
    assert not unfinished.exists()


@pytest.mark.parametrize(("renames", "safe"), [("1", "old"), ("2", "old"), ("3", "new")])
def test_a_folder_is_never_lost_between_two_names(tmp_path, renames, safe):
    """Killed before the old one moves away, before the new one comes, before the rest of the old one is put back."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    (target / "notes").write_text("mine")
    killed(renames, target)
    if safe == "old":
        with pytest.raises(UsageError), whole_folder(target, overwrite=False, members=["a"]):
            pass
        assert (target / "a").read_text() == "old"
    write_whole(target, "folder")
    assert sorted(os.listdir(target)) == ["a", "notes"]
    assert (target / "a").read_text() == "newer"
    assert (target / "notes").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["é" * 127, "漢" * 80])
def test_a_long_name_that_is_not_ascii(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == [name]
