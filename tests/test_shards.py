"""Tar shards: webdataset's own writer and reader, crafted archives, other processes, storage behind an address."""

import io
import logging
import multiprocessing
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import peak
from PIL import Image
from processes import losses, words

from maehub import rng
from maehub.cli import command_line as cli
from maehub.data import shards as tar_index
from maehub.data import storage
from maehub.data.shards import expanded, find_shards
from maehub.data.sources import find_samples, groups, select
from maehub.errors import DataError, MissingDependencyError, UsageError
from maehub.images.decoding import open_image
from maehub.models.encoder import PRESETS, EncoderConfig

WEED = os.environ.get("MAEHUB_WEED") or shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def jpeg(number):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (number % 256, 7 * number % 256, 90)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, members, **options):
    """A tar of (name or TarInfo, content)."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture
def folder(tmp_path):
    """Two shards as webdataset lays them out."""
    for shard in range(2):
        members = []
        for place in range(3):
            number = 3 * shard + place
            members += [(f"k/{number:04}.cls", b"%d" % number)] if place else []
            members += [(f"k/{number:04}.jpg", jpeg(number)), (f"k/{number:04}.json", b'{"a": 1}')]
        write_tar(tmp_path / f"s-{shard:03}.tar", members)
    return tmp_path


def test_names_bytes_and_messages(folder):
    samples = find_samples(folder)
    assert len(samples) == 6
    names = [samples.name(index) for index in range(6)]
    assert names == [b"s-%03d.tar/k/%04d.jpg" % (number // 3, number) for number in range(6)]
    assert samples.sample_id(4) == rng.sample_id(b"s-001.tar/k/0004.jpg")
    assert [samples.source(index).getvalue() for index in range(6)] == [jpeg(number) for number in range(6)]
    assert samples.size(2) == len(jpeg(2))
    assert samples.where(4) == f"{folder}/s-001.tar, member k/0004.jpg"
    assert [samples.label(index) for index in range(6)] == [None, 1, 2, None, 4, 5]
    assert open_image(samples.source(3)).size == (24, 16)
    assert groups(samples, 1).tolist() == [0, 0, 0, 1, 1, 1]
    assert select(samples, np.array([5, 0])).source(0).getvalue() == jpeg(5)


def test_the_same_names_however_the_shards_are_given(folder, monkeypatch):
    whole = find_samples(folder)
    monkeypatch.chdir(folder)
    for given_as in (f"{folder}/s-{{000..001}}.tar", "*.tar", "s-{000,001}.tar", f"{folder}/s-00?.tar"):
        again = find_samples(given_as)
        assert again.digest() == whole.digest(), given_as
        assert again.name(5) == whole.name(5)
    assert find_samples("s-001.tar").name(0) == b"s-001.tar/k/0003.jpg"
    shutil.move(folder / "s-001.tar", folder / "s-002.tar")
    assert find_samples(folder).digest() != whole.digest()
    (folder / "deep").mkdir()
    shutil.move(folder / "s-002.tar", folder / "deep")
    assert find_samples(folder).name(0) == b"deep/s-002.tar/k/0003.jpg"


def test_pictures_beside_shards_win_and_that_is_said(folder, caplog):
    (folder / "a.jpg").write_bytes(jpeg(1))
    with caplog.at_level(logging.WARNING, "maehub"):
        assert len(find_samples(folder)) == 1
    assert "passed over: 2 .tar" in caplog.text


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_reads_the_same_samples(tmp_path, tar_format):
    webdataset = pytest.importorskip("webdataset")
    long = "n" * 90 + "/" + "m" * 80  # a header of its own in two of the formats
    names = ["0.jpg", "1.cls", "1.jpeg", "1.json", "a.b/2.PNG", "a.b/2.seg.png", "3.txt", f"{long}.jpg", "./4.jpg"]
    names += [".5.jpg", "6", "__7__", "ä/8.webp", "9.cls"]
    write_tar(tmp_path / "s.tar", [(name, name.encode()) for name in names], format=tar_format)
    samples = find_shards(str(tmp_path / "s.tar"))
    ours = [samples.source(index).getvalue().decode() for index in range(len(samples))]
    reader, endings = webdataset.tariterators, {"jpg", "jpeg", "png", "webp"}
    with open(tmp_path / "s.tar", "rb") as file:
        found = list(reader.group_by_keys(part | {"__url__": ""} for part in reader.tar_file_iterator(file)))
    theirs = [sample[ending].decode() for sample in found for ending in sorted(endings & set(sample))]
    assert ours == theirs == ["0.jpg", "1.jpeg", "a.b/2.PNG", f"{long}.jpg", "./4.jpg", "ä/8.webp"]


def test_webdatasets_writer(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:05}", "cls": number, "jpg": jpeg(number), "json": {"x": number}})
    samples = find_samples(f"{tmp_path}/s-{{000..002}}.tar")
    assert [samples.source(index).getvalue() for index in range(10)] == [jpeg(number) for number in range(10)]
    assert [samples.label(index) for index in range(10)] == list(range(10))


@given(st.text(alphabet="a{},.0123456789-", max_size=14))
def test_braces_as_the_braceexpand_package_reads_them(pattern):
    braceexpand = pytest.importorskip("braceexpand")
    try:
        ours = list(expanded(pattern))
        theirs = list(braceexpand.braceexpand(pattern, escape=False))
    except (UsageError, braceexpand.UnbalancedBracesError):
        return
    known = pattern.count("{") == pattern.count("}") and "{}" not in pattern and "..-" not in pattern
    known = known and "{-" not in pattern and pattern.count("..") <= pattern.count("{")
    if known and len(pattern.split("}")[-1].split("{")) == 1:
        assert ours == theirs


def test_braces():
    assert list(expanded("s-{008..011}.tar")) == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert list(expanded("{a,b}/{1..2}")) == ["a/1", "a/2", "b/1", "b/2"]
    assert list(expanded("{2..0}")) == ["2", "1", "0"]
    assert list(expanded("{x}{")) == ["{x}{"]
    with pytest.raises(UsageError, match="braces inside braces"):
        list(expanded("{a,{b,c}}"))
    with pytest.raises(UsageError, match="more than 1,000,000 shards"):
        find_shards("{0..99999999999}.tar")


def test_row_47_a_shard_that_is_not_there(folder):
    with pytest.raises(DataError, match=r"s-002\.tar cannot be read: No such file"):
        find_samples(f"{folder}/s-{{000..002}}.tar")
    with pytest.raises(DataError, match=r"t-\*\.tar matches no file"):
        find_samples(f"{folder}/t-*.tar")
    with pytest.raises(UsageError, match="named 2 times"):
        find_samples(f"{folder}/s-{{000,000}}.tar")
    (folder / "dir.tar").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        find_shards(str(folder / "dir.tar"))
    with pytest.raises(DataError, match="0 images in 1 tar shards"):
        find_samples(write_tar(folder / "none.tar", [("a.txt", b"x")]))


HOSTILE = {
    "../a.jpg": (member("../a.jpg", tarfile.REGTYPE), "leads out of the shard"),
    "absolute": (member("/etc/a.jpg", tarfile.REGTYPE), "leads out of the shard"),
    "symlink": (member("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), "symbolic link"),
    "hardlink": (member("a.jpg", tarfile.LNKTYPE, "0.jpg"), "hard link"),
    "device": (member("a.jpg", tarfile.CHRTYPE), "neither a file nor a folder"),
    "pipe": (member("a.jpg", tarfile.FIFOTYPE), "neither a file nor a folder"),
    "link/..": (member("x/../../a.jpg", tarfile.REGTYPE), "leads out of the shard"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_row_47_members_that_have_no_place_in_a_shard(tmp_path, case):
    info, why = HOSTILE[case]
    path = write_tar(tmp_path / "s.tar", [("0.jpg", jpeg(0)), (info, b"")])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=why) as caught:
        find_shards(path)
    assert f"{path}, member {info.name}: " in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted


def test_row_47_a_key_that_is_used_again(tmp_path):
    for names in (["a.jpg", "b.jpg", "a.jpg"], ["a.jpg", "a.png"], ["a.jpg", "b.jpg", "a.jpeg"]):
        path = write_tar(tmp_path / "s.tar", [(name, b"x") for name in names])
        with pytest.raises(DataError, match=rf"member {names[-1]}: another picture of the shard has the same key"):
            find_shards(path)


@pytest.mark.parametrize("name", ["k.jpg", "k.cls"])
def test_row_47_a_member_that_is_too_large(tmp_path, name):
    """A sparse file: what is claimed is there, and is not read."""
    info = member(name, tarfile.REGTYPE)
    info.size = tar_index.LARGEST_MEMBER + 1
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(info.size + 4096)
    with peak() as grown, pytest.raises(DataError, match=rf"s\.tar, member {name}: it is .* large, and the limit is"):
        find_samples(tmp_path)
    assert grown[0] < 20_000  # kB
    info.name = "film.mp4"  # passed over, however large
    with (tmp_path / "s.tar").open("r+b") as file:
        file.write(info.tobuf())
    with pytest.raises(DataError, match=r"0 images in 1 tar shards.*1 \.mp4"):
        find_samples(tmp_path)


def test_row_47_nothing_is_ever_extracted(folder, monkeypatch):
    """Members are read where they lie: no tarfile is asked for one, and no file is written."""
    path = write_tar(folder / "x.tar", [("a.jpg", jpeg(1)), ("a.cls", b"7")])
    for name in ("extract", "extractall", "extractfile", "_extract_member", "makefile"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *_, **__: pytest.fail("extracted"))
    for name in ("mkstemp", "mkdtemp"):
        monkeypatch.setattr(f"tempfile.{name}", lambda *_, **__: pytest.fail("a temporary place"))
    written, real = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *more, **k: written.append(flags) or real(path, flags, *more, **k)
    )
    samples = find_shards(path)
    assert (samples.source(0).getvalue(), samples.label(0)) == (jpeg(1), 7)
    assert not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for flags in written)


def test_row_47_a_shard_cut_anywhere_is_named_with_its_member(tmp_path):
    whole = tmp_path / "whole.tar"
    names = ["0.jpg", "long/" + "n" * 120 + ".jpg", "2.jpg"]
    write_tar(whole, [(name, jpeg(0)) for name in names], format=tarfile.GNU_FORMAT)
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        members = list(tar)
        starts = {info.offset: info.name for info in members}
        end = tar.offset
    assert len(find_shards(str(whole))) == 3
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, 97), *starts, *(start + 1 for start in starts), end - 1, end, end + 511]:
        cut.write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            find_shards(str(cut))
        text = str(caught.value)
        assert str(cut) in text
        within = [info.name for info in members if info.offset_data <= length < info.offset_data + info.size]
        assert all(f"{cut}, member {name}: the shard is truncated" in text for name in within)
        begun = [name for start, name in starts.items() if start < length]
        assert length < 512 or any(name in text for name in begun[-2:]), (length, text)
        assert length < 512 or "truncated" in text or "not a header" in text or "header" in text, text
    cut.write_bytes(content[: end + 512])  # one of the two zero blocks: the end is known
    assert len(find_shards(str(cut))) == 3


def test_row_47_sizes_that_lie(tmp_path):
    path = Path(write_tar(tmp_path / "s.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))]))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        second = [info.offset for info in tar][1]

    def lie(field):
        header = bytearray(content[second : second + 512])
        header[124:136] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(content[:second] + bytes(header) + content[second + 512 :])
        with pytest.raises(DataError) as caught:
            find_shards(str(path))
        return str(caught.value)

    assert "member 1.jpg: " in lie(b"77777777777\0")  # 8 GiB in a shard of 10 kB
    for field in (b"\xff" * 12, b"\xff" * 4 + struct.pack(">q", -4096), b"00000000001\0"):  # negative, backwards, short
        assert str(path) in lie(field)


def test_row_47_a_header_that_claims_gigabytes_gets_none(tmp_path):
    path = tmp_path / "s.tar"
    info = member("x", tarfile.GNUTYPE_LONGNAME)
    info.size = 3 << 30
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(4 << 30)  # sparse
    with pytest.raises(DataError, match="not a tar shard: a header of 3,221"):
        find_shards(str(path))


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_47_broken_bytes_end_in_one_error(folder, data):
    content = bytearray((folder / "s-000.tar").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + 4] = data.draw(st.binary(min_size=1, max_size=4))
    path = folder / "broken.tar"
    path.write_bytes(content)
    text = ""
    try:
        samples = find_shards(str(path))
        for index in range(len(samples)):
            assert len(samples.source(index).getvalue()) == samples.size(index)
    except DataError as error:
        text = str(error)
    assert not text or (str(path) in text and len(text.splitlines()) == 1)


def test_row_47_what_is_no_tar(tmp_path):
    path = tmp_path / "s.tar"
    for content, why in (
        (b"", "empty file"),
        (b"hello" * 400, "not a tar shard"),
        (b"\x1f\x8b" + b"x" * 600, "unpack it"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=why):
            find_shards(str(path))
    (tmp_path / "s.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it to a plain"):
        find_samples(tmp_path / "s.tar.gz")


def test_a_shard_that_changes_is_named(folder):
    samples = find_samples(folder)
    os.truncate(folder / "s-001.tar", 1024)
    with pytest.raises(DataError, match=r"s-001\.tar, member k/0005\.jpg: the shard ends .* too early"):
        samples.source(5)
    storage._opened.cache_clear()
    (folder / "s-000.tar").unlink()
    with pytest.raises(DataError, match=r"s-000\.tar, member k/0001\.jpg: .* No such file"):
        samples.source(1)


def test_a_label_that_is_no_number(tmp_path):
    samples = find_shards(write_tar(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", b"cat")]))
    with pytest.raises(DataError, match=r"member a\.jpg: its \.cls member holds b'cat'"):
        samples.label(0)


def test_the_index_is_kept_until_the_shard_changes(folder, tmp_path, monkeypatch):
    kept = tmp_path / "index" / "deep"
    first = find_samples(folder, index_dir=kept)
    assert len(list(kept.iterdir())) == 2

    def refuse(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_members", refuse)
        again = find_samples(folder, index_dir=kept)
    assert again.digest() == first.digest()
    assert [again.label(index) for index in range(6)] == [first.label(index) for index in range(6)]
    write_tar(folder / "s-001.tar", [("new.jpg", jpeg(9))])
    assert find_samples(folder, index_dir=kept).name(3) == b"s-001.tar/new.jpg"
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    assert len(find_samples(folder, index_dir=kept)) == 4  # a broken one is made anew


def _read_all(samples, queue):
    queue.put([samples.source(index).getvalue() for index in range(len(samples))])


@pytest.mark.parametrize("pickled", [False, True])
def test_other_processes_read_the_same(folder, pickled):
    samples = find_samples(folder)
    samples.source(0)  # opened here already
    if pickled:
        samples = pickle.loads(pickle.dumps(samples))  # noqa: S301
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_read_all, args=(samples, queue))
    process.start()
    assert queue.get(timeout=60) == [jpeg(number) for number in range(6)]
    process.join()


def test_row_50_a_sample_costs_its_name_and_five_numbers(tmp_path):
    count = 5000
    path = write_tar(tmp_path / "s.tar", [(f"{number:08}.jpg", b"") for number in range(count)])
    samples = find_shards(path)
    assert len(samples) == count
    arrays = [samples.index.names.ends, *samples.index[1:-1]]
    assert len(samples.index.names.letters) + sum(array.nbytes for array in arrays) == count * (12 + 5 * 8)


def test_few_files_are_kept_open(tmp_path):
    for number in range(storage._OPEN_FILES + 20):
        write_tar(tmp_path / f"{number:03}.tar", [("a.jpg", b"%d" % number)])
    samples = find_samples(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(2):
        assert [int(samples.source(index).getvalue()) for index in range(len(samples))] == list(range(len(samples)))
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + storage._OPEN_FILES


def test_a_system_without_a_limit_of_open_files_keeps_some():
    code = "import resource; resource.getrlimit = lambda _: (resource.RLIM_INFINITY,) * 2\n"
    code += "from maehub.data import storage; print(storage._OPEN_FILES)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "64\n"


# -- behind an address


def test_an_address_gives_the_same_samples(folder):
    local = find_samples(folder)
    for pattern in (f"file://{folder}/s-{{000..001}}.tar", f"file://{folder}/*.tar"):
        remote = find_samples(pattern)
        assert remote.digest() == local.digest()
        assert remote.where(0) == f"file://{folder}/s-000.tar, member k/0000.jpg"
        remote.prefetch([4, 1, 4])
        assert sorted(remote._fetched) == [1, 4]
        assert [remote.source(index).getvalue() for index in range(6)] == [jpeg(number) for number in range(6)]
        assert remote._fetched == {}
    local.prefetch([1, 2])
    assert local._fetched == {}


def test_what_cannot_be_fetched_is_named_when_it_is_asked_for(folder):
    remote = find_samples(f"file://{folder}/*.tar")
    (folder / "s-001.tar").unlink()
    remote.prefetch([0, 5])
    assert remote.source(0).getvalue() == jpeg(0)
    with pytest.raises(DataError, match=r"s-001\.tar, member k/0005\.jpg: .*cannot be read"):
        remote.source(5)


def test_addresses_that_cannot_be(monkeypatch):
    with pytest.raises(UsageError, match="nosuch:// is not a kind of address"):
        find_samples("nosuch://x/a.tar")
    with pytest.raises(UsageError, match="there can be tar shards"):
        find_samples("s3://bucket/folder")

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    storage._connected.cache_clear()
    monkeypatch.setattr(storage.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'maehub\[data\]'"):
        find_samples("memory://a.tar")
    storage._connected.cache_clear()


def free_ports(count):
    """Ports whose number plus 10000, which the server takes for itself, is free, too."""
    found = []
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """SeaweedFS on loopback with an empty bucket: (client of S3, name of the bucket)."""
    session = pytest.importorskip("botocore.session")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # of a server that is gone
    master, volume, filer, s3 = free_ports(4)
    ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"]
    ports += ["-filer", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    (tmp_path / "weed").mkdir()
    command = [
        WEED,
        "server",
        "-filer",
        "-s3",
        "-master.telemetry=false",
        f"-dir={tmp_path / 'weed'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *ports,
    ]
    with (tmp_path / "weed.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "-volume.max=5", "-master.volumeSizeLimitMB=64"], stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{s3}"
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": address}).items():
        monkeypatch.setenv(name, value)
    storage._connected.cache_clear()
    try:
        for _ in range(150):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except urllib.error.HTTPError as error:  # it wants a signature: it is up
                error.close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "weed.log").read_text()
                time.sleep(0.2)
        client = session.get_session().create_client("s3", endpoint_url=address)
        for _ in range(50):  # a moment passes until its parts know each other
            try:
                client.create_bucket(Bucket="pictures")
                client.put_object(Bucket="pictures", Key="ready", Body=b"x")
                break
            except Exception:
                time.sleep(0.2)
        yield client, "pictures"
        client.close()
    finally:
        server.kill()
        server.wait(20)
        storage._connected.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not WEED, reason="no S3 server; scripts/test-s3 installs one and runs this")
@pytest.mark.filterwarnings("default")  # of the client's own
def test_shards_on_a_real_s3_server(folder, bucket, tmp_path):
    client, name = bucket
    for path in sorted(folder.glob("*.tar")):
        client.put_object(Bucket=name, Key=f"train/{path.name}", Body=path.read_bytes())
    local = find_samples(folder)
    index_dir = tmp_path / "index"
    for pattern in (f"s3://{name}/train/s-{{000..001}}.tar", f"s3://{name}/train/*.tar"):
        remote = find_samples(pattern, index_dir=index_dir)
        assert remote.digest() == local.digest()
        assert [remote.source(index).getvalue() for index in range(6)] == [jpeg(number) for number in range(6)]
        remote.prefetch(range(6))
        assert sorted(remote._fetched) == list(range(6))
        assert [remote.source(index).getvalue() for index in range(6)] == [jpeg(number) for number in range(6)]
    assert len(list(index_dir.iterdir())) == 2
    context = multiprocessing.get_context("fork")  # the parent is connected already
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(remote, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert queue.get(timeout=60) == [jpeg(number) for number in range(6)]
    for process in processes:
        process.join()
    cut = (folder / "s-001.tar").read_bytes()[: int(local.index.offsets[4]) + 100]
    client.put_object(Bucket=name, Key="train/s-001.tar", Body=cut)
    storage._connected("s3", os.getpid()).invalidate_cache()
    with pytest.raises(DataError, match=r"s3://pictures/train/s-001\.tar, member k/0004\.jpg: the shard is truncated"):
        find_samples(pattern, index_dir=index_dir)
    with pytest.raises(DataError, match=r"s3://pictures/train/s-009\.tar cannot be read"):
        find_samples(f"s3://{name}/train/s-009.tar")
    client.delete_object(Bucket=name, Key="train/s-001.tar")
    with pytest.raises(DataError, match=r"s-001\.tar, member k/0004\.jpg: .*cannot be read"):
        remote.source(4)


@pytest.mark.slow
@pytest.mark.skipif(not WEED, reason="no S3 server; scripts/test-s3 installs one and runs this")
@pytest.mark.filterwarnings("default")  # of the client's own
def test_training_from_a_real_s3_server_is_training_from_the_disk(folder, bucket, tmp_path_factory, monkeypatch):
    out = tmp_path_factory.mktemp("runs")
    client, name = bucket
    for path in sorted(folder.glob("*.tar")):
        client.put_object(Bucket=name, Key=f"train/{path.name}", Body=path.read_bytes())
    monkeypatch.setitem(PRESETS, "vit-tiny", EncoderConfig(32, 8, 3, 32, 1, 2))
    monkeypatch.setenv("MAEHUB_CACHE", str(out / "cache"))
    remote = f"s3://{name}/train/s-{{000..001}}.tar"
    changes = {"steps": 5, "batch-size": 4, "workers": 2, "holdout": 2, "validate-every": 5, "checkpoint-every": 5}
    torch.set_num_threads(1)
    assert cli.main(words(folder, out / "local", **changes)) == 0
    assert cli.main(words(remote, out / "remote", **changes)) == 0
    assert losses(out / "remote") == losses(out / "local")
    cut = (folder / "s-001.tar").read_bytes()[: int(find_samples(folder).index.offsets[4]) + 100]
    client.put_object(Bucket=name, Key="train/s-001.tar", Body=cut)
    storage._connected("s3", os.getpid()).invalidate_cache()
    assert cli.main(words(remote, out / "cut", **changes)) == 5
