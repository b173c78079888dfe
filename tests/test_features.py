"""A folder to a table: order, resumption, bad files, every file format, processes that die."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import WITH_TESTS
from PIL import Image
from processes import Forked
from rights import as_nobody, let_enter, needs_root
from safetensors.torch import load_file

from maehub.data import workers
from maehub.data.workers import Readers, reader_count
from maehub.errors import CheckpointError, DataError, IntegrityError, MissingDependencyError, UsageError
from maehub.features import extraction as features_module
from maehub.features import inference
from maehub.features.extraction import extract_features
from maehub.features.table import FeatureTable, read_provenance
from maehub.images.decoding import open_image
from maehub.images.preprocess import Preprocess, read_pixels
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import Encoder, EncoderConfig, Origin

ENDINGS = [".safetensors", ".npz", ".parquet", ".csv"]
TINY = EncoderConfig(32, 8, 3, 32, 1, 2)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(TINY).eval()


def make_photos(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        size = (40 + index % 3 * 8, 64 + index % 2 * 8, 3)
        image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        image.save(folder / f"{index:03}.{'png' if index % 4 == 3 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 45)


def one_by_one(encoder, paths, **options):
    with torch.inference_mode():
        images = [
            encoder.preprocess.normalise(torch.from_numpy(read_pixels(p, encoder.preprocess))[None]) for p in paths
        ]
        return torch.cat([encoder.features(image, **options) for image in images]).clone()


# --- what is computed


def test_rows_are_the_features_of_their_paths(encoder, photos):
    table = extract_features(encoder, photos, batch_size=7)
    assert table.paths == [str(path) for path in sorted(photos.iterdir())]
    assert table.features.dtype == torch.float32
    assert not table.features.requires_grad
    assert not table.features.is_inference()
    assert torch.allclose(table.features, one_by_one(encoder, table.paths), atol=1e-5)
    assert len(table) == 45
    assert table.skipped == []


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean", "tokens", "map"])
@pytest.mark.parametrize("layers", [None, [0, -1]])
def test_every_pool_and_layers(encoder, photos, pool, layers):
    paths = sorted(photos.iterdir())[:5]
    table = extract_features(encoder, paths, pool=pool, layers=layers, batch_size=2)
    assert torch.allclose(table.features, one_by_one(encoder, paths, pool=pool, layers=layers), atol=1e-5)


def test_workers_change_nothing(encoder, photos):
    tables = [extract_features(encoder, photos, workers=workers) for workers in (0, 1, 3)]
    assert all(torch.equal(table.features, tables[0].features) for table in tables)
    assert all(table.paths == tables[0].paths for table in tables)


def test_every_source(encoder, photos):
    paths = sorted(photos.glob("*.png"))  # no scaled decoding, so exactly one path through the transform
    images = [open_image(path) for path in paths]
    expected = torch.stack([encoder.preprocess(image) for image in images])
    with torch.inference_mode():
        wanted = encoder.features(expected).clone()
    sources = {
        "paths": paths,
        "bytes": [os.fsencode(path) for path in paths],
        "images": images,
        "arrays": [np.asarray(image) for image in images],
        "tensor": expected,
    }
    for name, source in sources.items():
        table = extract_features(encoder, source, exact_decode=True)
        assert torch.allclose(table.features, wanted, atol=1e-5), name
        numbers = [str(index) for index in range(len(paths))]
        assert table.paths == ([str(path) for path in paths] if name in ("paths", "bytes") else numbers)
    one = extract_features(encoder, images[0])
    assert torch.allclose(one.features, wanted[:1], atol=1e-5)
    stack = np.stack([np.asarray(image.resize((40, 50))) for image in images])
    first = extract_features(encoder, stack)
    assert torch.equal(first.features, extract_features(encoder, torch.from_numpy(stack).permute(0, 3, 1, 2)).features)
    other_size = torch.rand(2, 3, 64, 48)
    assert extract_features(encoder, other_size, pool="map").features.shape == (2, 32, 8, 6)


def test_other_transforms(encoder, photos):
    paths = sorted(photos.iterdir())[:4]
    own = extract_features(encoder, paths).features
    squashed = extract_features(encoder, paths, preprocess="transformers")
    assert not torch.allclose(own, squashed.features, atol=1e-3)
    assert squashed.provenance["transform"]["resize"] == "squash"
    padded = extract_features(encoder, paths, preprocess=replace(encoder.preprocess, resize="pad"), pool="tokens")
    assert padded.features.shape == (4, 16, 32)


def test_native_sizes_are_grouped_and_stay_in_order(encoder, photos):
    native = replace(encoder.preprocess, resize="native", patch_size=16)  # the model's patch of 8 is what counts
    table = extract_features(encoder, photos, preprocess=native, batch_size=4, workers=2)
    exact = replace(native, patch_size=8)
    for path, row in zip(table.paths, table.features, strict=True):
        image = torch.from_numpy(read_pixels(path, exact))[None]
        with torch.inference_mode():
            assert torch.allclose(row, encoder.features(exact.normalise(image))[0], atol=1e-5)
    with pytest.raises(UsageError, match="native"):
        extract_features(encoder, photos, preprocess=native, pool="tokens")


def test_native_pictures_that_wait_are_bounded(encoder, photos, monkeypatch):
    native = replace(encoder.preprocess, resize="native")
    expected = extract_features(encoder, photos, preprocess=native)
    batches = []
    compute = features_module._Job.features
    monkeypatch.setattr(inference, "_WAITING_BYTES", 60_000)
    monkeypatch.setattr(
        features_module._Job, "features", lambda job, pixels: batches.append(len(pixels)) or compute(job, pixels)
    )
    table = extract_features(encoder, photos, preprocess=native)
    assert max(batches) <= 8
    assert torch.allclose(table.features, expected.features, atol=1e-5)


def test_row_42_orientation_changes_no_feature(encoder, tmp_path):
    turns = Image.Transpose
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    stored = [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE, turns.ROTATE_90,
              turns.TRANSVERSE, turns.ROTATE_270]  # fmt: skip
    for orientation, turn in enumerate(stored, start=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (upright if turn is None else upright.transpose(turn)).save(tmp_path / f"{orientation}.png", exif=exif)
    rows = extract_features(encoder, tmp_path).features
    assert (rows - rows[0]).abs().max() < 1e-6


def test_half_precision_weights_give_float32(encoder, photos):
    half = Encoder(TINY).eval()
    half.load_state_dict(encoder.state_dict())
    half = half.to(torch.bfloat16)
    paths = sorted(photos.iterdir())[:3]
    rows = extract_features(half, paths).features
    assert rows.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rows, extract_features(encoder, paths).features).min() > 0.99


# --- files


@pytest.mark.parametrize("ending", ENDINGS)
def test_out_equals_memory_and_comes_back(encoder, photos, tmp_path, ending):
    encoder.origin = Origin("tiny", "abc", "0" * 64, "CC0-1.0")
    try:
        memory = extract_features(encoder, photos, batch_size=8)
        out = tmp_path / f"o{ending}"
        table = extract_features(encoder, photos, batch_size=8, out=out)
    finally:
        encoder.origin = None
    for other in (table, FeatureTable.load(out), FeatureTable.load(str(out))):
        assert other.paths == memory.paths
        assert torch.equal(other.features, memory.features)
        assert other.provenance["model"] == {
            "name": "tiny",
            "revision": "abc",
            "sha256": "0" * 64,
            "licence": "CC0-1.0",
        }
        assert other.provenance["transform"] == encoder.preprocess.to_dict()
        assert other.provenance["pool"] == "cls"
        assert other.provenance["decode"]["jpeg"] == "scaled"
        assert other.provenance["source"]["images"] == 45
    assert sorted(os.listdir(tmp_path)) == [out.name]  # nothing unfinished is left
    memory.save(tmp_path / f"saved{ending}")
    assert (tmp_path / f"saved{ending}").read_bytes() == out.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        memory.save(out)
    assert str(tmp_path) not in json.dumps(read_provenance(out))


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
@pytest.mark.parametrize("pool", ["tokens", "map"])
def test_many_dimensions(encoder, photos, tmp_path, ending, pool):
    paths = sorted(photos.iterdir())[:6]
    out = tmp_path / f"o{ending}"
    table = extract_features(encoder, paths, pool=pool, layers=[0], batch_size=4, out=out)
    assert torch.equal(table.features, extract_features(encoder, paths, pool=pool, layers=[0], batch_size=4).features)


@pytest.mark.parametrize("ending", ENDINGS)
def test_layers_come_back_in_shape(encoder, photos, tmp_path, ending):
    table = extract_features(encoder, sorted(photos.iterdir())[:3], layers=[0, -1], out=tmp_path / f"o{ending}")
    assert table.features.shape == (3, 2, 32)


def test_the_files_are_what_others_read(encoder, photos, tmp_path):
    import pyarrow.parquet as parquet

    for ending in ENDINGS:
        table = extract_features(encoder, photos, out=tmp_path / f"o{ending}")
    expected = table.features.numpy()
    tensors = load_file(tmp_path / "o.safetensors")
    assert torch.equal(tensors["features"], table.features)
    ends = tensors["path_offsets"].tolist()
    assert ends[0] == 0
    assert tensors["paths"].numpy().tobytes()[ends[2] : ends[3]].decode() == table.paths[2]
    with np.load(tmp_path / "o.npz") as arrays:  # allow_pickle is off unless asked for
        assert (arrays["features"] == expected).all()
        assert set(arrays) == {"features", "paths", "path_offsets", "maehub"}
    frame = parquet.read_table(tmp_path / "o.parquet")
    assert frame["path"].to_pylist() == table.paths
    assert (np.array(frame["features"].to_pylist(), np.float32) == expected).all()
    with open(tmp_path / "o.csv", newline="") as file:
        assert json.loads(file.readline().removeprefix("# "))["maehub"]
        lines = list(csv.reader(file))
    assert lines[0][:2] == ["path", "f0"]
    assert [line[0] for line in lines[1:]] == table.paths
    assert (np.array([line[1:] for line in lines[1:]], np.float32) == expected).all()


@pytest.mark.parametrize("ending", ENDINGS)
def test_row_46_odd_names_come_back(encoder, tmp_path, ending):
    folder = os.fsencode(tmp_path / "p")
    os.mkdir(folder)
    names = sorted([b"a\nb.png", b"\xff\xfe.png", "猫#.png".encode(), b'q"u,o.png', b" s .png"])
    for index, name in enumerate(names):
        with open(os.path.join(folder, name), "wb") as file:
            Image.new("RGB", (32, 32), (index * 40, 0, 0)).save(file, "PNG")
    out = tmp_path / f"o{ending}"
    table = extract_features(encoder, folder, out=out)
    assert [os.fsencode(path) for path in table.paths] == [os.path.join(folder, name) for name in names]
    assert all(os.path.exists(path) for path in table.paths)
    extract_features(encoder, folder, out=out)  # known again


def test_an_existing_table_is_done_or_refused(encoder, photos, tmp_path, monkeypatch):
    out = tmp_path / "o.npz"
    first = extract_features(encoder, photos, out=out, pool="cls")
    stamp = out.stat().st_mtime_ns
    monkeypatch.setattr(features_module._Job, "features", lambda *_: pytest.fail("computed again"))
    assert torch.equal(extract_features(encoder, photos, out=out).features, first.features)  # None is cls here
    other = Encoder(TINY).eval()
    for what, call in {
        "weights": lambda: extract_features(other, photos, out=out),
        "pool": lambda: extract_features(encoder, photos, out=out, pool="mean"),
        "layers": lambda: extract_features(encoder, photos, out=out, layers=[0]),
        "transform": lambda: extract_features(encoder, photos, out=out, preprocess="timm"),
        "decode": lambda: extract_features(encoder, photos, out=out, exact_decode=True),
        "source": lambda: extract_features(encoder, sorted(photos.iterdir())[:5], out=out),
    }.items():
        with pytest.raises(UsageError, match=f"another .*{what}.*overwrite"):
            call()
    assert out.stat().st_mtime_ns == stamp
    monkeypatch.undo()
    replaced = extract_features(other, photos, out=out, overwrite=True)
    assert not torch.equal(replaced.features, first.features)
    stranger = tmp_path / "x.csv"
    stranger.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="no table of features"):
        extract_features(encoder, photos, out=stranger)
    assert stranger.read_text() == "a,b\n1,2\n"


def test_row_85_what_cannot_be_written_is_refused_before_the_work(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module._Job, "features", lambda *_: pytest.fail("computed"))
    (tmp_path / "folder.npz").mkdir()
    for out, why in {
        "no/o.npz": "does not exist",
        "folder.npz": "is a folder",
        "o.txt": r"\.safetensors, \.npz, \.parquet, \.csv",
        "o": "ending",
    }.items():
        with pytest.raises(UsageError, match=why):
            extract_features(encoder, photos, out=tmp_path / out)
    for ending in (".csv", ".parquet"):
        with pytest.raises(UsageError, match="tokens"):
            extract_features(encoder, photos, pool="tokens", out=tmp_path / f"o{ending}")
    monkeypatch.setattr("maehub.files.free_bytes", lambda _: 10)
    with pytest.raises(CheckpointError, match="free"):
        extract_features(encoder, photos, out=tmp_path / "o.npz")


@needs_root
def test_row_85_a_read_only_folder(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module._Job, "features", lambda *_: pytest.fail("computed"))
    let_enter(tmp_path, photos)
    with as_nobody(), pytest.raises(CheckpointError, match="Permission denied"):
        extract_features(encoder, photos, out=tmp_path / "o.npz", workers=0)


def test_row_86_parquet_without_pyarrow_is_refused_first(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'maehub\[parquet\]'"):
        extract_features(encoder, photos, out=tmp_path / "o.parquet")


def test_row_87_numbers_that_cannot_be(encoder, photos):
    for options, why in (
        ({"workers": -1}, "workers"),
        ({"batch_size": 0}, "batch_size"),
        ({"pool": "max"}, "pool"),
        ({"layers": [1]}, "layers"),
        ({"layers": []}, "layers"),
        ({"preprocess": Preprocess.evaluation(30)}, "divisible"),
        ({"preprocess": Preprocess.evaluation(32, channels=1)}, "channels"),
        ({"preprocess": "keras"}, "keras"),
    ):
        with pytest.raises(UsageError, match=why):
            extract_features(encoder, photos, **options)
    with pytest.raises(UsageError, match=r"\.encoder"):
        extract_features(MaskedAutoencoder(AutoencoderConfig(TINY, 16, 1, 2)), photos)


def test_row_87_automatic_workers_fit_the_machine(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert reader_count(None, 10**6) == 6
    assert reader_count(None, 70) == 2
    assert reader_count(None, 5) == 0
    assert reader_count(9, 50) == 9
    assert reader_count(10**6, 5) == 5


def test_row_87_more_processes_than_the_machine_allows(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.subprocess, "Popen", refuse)
    with pytest.raises(UsageError, match=r"reading process 1 of 9.*fewer workers"), Readers(9, Preprocess()):
        pass


def test_row_87_a_batch_that_does_not_fit(encoder, photos, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "features", full)
    with pytest.raises(UsageError, match="smaller batch_size"):
        extract_features(encoder, photos, batch_size=16)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_is_no_table_is_refused(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    for data in (b"", b"\0" * 100, b"# {\n", b"PK\3\4", b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match="not a file of features"):
            FeatureTable.load(path)
    with pytest.raises(UsageError, match="does not exist"):
        FeatureTable.load(tmp_path / f"gone{ending}")


# --- bad files


@pytest.fixture
def spoilt(tmp_path):
    folder = make_photos(tmp_path / "spoilt", 20)
    whole = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "011.png").write_bytes(b"")
    (folder / "017.jpg").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_row_39_a_bad_file_stops_and_is_named(encoder, spoilt, tmp_path, workers):
    with pytest.raises(DataError, match=r"004\.jpg.*(truncated|Premature end).*skip-bad") as caught:
        extract_features(encoder, spoilt, workers=workers)
    assert caught.value.exit_code == 5
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ending", [None, *ENDINGS])
def test_row_39_skipping_keeps_rows_and_paths_together(encoder, spoilt, tmp_path, workers, ending):
    out = tmp_path / f"o{ending}" if ending else None
    bad = ["004.jpg", "011.png", "017.jpg"]
    table = extract_features(encoder, spoilt, skip_bad=True, workers=workers, batch_size=4, out=out)
    assert table.paths == [str(path) for path in sorted(spoilt.iterdir()) if path.name not in bad]
    assert torch.allclose(table.features, one_by_one(encoder, table.paths), atol=1e-5)
    assert [os.path.basename(item.path) for item in table.skipped] == bad
    assert re.search("truncated|Premature end", table.skipped[0].reason)
    if out:
        with open(tmp_path / "bad_files.csv", newline="") as file:
            assert list(csv.reader(file)) == [["path", "reason"], *map(list, table.skipped)]
        assert FeatureTable.load(out).skipped == table.skipped
        assert extract_features(encoder, spoilt, skip_bad=True, out=out).skipped == table.skipped  # done
        with pytest.raises(UsageError, match="leaves out 3"):
            extract_features(encoder, spoilt, out=out)


def test_row_39_finished_work_is_kept_and_used(encoder, spoilt, tmp_path, monkeypatch):
    out = tmp_path / "o.npz"
    monkeypatch.setattr(features_module, "_CHUNK_BATCHES", 1)
    (spoilt / "004.jpg").write_bytes((spoilt / "006.jpg").read_bytes())
    with pytest.raises(DataError, match=r"011\.png.*10 of 20 rows are kept") as caught:
        extract_features(encoder, spoilt, batch_size=2, out=out)
    assert str(tmp_path / "o.npz.partial") in str(caught.value)
    assert not out.exists()
    (spoilt / "011.png").unlink()
    (spoilt / "017.jpg").unlink()
    computed = []
    compute = features_module._Job.features
    monkeypatch.setattr(
        features_module._Job, "features", lambda job, pixels: computed.append(len(pixels)) or compute(job, pixels)
    )
    table = extract_features(encoder, spoilt, batch_size=2, out=out)
    assert sum(computed) == 8  # ten were there
    monkeypatch.undo()
    monkeypatch.setattr(features_module, "_CHUNK_BATCHES", 1)
    fresh = tmp_path / "fresh.npz"
    extract_features(encoder, spoilt, batch_size=2, out=fresh)
    assert fresh.read_bytes() == out.read_bytes()
    assert len(table) == 18


def test_row_39_when_everything_is_bad(encoder, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 1 .*x\.jpg.*empty"):
        extract_features(encoder, tmp_path, skip_bad=True)


def test_row_46_a_file_that_vanishes_is_a_bad_file(encoder, tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "p", 12)
    read = workers.read_pixels

    def vanishing(path, *arguments, **options):
        if path.endswith(b"005.jpg"):
            os.unlink(path)
        return read(path, *arguments, **options)

    monkeypatch.setattr(workers, "read_pixels", vanishing)
    table = extract_features(encoder, folder, skip_bad=True, workers=0)
    assert [item.reason.split(": ")[-1] for item in table.skipped] == ["No such file or directory"]
    assert len(table) == 11
    with pytest.raises(DataError, match="0 images"):
        extract_features(encoder, make_photos(tmp_path / "none", 0))


def test_bad_pictures_in_memory_are_numbered(encoder):
    pictures = [np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40, 2), np.uint8)]
    with pytest.raises(DataError, match="picture 1: an array with 2 channels"):
        extract_features(encoder, pictures)
    assert extract_features(encoder, pictures, skip_bad=True).paths == ["0"]


# --- interruption


SCRIPT = """
import sys, torch
from maehub.features import extraction as features
from maehub.models.encoder import Encoder, EncoderConfig
torch.manual_seed(0)
encoder = Encoder(EncoderConfig(32, 8, 3, 32, 1, 2)).eval()
features._CHUNK_BATCHES = 1
compute = features._Job.features
pause = float(sys.argv[3])
def slow(job, pixels):
    import time
    time.sleep(pause)
    print("batch", flush=True)
    return compute(job, pixels)
