"""Downloads that are killed, that meet each other, a lock, a full disk or a cache that may not be written."""

import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import fetch, fetch_repo
from rights import as_nobody, let_enter, needs_root

from maehub.cli.command_line import main
from maehub.errors import CheckpointError, HubError, UsageError
from maehub.files import atomic_write
from maehub.hub import cache as caching
from maehub.hub import catalog
from maehub.hub.cache import clean_cache
from maehub.hub.catalog import model_info

TIMM = "timm/vit_base_patch16_224.mae"
FOLDER = "models--timm--vit_base_patch16_224.mae"
WEIGHTS = TIMM + "/model.safetensors"
OFFICIAL = "/mae/pretrain/mae_pretrain_vit_base_full.pth"
BYTES = bytes(range(256)) * 4096  # 1 MB
SHA256 = hashlib.sha256(BYTES).hexdigest()
LOCKS = Path("/proc/locks")

# The command line in a process of its own: small chunks, the test server's official files, and what a test wants.
CHILD = """
import fcntl, os, shutil, sys, time
from huggingface_hub import constants
from maehub.hub import catalog
constants.DOWNLOAD_CHUNK_SIZE = 65_536
catalog.FAIR_BASE = os.environ["HF_ENDPOINT"] + "/"
{patch}
from maehub.cli.command_line import main
code = main(sys.argv[1:])
{after}
sys.exit(code)
"""
NO_FLOCK = "fcntl.flock = lambda *_: None"  # as on file systems where everyone is given the lock
ENOSYS = """
def flock(*_):
    raise OSError(38, "Function not implemented")
fcntl.flock = flock
"""


@pytest.fixture(autouse=True)
def quiet_again():
    """``main`` sets how much maehub logs."""
    yield
    logging.getLogger("maehub").setLevel(logging.NOTSET)


@pytest.fixture
def vit_b(hub, monkeypatch):
    """The row vit-b in a repository, and vit-b-normpix-full, an official file without any hash to compare with."""
    monkeypatch.setattr(catalog, "FAIR_BASE", hub.endpoint + "/")
    hub.add_repo(TIMM, {"config.json": "{}", "model.safetensors": BYTES})
    hub.add_page(OFFICIAL, BYTES)
    return model_info("vit-b")


@pytest.fixture
def start(hub):
    """Start the command line in a process; all are gone when the test ends."""
    running = []

    def started(*words, patch="", after="", wrapped=(), **options):
        code = CHILD.format(patch=patch, after=after)
        command = [*wrapped, sys.executable, "-c", code, *map(str, words)]
        environment = hub.env() | options.pop("env", {})
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **piped, **options))
        return running[-1]

    yield started
    for process in running:
        process.kill()
        process.communicate()


def finished(process, timeout=60):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=timeout)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def cache_of(hub):
    return Path(hub.env()["HF_HUB_CACHE"])


def lock_of(hub):
    return cache_of(hub) / ".locks" / FOLDER / f"{SHA256}.lock"


def unfinished(folder):
    """Files of downloads that are not whole."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in found if path.suffix in (".incomplete", ".tmp") or caching.STAGING in str(path)]


def large(folder):
    """Those that most of a file has come for; some of the client's own come and go."""
    found = []
    for path in unfinished(folder):
        with contextlib.suppress(FileNotFoundError):
            found += [path] if path.stat().st_size > 300_000 else []
    return found


def age(folder, seconds):
    """Let everything below be this much older."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        when = path.lstat().st_mtime - seconds
        os.utime(path, (when, when), follow_symlinks=False)


def tree(folder):
    """Every name below, with what a link leads to and what a file holds."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


KINDS = pytest.mark.parametrize(
    ("name", "pattern"), [("vit-b", WEIGHTS), ("vit-b-normpix-full", OFFICIAL)], ids=["hub", "official"]
)


# -- the cache is the one of the Hub's client


