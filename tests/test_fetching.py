"""Downloads through the real client of the Hub, against a small Hub on loopback that misbehaves on demand."""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import SIGNATURE, HubServer, fetch, fetch_repo
from hypothesis import given
from hypothesis import strategies as st

from maehub.errors import HubError, IntegrityError, MaehubError, UsageError
from maehub.figures import rendering
from maehub.hub import catalog, client, deadlines, downloading, urls, verification
from maehub.hub.catalog import Source, model_info
from maehub.hub.fetching import download, verify
from maehub.images import Preprocess

TIMM = "timm/vit_base_patch16_224.mae"
WEIGHTS = TIMM + "/model.safetensors"
BYTES = bytes(range(256)) * 4096  # 1 MB
SHA256 = hashlib.sha256(BYTES).hexdigest()
SECRET = "hf_" + "s3cr3t" * 5


@pytest.fixture
def naps(monkeypatch):
    """Sleeping costs nothing; the seconds that were asked for."""
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)
    return asked


@pytest.fixture
def vit_b(hub):
    """The row vit-b, and the repository of its first source; its official file is not there."""
    hub.add_repo(TIMM, {"config.json": "{}", "model.safetensors": BYTES})
    return model_info("vit-b")


@pytest.fixture(autouse=True)
def fair(request, monkeypatch):
    """The official files' addresses lead to the test server."""
    if "hub" in request.fixturenames:
        monkeypatch.setattr(catalog, "FAIR_BASE", request.getfixturevalue("hub").endpoint + "/")


@pytest.fixture
def small_chunks(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65_536)