features._Job.features = slow
table = features.extract_features(encoder, sys.argv[1], out=sys.argv[2] or None, batch_size=4, workers=2)
print(len(table), flush=True)
"""  # no guard around the call: processes must not run the script again


def start(folder, out, pause):
    return Forked(
        [sys.executable, "-c", SCRIPT, folder, out, str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def readers_of(pid):
    """Living reading processes of a process, by their parent."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if b"maehub.data.workers" in line and fields[0] != "Z" and (pid is None or int(fields[1]) == pid):
                found.append(int(entry))
    return found


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.mark.parametrize("ending", [".safetensors", ".csv"])
def test_row_52_after_a_kill_the_rest_is_computed_to_the_same_bytes(encoder, photos, tmp_path, monkeypatch, ending):
    out, whole = tmp_path / f"o{ending}", tmp_path / f"whole{ending}"
    process = start(photos, out, 0.05)
    for _ in range(5):
        assert process.stdout.readline() == "batch\n"
    readers = readers_of(process.pid)
    assert len(readers) == 2
    process.kill()
    process.communicate()
    wait_until(lambda: not set(readers) & set(readers_of(None)))  # no orphans
    assert not out.exists()
    commits = (tmp_path / f"{out.name}.partial" / "commits.jsonl").read_text().splitlines()
    assert 3 <= len(commits) < 12
    monkeypatch.setattr(features_module, "_CHUNK_BATCHES", 1)
    computed = []
    compute = features_module._Job.features
    monkeypatch.setattr(
        features_module._Job, "features", lambda job, pixels: computed.append(len(pixels)) or compute(job, pixels)
    )
    extract_features(encoder, photos, out=out, batch_size=4, workers=2)
    assert len(computed) == 12 - len(commits)
    extract_features(encoder, photos, out=whole, batch_size=4, workers=0)
    assert whole.read_bytes() == out.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, whole.name])


