"""Small files that once cost gigabytes or minutes: each is one named error now, or one picture that is lost."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import zlib

import pytest
from PIL import Image
from processes import forked

from maehub.cli import command_line as cli
from maehub.data import workers
from maehub.data.inspection import check_data
from maehub.data.workers import Readers
from maehub.errors import DataError
from maehub.images import Preprocess, limit_time
from maehub.images.decoding import open_header

SECONDS = 60  # of processor time: a guard, past which the kernel ends the reader; they take a fraction of one
READ = """
import json, resource, sys
from pathlib import Path
reader, path, seconds = sys.argv[1:]
exec(reader)
resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code, text = 0, ""
try:
    text = str(read(path))
except Exception as error:
    code, text = error.exit_code, str(error)
print(json.dumps([code, text, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def cost(reader, path):
    """Exit code, message and MiB of memory of a reader in a process of its own."""
    done = forked([sys.executable, "-c", READ, reader, str(path), str(SECONDS)])
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-800:]}"
    return json.loads(done.stdout.splitlines()[-1])


# -- pictures


def jpeg(width, height, scans):
    """A progressive grey JPEG whose scans say in a few bytes that there is nothing in any block."""
    tables = b"".join(b"\xff\xc4\0\x14" + bytes([kind, 1, *[0] * 15, code]) for kind, code in ((0, 0), (16, 0xE0)))
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    blocks = -(-width // 8) * -(-height // 8)
    runs = "".join("0" + "1" * 13 + "0" for _ in range(blocks // 32767 + 2))
    runs = runs.ljust(-(-len(runs) // 8) * 8, "1")
    coded = int(runs, 2).to_bytes(len(runs) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = b"\xff\xda\0\x08\1\1\0"
    start = b"\xff\xd8\xff\xdb\0\x43\0" + bytes([1] * 64) + frame + tables
    return start + scan + bytes(3) + bytes(-(-blocks // 8)) + (scan + b"\1\x3f\0" + coded) * scans + b"\xff\xd9"


def png_of(chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = chunk(b"IDAT", zlib.compress(bytes(17 * 16)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(*chunks[:2]) * chunks[2] + pixels + chunk(b"IEND", b"")


def tiff_of_one_strip_again_and_again(strip, rows, times):
    def tag(number, values):
        return number, values

    tags = [tag(256, [8]), tag(257, [rows * times]), tag(258, [8]), tag(259, [7]), tag(262, [1])]
    tags += [tag(273, [0] * times), tag(277, [1]), tag(278, [rows]), tag(279, [len(strip)] * times)]
    behind = 8 + 2 + 12 * len(tags) + 4
    values_at, entries, values = behind, b"", b""
    for number, numbers in tags:
        if number == 273:
            numbers = [behind + 8 * times] * times
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            entries += struct.pack("<HHII", number, 4, len(numbers), values_at + len(values))
            values += packed
        else:
            entries += struct.pack("<HHI", number, 4, 1) + packed
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values + strip


PICTURES = {
    "scans of a large picture": (lambda: jpeg(13000, 13000, 20), "in 21 scans, which take too long"),
    "scans of a thin picture": (lambda: jpeg(1, 65000, 500), "in 501 scans, which take too long"),
    "scans of 3 MB": (lambda: jpeg(1000, 900, 150_000), "in 150,001 scans, which take too long"),
    "strips that share their bytes": (
        lambda: tiff_of_one_strip_again_and_again(jpeg(8, 8, 10), 8, 150_000),
        "strips or tiles are more bytes than the file has",
    ),
    "comments": (lambda: b"P1\n1000 1000\n" + b"#c\n" * 1_000_000, "more than 1,000 comments"),
    "palettes": (lambda: png_of((b"PLTE", bytes(3), 200_000)), "200,002 chunks beside its pixels"),
    "unknown chunks": (lambda: png_of((b"ZzZz", b"", 200_000)), "200,002 chunks beside its pixels"),
}
READERS = """
from maehub.data.workers import examine
from maehub.errors import DataError
from maehub.images import Preprocess, read_pixels
from maehub.images.decoding import Box, open_part
def read(path):
    reasons = [examine(path, True).reason]
    for read in (lambda: read_pixels(path, Preprocess()), lambda: open_part(path, lambda s: Box(0, 0, 1, 1), (1, 1))):
        try:
            read()
        except DataError as error:
            reasons.append(str(error))
    return reasons
"""


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(tmp_path, case):
    """Of `data check`, of `features` and `knn`, and of `pretrain`."""
    make, why = PICTURES[case]
    path = tmp_path / "picture"
    path.write_bytes(make())
    code, text, grown = cost(READERS, path)
    assert (code, text.count(why)) == (0, 3), text
    assert grown < 512


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def slow(monkeypatch):
    """In reading processes the decoder of 07.png never comes back."""
    start = workers._START.replace("serve()", "").rstrip("; ")
    planted = """
import maehub.data.workers as module, maehub.images.decoding as decoding
decoding._PATIENCE = 0.3
def slowed(plain):
    def read(picture, *args, **options):
        while isinstance(picture, bytes) and picture.endswith(b'07.png'):
            pass
        return plain(picture, *args, **options)
    return read
module.examine, module.read_pixels = slowed(module.examine), slowed(module.read_pixels)
module.serve()
"""
    monkeypatch.setattr(workers, "_START", start + "\n" + planted)


@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_that_takes_too_long_is_one_bad_picture(photos, slow, count):
    found = check_data(photos, workers=count)
    assert [picture.where for picture in found.bad] == [str(photos / "07.png")]
    assert found.bad[0].reason.startswith("it takes too long to decode: more than 10 s")
    assert found.formats == {"PNG": 19}
    paths = sorted(os.fsencode(path) for path in photos.iterdir())
    with Readers(count, Preprocess.evaluation(32)) as readers:
        readings = list(readers.read(paths))
        assert [index for index, reading in enumerate(readings) if isinstance(reading, DataError)] == [7]
        assert str(readings[7]).startswith(f"{photos}/07.png cannot be read: it takes too long")
        assert [int(reading[0, 0, 0]) for index, reading in enumerate(readings) if index != 7] == [
            number for number in range(20) if number != 7
        ]
        assert len(list(readers.read(paths[:3]))) == 3


def test_features_leave_out_a_picture_that_takes_too_long(photos, slow, tmp_path, capsys):
    words = ["features", str(photos), "-m", "vit-nano", "-o", str(tmp_path / "o.csv"), "--workers", "2"]
    assert cli.main([*words, "--device", "cpu"]) == 5
    assert "07.png cannot be read: it takes too long" in capsys.readouterr().err
    assert cli.main([*words, "--device", "cpu", "--skip-bad"]) == 9
    listed = (tmp_path / "bad_files.csv").read_text().splitlines()
    assert len(listed) == 2
    assert listed[1].startswith(f"{photos}/07.png,")
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2 + 19


def test_a_large_picture_has_more_time():
    file = io.BytesIO()
    Image.new("1", (2000, 1000)).save(file, "GIF")
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        limit_time(3_000_000)
        assert 12 < signal.getitimer(signal.ITIMER_PROF)[0] <= 13.1
        file.seek(0)
        open_header(file)
        assert 14 < signal.getitimer(signal.ITIMER_PROF)[0] <= 15.1
        signal.setitimer(signal.ITIMER_PROF, 100, 100)  # of a profiler, which is left alone
        file.seek(0)
        open_header(file)
        assert signal.getitimer(signal.ITIMER_PROF)[1] == 100
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# -- shards


def header(name, kind, size):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def member(name, content, kind=tarfile.REGTYPE):
    return header(name, kind, len(content)) + content + bytes(-len(content) % 512)


def record(key, value):
    length = len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length + len(str(length + len(str(length)))), key, value)


def sparse():
    """A member whose map goes on in the next block."""
    block = bytearray(header("s.jpg", tarfile.GNUTYPE_SPARSE, 100))
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


MANY = b"".join(record(b"k%d" % number, b"") for number in range(60_000))
TARS = {
    "digits": ([member("p", b"1" * 1_000_000, b"x")], "pax header is malformed"),
    "digits in a value": ([member("p", record(b"comment", b"1" * 1_000_000), b"x")], "a number of 100 digits"),
    "records in records": ([member("p", b"2 " * 500_000 + b"=", b"x")], "pax header is malformed"),
    "attributes": ([member("p", MANY, b"x")], "over 100 attributes"),
    "attributes of all": (
        [member("p", MANY, b"g"), *(member(f"{number}.jpg", b"") for number in range(3000))],
        "over 100 attributes",
    ),
    "one more attribute of all each": (
        [member("p", record(b"k%d" % number, b""), b"g") + member(f"{number}.jpg", b"") for number in range(3000)],
        r"after member 99\.jpg: .*over 100 attributes",
    ),
    "sparse 0.1": ([member("p", record(b"GNU.sparse.map", b"1," * 400_000 + b"1"), b"x")], "of a sparse file"),
    "sparse 1.0": (
        [
            member("p", record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"), b"x"),
            member("s.jpg", b"4000000\n" + b"1\n" * 8_000_000),
        ],
        "of a sparse file",
    ),
    "sparse, old": ([sparse()], r"member s\.jpg: it is sparse"),
    "a label": ([member("a.cls", b"1" * 3_000_000)], "its .cls member has 3,000,000 bytes"),
}
SHARDS = """
from maehub.data.shards import find_shards
def read(path):
    samples = find_shards(path)
    return [samples.label(index) for index in range(len(samples))]
"""


@pytest.mark.parametrize("case", TARS)
def test_shards(tmp_path, case):
    parts, why = TARS[case]
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join([*parts, member("a.jpg", b"x"), bytes(1024)]))
    code, text, grown = cost(SHARDS, path)
    assert code == 5, text
    assert str(path) in text
    assert re.search(why, text), text
    assert len(text) < 500
    assert grown < 256


def test_more_shards_than_files_may_be_open(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "JPEG")
    (tmp_path / "shards").mkdir()
    for number in range(100):
        content = member(f"{number}.jpg", file.getvalue()) + bytes(1024)
        (tmp_path / "shards" / f"{number:03}.tar").write_bytes(content)
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from maehub.cli.command_line import main
words = "--model vit-nano --device cpu --quiet --steps 1 --batch-size 90 --image-size 32 --workers 2"
codes = [main(["data", "check", sys.argv[1]]), main(["pretrain", sys.argv[1], "-o", sys.argv[2], *words.split()])]
sys.exit(codes != [0, 0])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "shards"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-800:]
    assert "100 pictures, all readable" in done.stdout


# -- tables


def repeated(size, rows, folder):
    """One value of zeros in a dictionary, and in each row its number."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    numbers = arrow.array([0] * rows, arrow.int32())
    column = arrow.DictionaryArray.from_arrays(numbers, arrow.array([bytes(size)]))
    parquet.write_table(arrow.table({"a": column}), folder / "t.parquet", compression="zstd", store_schema=False)


def packed(size, rows, folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"a": arrow.array([bytes(size)] * rows)})
    parquet.write_table(table, folder / "t.parquet", compression="zstd", use_dictionary=False)


TABLES = {
    "one value in all rows": (repeated, 2**20, 2400, "stand for 5[0-9]{2} MiB or more", 512),
    "one large value in all rows": (repeated, 2**26, 40, "stand for [0-9]{3} MiB or more", 512 + 8 * 64),
    "values that compress well": (packed, 2**20, 600, "stand for 600 MiB or more", 200),
    "rows without end": (repeated, 1, 3_000_000, "stand for 3,000,000 rows", 200),
}
PARQUET = """
from maehub.data.tables import find_parquet
def read(path):
    return len(find_parquet([path], Path(path).parent / "index"))
"""


@pytest.mark.parametrize("case", TABLES)
def test_tables(tmp_path, case):
    pytest.importorskip("datasets")
    write, size, rows, why, most = TABLES[case]
    write(size, rows, tmp_path)
    code, text, grown = cost(PARQUET, tmp_path / "t.parquet")
    assert code == 5, text
    assert text.startswith(f"{tmp_path}/t.parquet ")
    assert re.search(why, text), text
    assert grown < most
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_copy_that_does_not_fit_on_the_disk(tmp_path):
    pytest.importorskip("datasets")
    packed(2**20, 40, tmp_path)
    full = PARQUET + "\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**22, 2**22))"
    code, text, _ = cost(full, tmp_path / "t.parquet")
    assert code == 6, text
    assert "the disk is full" in text
    assert not [path for path in (tmp_path / "index").iterdir() if path.suffix != ".lock"]
    assert cost(PARQUET, tmp_path / "t.parquet")[:2] == [0, "40"]


# -- CSVs

CSVS = {
    "columns": ("path,label" + "".join(f",c{number}" for number in range(20_000)), "00.jpg,x" + "," * 20_000, ""),
    "columns, none of them known": (
        "a" + "".join(f",c{number}" for number in range(20_000)),
        "x",
        "has no column 'path'",
    ),
    "columns of one name": ("path,label" + ",c" * 1_000_000, "x", "'c' stands there twice"),
    "a class for each label": ("path,label", None, "1,500 pictures have 750,000 classes"),
}
CSV = """
from maehub.data.labels import find_labelled
def read(path):
    return len(find_labelled(path, classes=()).labelled)
"""


@pytest.mark.parametrize("case", CSVS)
def test_csvs(tmp_path, case):
    first, row, why = CSVS[case]
    rows = [row] * 100
    (tmp_path / "00.jpg").touch()
    if row is None:
        rows = []
        for number in range(1500):
            (tmp_path / f"{number}.jpg").touch()
            rows.append(f"{number}.jpg," + "|".join(str(500 * number + label) for label in range(500)))
    (tmp_path / "t.csv").write_text("\n".join([first, *rows]))
    code, text, grown = cost(CSV, tmp_path / "t.csv")
    assert (code, why in text) == (5 if why else 0, True), text[:500]
    assert str(tmp_path) in text or not why
    assert len(text) < 1000
    assert grown < 512
