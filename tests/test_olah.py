"""Reading from olah, a Hub server that this project did not write: our own test server is not the only judge.

scripts/test-olah installs it in an environment of its own and runs this file.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, fetch, fetch_repo
from hub_writes import Token
from safetensors.torch import load_file, save_file

import maehub
from maehub.errors import HubError, IntegrityError
from maehub.hub.catalog import model_info
from maehub.hub.fetching import verify
from maehub.publishing import round_trip as readback
from maehub.publishing.committing import commit as publish
from maehub.publishing.pushing import push
from maehub.publishing.remote import Hub, LocalFile, look, verify_remote

OLAH = os.environ.get("MAEHUB_OLAH") or shutil.which("olah-cli")
pytestmark = pytest.mark.skipif(not OLAH, reason="olah-cli is not installed; scripts/test-olah installs and runs it")

WEIGHTS = bytes(range(256)) * 45_000  # 11.5 MB, more than one chunk of the client
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def git(folder, *arguments):
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "init.defaultBranch=main"]
    command = ["git", *identity, "-C", folder, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(repo, files):
    """Commit files as the Hub keeps them: weights as Git LFS pointers, their bytes beside git's own objects."""
    for name, content in files.items():
        path = repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(content).hexdigest()
            stored = repo / ".git" / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(content)
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        path.write_bytes(content)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "files")
    return git(repo, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def olah(tmp_path_factory):
    """olah on loopback, offline, with one repository: (address, folder of repositories, first and second commit)."""
    folder = tmp_path_factory.mktemp("olah")
    repo = folder / "mirrors" / "models" / "timm" / "vit_base_patch16_224.mae"
    repo.mkdir(parents=True)
    git(repo, "init", "-q")
    first = commit(repo, {"config.json": b'{"architecture": "vit"}', "model.safetensors": WEIGHTS[::-1]})
    second = commit(repo, {"model.safetensors": WEIGHTS})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{folder}/repos"\n'
        f'mirrors-path = ["{folder}/mirrors"]\nhf-netloc = "127.0.0.1:9"\nhf-lfs-netloc = "127.0.0.1:9"\n'
        f'mirror-netloc = "127.0.0.1:{port}"\nmirror-lfs-netloc = "127.0.0.1:{port}"\n[accessibility]\noffline = true\n'
    )
    with (folder / "out.txt").open("wb") as out:
        command = [OLAH, "-c", str(config), "--log-path", str(folder / "log")]
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(
                    f"{address}/api/models/timm/vit_base_patch16_224.mae/revision/main", timeout=5
                ).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "out.txt").read_text()
                time.sleep(0.2)
        else:
            pytest.fail((folder / "out.txt").read_text())
        yield address, folder / "mirrors" / "models", first, second
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def client(olah, monkeypatch, tmp_path):
    """The Hub's client in this process talks to olah."""
    from huggingface_hub import close_session, constants

    address, _, first, second = olah
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("MAEHUB_CACHE", str(tmp_path / "maehub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield first, second
    close_session()


def test_a_catalog_row(client):
    _, second = client
    info = model_info("vit-b")
    found = fetch(replace(info, sources=info.sources[:1]))
    assert (found.sha256, found.revision) == (SHA256, second)
    assert Path(found.path).read_bytes() == WEIGHTS
    assert verify("vit-b") == [(found.path, SHA256, "the Hub")]
    assert fetch(replace(info, sources=info.sources[:1]), offline=True) == found


def test_a_pinned_commit(client):
    first, _ = client
    info = model_info("vit-b")
    source = replace(info.sources[0], revision=first, sha256=hashlib.sha256(WEIGHTS[::-1]).hexdigest())
    assert fetch(replace(info, sources=(source,))).path.read_bytes() == WEIGHTS[::-1]


def test_a_repository(client):
    _, second = client
    found = fetch_repo("timm/vit_base_patch16_224.mae")
    assert (found.sha256, found.revision) == (SHA256, second)
    assert found.config.read_bytes() == b'{"architecture": "vit"}'


def test_what_is_not_there(client):
    with pytest.raises(HubError):
        fetch_repo("timm/nobody")
    with pytest.raises(HubError):
        fetch_repo("timm/vit_base_patch16_224.mae@nothing")


def test_what_was_pushed_is_read_back(olah, client, tmp_path, monkeypatch):
    """Pushed to our own server, laid out as a git work tree, and read through olah: every file, byte for byte."""
    from huggingface_hub import constants, hf_hub_download

    address, mirrors, _, _ = olah
    contents = {
        "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n\n# name\n",
        "config.json": b'{"architecture": "vit"}',
        "figures/curve.png": bytes(range(256)) * 20,
        "model.safetensors": WEIGHTS,
        "timm/model.safetensors": WEIGHTS[: 1 << 20],
    }
    files = {}
    for name, content in contents.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        files[name] = LocalFile(path, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer() as hub:
        hub.tokens["hf_" + "writes" * 5] = Token()
        with monkeypatch.context() as there:
            there.setenv("HF_ENDPOINT", hub.endpoint)
            at = Hub("user/name", "hf_" + "writes" * 5)
        done = publish(at, files, remote=look(at), message="m", progress=False)
        verify_remote(at, done.commit, files)
        stated = look(at).files
        held = {name: one.read() for name, one in hub.repos["user/name"].commits[done.commit].items()}
    repo = mirrors / "user" / "name"
    repo.mkdir(parents=True)
    git(repo, "init", "-q")
    at_olah = commit(repo, held)
    for line in git(repo, "ls-tree", "-r", "HEAD").splitlines():  # git's own word for the small files
        _, _, blob, name = line.split(maxsplit=3)
        assert stated[name].sha256 or stated[name].git == blob
    for name, content in contents.items():
        assert Path(hf_hub_download("user/name", name, revision=at_olah, endpoint=address)).read_bytes() == content
    assert fetch_repo("user/name").revision == at_olah
    with monkeypatch.context() as there:
        there.setenv("HF_ENDPOINT", address)
        at = Hub("user/name", "hf_" + "reads" * 6)
    verify_remote(at, at_olah, files)
    wrong = files | {"config.json": files["config.json"]._replace(sha256="0" * 64)}
    with pytest.raises(IntegrityError, match=r"config\.json"):
        verify_remote(at, at_olah, wrong)


def test_a_pushed_model_loads_through_olah(olah, client, tmp_path, monkeypatch):
    """All of `maehub.push`, its repository as olah serves it, and each library over the network that it makes."""
    from huggingface_hub import close_session, constants

    address, mirrors, _, _ = olah
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    nano = maehub.load_autoencoder("vit-nano")
    with HubServer() as hub:
        hub.tokens["hf_" + "writes" * 5] = Token()
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        done = push(nano, "user/nano", licence="apache-2.0", token="hf_" + "writes" * 5, progress=False)
        held = {name: one.read() for name, one in hub.repos["user/nano"].commits[done.committed.commit].items()}
    close_session()
    monkeypatch.setenv("HF_ENDPOINT", address)
    repo = mirrors / "user" / "nano"
    repo.mkdir(parents=True)
    git(repo, "init", "-q")
    commit(repo, held)

    pictures = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    seeds = (1, 2)
    with torch.inference_mode():
        expected = nano(pictures, seeds=seeds)
        feature = nano.encoder(pictures)
        assert torch.allclose(maehub.load("user/nano")(pictures), feature, atol=1e-5)
        found = maehub.load_autoencoder("user/nano")(pictures, seeds=seeds)
        assert torch.allclose(found.prediction, expected.prediction, atol=1e-5)

    noise = expected.masked.float() + torch.arange(144) / 288
    save_file({"images": pictures, "noise": noise}, tmp_path / "inputs.safetensors")
    for library, name, wanted in (("timm", "forward", feature), ("transformers", "prediction", expected.prediction)):
        job = {"library": library, "repo": "user/nano", "inputs": str(tmp_path / "inputs.safetensors")}
        job |= {"outputs": str(tmp_path / f"{library}.safetensors")}
        (tmp_path / "job.json").write_text(json.dumps(job))
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / library), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-P", readback.__file__, str(tmp_path / "job.json")]
        subprocess.run(command, check=True, env=os.environ | environment, timeout=300)
        assert torch.allclose(load_file(job["outputs"])[name], wanted, atol=1e-5)