def test_the_cache_is_as_the_clients_own(hub, tmp_path):
    from huggingface_hub import hf_hub_download, scan_cache_dir

    config = '{"pretrained_cfg": {"hf_hub_filename": "timm/model.safetensors"}}'
    commit = hub.add_repo("user/repo", {"config.json": config, "timm/model.safetensors": BYTES}, revision="refs/pr/1")
    ours, theirs = cache_of(hub), tmp_path / "theirs"
    fetch_repo("user/repo", revision="refs/pr/1")
    for filename in ("config.json", "timm/model.safetensors"):
        hf_hub_download("user/repo", filename, revision="refs/pr/1", cache_dir=theirs)
    assert tree(ours / "models--user--repo") == tree(theirs / "models--user--repo")
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    (repo,) = scan_cache_dir(ours).repos
    assert [(one.commit_hash, one.nb_files, one.refs) for one in repo.revisions] == [(commit, 2, {"refs/pr/1"})]
    assert not scan_cache_dir(ours).warnings
    options = {"revision": "refs/pr/1", "cache_dir": ours, "local_files_only": True}
    assert Path(hf_hub_download("user/repo", "timm/model.safetensors", **options)).read_bytes() == BYTES
    modes = [(cache / "models--user--repo" / "blobs" / SHA256).stat().st_mode for cache in (ours, theirs)]
    assert modes[0] == modes[1]


def test_a_file_that_another_commit_has_is_not_downloaded_again(hub, vit_b):
    first = fetch(vit_b)
    second = hub.add_repo(TIMM, {"config.json": '{"changed": 1}', "model.safetensors": BYTES})
    found = fetch(vit_b, revision="main", offline=True)
    assert found.revision == first.revision
    assert fetch_repo(TIMM).revision == second
    assert len(hub.asked("GET", store=True)) == 1
    assert (cache_of(hub) / FOLDER / "refs" / "main").read_text() == second


@pytest.mark.parametrize("wanted", [True, False], ids=["none possible", "none wanted"])
def test_a_cache_without_links(hub, vit_b, monkeypatch, wanted):
    from huggingface_hub import constants

    def refused(self, target):
        raise OSError(95, "Operation not supported")

    if wanted:
        monkeypatch.setattr(Path, "symlink_to", refused)
    else:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)
    found = fetch(vit_b)
    assert found.path.read_bytes() == BYTES
    assert not found.path.is_symlink()
    assert not list((cache_of(hub) / FOLDER / "blobs").iterdir())
    assert fetch(vit_b, offline=True) == found


@pytest.mark.parametrize("bad", ["../../x", "a/b", "..", "", "x" * 200])
@pytest.mark.parametrize("which", ["X-Repo-Commit", "ETag"])
def test_row_17_a_commit_or_hash_that_is_a_path(hub, vit_b, which, bad):
    headers = {"X-Repo-Commit": "1" * 40, "ETag": '"1"'} | {which: f'"{bad}"' if which == "ETag" else bad}
    hub.fault(WEIGHTS, "status", status=200, methods=("HEAD",), headers=headers)
    with pytest.raises(HubError, match="does not answer like a Hub"):
        fetch(vit_b)
    assert not cache_of(hub).exists()


# -- row 6: kill -9


