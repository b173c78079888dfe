"""A small file of a model cannot cost much: one budget of memory and time, past which a reader names the file."""

import contextlib
import gc
import json
import math
import os
import pickle
import shutil
import signal
import struct
import time
import zipfile

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import peak
from pyarrow import parquet
from safetensors.torch import save_file

import maehub
from maehub.conversion import convert, identify
from maehub.data.label_sources import read_csv
from maehub.errors import CheckpointError, IntegrityError, MaehubError
from maehub.features import FeatureTable
from maehub.features.store import FeatureStore
from maehub.features.table import read_provenance
from maehub.figures.masks import open_mask
from maehub.files import read_words
from maehub.train.engine import Progress, check_run_folder
from maehub.train.engine.checkpoint import _verified, newest_checkpoint, save_checkpoint
from maehub.train.engine.run_log import RunLog, last_good_step, run_state
from maehub.train.evaluation.class_matching import _read_file
from maehub.train.pretraining.config import PretrainConfig
from maehub.train.reports.report import write_report
from maehub.weights import read_pickle

MEGABYTE = 2**20


@contextlib.contextmanager
def bounded(*files, seconds=60):
    """What is read in the block is refused by an error of ours that names the file, and within the budget."""
    gc.collect()
    begun = time.monotonic()
    with peak() as grown, pytest.raises(MaehubError) as caught:
        yield caught
    size = sum(file.stat().st_size for file in files if file.is_file()) / MEGABYTE
    assert grown[0] / 1024 < 512 + 8 * size, f"{grown[0] / 1024:.0f} MB"
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
SET = Op.called("builtins.set", b"](" + b"".join(b"J" + struct.pack("<i", n) for n in range(50_000)) + b"e")