def test_row_52_half_a_commit_does_not_count(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "_CHUNK_BATCHES", 1)
    out, whole = tmp_path / "o.csv", tmp_path / "whole.csv"
    extract_features(encoder, photos, batch_size=4, out=whole, workers=0)
    batches = iter(range(6))
    compute = features_module._Job.features

    def failing(job, pixels):
        if next(batches) == 5:
            raise KeyboardInterrupt
        return compute(job, pixels)

    for damage in ("journal", "rows", "junk"):
        batches = iter(range(6))
        monkeypatch.setattr(features_module._Job, "features", failing)
        with pytest.raises(KeyboardInterrupt):
            extract_features(encoder, photos, batch_size=4, out=out, workers=0)
        monkeypatch.setattr(features_module._Job, "features", compute)
        partial = tmp_path / "o.csv.partial"
        journal, rows = partial / "commits.jsonl", partial / "features.bin"
        if damage == "journal":
            journal.write_bytes(journal.read_bytes()[:-7])
        elif damage == "rows":
            os.truncate(rows, rows.stat().st_size - 10)
        else:
            rows.write_bytes(rows.read_bytes() + b"half a row")
        extract_features(encoder, photos, batch_size=4, out=out, workers=0)
        assert out.read_bytes() == whole.read_bytes(), damage
        out.unlink()