@pytest.fixture
def impatient(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(client, "SILENCE", 0.3)


def fails(kind, call, *args, **options):
    """The text of the error, which must be ours, short, and free of secrets."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert isinstance(caught.value, MaehubError)
    assert len(text.splitlines()) <= 6
    assert SIGNATURE not in text
    assert SECRET not in text
    return text


def files_below(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file() or path.is_symlink()]


def whole_files(hub):
    """What lies in the caches, less references, stamps and locks."""
    others = {"stamps", "refs", "locks", ".locks"}
    return [path for path in files_below(hub.folder.name) if not others & set(path.parts)]


def run(hub, code, **environment):
    """A fresh interpreter that talks to the test server."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=hub.env() | environment, capture_output=True, text=True, timeout=60, check=False)


# -- what a download is ------------------------------------------------------------------------------------------------


def test_a_row_is_fetched_verified_and_named(hub, vit_b, caplog):
    caplog.set_level(logging.INFO, "maehub")
    found = fetch(vit_b)
    commit = hub.repos[TIMM].refs["main"]
    assert found.path.read_bytes() == BYTES
    assert (found.sha256, found.revision) == (SHA256, commit)
    assert (found.source.repo, found.source.format) == (TIMM, "safetensors")
    assert found.licence == "CC-BY-NC-4.0"
    assert [record.message for record in caplog.records] == [
        f"vit-b: {TIMM}@{commit[:7]} model.safetensors, licence CC-BY-NC-4.0"
    ]


def test_a_file_is_hashed_once(hub, vit_b, monkeypatch):
    hashed = []
    real = verification.file_hashes
    monkeypatch.setattr(verification, "file_hashes", lambda path, other=None: hashed.append(path) or real(path, other))
    first, second = fetch(vit_b), fetch(vit_b)
    assert len(hashed) == 1
    assert first == second
    fetch(vit_b, verify=True)
    assert len(hashed) == 2
    os.utime(first.path, ns=(1, 1))  # another time: the stamp no longer speaks for the file
    fetch(vit_b)
    assert len(hashed) == 3


def test_a_cached_row_asks_nobody(hub, vit_b):
    fetch(vit_b)
    before = len(hub.log)
    fetch(vit_b)
    assert len(hub.log) == before


def test_a_stamp_that_cannot_be_written_costs_only_time(hub, vit_b, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAEHUB_CACHE", str(tmp_path / "file"))
    assert fetch(vit_b).sha256 == fetch(vit_b).sha256 == SHA256


def test_cache_dir_holds_everything(hub, vit_b, tmp_path):
    found = fetch(vit_b, cache_dir=tmp_path)
    assert tmp_path in found.path.parents
    assert not whole_files(hub)
    assert fetch(vit_b, cache_dir=tmp_path, offline=True) == found
    assert (tmp_path / "maehub" / "stamps").is_dir()


def test_another_revision_of_a_row(hub, vit_b):
    commit = hub.add_repo(TIMM, {"model.safetensors": b"other"}, revision="v2")
    pinned = replace(vit_b, sources=(replace(vit_b.sources[0], sha256="0" * 64), vit_b.sources[1]))
    found = fetch(pinned, revision="v2")
    assert (found.revision, found.path.read_bytes()) == (commit, b"other")
    assert "does not come from the Hub" in fails(UsageError, fetch, model_info("vit-b-in1k"), revision="v2")
    assert "not a branch" in fails(UsageError, fetch, vit_b, revision="../../x")


# -- the order of sources ----------------------------------------------------------------------------------------------


def test_the_first_source_that_exists_is_used(hub, caplog):
    """ViT-L on pixels: safetensors on main, at the pull request, the official file."""
    caplog.set_level(logging.INFO, "maehub")
    info = model_info("vit-l-pixel")
    address = "/mae/visualize/mae_visualize_vit_large.pth"
    text = fails(HubError, fetch, info)
    assert all(place in text for place in ("facebook/vit-mae-large", "mae_visualize_vit_large.pth"))
    hub.add_page(address, b"official")
    assert fetch(info).source.format == "pickle"

    hub.add_repo("facebook/vit-mae-large", {"pytorch_model.bin": b"main"})
    commit = hub.add_repo("facebook/vit-mae-large", {"model.safetensors": b"pull request"}, revision="refs/pr/1")
    text = fails(IntegrityError, fetch, info, cache_dir=f"{hub.folder.name}/2")  # another commit than the named one
    assert commit[:12] in text
    assert "dc39720" in text
    info = replace(info, sources=(info.sources[0], replace(info.sources[1], commit=commit[:7]), info.sources[2]))
    found = fetch(info, cache_dir=f"{hub.folder.name}/3")
    assert (found.path.read_bytes(), found.revision) == (b"pull request", commit)
    assert f"vit-l-pixel: facebook/vit-mae-large@{commit[:7]}" in caplog.text
    assert fetch(info, cache_dir=f"{hub.folder.name}/3", offline=True) == found

    hub.add_repo("facebook/vit-mae-large", {"model.safetensors": b"merged"})
    assert fetch(info, cache_dir=f"{hub.folder.name}/4").path.read_bytes() == b"merged"


def test_a_source_in_trouble_is_not_a_source_that_is_gone(hub, vit_b, naps):
    hub.add_page("/mae/pretrain/mae_pretrain_vit_base.pth", b"official")
    hub.fault(WEIGHTS, "status", status=503, methods=("HEAD",))
    assert "HTTP 503" in fails(HubError, fetch, vit_b)


def test_the_embedded_file_needs_no_network_and_is_pinned(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "__file__", str(tmp_path / "hub" / "downloading.py"))
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "nano.safetensors").write_bytes(BYTES)
    source = Source("package", "assets/nano.safetensors", "safetensors", sha256=SHA256)
    info = replace(model_info("vit-nano"), sources=(source,))
    assert fetch(info, offline=True).sha256 == SHA256
    (tmp_path / "assets" / "nano.safetensors").write_bytes(BYTES[1:])
    assert "install maehub again" in fails(IntegrityError, fetch, info)
    (tmp_path / "assets" / "nano.safetensors").unlink()
    assert "install the package again" in fails(IntegrityError, fetch, info)
    assert not hub.log


# -- the official files ------------------------------------------------------------------------------------------------


def official(hub, content, md5=None):
    """The row vit-b-in1k with a file of these bytes, and the md5 prefix that the catalog states for it."""
    info = model_info("vit-b-in1k")
    address = "/mae/finetune/mae_finetuned_vit_base.pth"
    hub.add_page(address, content)
    md5 = hashlib.md5(content).hexdigest()[:6] if md5 is None else md5
    return replace(info, sources=(replace(info.sources[0], md5=md5),)), address


def test_an_official_file_is_verified_by_its_md5_prefix(hub):
    info, address = official(hub, BYTES)
    found = fetch(info)
    assert (found.sha256, found.source.format, found.source.url) == (SHA256, "pickle", hub.endpoint + address)
    assert fetch(info, offline=True) == found
    assert len(hub.log) == 1
    assert (found.path.stat().st_mode & 0o777) == 0o666 & ~_umask()


def test_an_official_file_with_other_bytes_is_refused_and_removed(hub):
    info, _ = official(hub, BYTES, md5="000000")
    text = fails(IntegrityError, fetch, info)
    assert "000000" in text
    assert "downloaded twice" in text
    assert len(hub.asked("GET")) == 2
    assert not whole_files(hub)


def test_an_official_file_goes_on_where_it_was_cut(hub, naps, caplog):
    info, address = official(hub, BYTES)
    hub.fault(address, "cut", after=300_000, times=2)
    assert fetch(info).sha256 == SHA256
    ranges = [one.headers.get("range") for one in hub.asked("GET")]
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges[1:]]
    assert ranges[0] is None
    assert 200_000 < starts[0] <= 300_000
    assert 500_000 < starts[1] <= 600_000
    assert "the connection broke at" in caplog.text


def test_an_official_file_from_a_server_without_ranges(hub, naps):
    info, address = official(hub, BYTES)
    hub.fault(address, "cut", after=300_000, times=1)
    hub.fault(address, "norange")
    assert fetch(info).sha256 == SHA256


@pytest.mark.parametrize(
    ("mode", "options", "said"),
    [
        ("cut", {"after": 70_000}, "of 1 MB"),
        ("short", {"after": 1000}, "hash"),
        ("html", {}, "27 B of HTML"),
        ("status", {"status": 404}, "HTTP 404"),
        ("status", {"status": 500}, "HTTP 500"),
        ("hang", {"seconds": 5}, "no data for 0.3 s from 127.0.0.1"),
        ("slow", {"after": 70_000, "seconds": 5}, "the connection went silent at"),
        ("redirect", {"location": "http://127.0.0.1:9/gone?" + SIGNATURE}, "cannot be reached"),
    ],
)
def test_an_official_file_in_trouble_leaves_nothing(hub, naps, impatient, mode, options, said):
    info, address = official(hub, BYTES)
    hub.fault(address, mode, **options)
    assert said in fails((HubError, IntegrityError), fetch, info)
    assert not whole_files(hub)


def test_an_official_file_needs_encryption(hub, monkeypatch):
    info, _ = official(hub, BYTES)
    monkeypatch.setattr(catalog, "FAIR_BASE", "http://example.org/")
    assert "not https" in fails(IntegrityError, fetch, info)


def test_an_unpinned_official_file_must_stay_what_it_was(hub):
    info, _ = official(hub, BYTES, md5="")
    found = fetch(info)
    found.path.write_bytes(BYTES[:-1])
    text = fails(IntegrityError, fetch, info, offline=True)
    assert "the first download" in text
    assert SHA256[:12] in text
    assert fetch(info).sha256 == SHA256  # online, it is fetched again


# -- reliability rows --------------------------------------------------------------------------------------------------


def test_row_1_a_cut_connection_is_resumed(hub, vit_b, naps, small_chunks, caplog):
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    try:
        hub.fault(WEIGHTS, "cut", after=300_000, times=1)
        found = fetch(vit_b)
    finally:
        logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert found.path.read_bytes() == BYTES
    ranges = [one.headers.get("range") for one in hub.asked("GET", store=True)]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1].startswith("bytes=")
    assert any(record.levelno >= logging.WARNING for record in caplog.records)
    assert not [path for path in files_below(hub.folder.name) if "incomplete" in path.name]


def test_row_2_a_connection_that_is_always_cut(hub, vit_b, naps):
    hub.fault(WEIGHTS, "cut", after=50_000)
    text = fails(HubError, fetch, vit_b)
    assert "stopped after repeated tries" in text
    assert "of 1 MB" in text
    assert not [path for path in whole_files(hub) if path.suffix in (".safetensors", ".incomplete")]
    assert not list(Path(hub.folder.name).rglob("blobs/*"))


@pytest.mark.parametrize("pinned", [False, True])
def test_row_3_changed_bytes_of_the_same_length(hub, vit_b, pinned):
    """The client accepts these; the catalog's hash or the Hub's own tells."""
    source = replace(vit_b.sources[0], sha256=SHA256 if pinned else "")
    info = replace(vit_b, sources=(source,))
    fault = hub.fault(WEIGHTS, "corrupt")
    text = fails(IntegrityError, fetch, info)
    assert SHA256[:12] in text
    assert ("the catalog" if pinned else "the Hub") in text
    assert len(hub.asked("GET", store=True)) == 2
    assert not list(Path(hub.folder.name).rglob("blobs/*"))
    fails(HubError, fetch, info, offline=True)  # nothing was left to take for whole
    fault.times = 1
    assert fetch(info).sha256 == SHA256  # one bad download heals itself


@pytest.mark.parametrize(("mode", "size"), [("short", "949 kB"), ("html", "27 B")])
def test_row_4_another_length(hub, vit_b, naps, mode, size):
    hub.fault(WEIGHTS, mode, after=100_000)
    text = fails((HubError, IntegrityError), fetch, vit_b)
    assert f"got {size} instead of 1 MB" in text
    assert not list(Path(hub.folder.name).rglob("blobs/*"))