PICKLES = {
    "a string copied": b"(" + Op.text("x" * 700_000) + b"q\x01c_codecs\nencode\nq\x02" + CALL * 5000 + b"t",
    "a tuple copied": b"((" + b"K\x01" * 100_000 + b"tq\x01ctorch\nSize\nq\x02" + CALL * 5000 + b"t",
    "bytes by their number": Op.called("builtins.bytearray", Op.number(2**32)),
    "a tensor by its number": Op.called("torch.Tensor", Op.number(2**30)),
    "arguments copied": b"(" + MANY_KEYS + b"cargparse\nNamespace\nq\x02" + b"h\x02)\x81h\x01b" * 2000 + b"t",
    "a key of tuples in tuples": b"}" + TUPLES + b"Ns",
    "a set copied": b"(" + SET + b"q\x01cbuiltins\nset\nq\x02" + CALL * 5000 + b"t",
    "a dictionary copied": b"("
    + Op.called("collections.OrderedDict")
    + MANY_KEYS[1:]
    + b"cargparse\nNamespace\nq\x02"
    + b"h\x02)\x81h\x01b" * 2000
    + b"t",
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


# -- configurations


SMALL = maehub.EncoderConfig(8, 4, 3, 8, 1, 2)


@pytest.fixture(scope="module", params=["maehub encoder", "maehub autoencoder", "timm", "transformers"])
def model_folder(request, tmp_path_factory):
    """A small model folder of each kind that is read."""
    folder = tmp_path_factory.mktemp("models") / "model"
    if request.param == "maehub encoder":
        return maehub.save(maehub.Encoder(SMALL), folder)
    maehub.save(maehub.MaskedAutoencoder(maehub.AutoencoderConfig(SMALL, 8, 1, 2)), folder)
    if request.param in ("timm", "transformers"):
        config = folder / "config.json"
        values = json.loads(config.read_text())
        del values["maehub"]
        if request.param == "timm":
            shutil.copy(folder / "timm" / "model.safetensors", folder)
            for name in ("model_type", "architectures"):
                values.pop(name)
        config.write_text(json.dumps(values))
    return folder


def fields(values, above=()):
    """The places of all values in an object, from its top."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from fields(value, (*above, key))


def changed(values, place, value):
    """A copy with another value in one place."""
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


HOSTILE = [math.inf, math.nan, 10**6, 10**30, -1, 1e-9, [[]], None]


def read_or_refused(folder, file, text):
    """A folder with another text in one of its files costs little, whether or not it can be read."""
    original = (folder / file).read_text()
    (folder / file).write_text(text)
    refused = None
    with peak() as grown:
        try:
            maehub.load(folder).preprocess(np.zeros((9, 9, 3), np.uint8))
        except MaehubError as error:
            refused = error
        finally:
            (folder / file).write_text(original)
    assert grown[0] / 1024 < 512
    assert refused is None or (refused.exit_code in (2, 4) and "model" in str(refused))


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_no_value_of_a_configuration_costs_much(model_folder, file):
    if not (model_folder / file).exists():
        pytest.skip("it has none")
    values = json.loads((model_folder / file).read_text())
    for place in fields(values):
        for value in HOSTILE:
            read_or_refused(model_folder, file, json.dumps(changed(values, place, value)))


@OFTEN
@given(st.data())
def test_any_value_of_a_configuration_is_read_or_refused(model_folder, data):
    values = json.loads((model_folder / "config.json").read_text())
    place = data.draw(st.sampled_from(list(fields(values))))
    read_or_refused(model_folder, "config.json", json.dumps(changed(values, place, data.draw(ANY_JSON))))


PLACES = {
    "maehub encoder": "image_size patch_size channels width depth heads classes mlp_ratio",
    "maehub autoencoder": "decoder_width decoder_depth decoder_heads outputs",
    "transformers": "image_size num_attention_heads",
    "timm": "num_heads img_size",
}
INSIDE = {"maehub encoder": ("maehub", "network"), "maehub autoencoder": ("maehub", "network"), "timm": ("model_args",)}


@pytest.mark.parametrize("model_folder", PLACES, indirect=True)
@pytest.mark.parametrize("value", [math.inf, math.nan, 10**6, -1, True, 1e-9, "10", [[]]])
def test_sizes_that_no_network_has_are_refused_by_the_configuration(model_folder, value, request):
    """With exit code 4, and nothing of them is built."""
    kind = request.node.callspec.params["model_folder"]
    config = model_folder / "config.json"
    original = config.read_text()
    gc.collect()
    try:
        with peak() as grown:
            for name in PLACES[kind].split():
                place = (*INSIDE.get(kind, ()), name)
                config.write_text(json.dumps(changed(json.loads(original), place, value)))
                with pytest.raises(MaehubError, match=r"config\.json") as caught:
                    maehub.load(model_folder)
                assert caught.value.exit_code == 4, place
    finally:
        config.write_text(original)
    assert grown[0] / 1024 < 512


# -- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    for step in (1, 2):
        save_checkpoint(folder, network, optimizer, Progress(step, {"seed": 0}, "data"))
    (folder / "run.json").write_text(json.dumps({"state": "running", "last_good_step": 2}))
    (folder / "config.json").write_text(json.dumps({"kind": "pretrain", "environment": {"maehub": maehub.__version__}}))
    return folder


@OFTEN
@given(st.data())
def test_a_manifest_with_any_value_gives_way_to_the_checkpoint_before(run, tmp_path, data):
    copy = tmp_path / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    manifest = copy / "checkpoints" / "step-2" / "manifest.json"
    values = json.loads(manifest.read_text())
    place, value = data.draw(st.sampled_from(list(fields(values)))), data.draw(ANY_JSON)
    manifest.write_text(json.dumps(changed(values, place, value)))
    folder, progress = newest_checkpoint(copy)
    same_kind = type(value) in (int, str, dict) and place[-1] in ("data", "seed", "config", "processes", "micro_batch")
    equal = changed(values, place, value) == values
    assert progress.step == (2 if folder.name == "step-2" else 1)
    if folder.name == "step-2":
        assert same_kind or equal or place[-1] == "seed"
        assert [type(one) for one in vars(progress).values()] == [int, dict, str, int, int]


@pytest.mark.parametrize(
    "manifest", ["[]", "null", "-3", "{}", "[" * 10**5, '{"format": 1, "progress": [], "files": {}}']
)
@pytest.mark.parametrize("place", ["files", "progress", "format", None])
def test_no_manifest_that_holds_is_a_checkpoint_error(run, tmp_path, manifest, place):
    shutil.copytree(run, tmp_path / "run")
    for step in (1, 2):
        file = tmp_path / "run" / "checkpoints" / f"step-{step}" / "manifest.json"
        values = json.loads(file.read_text()) | {str(place): "PLACE"}
        file.write_text(json.dumps(values).replace('"PLACE"', manifest) if place else manifest)
    with pytest.raises(CheckpointError, match="none of them is whole"):
        newest_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", [["x" * 5000], ["\0"], ["\ud800"], [7], "model.safetensors"])
def test_names_in_a_manifest_that_are_no_names(run, tmp_path, caplog, name):
    caplog.set_level("CRITICAL", "maehub")  # a process of pytest cannot send every text to another
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json"
    values = json.loads(file.read_text())
    listed = values["files"]
    values["files"] = name if isinstance(name[0], int) else listed | dict.fromkeys(name, listed["model.safetensors"])
    file.write_text(json.dumps(values))
    assert newest_checkpoint(tmp_path / "run")[1].step == 1


@OFTEN
@given(st.sampled_from(["run.json", "config.json"]), st.data())
def test_any_value_of_a_run_folder_is_borne(run, tmp_path, file, data):
    copy = tmp_path / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    values = json.loads((copy / file).read_text())
    text = json.dumps(changed(values, data.draw(st.sampled_from(list(fields(values)))), data.draw(ANY_JSON)))
    (copy / file).write_text(data.draw(st.sampled_from([text, text, json.dumps(data.draw(ANY_JSON)), "[" * 10**5])))
    with contextlib.suppress(MaehubError):
        check_run_folder(copy, resume=True, overwrite=False)
    with contextlib.suppress(MaehubError):
        write_report(copy, PretrainConfig)
    assert type(last_good_step(copy)) is int
    assert type(run_state(copy)) in (str, type(None))


# -- what is no file


def model_with(name):
    def read(path):
        for other in {"config.json", "model.safetensors", "preprocessor_config.json"} - {name}:
            shutil.copy(path.parent.parent / "whole" / other, path.parent)
        maehub.load(path.parent)

    return read


def run_with(path):
    with RunLog(path.parent, 1) as log:
        log.begin({}, 0, 1, hide_bar=True)


def refused_where_nothing_is(function):
    """Of readers that say what they found: nothing."""

    def read(path):
        if not function(path):
            raise MaehubError(f"{path.name}: nothing")

    return read


READERS = {
    **{name: model_with(name) for name in ("config.json", "model.safetensors", "preprocessor_config.json")},
    **{f"a{ending}": read for ending in (".pth", ".bin", ".safetensors") for read in [identify]},
    **{f"b{ending}": read_pickle for ending in (".pth", ".bin")},
    "c.pth": lambda path: convert(path, path.parent / "out"),
    "c.safetensors": lambda path: convert(path, path.parent / "out"),
    "d.safetensors": maehub.load,
    **{f"table{ending}": FeatureTable.load for ending in (".npz", ".safetensors", ".parquet", ".csv")},
    **{f"facts{ending}": refused_where_nothing_is(read_provenance) for ending in (".npz", ".csv", ".parquet")},
    "manifest.json": lambda path: _verified(path.parent, 1),
    "run.json": refused_where_nothing_is(lambda path: run_state(path.parent) or last_good_step(path.parent)),
    "metrics.jsonl": run_with,
    "labels.csv": lambda path: read_csv(str(path), ["label"], None),
    "classes.txt": lambda path: _read_file(path, ["a", "b"], 2),
    "classes.csv": lambda path: _read_file(path, ["a", "b"], 2),
    "mask.png": open_mask,
    "card.md": read_words,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_read(tmp_path, name, kind, model_folder_of_transformers):
    (tmp_path / "whole").symlink_to(model_folder_of_transformers)
    path = tmp_path / "here" / name
    path.parent.mkdir()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    signal.alarm(60)  # which a pipe that blocks would wait for
    try:
        with bounded(path):
            READERS[name](path)
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module")
def model_folder_of_transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "model"
    maehub.save(maehub.MaskedAutoencoder(maehub.AutoencoderConfig(SMALL, 8, 1, 2)), folder)
    values = json.loads((folder / "config.json").read_text())
    del values["maehub"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder
