"""A small file of a model cannot cost much: one budget of memory and time, past which a reader names the file."""

import contextlib
import gc
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file

import maehub
from maehub.conversion import convert, identify
from maehub.errors import IntegrityError, MaehubError
from maehub.features import FeatureTable
from maehub.features.store import FeatureStore
from maehub.features.table import read_provenance
from maehub.weights import read_pickle

MEGABYTE = 2**20


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(kind):
    return next(int(line.split()[1]) // 1024 for line in STATUS.read_text().splitlines() if line.startswith(kind))


@contextlib.contextmanager
def bounded(*files, seconds=60):
    """What is read in the block is refused by an error of ours that names the file, and within the budget."""
    gc.collect()
    CLEAR.write_text("5")  # the peak begins anew
    before, begun = memory("VmRSS"), time.monotonic()
    with pytest.raises(MaehubError) as caught:
        yield caught
    taken, size = memory("VmHWM") - before, sum(file.stat().st_size for file in files if file.is_file()) / MEGABYTE
    assert taken < 512 + 8 * size, f"{taken} MB"
    assert time.monotonic() - begun < seconds  # against what never ends
    assert files[0].name in str(caught.value)


# -- pickles


class Op:
    """Pieces of a pickle, of protocol 2."""

    @staticmethod
    def text(value):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    @staticmethod
    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    @staticmethod
    def called(name, *arguments):
        module, name = name.rsplit(".", 1)
        return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def stored(file, body, legacy=False):
    """A file of PyTorch whose content is these opcodes."""
    content = b"\x80\x02" + body + b"."
    if legacy:
        head = [pickle.dumps(fact, 2) for fact in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})]
        file.write_bytes(b"".join([*head, content, pickle.dumps([], 2)]))
        return file
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {
            "data.pkl": content,
            "byteorder": b"little",
            "version": b"3\n",
            "data/0": b"\0" * 64,
        }.items():
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), data)
    return file


TUPLES = b")" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(33))  # each the pair of the one before
CALL = b"h\x02h\x01\x85R"  # of what is kept as 2, with what is kept as 1
MANY_KEYS = b"}(" + b"".join(Op.text(f"k{number}") + b"N" for number in range(50_000)) + b"uq\x01"