def test_row_52_unfinished_work_of_another_kind_is_not_mixed_in(encoder, photos, tmp_path, monkeypatch):
    out = tmp_path / "o.npz"
    compute = features_module._Job.features
    monkeypatch.setattr(features_module, "_CHUNK_BATCHES", 1)
    calls = iter(range(100))

    def failing(job, pixels):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return compute(job, pixels)

    monkeypatch.setattr(features_module._Job, "features", failing)
    with pytest.raises(KeyboardInterrupt):
        extract_features(encoder, photos, batch_size=4, out=out, workers=0)
    for options in ({"pool": "mean"}, {"batch_size": 8}):
        with pytest.raises(UsageError, match=r"o\.npz\.partial holds unfinished features"):
            extract_features(encoder, photos, **{"batch_size": 4, "out": out, "workers": 0, **options})
    table = extract_features(encoder, photos, batch_size=8, out=out, workers=0, overwrite=True)
    assert torch.equal(table.features, extract_features(encoder, photos, batch_size=8, workers=0).features)


def test_two_processes_do_not_write_one_file(encoder, photos, tmp_path):
    out = tmp_path / "o.npz"
    first = start(photos, out, 0.5)
    first.stdout.readline()
    with pytest.raises(UsageError, match="another process is writing"):
        extract_features(encoder, photos, out=out, workers=0)
    first.kill()
    first.communicate()


