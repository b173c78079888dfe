"""ONNX and torch.export of an encoder, run at sizes and batches that they were not made with."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peers import TINY, autoencoder_config, images, make_autoencoder, make_encoder

from maehub.cli.command_line import main
from maehub.conversion import exporting
from maehub.conversion.conversion import convert
from maehub.conversion.exporting import AnySize, checked_shapes
from maehub.errors import IntegrityError, MissingDependencyError, UsageError
from maehub.files import sha256_file
from maehub.models.encoder import Encoder
from maehub.models.positions import sincos_table, with_cls_row
from maehub.weights.model_folder import open_encoder, save

SMALL = replace(TINY, width=32, depth=1)
CLASSIFIER = replace(SMALL, classes=3)
OTHERS = [(1, (32, 32)), (2, (32, 32)), (1, (48, 24)), (5, (48, 24)), (2, (16, 80))]


def close(ours, theirs, bound=1e-4):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


@torch.inference_mode()
def expected(encoder, pictures):
    found = {"features": encoder.features(pictures), "tokens": encoder.features(pictures, pool="tokens")}
    return found | ({"logits": encoder(pictures)} if encoder.config.classes else {})


@pytest.fixture(scope="module")
def as_onnx(tmp_path_factory):
    """A classifier that pools the class token."""
    folder = tmp_path_factory.mktemp("onnx")
    save(make_encoder(CLASSIFIER), folder / "model")
    return convert(folder / "model", folder / "out", to="onnx")


@pytest.fixture(scope="module")
def as_program(tmp_path_factory):
    """The encoder of an autoencoder, by the command line; its rule for positions is timm's."""
    folder = tmp_path_factory.mktemp("program")
    antialias = replace(autoencoder_config("tiny", SMALL, "pixels"), encoder=replace(SMALL, positions="antialias"))
    save(make_autoencoder(antialias), folder / "model")
    arguments = ["convert", str(folder / "model"), "-o", str(folder / "out"), "--to", "torch-export", "--quiet"]
    assert main(arguments) == 0
    return folder / "out"


@pytest.mark.parametrize(("batch", "size"), OTHERS)
def test_onnx_equals_torch(as_onnx, batch, size):
    encoder = open_encoder(as_onnx.folder.parent / "model")
    session = onnxruntime.InferenceSession(str(as_onnx.folder / "encoder.onnx"))
    pictures = images(CLASSIFIER, batch, size, seed=batch)
    names = ["features", "tokens", "logits"]
    for name, value in zip(names, session.run(names, {"images": pictures.numpy()}), strict=True):
        close(value, expected(encoder, pictures)[name].numpy())


def test_the_onnx_file_says_what_it_is_and_nothing_of_this_machine(as_onnx):
    path = as_onnx.folder / "encoder.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shape = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape[1] == 3
    assert all(isinstance(side, str) for side in (shape[0], *shape[2:]))
    assert {opset.version for opset in model.opset_import} == {20}
    notes = {entry.key: entry.value for entry in model.metadata_props}
    encoder = open_encoder(as_onnx.folder.parent / "model")
    assert json.loads(notes["preprocess"]) == json.loads(json.dumps(encoder.preprocess.to_dict()))
    assert notes["source_sha256"] == sha256_file(as_onnx.folder.parent / "model" / "model.safetensors")
    for word in (b"site-packages", str(as_onnx.folder.parent).encode(), os.getcwd().encode()):
        assert word not in path.read_bytes()


def test_the_certificate_of_a_graph(as_onnx):
    found = json.loads((as_onnx.folder / "certificate.json").read_text())
    assert found["bound"] == {"relative": 1e-4}
    assert found["difference"]["relative"] <= 1e-4
    assert set(found["difference"]["outputs"]) == {"features", "tokens", "logits"}
    shapes = found["fixed_input"]["shapes"]
    assert len({tuple(shape[2:]) for shape in shapes}) == len({shape[0] for shape in shapes}) == 2
    assert found["names"]["encoder.onnx"]["blocks.0.attn.qkv.bias"] == ["blocks.0.attn.qkv.bias"]
    assert found["left_out"] == {}
    assert set(found["versions"]) == {"maehub", "torch", "onnx", "onnxscript", "onnxruntime", "opset"}
    assert set(found["sha256"]["written"]) == {"README.md", "config.json", "encoder.onnx"}