PICKLES = {
    "a string copied": b"(" + Op.text("x" * 700_000) + b"q\x01c_codecs\nencode\nq\x02" + CALL * 5000 + b"t",
    "a tuple copied": b"((" + b"K\x01" * 100_000 + b"tq\x01ctorch\nSize\nq\x02" + CALL * 5000 + b"t",
    "bytes by their number": Op.called("builtins.bytearray", Op.number(2**32)),
    "a tensor by its number": Op.called("torch.Tensor", Op.number(2**30)),
    "arguments copied": b"(" + MANY_KEYS + b"cargparse\nNamespace\nq\x02" + b"h\x02)\x81h\x01b" * 2000 + b"t",
    "a key of tuples in tuples": b"}" + TUPLES + b"Ns",
    "a set of tuples in tuples": Op.called("builtins.set", b"]" + TUPLES + b"a"),
    "many empty things": b"(" + b"}" * 3_000_000 + b"t",
    "many marks": b"(" * 3_000_000,
    "copies of a tensor": Op.called("torch._utils._rebuild_device_tensor_from_cpu_tensor", b"N"),
    "a dictionary that holds itself": b"}q\x01" + Op.text("model") + b"h\x01s",
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_pickle_costs_little(tmp_path, kind, legacy):
    file = stored(tmp_path / "a.pth", PICKLES[kind], legacy)
    with bounded(file) as caught:
        read_pickle(file)
    assert caught.type is IntegrityError


def tiny():
    return maehub.Encoder(maehub.EncoderConfig(8, 4, 3, 8, 1, 2)).state_dict()


TENSORS = {
    "one number seen often": lambda: tiny() | {"blocks.0.mlp.fc1.weight": torch.zeros(1).expand(10**8, 8)},
    "one tensor named often": lambda: dict.fromkeys((f"blocks.{n}.x" for n in range(1500)), torch.zeros(600_000)),
    "the same as another part": lambda: {
        "cls_token": torch.zeros(1),
        "x": torch.zeros(9).as_strided((9, 10**8), (1, 0)),
    },
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("form", ["zip", "legacy", "compressed"])
@pytest.mark.parametrize("reader", [convert, identify])
def test_a_small_file_of_large_tensors_costs_little(tmp_path, kind, form, reader):
    """Gigabytes of values where a few bytes are."""
    file = tmp_path / "a.pth"
    torch.save({"model": TENSORS[kind]()}, file, _use_new_zipfile_serialization=form != "legacy")
    if form == "compressed":
        with zipfile.ZipFile(file) as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in members.items():
                new.writestr(name, data if "/data/" not in name else bytes(100 * MEGABYTE))
    with bounded(file) as caught:
        reader(file) if reader is identify else convert(file, tmp_path / "out", heads=2)
    assert caught.type is IntegrityError


def test_tied_weights_are_no_attack(tmp_path):
    tied = torch.arange(1000.0)
    torch.save({"a": tied, "b": tied, "c": tied[:500]}, tmp_path / "a.pth")
    assert torch.equal(read_pickle(tmp_path / "a.pth").tensors["b"], tied)


# -- tables of features

LENGTH, ROWS = 2**20, 4000
AGAIN = np.array([0, LENGTH] * (ROWS // 2) + [0], np.int64)  # every other path is all the letters
GOOD = {"paths": np.frombuffer(b"ab", np.uint8), "path_offsets": np.array([0, 1, 2])}
GOOD |= {"features": np.zeros((2, 3), np.float32)}
LETTERS = {"paths": np.zeros(LENGTH, np.uint8), "features": np.zeros((ROWS, 1), np.float32)}


def table(file, facts=b'{"shape": [2, 3]}', packed=False, **arrays):
    """A table of features whose parts are these."""
    if file.suffix == ".npz":
        (np.savez_compressed if packed else np.savez)(file, maehub=np.frombuffer(facts, np.uint8), **GOOD | arrays)
    elif file.suffix == ".safetensors":
        tensors = {name: torch.from_numpy(value.copy()) for name, value in (GOOD | arrays).items()}
        save_file(tensors, file, {"maehub": facts.decode()})
    elif file.suffix == ".parquet":
        values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array((GOOD | arrays)["features"].reshape(-1)), 3)
        names = arrays.get("names", ["a", "b"])
        rows = pyarrow.table({"path": names, "features": values}).replace_schema_metadata({"maehub": facts})
        parquet.write_table(rows, file, compression=arrays.get("compression", "snappy"))
    else:
        file.write_bytes(b"# " + facts + b"\npath,f0,f1,f2\n" + arrays.get("rows", b"a,1,2,3\nb,4,5,6\n"))
    return file


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    "arrays",
    [
        LETTERS | {"path_offsets": AGAIN},
        {"path_offsets": np.array([0, 2, 2, 2])},
        {"path_offsets": np.array([0, -1, 2])},
        {"path_offsets": np.array([0.0, 1.0, 2.0])},
        {"path_offsets": np.zeros((3, 1), np.int64)},
        {"path_offsets": np.zeros(0, np.int64)},
        {"features": np.zeros((2, 3), np.int32)},
        {"features": np.zeros(2, np.float32)},
    ],
)
def test_paths_and_rows_that_do_not_go_together(tmp_path, ending, arrays):
    file = table(tmp_path / f"a{ending}", **arrays)
    with bounded(file) as caught:
        FeatureTable.load(file)
    assert caught.type is IntegrityError


def test_a_packed_archive_of_features_is_not_unpacked(tmp_path):
    zeros = np.zeros((2, 10**8), np.float32)
    file = table(tmp_path / "a.npz", packed=True, features=zeros)
    del zeros
    with bounded(file) as caught:
        FeatureTable.load(file)
    assert caught.type is IntegrityError


def test_an_array_that_claims_what_its_file_has_not(tmp_path):
    file = table(tmp_path / "a.npz")
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members["features.npy"] = members["features.npy"].replace(b"(2, 3), }       ", b"(2, 3000000000)}")
    with zipfile.ZipFile(file, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    with bounded(file):
        FeatureTable.load(file)


@pytest.mark.parametrize("compression", ["snappy", "gzip"])
def test_a_parquet_file_of_one_path_said_often(tmp_path, compression):
    rows = 4000
    names = pyarrow.array(["x" * 10**6]).dictionary_encode().take(pyarrow.array(np.zeros(rows, np.int64)))
    facts = json.dumps({"shape": [rows, 3]}).encode()
    features = np.zeros((rows, 3), np.float32)
    file = table(tmp_path / "a.parquet", facts, names=names, features=features, compression=compression)
    assert file.stat().st_size < MEGABYTE
    with bounded(file) as caught:
        FeatureTable.load(file)
    assert caught.type is IntegrityError


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".parquet", ".csv"])
@pytest.mark.parametrize(
    "facts",
    [
        *(b"[]", b"3", b"null", b'"text"', b"[" * 100_000, b"{"),
        *(b'{"shape": [2, 3], "skipped": 3}', b'{"shape": [2, 3], "skipped": ["ab"]}'),
        *(b'{"shape": [2, 3], "skipped": [["a", 3]]}', b'{"shape": [2, 3], "skipped": {"a": "b"}}'),
    ],
)
def test_facts_of_another_kind(tmp_path, ending, facts):
    file = table(tmp_path / f"a{ending}", facts)
    with bounded(file) as caught:
        FeatureTable.load(file)
    assert caught.type is IntegrityError
    assert read_provenance(file) is None


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
@pytest.mark.parametrize("shape", ["3", "null", '"23"', "[2, null]", "[2, -1]", "[6]", "[true, 3]", "[2.0, 3]", "{}"])
def test_shapes_of_another_kind(tmp_path, ending, shape):
    file = table(tmp_path / f"a{ending}", f'{{"shape": {shape}}}'.encode())
    with bounded(file) as caught:
        FeatureTable.load(file)
    assert caught.type is IntegrityError


@pytest.mark.parametrize("rows", [b"a\n" * 10**6, b"\n" * 10**6, b"a,1,2\n", b"a,1,2,x\n", b"x" * 200_000, b'"\0'])
def test_lines_that_are_no_rows(tmp_path, rows):
    file = table(tmp_path / "a.csv", rows=rows)
    with bounded(file):
        FeatureTable.load(file)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".parquet", ".csv"])
def test_the_same_tables_as_they_should_be(tmp_path, ending):
    assert FeatureTable.load(table(tmp_path / f"a{ending}")).paths == ["a", "b"]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OFTEN = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@OFTEN
@given(field=st.sampled_from(["chunk", "key", "rows", "skipped"]), value=ANY_JSON)
def test_a_commit_of_features_with_any_value_counts_or_does_not(tmp_path, field, value):
    out, chunks = tmp_path / "a.npz", [(range(4), "one"), (range(4, 6), "two")]
    with FeatureStore(out, {}, (3,), overwrite=True) as store:
        store.resume(iter([]), True)
        store.append("one", np.zeros((3, 3), np.float32), {2: "broken"})
        store.append("two", np.zeros((2, 3), np.float32), {})
    journal = store.folder / "commits.jsonl"
    first, second = journal.read_text().splitlines()
    changed = json.loads(first) | {field: value}
    journal.write_text(f"{json.dumps(changed)}\n{second}\n")
    with FeatureStore(out, {}, (3,), overwrite=False) as store:
        kept = store.resume(iter(chunks), True)
        assert kept == (2 if changed == json.loads(first) else 0)
        assert set(store.skipped) <= set(range(6))