def test_row_4_a_login_page_instead_of_the_hub(hub, vit_b):
    hub.fault(WEIGHTS, "redirect", methods=("HEAD",), location="/welcome")
    hub.add_page("/welcome", b"<html>")
    assert "does not answer like a Hub" in fails(HubError, fetch, vit_b)


@pytest.mark.parametrize("damage", [b"", b"X" + BYTES[1:], BYTES[:-1]])
def test_row_5_a_damaged_file_in_the_cache(hub, vit_b, damage, caplog):
    path = fetch(vit_b).path
    path.write_bytes(damage)
    text = fails(IntegrityError, fetch, vit_b, offline=True)
    assert str(path) in text
    assert "maehub download vit-b" in text
    assert path.read_bytes() == damage  # without a network it is not ours to remove
    before = len(hub.asked("GET", store=True))
    assert fetch(vit_b).sha256 == SHA256
    assert len(hub.asked("GET", store=True)) == before + 1
    assert "damaged" in caplog.text


def test_row_5_damage_below_an_unchanged_stamp_is_found_by_verify(hub, vit_b):
    path = fetch(vit_b).path
    times = path.stat()
    path.write_bytes(b"X" + BYTES[1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fetch(vit_b, offline=True).path == path
    fails(IntegrityError, fetch, vit_b, offline=True, verify=True)
    fails(IntegrityError, verify, "vit-b")


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_row_9_offline_with_a_cache(hub, vit_b, how, monkeypatch):
    from huggingface_hub import constants

    found, repo = fetch(vit_b), fetch_repo(TIMM)
    before = len(hub.log)
    if how == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(vit_b, offline=how == "argument") == found
    assert fetch_repo(TIMM, offline=how == "argument") == repo
    assert len(hub.log) == before


OFFLINE = """
import sys, time
from maehub.errors import HubError
from maehub.hub import locate
try:
    locate("user/repo" if REPO else "vit-h-448", "encoder", offline=OFFLINE)
except HubError as error:
    print(error, "torch" in sys.modules, time.process_time() < 1, sep="|")
"""


@pytest.mark.parametrize("repo", ["False", "True"])
@pytest.mark.parametrize("way", ["argument", "variable", "no network"])
def test_row_10_offline_without_a_cache(hub, way, repo):
    code = OFFLINE.replace("OFFLINE", str(way == "argument")).replace("REPO", repo)
    environment = {"variable": {"HF_HUB_OFFLINE": "1"}, "no network": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    ran = run(hub, code, **environment.get(way, {}))
    text, torch, quick = ran.stdout.strip().rsplit("|", 2)
    name = "user/repo" if repo == "True" else "vit-h-448"
    assert f"run `maehub download {name}` where there is" in text
    assert (torch, quick) == ("False", "True")
    assert not hub.log


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare (util-linux) makes a machine without a network")
def test_row_10_no_network_at_all_fails_at_once(hub):
    probe = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("network namespaces are not allowed here")
    code = OFFLINE.replace("OFFLINE", "False").replace("REPO", "False")
    environment = hub.env() | {"HF_ENDPOINT": "https://huggingface.co"}
    command = ["unshare", "-rn", sys.executable, "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "huggingface.co cannot be reached for vit-h-448" in ran.stdout
    assert ran.stdout.strip().endswith("|False|True")


def test_row_11_every_refusal_has_a_text_of_its_own(hub, vit_b, monkeypatch, naps):
    only = replace(vit_b, sources=vit_b.sources[:1])
    gone = replace(only, sources=(replace(only.sources[0], repo="timm/gone"),))
    nowhere = replace(only, sources=(replace(only.sources[0], filename="gone.safetensors"),))
    texts = [fails(HubError, fetch, gone)]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    texts += [
        fails(HubError, fetch, gone),
        fails(HubError, fetch, nowhere),
        fails(HubError, fetch, only, revision="v9"),
    ]
    hub.repos[TIMM].gated = True
    texts.append(fails(HubError, fetch, only))
    wants = ["wants a login", "there is no repository", "has no file", "has no revision 'v9'", "is gated (HTTP 403)"]
    assert all(want in text for want, text in zip(wants, texts, strict=True))
    assert "config.json, model.safetensors" in texts[2]
    assert "known revisions: main" in texts[3]
    assert f"accept the terms at {hub.endpoint}/{TIMM}" in texts[4]
    assert not naps  # none of these is asked again


def test_row_12_retry_after_is_honoured(hub, vit_b, naps):
    hub.fault(WEIGHTS, "status", status=429, methods=("HEAD",), times=1, headers={"Retry-After": "7"})
    assert fetch(vit_b).sha256 == SHA256
    assert naps == [7]


def test_row_12_a_long_retry_after_ends_the_run(hub, vit_b, naps):
    hub.fault(WEIGHTS, "status", status=429, methods=("HEAD",), headers={"Retry-After": "3600"})
    text = fails(HubError, fetch, vit_b)
    assert "HTTP 429" in text
    assert "3600 s" in text
    assert naps == []


@pytest.mark.parametrize("status", [500, 503])
def test_row_12_server_errors_are_named(hub, vit_b, naps, status):
    hub.fault(WEIGHTS, "status", status=status, methods=("HEAD",))
    text = fails(HubError, fetch, vit_b)
    assert f"HTTP {status}" in text
    assert len(hub.asked("HEAD")) == client.TRIES
    hub.faults.clear()
    hub.fault(WEIGHTS, "status", status=status)  # the store answers so, the Hub does not
    assert f"HTTP {status}" in fails(HubError, fetch, vit_b)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_row_13_a_server_that_hangs(hub, vit_b, naps, impatient, method):
    hub.fault(WEIGHTS, "hang", methods=(method,), seconds=5)
    assert "no data for 0.3 s from 127.0.0.1" in fails(HubError, fetch, vit_b)
    assert not list(Path(hub.folder.name).rglob("blobs/*"))


def test_row_13_a_server_that_hangs_midway(hub, vit_b, naps, impatient, small_chunks):
    hub.fault(WEIGHTS, "slow", after=200_000, seconds=5, times=1)
    hub.fault(WEIGHTS, "hang", seconds=5)
    text = fails(HubError, fetch, vit_b)
    assert "no data for 0.3 s from 127.0.0.1" in text
    assert "of 1 MB had come" in text


def test_row_14_a_pinned_commit_is_used_when_main_moved(hub, vit_b):
    commit = hub.repos[TIMM].refs["main"]
    hub.add_repo(TIMM, {"model.safetensors": b"moved"})
    pinned = replace(vit_b, sources=(replace(vit_b.sources[0], revision=commit, sha256=SHA256),))
    assert fetch(pinned).sha256 == SHA256
    assert not hub.asked(contains="/main/")
    before = len(hub.log)
    assert fetch(pinned).revision == commit
    assert len(hub.log) == before


def test_row_15_another_commit_than_the_pinned_one(hub, vit_b):
    commit = hub.repos[TIMM].refs["main"]
    pinned = replace(vit_b, sources=(replace(vit_b.sources[0], revision=commit),))
    hub.fault(WEIGHTS, "commit", methods=("HEAD",))
    text = fails(IntegrityError, fetch, pinned)
    assert commit[:12] in text
    assert "f" * 12 in text
    assert not hub.asked("GET")


def test_row_15_another_hash_than_the_pinned_one(hub, vit_b):
    pinned = replace(vit_b, sources=(replace(vit_b.sources[0], sha256="0" * 64),))
    text = fails(IntegrityError, fetch, pinned)
    assert SHA256[:12] in text
    assert "0" * 12 in text
    assert not hub.asked("GET")


def test_row_16_a_token_stays_with_the_hub(hub, vit_b, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    fetch(vit_b)
    assert all("authorization" in one.headers for one in hub.asked(store=False))
    assert hub.asked(store=True)
    assert not any("authorization" in one.headers for one in hub.asked(store=True))


@pytest.fixture
def encrypted(hub, tmp_path, monkeypatch):
    """The Hub speaks TLS with a certificate that the clients trust; its store does not."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*request.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    hub._servers[0].socket = context.wrap_socket(hub._servers[0].socket, server_side=True)
    hub.endpoint = hub.endpoint.replace("http:", "https:")
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(catalog, "FAIR_BASE", hub.endpoint + "/")
    return hub


def test_row_16_a_way_from_https_to_http_is_refused(encrypted, vit_b):
    text = fails(IntegrityError, fetch, vit_b)
    assert "https to http" in text
    assert not encrypted.asked(store=True)
    info, address = official(encrypted, BYTES)
    assert fetch(info).sha256 == SHA256
    shutil.rmtree(fetch(info).path.parent)
    encrypted.fault(address, "redirect", location=encrypted.store + "/x/y/z/w")
    encrypted.add_repo("x/y", {"w": b""})
    encrypted.repos["x/y"].commits["z"] = encrypted.repos["x/y"].commits.popitem()[1]
    assert "https to http" in fails(IntegrityError, fetch, info)


HOSTILE = [
    "../x.safetensors",
    "a/../../x.safetensors",
    "/etc/x.safetensors",
    "C:\\x.safetensors",
    "a\\..\\x",
    "a//x",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_row_17_names_that_lead_out_of_the_folder(hub, name, tmp_path):
    hub.add_repo("user/config", {"config.json": json.dumps({"pretrained_cfg": {"hf_hub_filename": name}})})
    hub.add_repo("user/list", {"config.json": "{}", name: b"1", "model.safetensors": b"2"})
    before = files_below(tmp_path)
    if name.endswith(".safetensors"):
        assert "outside its folder" in fails(IntegrityError, fetch_repo, "user/config")
    assert "outside its folder" in fails(IntegrityError, fetch_repo, "user/list")
    assert files_below(tmp_path) == before
    assert {path.name for path in whole_files(hub) if path.is_symlink()} <= {"config.json"}


@given(st.text(alphabet=st.sampled_from("ab./\\:\x00~"), max_size=12))
def test_row_17_what_passes_stays_inside(name):
    try:
        client.check_filename(name, "user/repo")
    except IntegrityError:
        return
    folder = "/cache/snapshots/abc"
    assert os.path.normpath(os.path.join(folder, name)).startswith(folder + "/")


ODD = ["../x", "a/b/c", "a", "a/..", "a/b@../c", "/a/b", "a\\b/c", "a/b?x", "http://a/b"]
ODD += ["漢/b", "a/b-", "a/" + "b" * 96]  # what the Hub's client would refuse in its own words


@pytest.mark.parametrize("repo", ODD)
def test_row_17_repositories_and_revisions_are_checked(hub, repo):
    fails(UsageError, fetch_repo, repo)
    assert not hub.log


class _Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("config", [True, False])
def test_row_18_pickles_are_not_even_downloaded(hub, tmp_path, config):
    poison = pickle.dumps(_Canary(str(tmp_path / "canary")))
    files = {"pytorch_model.bin": poison, "x.pth": poison} | ({"config.json": "{}"} if config else {})
    hub.add_repo("user/pickles", files)
    text = fails(IntegrityError, fetch_repo, "user/pickles")
    assert "only safetensors" in text
    assert "pytorch_model.bin" in text
    assert not [one for one in hub.asked() if one.path.endswith((".bin", ".pth"))]
    assert not (tmp_path / "canary").exists()


def test_row_18_code_beside_the_weights_is_left_alone(hub, tmp_path):
    code = f"import os; os.mkdir({str(tmp_path / 'canary')!r})"
    config = {"auto_map": {"AutoModel": "poison.Model"}, "trust_remote_code": True, "model_type": "poison"}
    config |= {"_attn_implementation_internal": "user/poison", "pretrained_cfg": {"custom_load": "poison"}}
    hub.add_repo("user/code", {"config.json": json.dumps(config), "poison.py": code, "model.safetensors": b"1"})
    assert fetch_repo("user/code").path.read_bytes() == b"1"
    assert not hub.asked(contains="poison.py")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("config", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_row_18_a_config_that_is_none(hub, config):
    hub.add_repo("user/broken", {"config.json": config.encode("latin-1"), "model.safetensors": b"1"})
    assert "config.json of user/broken" in fails(IntegrityError, fetch_repo, "user/broken")


# -- any repository ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["timm/model.bin", "timm/model.safetensors"])
def both(hub, request):
    """A repository with the autoencoder at its root and the encoder for timm below; timm takes both names for it."""
    config = {"pretrained_cfg": {"hf_hub_filename": request.param, "license": "mit"}}
    files = {
        "config.json": json.dumps(config),
        "model.safetensors": b"autoencoder",
        "timm/model.safetensors": b"encoder",
    }
    return hub.add_repo("user/both", files)


def test_a_repository_gives_the_file_that_is_asked_for(hub, both):
    encoder, autoencoder = fetch_repo("user/both"), fetch_repo("user/both", want="autoencoder")
    assert encoder.path.read_bytes() == b"encoder"
    assert autoencoder.path.read_bytes() == b"autoencoder"
    assert encoder.config == autoencoder.config == autoencoder.path.with_name("config.json")
    assert encoder.revision == autoencoder.revision == both
    assert encoder.licence == "mit"
    config = {"pretrained_cfg": {"hf_hub_filename": "no.safetensors"}}  # which is not there
    hub.add_repo("user/one", {"config.json": json.dumps(config), "model.safetensors": b"autoencoder"})
    assert fetch_repo("user/one").path.read_bytes() == b"autoencoder"


def test_a_branch_is_looked_up_and_a_commit_is_not(hub, both):
    fetch_repo("user/both")
    before = len(hub.log)
    fetch_repo(f"user/both@{both}")
    assert len(hub.log) == before
    hub.add_repo("user/both", {"model.safetensors": b"new"})
    assert fetch_repo("user/both").path.read_bytes() == b"new"
    assert fetch_repo("user/both", revision=both).path.read_bytes() == b"encoder"
    fails(UsageError, fetch_repo, f"user/both@{both}", revision="main")


def test_a_silent_hub_leaves_the_copy_that_is_there(hub, both, naps, caplog):
    found = fetch_repo("user/both")
    hub.fault("*", "status", status=503, methods=("HEAD", "GET"))
    assert fetch_repo("user/both") == found
    assert "taking the copy on this machine" in caplog.text


def test_weights_that_are_not_there(hub):
    hub.add_repo("user/none", {"config.json": "{}", "README.md": "hello"})
    assert "README.md" in fails(HubError, fetch_repo, "user/none")
    hub.add_repo("user/cut", {"config.json": "{}", "model.safetensors.index.json": "{}"})
    assert "several files" in fails(HubError, fetch_repo, "user/cut")
    assert "HTTP 401" in fails(HubError, fetch_repo, "user/nobody")


# -- download and verify -----------------------------------------------------------------------------------------------


def test_download_brings_what_load_needs(hub, vit_b, both):
    assert download("vit-b") == fetch(vit_b, offline=True).path
    assert download("vit-b-448") == download("vit-b-encoder") == download("vit-b")
    assert download("user/both").read_bytes() == b"encoder"
    assert fetch_repo("user/both", want="autoencoder", offline=True).path.read_bytes() == b"autoencoder"
    fails(UsageError, download, "vit-z")


def test_download_looks_for_a_newer_commit_where_nothing_is_pinned(hub, vit_b):
    download("vit-b")
    hub.add_repo(TIMM, {"model.safetensors": b"newer"})
    assert fetch(vit_b).path.read_bytes() == BYTES
    assert download("vit-b").read_bytes() == b"newer"
    assert fetch(vit_b).path.read_bytes() == b"newer"


def test_download_takes_an_official_file_once(hub, monkeypatch):
    info, address = official(hub, BYTES)
    monkeypatch.setattr("maehub.hub.fetching.model_info", lambda name: info)
    assert download("vit-b-in1k") == download("vit-b-in1k")
    assert len(hub.asked(contains=address)) == 1


def test_verify_hashes_again_and_says_what_it_compared_with(hub, vit_b, both, tmp_path):
    fails(HubError, verify, "vit-b")
    path = fetch(vit_b).path
    assert verify("vit-b") == [(path, SHA256, "the Hub")]
    assert verify(path) == verify("vit-b") == verify(path.parent)
    fetch_repo("user/both")
    assert {Path(one.path).name for one in verify("user/both")} == {"config.json", "model.safetensors"}
    (tmp_path / "own.safetensors").write_bytes(b"1")
    assert [one.compared_with for one in verify(tmp_path / "own.safetensors")] == ["nothing"]
    path.write_bytes(BYTES[1:])
    assert str(path) in fails(IntegrityError, verify, "vit-b")
    assert str(path) in fails(IntegrityError, verify, path.parent)


# -- what is sent, and what is shown -----------------------------------------------------------------------------------


def test_row_88_nothing_is_sent_but_the_requests(hub, vit_b):
    ran = run(hub, "from maehub import download; download('timm/vit_base_patch16_224.mae')")
    assert not ran.returncode, ran.stderr
    assert not hub.asked(contains="agent-harnesses")
    agents = {one.headers["user-agent"] for one in hub.asked()}
    assert all(agent.startswith("maehub/") and "torch" not in agent for agent in agents)


def test_importing_sets_nothing(hub):
    code = """
import os, sys
before = dict(os.environ)
import maehub.hub.catalog, maehub.hub.fetching
assert "huggingface_hub" not in sys.modules and "requests" not in sys.modules and "torch" not in sys.modules
maehub.hub.fetching.cache_paths(None, False, False)
assert dict(os.environ) == before
"""
    assert not run(hub, code).returncode


def test_texts_show_no_secrets():
    text = f"GET https://x.org/a?{SIGNATURE}&b=1 failed: /a?{SIGNATURE} (Bearer {SECRET}) {SECRET}\nmore"
    assert client.scrub(text) == "GET https://x.org/a failed: /a ((hidden)) (hidden) more"


def test_the_test_server_serves_ranges():
    """The client asks for the rest of a file; a wrong answer here would hide a wrong file."""
    import requests

    with HubServer() as server:
        address = server.add_page("/x", BYTES)
        with requests.get(address, headers={"Range": "bytes=10-19"}, timeout=5) as answer:
            assert answer.status_code == 206
            assert answer.content == BYTES[10:20]
            assert answer.headers["Content-Range"] == f"bytes 10-19/{len(BYTES)}"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- servers that answer without end -----------------------------------------------------------------------------------

REPEATED = {
    "headers": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
}
"""What a server says, and then again and again, always in time for the next byte: a test that fails takes 20 s."""


def asking():
    """Threads that are waiting for an answer."""
    return [one for one in threading.enumerate() if one.name.endswith("(answer)")]


@pytest.fixture
def dripping(monkeypatch):
    """An address whose server never ends, ``say`` what it says; patience is a second and a half."""
    monkeypatch.setattr(deadlines, "PATIENCE", 1.5)
    over = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            first, again = server.says
            with contextlib.suppress(OSError):
                self.wfile.write(first)
                for _ in range(200):
                    self.wfile.write(again)
                    if over.wait(0.1):
                        break

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.says = REPEATED["headers"]
        server.host = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        wait_until = time.monotonic() + 15
        while asking() and time.monotonic() < wait_until:
            time.sleep(0.05)
        assert not asking(), "who asked is still asking"
        over.set()
        server.shutdown()


@pytest.mark.parametrize("says", REPEATED)
def test_an_address_that_never_ends_is_given_up(dripping, says, tmp_path):
    dripping.says = REPEATED[says]
    label = client.DownloadLabel("x", "x.pth")
    text = fails(HubError, urls.get_from_url, f"http://{dripping.host}/x.pth", tmp_path / "x.pth", label)
    assert f"{dripping.host} was given up for x (x.pth)" in text
    assert not list(tmp_path.iterdir())


def test_an_interim_answer_is_no_file(dripping, tmp_path):
    """The client takes any of them but 100 for the whole answer, whose body is empty."""
    dripping.says = (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"x")
    label = client.DownloadLabel("x", "x.pth")
    text = fails(HubError, urls.get_from_url, f"http://{dripping.host}/x.pth", tmp_path / "x.pth", label)
    assert "HTTP 103" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("says", ["headers", "interim answers"])
def test_a_hub_that_never_ends_its_answer_is_given_up(hub, vit_b, dripping, says, monkeypatch):
    dripping.says = REPEATED[says]
    monkeypatch.setenv("HF_ENDPOINT", f"http://{dripping.host}")
    assert f"{dripping.host} was given up for vit-b" in fails(HubError, fetch, vit_b)
    assert client.list_hub_files(TIMM, "main") == []


@pytest.mark.parametrize("says", REPEATED)
def test_a_store_that_never_ends_is_given_up(hub, vit_b, dripping, says):
    dripping.says = REPEATED[says]
    hub.fault(WEIGHTS, "redirect", location=f"http://{dripping.host}/x")
    assert "was given up for vit-b" in fails(HubError, fetch, vit_b)
    assert not list(Path(hub.folder.name).rglob("*.incomplete"))


@pytest.mark.parametrize("says", REPEATED)
def test_a_picture_that_never_ends_is_given_up(dripping, says):
    dripping.says = REPEATED[says]
    address = f"http://me:secret@{dripping.host}/x.jpg?key=secret"
    text = fails(HubError, rendering.open_picture, address, Preprocess(size=(16, 16)))
    assert f"{dripping.host} was given up" in text
    assert "secret" not in text


def test_a_command_ends_with_3_where_the_server_never_does(hub, dripping):
    code = (
        "from maehub.hub import deadlines; deadlines.PATIENCE = 1.5\n"
        "from maehub.cli.command_line import main; raise SystemExit(main(['download', 'user/repo']))"
    )
    done = run(hub, code, HF_ENDPOINT=f"http://{dripping.host}")
    assert done.returncode == 3, done.stderr
    assert f"{dripping.host} was given up" in done.stderr


def test_a_slow_download_that_goes_on_is_not_given_up(hub, vit_b, monkeypatch):
    monkeypatch.setattr(deadlines, "PATIENCE", 0.5)
    hub.fault(WEIGHTS, "drip", seconds=0.2)
    assert fetch(vit_b).sha256 == SHA256