@pytest.mark.parametrize(("batch", "size"), OTHERS)
@torch.inference_mode()
def test_torch_export_equals_torch(as_program, batch, size):
    encoder = open_encoder(as_program.parent / "model")
    run = torch.export.load(as_program / "encoder.pt2").module()
    pictures = images(SMALL, batch, size, seed=batch)
    for value, theirs in zip(run(pictures), expected(encoder, pictures).values(), strict=True):
        close(value.numpy(), theirs.numpy(), 1e-6)


def test_the_program_says_nothing_of_this_machine(as_program):
    content = (as_program / "encoder.pt2").read_bytes()
    for word in (b"site-packages", str(as_program.parent).encode(), os.getcwd().encode()):
        assert word not in content
    left = json.loads((as_program / "certificate.json").read_text())["left_out"]
    assert left["decoder.mask_token"] == "the decoder, which torch-export has no place for"


@pytest.mark.parametrize("positions", ["bicubic", "antialias", "sincos"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.inference_mode()
def test_a_network_without_choices_computes_the_same(positions, pool):
    encoder = make_encoder(replace(CLASSIFIER, positions=positions, pool=pool))
    module = AnySize(encoder)
    for shape in checked_shapes(encoder.config):
        pictures = images(SMALL, shape[0], shape[2:])
        theirs = expected(encoder, pictures)
        assert module.names == tuple(theirs)
        for value, other in zip(module(pictures), theirs.values(), strict=True):
            close(value.numpy(), other.numpy(), 1e-6)


def test_what_is_checked_are_two_sizes_and_two_batch_sizes():
    for config in (SMALL, replace(SMALL, image_size=(8, 8)), replace(SMALL, image_size=(16, 48))):
        shapes = checked_shapes(config)
        assert len({shape[2:] for shape in shapes}) == 2
        assert {shape[0] for shape in shapes} == {1, 3}
        assert all(side % 8 == 0 for shape in shapes for side in shape[2:])


def test_fresh_positions_after_other_ones_are_refused(tmp_path):
    config = replace(SMALL, positions="sincos")
    encoder = make_encoder(config)
    with torch.no_grad():
        encoder.pos_embed.copy_(with_cls_row(sincos_table(32, config.grid)) + 0.1)
    save(encoder, tmp_path / "model")
    with pytest.raises(UsageError, match="positions='antialias'"):
        convert(tmp_path / "model", tmp_path / "out", to="torch-export")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    save(make_encoder(replace(SMALL, depth=1)), tmp_path / "model")
    monkeypatch.setattr(AnySize, "_positions", lambda self, rows, columns: torch.zeros(1, 1, 32))
    with pytest.raises(IntegrityError, match="differs from the original"):
        convert(tmp_path / "model", tmp_path / "out", to="torch-export")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_without_the_packages_of_onnx_it_is_said_before_any_work(tmp_path, monkeypatch):
    there = exporting.importlib.util.find_spec
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None if name == "onnx" else there(name))
    with pytest.raises(MissingDependencyError, match=r"maehub\[onnx\]"):
        convert(tmp_path / "there-is-none.pth", tmp_path / "out", to="onnx")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_the_same_input_gives_the_same_bytes_in_every_process(to, tmp_path):
    """Sets are ordered by the seed of the process."""
    save(make_encoder(replace(CLASSIFIER, depth=1)), tmp_path / "model")
    code = "import sys, maehub; maehub.convert(sys.argv[1], sys.argv[2], to=sys.argv[3])"
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, "model", f"{seed}/out", to]
        subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / seed / "out").iterdir()} for seed in "12")
    assert set(one) == set(two)
    assert [name for name in one if one[name] != two[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["antialias", "sincos"])
def test_the_other_rules_for_positions_as_onnx(positions, tmp_path):
    encoder = make_encoder(replace(SMALL, positions=positions, pool="mean"))
    save(encoder, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out", to="onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"))
    for batch, size in OTHERS:
        pictures = images(SMALL, batch, size)
        (value,) = session.run(["tokens"], {"images": pictures.numpy()})
        close(value, expected(encoder, pictures)["tokens"].numpy())


@pytest.mark.slow
def test_the_real_shape_of_a_published_encoder(tmp_path):
    from maehub.models.encoder import PRESETS

    encoder = Encoder(PRESETS["vit-ti"]).eval()
    save(encoder, tmp_path / "model")
    for to in ("onnx", "torch-export"):
        assert convert(tmp_path / "model", tmp_path / to, to=to).certificate.holds