def test_row_84_ctrl_c_ends_within_two_seconds_without_orphans(photos, tmp_path):
    process = start(photos, tmp_path / "o.csv", 0.1)
    process.stdout.readline()
    readers = readers_of(process.pid)
    assert len(readers) == 2
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30  # a guard; it takes a fraction of a second where nothing else is computed
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # our own; the reading processes are silent
    assert not set(readers) & set(readers_of(None))
    assert os.listdir(tmp_path) == ["o.csv.partial"]


# --- processes


def test_row_48_killed_processes_are_one_clear_error(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_AT_ONCE", 1)
    compute = features_module._Job.features

    def killing(job, pixels):
        for reader in readers_of(os.getpid()):
            os.kill(reader, signal.SIGKILL)
        return compute(job, pixels)

    monkeypatch.setattr(features_module._Job, "features", killing)
    with pytest.raises(
        DataError, match=r"died by signal 9 at .*\.(jpg|png)\. If memory is short, use fewer workers"
    ) as caught:
        extract_features(encoder, photos, batch_size=2, workers=2, out=tmp_path / "o.csv", skip_bad=True)
    assert caught.value.exit_code == 5
    assert readers_of(os.getpid()) == []


def test_row_48_a_process_that_dies_at_a_picture_names_it(photos):
    readers = Readers(2, Preprocess.evaluation(32))
    with readers:
        for process in readers._processes:
            process.kill()
        with pytest.raises(DataError, match=r"died by signal 9 at .*\d\d\d\.jpg"):
            list(readers.read([os.fsencode(path) for path in sorted(photos.glob("*.jpg"))]))
    assert all(process.poll() is not None for process in readers._processes)


def test_row_48_a_process_that_hangs_is_given_up(photos, monkeypatch):
    assert workers._SILENCE == 300  # seconds
    monkeypatch.setattr(workers, "_SILENCE", 0.3)
    with Readers(2, Preprocess.evaluation(32)) as readers:
        numbers = [process.pid for process in readers._processes]
        os.kill(numbers[0], signal.SIGSTOP)
        with pytest.raises(DataError, match=r"no picture was read for .*check the disk or the network"):
            list(readers.read([os.fsencode(next(photos.iterdir()))]))  # the first one's; the other one has no work
    assert not any(os.path.exists(f"/proc/{number}") for number in numbers)  # neither stopped nor zombies


def test_readers_give_pictures_and_errors_in_order(photos, tmp_path):
    preprocess = Preprocess.evaluation(32)
    (tmp_path / "bad\n.jpg").write_bytes(b"x")
    paths = [os.fsencode(path) for path in sorted(photos.iterdir())] + [
        os.fsencode(tmp_path / "bad\n.jpg"),
        b"gone.png",
    ]
    with Readers(3, preprocess, exact_decode=True) as readers:
        readings = list(readers.read(paths))
        assert [str(error).split(" cannot")[0][-8:] for error in readings[45:]] == [r"bad\n.jpg"[-8:], "gone.png"]
        for path, pixels in zip(paths, readings[:45], strict=False):
            assert (pixels == read_pixels(path, preprocess, exact_decode=True)).all()
        assert len(list(readers.read(paths[:3]))) == 3  # may be asked again


def test_reading_processes_import_no_torch(photos):
    with Readers(1, Preprocess.evaluation(32)) as readers:
        list(readers.read([os.fsencode(next(photos.iterdir()))]))
        maps = Path(f"/proc/{readers._processes[0].pid}/maps").read_text()
    assert "numpy" in maps
    assert "libtorch" not in maps


def test_from_load_to_features_no_torchvision_and_no_timm(photos, tmp_path):
    code = SCRIPT + "\nprint(sorted({'torchvision', 'timm', 'transformers', 'skimage', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, photos, tmp_path / "o.csv", "0"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_memory_does_not_grow_with_the_source(encoder, tmp_path):
    """Rows of 2 MB each: of 120 more, 240 MB more would be in memory."""
    code = """
import sys, torch, numpy as np
from memory import peak
from maehub.features import extraction as features
from maehub.models.encoder import Encoder, EncoderConfig
encoder = Encoder(EncoderConfig(256, 8, 3, 512, 0, 2)).eval()
picture = np.zeros((256, 256, 3), np.uint8)
run = lambda count, out: features.extract_features(encoder, [picture] * count, pool="tokens", batch_size=4, out=out)
run(8, sys.argv[1] + "/a.safetensors")
with peak() as few:
    run(40, sys.argv[1] + "/b.safetensors")
with peak() as many:
    table = run(160, sys.argv[1] + "/c.safetensors")
print(table.features.nbytes // 1024, many[0] - few[0])
"""
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=WITH_TESTS)
    table, growth = map(int, done.stdout.split())
    assert table == 160 * 1024 * 512 * 4 // 1024
    assert growth < table / 4


def test_no_bar_where_nobody_looks(encoder, photos, capsys):
    extract_features(encoder, photos)
    assert capsys.readouterr().err == ""