@KINDS
def test_row_6_a_killed_download_is_begun_anew_and_its_rest_goes(hub, vit_b, start, capsys, name, pattern):
    hub.fault(pattern, "slow", after=500_000, seconds=60, times=1)
    process = start("download", name)
    wait_for(lambda: large(hub.folder.name), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (rest,) = large(hub.folder.name)

    code, out, err = finished(start("download", name, "--json"))
    assert code == 0
    assert Path(json.loads(out.splitlines()[-1])["path"]).read_bytes() == BYTES
    assert "waiting" not in err  # the kernel gave the lock back
    found = fetch(model_info(name), offline=True, verify=True)
    assert found.sha256 == SHA256

    assert not rest.exists()  # its name says whose it was
    assert main(["cache", "clean"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert not unfinished(hub.folder.name)


def test_row_6_what_a_killed_process_left_is_cleaned_at_once(hub, capsys):
    own = Path(hub.env()["MAEHUB_CACHE"]) / "converted"
    own.mkdir(parents=True)
    code = (
        "import os, pathlib, signal; from maehub.files import atomic_write\n"
        f"with atomic_write({str(own / 'x.safetensors')!r}) as file:\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (rest,) = own.iterdir()
    with atomic_write(own / "y.safetensors") as living:
        assert main(["cache", "clean"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "kept 1 written to within the last hour, 0 B"
        assert living.exists()
        living.write_text("whole")
    assert [path.name for path in own.iterdir()] == ["y.safetensors"], rest


@pytest.mark.slow
@KINDS
def test_row_6_killed_at_any_moment(hub, vit_b, start, name, pattern):
    """At moments from before the first request to after the last byte; whatever is there is whole."""
    hub.fault(pattern, "slow", after=700_000, seconds=0.3)
    rng = random.Random(6)
    for _ in range(12):
        process = start("download", name)
        time.sleep(rng.uniform(0.2, 1.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with contextlib.suppress(HubError):  # it is not there
            assert fetch(model_info(name), offline=True, verify=True).sha256 == SHA256
    assert finished(start("download", name))[0] == 0
    age(hub.folder.name, 3700)
    clean_cache()
    assert not unfinished(hub.folder.name)
    assert fetch(model_info(name), offline=True, verify=True).sha256 == SHA256


def test_row_6_only_old_leftovers_are_removed(hub, vit_b, tmp_path, capsys):
    fetch(vit_b)
    cache, own = cache_of(hub), Path(hub.env()["MAEHUB_CACHE"])
    (tmp_path / "mine").write_text("mine")
    old = {
        cache / FOLDER / "blobs" / "abc.incomplete": 5,
        cache / FOLDER / "blobs" / f"{SHA256}.1a2b3c4d.incomplete": 7,
        cache / "datasets--a--b" / "blobs" / "abc.1a2b3c4d.incomplete": 11,
        cache / FOLDER / f"{caching.STAGING}x1" / "download" / "a.incomplete": 13,
        own / "stamps" / ".x.json.1a2b3c4d.tmp": 17,
        own / "files" / "h" / ".x.pth.00000000.tmp": 19,
    }
    others = [
        cache / FOLDER / "snapshots" / "1" / "a.incomplete",  # a file of the repository
        cache / ".locks" / FOLDER / "abc.incomplete",
        cache / "notes" / "blobs" / "abc.incomplete",
        own / "files" / "h" / ".mine.tmp",
        own / "files" / "h" / "x.1a2b3c4d.tmp",
        tmp_path / "a.incomplete",
    ]
    for path, size in [*old.items(), *((path, 1) for path in others)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    (cache / FOLDER / "blobs" / "link.incomplete").symlink_to(tmp_path / "mine")
    age(hub.folder.name, 3700)
    young = cache / FOLDER / f"{caching.STAGING}x2" / "download" / "b.incomplete"
    young.parent.mkdir(parents=True)
    young.write_bytes(b"yy")
    age(young.parent.parent, 3700)
    os.utime(young)  # the folder is old, and something is still written into it
    before = set(tree(hub.folder.name))

    assert main(["cache", "clean", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == sum(old.values()) == sum(one["bytes"] for one in facts["removed"])
    assert [(one["path"], one["bytes"]) for one in facts["kept"]] == [(str(young.parent.parent), 2)]
    gone = {path for path in (Path(hub.folder.name) / name for name in before) if not os.path.lexists(path)}
    staged = cache / FOLDER / f"{caching.STAGING}x1"
    assert gone == set(old) | {staged, staged / "download"}
    assert (tmp_path / "mine").read_text() == "mine"
    assert fetch(vit_b, offline=True).sha256 == SHA256
    assert main(["cache", "clean"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nothing to remove"


def test_row_6_an_empty_or_missing_cache_is_clean(tmp_path, capsys):
    assert main(["cache", "clean", "--cache-dir", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert not (tmp_path / "none").exists()


def test_row_6_a_download_that_ends_meanwhile_is_no_leftover(tmp_path, monkeypatch):
    path = tmp_path / "models--a--b" / "blobs" / "x.incomplete"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(caching, "_candidates", lambda place: [path])
    assert clean_cache(tmp_path).removed == []


@needs_root
def test_row_6_what_cannot_be_removed_is_named(tmp_path):
    for folder, owner in (("models--a--b", 0), ("models--c--d", 65534)):
        path = tmp_path / folder / "blobs" / "x.incomplete"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 2000)
        os.chown(path.parent, owner, owner)
    age(tmp_path, 3700)
    let_enter(tmp_path)
    with as_nobody(), pytest.raises(CheckpointError) as caught:
        clean_cache(tmp_path)
    text = str(caught.value)
    assert f"{tmp_path / 'models--a--b' / 'blobs' / 'x.incomplete'} cannot be removed: Permission denied" in text
    assert "1 others were removed, 2 kB" in text
    assert not (tmp_path / "models--c--d" / "blobs" / "x.incomplete").exists()


# -- row 7: several at once


@KINDS
@pytest.mark.parametrize("patch", ["", NO_FLOCK], ids=["locks", "no locks"])
def test_row_7_four_processes_and_a_cold_cache(hub, vit_b, start, name, pattern, patch):
    hub.fault(pattern, "slow", after=600_000, seconds=2 if patch else 0.7)
    before = len(hub.asked("GET", contains=pattern.rpartition("/")[2]))
    processes = [start("download", name, "--json", patch=patch) for _ in range(4)]
    ends = [finished(process) for process in processes]
    assert [code for code, _, _ in ends] == [0] * 4
    (path,) = {json.loads(out.splitlines()[-1])["path"] for _, out, _ in ends}
    assert Path(path).read_bytes() == BYTES
    asked = len(hub.asked("GET", contains=pattern.rpartition("/")[2])) - before
    assert asked == 1 if not patch else 1 < asked <= 4
    assert not unfinished(hub.folder.name)
    assert not any("going on without it" in err for _, _, err in ends)
    assert fetch(model_info(name), offline=True, verify=True).sha256 == SHA256


# -- row 8: locks


@pytest.fixture
def holder(hub):
    """Another process that holds the lock of the weights; closing its stdin lets it go."""
    lock = lock_of(hub)
    lock.parent.mkdir(parents=True)
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1); sys.stdin.read()"
    command = [sys.executable, "-u", "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_row_8_a_lock_that_another_process_holds(hub, vit_b, holder, caplog):
    caplog.set_level(logging.INFO, "maehub")
    begin = time.monotonic()
    found = fetch(vit_b, lock_timeout=0.5)
    assert 0.5 <= time.monotonic() - begin < 10
    assert found.path.read_bytes() == BYTES
    waiting, beside = [record for record in caplog.records if "lock" in record.message][:2]
    assert f"waiting at most 0.5 s for {lock_of(hub)}" in waiting.message
    assert f"after 0.5 s, {lock_of(hub)} is still held" in beside.message
    assert "going on without it" in beside.message
    assert (waiting.levelno, beside.levelno) == (logging.INFO, logging.WARNING)
    if LOCKS.exists():
        assert f"held by process {holder.pid}" in waiting.message
        assert f"held by process {holder.pid}" in beside.message
    assert holder.poll() is None
    assert not unfinished(hub.folder.name)


def test_row_8_a_lock_that_comes_free_in_time(hub, vit_b, holder, start):
    process = start("download", "vit-b")
    line = process.stderr.readline()
    assert "waiting at most 60 s" in line
    assert not hub.asked("GET", store=True)
    holder.stdin.close()
    code, _, err = finished(process)
    assert code == 0
    assert "going on" not in err


def test_row_8_the_flag_of_the_command(hub, vit_b, holder, start):
    code, _, err = finished(start("download", "vit-b", "--lock-timeout", "0"))
    assert code == 0
    assert f"after 0 s, {lock_of(hub)} is still held" in err
    assert fetch(vit_b, offline=True).sha256 == SHA256


@pytest.mark.parametrize("patch", ["", ENOSYS], ids=["flock", "no flock"])
def test_row_8_a_stale_lock_file(hub, vit_b, start, patch):
    """Where flock works, a file that nobody holds is no lock; where it does not, its being there is."""
    lock = lock_of(hub)
    lock.parent.mkdir(parents=True)
    lock.write_text("4711\nanother-host\n")
    begin = time.monotonic()
    code, _, err = finished(start("download", "vit-b", "--lock-timeout", "1.5", patch=patch))
    assert code == 0
    assert fetch(vit_b, offline=True).sha256 == SHA256
    if patch:
        assert time.monotonic() - begin > 1.5
        assert f"after 1.5 s, {lock} is still held by process 4711 on another-host" in err
        assert "delete the lock file" in err
    else:
        assert "waiting" not in err


def test_row_8_an_official_file_has_a_lock_too(hub, vit_b, start, caplog):
    lock = Path(hub.env()["MAEHUB_CACHE"]) / "locks" / "mae_pretrain_vit_base_full.pth.lock"
    lock.parent.mkdir(parents=True)
    import filelock

    with filelock.FileLock(lock):
        code, _, err = finished(start("download", "vit-b-normpix-full", "--lock-timeout", "0.2"))
    assert code == 0
    assert str(lock) in err
    if LOCKS.exists():
        assert f"by process {os.getpid()}" in err


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_row_8_a_wait_that_is_none(hub, vit_b, capsys, seconds):
    with pytest.raises(UsageError, match="lock_timeout"):
        fetch(vit_b, lock_timeout=seconds)
    assert main(["download", "vit-b", f"--lock-timeout={seconds}"]) == 2
    assert "0 or more" in capsys.readouterr().err


# -- row 19: a full disk


def mounted(folder, options):
    """What runs a command with a file system of its own at ``folder``; skips where that is not allowed."""
    if not shutil.which("unshare"):
        pytest.skip("unshare (util-linux) mounts a small file system")
    mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    wrapped = ["unshare", "-rm", "sh", "-c", mount, str(folder)]
    if subprocess.run([*wrapped, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    return wrapped


LISTING = """
left = [os.path.join(top, name) for top, _, names in os.walk(os.environ["DISK"]) for name in names]
[print(one) for one in left if os.path.getsize(one)]
print("free", os.statvfs(os.environ["DISK"]).f_bavail * os.statvfs(os.environ["DISK"]).f_frsize)
"""
MUCH_ROOM = "shutil.disk_usage = lambda path, real=shutil.disk_usage: real(path)._replace(free=10**12)"
# Room enough when it is asked for, and then another process takes it.
RACE = """
from maehub.hub import cache as caching, client
def took_it(*_, check=caching.check_disk_space):
    check(*_)
    with open(os.path.join(os.environ["DISK"], "other"), "wb") as other:
        other.write(bytes(1_200_000))
caching.check_disk_space = client.check_disk_space = took_it
"""


@KINDS
@pytest.mark.parametrize(("size", "patch"), [("600k", ""), ("2m", RACE)], ids=["known before", "found out midway"])
def test_row_19_a_full_disk(hub, vit_b, start, tmp_path, name, pattern, size, patch):
    disk = tmp_path / "disk"
    disk.mkdir()
    names = {"HF_HOME": disk, "HF_HUB_CACHE": disk / "hub", "MAEHUB_CACHE": disk / "maehub", "DISK": disk}
    wrapped = mounted(disk, f"size={size}")
    environment = {key: str(value) for key, value in names.items()}
    process = start("download", name, env=environment, patch=patch, after=LISTING, wrapped=wrapped)
    code, out, err = finished(process)
    assert code == 6, err
    lines = err[err.index("maehub: ") :].splitlines()  # the client warns before it
    first = lines[0]
    assert first.startswith(f"maehub: {name} (")
    assert " needs 1 MB, " in first
    assert f" free at {disk}" in first
    assert ("the part that had come was removed" if patch else "nothing was downloaded") in err
    assert "HF_HOME" in err
    assert "--cache-dir" in err
    assert len(lines) <= 6
    *left, free = out.splitlines()
    assert [Path(path).name for path in left if Path(path).name != "CACHEDIR.TAG"] == (["other"] if patch else [])
    assert int(free.split()[1]) > (700_000 if patch else 500_000)  # nothing of it takes any room
    asked = hub.asked("GET", contains=pattern.rpartition("/")[2])
    if not patch and name == "vit-b":
        assert not asked  # an official file's size is known from the answer


def test_row_19_a_size_that_nobody_knows_is_found_out_midway(hub, vit_b, start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    environment = {"MAEHUB_CACHE": str(disk / "maehub"), "DISK": str(disk)}
    patch = MUCH_ROOM + "\nfrom maehub.hub import client\nclient.check_disk_space = lambda *_: None"
    process = start(
        "download",
        "vit-b-normpix-full",
        env=environment,
        patch=patch,
        after=LISTING,
        wrapped=mounted(disk, "size=600k"),
    )
    code, out, err = finished(process)
    assert code == 6, err
    assert "the part that had come was removed" in err
    assert len(out.splitlines()) == 1


# -- row 20: a cache or a home that may not be written


@pytest.fixture
def open_folders(tmp_path, monkeypatch):
    """Folders that everyone may enter; modules and a login may lie where only root reads."""
    for late in ("huggingface_hub.file_download", "huggingface_hub.utils", "filelock", "requests", "tqdm", "tyro"):
        importlib.import_module(late)
    let_enter(tmp_path)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path


@needs_root
def test_row_20_a_read_only_cache_is_used(hub, vit_b, open_folders, caplog):
    cache = open_folders / "cache"
    found, repo = fetch(vit_b, cache_dir=cache), fetch_repo(TIMM, cache_dir=cache)
    shutil.rmtree(cache / "maehub")  # a cache that the client filled
    fetched = len(hub.asked("GET", store=True))
    before = tree(cache)
    with as_nobody():
        assert fetch(vit_b, cache_dir=cache) == found
        assert fetch_repo(TIMM, cache_dir=cache) == repo
        assert fetch_repo(TIMM, cache_dir=cache, offline=True) == repo
        assert clean_cache(cache).removed == []
    hub.repos[TIMM].refs["dev"] = found.revision  # a branch that the cache does not know, at a commit that it has
    with as_nobody():
        assert fetch(vit_b, revision="dev", cache_dir=cache).path == found.path
    assert tree(cache) == before
    assert len(hub.asked("GET", store=True)) == fetched
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@needs_root
@pytest.mark.parametrize("there", [False, True], ids=["not made", "made"])
@KINDS
def test_row_20_a_read_only_cache_that_lacks_the_file(hub, vit_b, open_folders, capsys, name, pattern, there):
    cache = open_folders / "cache"
    if there:
        for folder in (cache / FOLDER / "blobs", cache / ".locks", cache / "maehub" / "files", cache / "maehub/locks"):
            folder.mkdir(parents=True)
    before = tree(open_folders)
    with as_nobody():
        assert main(["download", name, "--cache-dir", str(cache)]) == 6
    err = capsys.readouterr().err
    assert err.startswith(f"maehub: {name} (")
    assert "Permission denied" in err
    assert str(cache) in err
    assert "HF_HOME" in err
    assert "--cache-dir" in err
    assert len(err.splitlines()) <= 6
    assert tree(open_folders) == before


@needs_root
def test_row_20_locks_of_another_user(hub, vit_b, open_folders):
    """A cache that several users share, where the first of them made the folder of locks."""
    cache = open_folders / "cache"
    (cache / ".locks").mkdir(parents=True)
    os.chown(cache, 65534, 65534)
    with as_nobody():
        assert fetch(vit_b, cache_dir=cache).sha256 == SHA256


def test_row_20_a_cache_that_is_a_file(hub, vit_b, tmp_path, capsys):
    (tmp_path / "file").touch()
    for name in ("vit-b", "vit-b-normpix-full"):
        assert main(["download", name, "--cache-dir", str(tmp_path / "file")]) == 6
        err = capsys.readouterr().err
        assert "HF_HOME" in err
        assert str(tmp_path / "file") in err


CACHES = ("HF_HOME", "HF_HUB_CACHE", "MAEHUB_CACHE", "XDG_CACHE_HOME")


def homeless(start, *words, home, wrapped=()):
    """The command line where nothing but the home says where caches lie; "" is none at all."""
    flags = [part for name in (*CACHES, *([] if home else ["HOME"])) for part in ("-u", name)]
    flags += [f"HOME={home}"] if home else []
    return finished(start(*words, wrapped=["env", *flags, *wrapped]))


def test_row_20_a_read_only_home(hub, vit_b, start, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    wrapped = mounted(home, "ro")
    for name in ("vit-b", "vit-b-normpix-full"):
        code, _, err = homeless(start, "download", name, wrapped=wrapped, home=home)
        assert code == 6, err
        assert "Read-only file system" in err
        assert "HF_HOME" in err
        assert str(home) in err
    assert homeless(start, "download", "vit-nano", wrapped=wrapped, home=home)[0] == 0
    words = ["download", "vit-b", "--cache-dir", tmp_path / "cache"]
    assert homeless(start, *words, wrapped=wrapped, home=home)[0] == 0
    assert fetch(vit_b, cache_dir=tmp_path / "cache", offline=True).sha256 == SHA256


@needs_root
def test_row_20_a_user_without_account_and_home(hub, vit_b, start):
    """As in containers that are run under a number."""
    wrapped = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    probe = [*wrapped, sys.executable, "-c", "import maehub.cli.command_line, huggingface_hub, torch"]
    if not shutil.which("setpriv") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("only root runs this Python")
    code, _, err = homeless(start, "download", "vit-b", home="", wrapped=wrapped)
    assert code == 6, err
    assert "Permission denied" in err
    assert "HF_HOME" in err
    assert homeless(start, "download", "vit-nano", home="", wrapped=wrapped)[0] == 0


@needs_root
def test_row_20_a_login_that_may_not_be_read(hub, vit_b, open_folders, capsys):
    (open_folders / "token").write_text("hf_secret")
    (open_folders / "token").chmod(0o600)
    with as_nobody():
        assert main(["download", "vit-b", "--cache-dir", str(open_folders / "cache")]) == 6
    err = capsys.readouterr().err
    assert f"{open_folders / 'token'} cannot be read: Permission denied" in err
    assert "hf_secret" not in err
