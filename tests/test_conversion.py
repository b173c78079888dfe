"""Conversion between the published forms, its certificate, and pickles. Fault rows 27 and 28."""

import argparse
import builtins
import collections
import hashlib
import json
import os
import pathlib
import pickle
import re
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch
from peers import (
    TINY,
    assert_equal_outputs,
    autoencoder_config,
    images,
    make_autoencoder,
    make_encoder,
    official,
    timm_encoder,
    transformers_autoencoder,
)
from torch import nn
from torch.torch_version import TorchVersion
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel

import maehub
from maehub.cli.command_line import main
from maehub.conversion.certificate import Difference, difference, fixed_images, largest
from maehub.conversion.conversion import convert
from maehub.errors import IntegrityError, UsageError
from maehub.files import sha256_file
from maehub.hub import catalog
from maehub.models.encoder import PRESETS, Encoder, Origin
from maehub.weights.keys import from_official, is_decoder, official_names
from maehub.weights.model_folder import open_autoencoder, open_encoder, save
from maehub.weights.pickles import read_pickle, write_pickle
from maehub.weights.tensorfile import read_header, read_tensors, write_tensors

MAE = autoencoder_config("tiny", TINY, "pixels")
SAID = {"heads": 4, "decoder_heads": 4, "target": "pixels"}


@pytest.fixture(scope="module")
def autoencoder():
    return make_autoencoder(MAE)


def same_weights(ours, theirs):
    theirs = theirs.state_dict()
    return set(ours.state_dict()) == set(theirs) and all(
        torch.equal(v, theirs[k]) for k, v in ours.state_dict().items()
    )


def source_of(kind, model, tmp_path):
    """A model as it is published, and what must be said about it."""
    state = official(model)
    if kind == "official pickle":
        torch.save({"model": state}, tmp_path / "mae.pth")
    elif kind == "legacy pickle":
        torch.save({"model": state}, tmp_path / "mae.pth", _use_new_zipfile_serialization=False)
    elif kind == "bare pickle":
        torch.save(collections.OrderedDict(state), tmp_path / "mae.pth")
    elif kind == "training checkpoint":
        beside = {"optimizer": {"state": {0: {"step": 3}}}, "epoch": 799, "scaler": {"scale": 2.0}}
        arguments = argparse.Namespace(model="mae_vit_tiny", lr=1e-3, output_dir="/data", dist_backend=None)
        torch.save({"model": state, **beside, "args": arguments}, tmp_path / "mae.pth")
    elif kind == "wrapped":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "mae.pth")
    elif kind == "transformers pickle":
        torch.save(from_official(state, "transformers-4"), tmp_path / "mae.pth")
    elif kind == "safetensors":
        write_tensors(tmp_path / "mae.safetensors", state)
        return tmp_path / "mae.safetensors"
    return tmp_path / "mae.pth"


KINDS = ["official pickle", "legacy pickle", "bare pickle", "training checkpoint", "wrapped", "transformers pickle", "safetensors"]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("kind", KINDS)
def test_row_28_every_form_of_a_file_converts(autoencoder, kind, tmp_path):
    source = source_of(kind, autoencoder, tmp_path)
    result = convert(source, tmp_path / "out", **SAID)
    assert result.folder == tmp_path / "out"
    assert result.difference <= 1e-6
    assert set(result.dropped) == ({"optimizer", "epoch", "scaler", "args"} if kind == "training checkpoint" else set())
    again = open_autoencoder(tmp_path / "out")
    assert same_weights(again, autoencoder)
    assert again.config == MAE
    assert again.encoder.origin == Origin(source.name, sha256=sha256_file(source))
    metadata = read_header(tmp_path / "out" / "model.safetensors").metadata
    assert metadata == {
        "format": "pt", "maehub": maehub.__version__, "source": source.name, "source_sha256": sha256_file(source)
    }  # fmt: skip


def test_row_28_the_encoder_of_a_published_shape_needs_no_words(tmp_path):
    """The published encoder-only file has 150 tensors under `model`; depth and heads are read off its shapes."""
    encoder = Encoder(PRESETS["vit-ti"]).eval()
    torch.save({"model": encoder.state_dict()}, tmp_path / "mae_pretrain.pth")
    convert(tmp_path / "mae_pretrain.pth", tmp_path / "out")
    assert len(read_header(tmp_path / "out" / "model.safetensors").tensors) == 150
    assert same_weights(open_encoder(tmp_path / "out"), encoder)


def test_row_28_names_are_mapped_as_published(tmp_path):
    """By hand, tensor by tensor: what transformers' conversion of the official file calls them."""
    write_tensors(tmp_path / "a.safetensors", official(make_autoencoder(MAE)))
    convert(tmp_path / "a.safetensors", tmp_path / "out", to="transformers", **SAID)
    before, after = (
        read_tensors(path).tensors for path in (tmp_path / "a.safetensors", tmp_path / "out/model.safetensors")
    )
    layer = "vit.encoder.layer.2."
    golden = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "blocks.2.norm1.weight": layer + "layernorm_before.weight",
        "blocks.2.norm2.bias": layer + "layernorm_after.bias",
        "blocks.2.attn.proj.weight": layer + "attention.output.dense.weight",
        "blocks.2.mlp.fc1.weight": layer + "intermediate.dense.weight",
        "blocks.2.mlp.fc2.bias": layer + "output.dense.bias",
        "norm.weight": "vit.layernorm.weight",
        "mask_token": "decoder.mask_token",
        "decoder_embed.weight": "decoder.decoder_embed.weight",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_blocks.1.norm1.bias": "decoder.decoder_layers.1.layernorm_before.bias",
        "decoder_blocks.1.mlp.fc1.weight": "decoder.decoder_layers.1.intermediate.dense.weight",
        "decoder_norm.bias": "decoder.decoder_norm.bias",
        "decoder_pred.weight": "decoder.decoder_pred.weight",
    }
    for ours, theirs in golden.items():
        assert torch.equal(before[ours], after[theirs]), ours
    for place, part in enumerate(("query", "key", "value")):
        rows = slice(64 * place, 64 * (place + 1))
        assert torch.equal(before["blocks.2.attn.qkv.weight"][rows], after[f"{layer}attention.attention.{part}.weight"])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FORMS = ["maehub", "official", "timm", "transformers", "lightly", "mmpretrain", "detectron2"]


@pytest.mark.parametrize("to", ["maehub", "official", "timm", "transformers"])
def test_every_form_loads_again_and_is_the_same_each_time(autoencoder, to, tmp_path):
    source = source_of("official pickle", autoencoder, tmp_path)
    result = convert(source, tmp_path / "a" / "out", to=to, **SAID)
    convert(source, tmp_path / "b" / "out", to=to, **SAID)
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")
    assert same_weights(open_encoder(result.folder), autoencoder.encoder)
    tensors = set(read_header(result.folder / "model.safetensors").tensors)
    config = json.loads((result.folder / "config.json").read_text())
    state = official(autoencoder)
    if to == "timm":
        assert tensors == {name for name in state if not is_decoder(name)}
        assert "architecture" in config
        return
    assert same_weights(open_autoencoder(result.folder), autoencoder)
    assert tensors == set(state if to == "official" else from_official(state, "transformers-4"))
    assert (result.folder / "timm").exists() == (to == "maehub")
    assert ("model_type" in config) == (to != "official")


def test_forms_convert_into_each_other_and_back(autoencoder, tmp_path):
    source = source_of("safetensors", autoencoder, tmp_path)
    for number, to in enumerate(("transformers", "official", "maehub", "transformers", "official")):
        said = SAID if number == 0 else {}
        source = convert(source, tmp_path / str(number), to=to, **said).folder
    assert same_weights(open_autoencoder(source), autoencoder)
    assert open_autoencoder(source).config == MAE


def test_transformers_reads_what_is_written_for_it(autoencoder, tmp_path):
    pictures = images(TINY)

    def loaded(kind, model, name):
        save(model, tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}-out", to="transformers")
        theirs, report = kind.from_pretrained(tmp_path / f"{name}-out", output_loading_info=True)
        assert not report["unexpected_keys"]
        assert {key.split(".")[0] for key in report["missing_keys"]} <= {"pooler"}
        return theirs.eval()

    with torch.inference_mode():
        assert loaded(ViTMAEForPreTraining, autoencoder, "a").config.norm_pix_loss is False
        encoder = make_encoder(replace(TINY, image_size=(16, 48)))
        tokens = loaded(ViTModel, encoder, "b")(images(encoder.config)).last_hidden_state
        assert_equal_outputs(encoder(images(encoder.config)), tokens[:, 0])
        classifier = make_encoder(replace(TINY, classes=3))
        assert_equal_outputs(classifier(pictures), loaded(ViTForImageClassification, classifier, "c")(pictures).logits)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: make_encoder(replace(TINY, pool="mean")), "the mean"),
        (lambda: make_autoencoder(replace(MAE, target="unknown")), "target="),
        (lambda: make_autoencoder(replace(MAE, mask_tokens="encoder")), "mask tokens"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(tmp_path, model, words):
    save(model(), tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        convert(tmp_path / "model", tmp_path / "out", to="transformers")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_a_pickle_uses_its_configuration(autoencoder, tmp_path):
    """As facebook/vit-mae-large was published: transformers' names in pytorch_model.bin, and an eps of 1e-12."""
    save(autoencoder, tmp_path / "repo")
    config = json.loads((tmp_path / "repo" / "config.json").read_text())
    del config["maehub"]
    config["layer_norm_eps"] = 1e-12
    (tmp_path / "repo" / "config.json").write_text(json.dumps(config))
    torch.save(from_official(official(autoencoder), "transformers-4"), tmp_path / "repo" / "pytorch_model.bin")
    (tmp_path / "repo" / "model.safetensors").unlink()
    convert(tmp_path / "repo", tmp_path / "out")
    again = open_autoencoder(tmp_path / "out")
    assert same_weights(again, autoencoder)
    assert again.config == MAE
    assert again.encoder.origin.name == "repo"


# ---- the certificate


@pytest.mark.parametrize("to", FORMS)
def test_every_conversion_has_a_certificate(autoencoder, to, tmp_path):
    source = source_of("training checkpoint", autoencoder, tmp_path)
    result = convert(source, tmp_path / "a" / "out", to=to, **SAID)
    found = json.loads((result.folder / "certificate.json").read_text())
    assert found == json.loads(json.dumps(result.certificate.to_dict()))
    assert (found["from"], found["to"], found["bound"]) == ("official", to, {"relative": 1e-5})
    assert found["difference"]["relative"] == result.difference <= 1e-6
    assert found["fixed_input"]["shapes"] == [[1, 3, 32, 32]]
    assert found["versions"] == {"maehub": maehub.__version__, "torch": str(torch.__version__)}
    assert found["sha256"]["read"] == {"mae.pth": sha256_file(source)}
    written = {name for name in files(result.folder) if name != "certificate.json"}
    assert found["sha256"]["written"] == {name: sha256_file(result.folder / name) for name in sorted(written)}
    # every tensor of the input is somewhere, or it is said why not; what is somewhere is the same values
    before, elsewhere = official(autoencoder), set(found["left_out"])
    for file, table in found["names"].items():
        path = result.folder / file
        after = read_pickle(path).tensors if file.endswith(".pth") else read_tensors(path).tensors
        assert {new for names in table.values() for new in names} | set(found["added"]) == set(after)
        for old, names in table.items():
            assert torch.equal(torch.cat([after[name] for name in names]), before[old]), old
        assert set(before) - set(table) <= elsewhere or file == "timm/model.safetensors"
    assert {"optimizer", "epoch", "scaler", "args"} <= elsewhere
    assert ("decoder_norm.weight" in elsewhere) == (to in ("timm", "detectron2"))
    assert ("cls_token" in elsewhere) == (to == "detectron2")
    text = (result.folder / "certificate.json").read_text()
    assert str(tmp_path) not in text
    convert(source, tmp_path / "b" / "out", to=to, **SAID)
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")


def test_the_certificate_tells_queries_from_keys(autoencoder, tmp_path):
    """From one split form to another, and from a split form to a fused one."""
    state = from_official(official(autoencoder), "transformers-4")
    theirs = {name: value.clone() for name, value in state.items()} | {"pooler.dense.bias": torch.zeros(64)}
    write_tensors(tmp_path / "a.safetensors", theirs)
    key = "vit.encoder.layer.1.attention.attention.key.weight"
    split = convert(tmp_path / "a.safetensors", tmp_path / "b", to="transformers", **SAID).certificate
    assert split.names["model.safetensors"][key] == [key]
    fused = convert(tmp_path / "a.safetensors", tmp_path / "c", to="official", **SAID).certificate
    assert fused.names["model.safetensors"][key] == ["blocks.1.attn.qkv.weight"]
    assert "the tanh pooler" in fused.left_out["pooler.dense.bias"]
    assert official_names(state).names[key] == "blocks.1.attn.key.weight"


def test_a_folder_is_read_with_its_configuration(autoencoder, tmp_path):
    save(autoencoder, tmp_path / "model")
    found = convert(tmp_path / "model", tmp_path / "out", to="timm").certificate
    assert set(found.read) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert found.source == "transformers-4"


@pytest.mark.parametrize(("to", "whole"), [("maehub", True), ("lightly", True), ("timm", False)])
def test_a_name_of_the_catalog(to, whole, tmp_path):
    found = convert("vit-nano", tmp_path / "out", to=to)
    info = catalog.model_info("vit-nano")
    assert set(found.certificate.read) == {"vit-nano.safetensors"}
    assert found.certificate.read["vit-nano.safetensors"].startswith(info.sources[0].sha256)
    again = open_autoencoder(found.folder) if whole else open_encoder(found.folder)
    nano = maehub.load_autoencoder("vit-nano")
    assert same_weights(again, nano if whole else nano.encoder)
    origin = again.encoder.origin if whole else again.origin
    assert (origin.name, origin.licence) == ("vit-nano", info.licence)
    assert again.preprocess == nano.preprocess


def test_a_row_with_an_encoder_is_converted_as_one(hub, tmp_path, monkeypatch):
    """The same word means what `maehub.load` gives, whatever is written."""
    encoder = make_encoder(replace(PRESETS["vit-b"], image_size=32, width=64, depth=1, heads=4))
    info = replace(catalog.model_info("vit-b"), width=64, depth=1, heads=4, native_size=(32, 32), image_size=(32, 32))
    monkeypatch.setattr(catalog, "_find", lambda name: info if name == "vit-b" else None)
    save(encoder, tmp_path / "timm")
    source = info.sources[0]
    hub.add_repo(source.repo, {source.filename: tmp_path / "timm" / "model.safetensors"}, source.revision or "main")
    found = convert("vit-b", tmp_path / "out")
    assert same_weights(open_encoder(found.folder), encoder)
    assert open_encoder(found.folder).origin.licence == "CC-BY-NC-4.0"


@pytest.mark.parametrize("to", ["official", "timm"])
def test_a_repository_on_the_hub(to, hub, autoencoder, tmp_path):
    save(autoencoder, tmp_path / "model")
    contents = {name: tmp_path / "model" / name for name in files(tmp_path / "model")}
    commit = hub.add_repo("user/repo", contents)
    found = convert("user/repo", tmp_path / "out", to=to)
    again = open_autoencoder(found.folder) if to == "official" else open_encoder(found.folder)
    assert same_weights(again, autoencoder if to == "official" else autoencoder.encoder)
    assert (again.encoder.origin if to == "official" else again.origin).revision == commit
    assert set(found.certificate.read) == {"config.json", "model.safetensors"}
    assert found.certificate.source == "transformers-4"


@pytest.mark.parametrize("name", ["vit-nana", "no/such.pth", pathlib.Path("vit-nano")])
def test_what_is_neither_there_nor_a_name(name, tmp_path):
    with pytest.raises(UsageError, match=r"no model is called 'vit-nana'|there is no file"):
        convert(name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_form_over_an_older_one_leaves_nothing_of_it(autoencoder, tmp_path):
    source = source_of("official pickle", autoencoder, tmp_path)
    convert(source, tmp_path / "out", to="mmpretrain", **SAID)
    (tmp_path / "out" / "mine.txt").touch()
    convert(source, tmp_path / "out", to="official", **SAID, overwrite=True)
    assert set(files(tmp_path / "out")) == {
        "config.json", "model.safetensors", "README.md", "certificate.json", "mine.txt"
    }  # fmt: skip


def test_fixed_images_and_differences():
    images_ = fixed_images((2, 3, 8, 8))
    assert images_.unique().numel() == images_.numel()
    assert torch.equal(images_[:1], fixed_images((1, 3, 8, 8)))
    assert images_.flatten()[1].item() == pytest.approx(2 * 0.5794, abs=1e-3)
    assert difference(torch.ones(3), torch.ones(3)) == Difference(0.0, 0.0)
    assert difference(torch.tensor([1.0, 4.5]), torch.tensor([1.0, -4.0])) == Difference(8.5, 2.125)
    assert difference(torch.ones(1), torch.zeros(1)).relative == float("inf")
    nan = difference(torch.tensor([float("nan")]), torch.ones(1))
    for order in ([nan, Difference(1, 1)], [Difference(1, 1), nan]):
        assert not largest(order).relative <= 1  # NaN is never within a bound


@torch.inference_mode()
def test_real_networks_of_timm_and_transformers_and_back(autoencoder, tmp_path):
    """Not through our own names: what their classes hold, written by their own code."""
    pictures = images(TINY)
    masked = autoencoder(pictures, seeds=[3, 4])
    theirs = transformers_autoencoder(autoencoder)
    for name, state in {"in memory": theirs.state_dict(), "saved": None}.items():
        folder = tmp_path / name
        folder.mkdir()
        if state is None:
            theirs.save_pretrained(folder)  # transformers 5.23's third dialect
        else:
            write_tensors(folder / "model.safetensors", {key: value.clone() for key, value in state.items()})
            (folder / "config.json").write_text(json.dumps(theirs.config.to_dict()))
        again = open_autoencoder(convert(folder, tmp_path / f"{name} again").folder)
        assert_equal_outputs(again(pictures, seeds=[3, 4]).prediction, masked.prediction)
    encoder = make_encoder(replace(TINY, classes=3, pool="mean"))
    vit = timm_encoder(encoder)
    write_tensors(tmp_path / "timm.safetensors", vit.state_dict())
    again = open_encoder(convert(tmp_path / "timm.safetensors", tmp_path / "t", heads=4).folder)
    assert_equal_outputs(again(pictures), vit(pictures))
    bare = nn.DataParallel(vit).state_dict()  # "module." in front, as a training script saves it
    write_tensors(tmp_path / "wrapped.safetensors", bare)
    again = open_encoder(convert(tmp_path / "wrapped.safetensors", tmp_path / "w", to="official", heads=4).folder)
    assert_equal_outputs(again(pictures), vit(pictures))


def test_licence_and_name_of_a_model_folder_are_inherited(tmp_path):
    encoder = make_encoder(TINY)
    encoder.origin = Origin("vit-b", "main", "c" * 64, "cc-by-nc-4.0")
    save(encoder, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="official")
    origin = open_encoder(tmp_path / "b").origin
    assert origin == Origin("vit-b", "main", sha256_file(tmp_path / "a" / "model.safetensors"), "cc-by-nc-4.0")
    assert "license: cc-by-nc-4.0" in (tmp_path / "b" / "README.md").read_text()


class Canary:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Calls:
    """Calls a function when it is unpickled by a reader that runs code."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def bombs(canary):
    """Objects that make the canary when an unsafe reader meets them, each in another way."""
    path = str(canary)
    nested = argparse.Namespace(lr=1e-3, hidden=[{"deep": (Calls(os.mkdir, path),)}])
    return {
        "system": Calls(os.system, f"mkdir '{path}'"),
        "eval": Calls(builtins.eval, f"__import__('os').mkdir({path!r})"),
        "exec": Calls(builtins.exec, f"open({path!r}, 'w').close()"),
        "process": Calls(subprocess.call, ["mkdir", path]),
        "nested": nested,
        "path method": Calls(pathlib.Path.mkdir, pathlib.Path(path)),
    }


BOMBS = ["system", "eval", "exec", "process", "nested", "path method"]


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("file", ["zip", "legacy", "bare"])
def test_row_27_bombs_of_several_kinds_at_the_command_line(kind, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    bomb = bombs(canary)[kind]
    content = {"model": {"cls_token": torch.zeros(1, 1, 4)}, "args": bomb}
    if file == "bare":
        (tmp_path / "evil.bin").write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        torch.save(content, tmp_path / "evil.bin", _use_new_zipfile_serialization=file == "zip")
    assert main(["convert", "evil.bin", "-o", "out"]) == 4
    said = capsys.readouterr().err
    assert "No code in it was run" in said
    assert "Traceback" not in said
    assert not canary.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.bin"]
    with open(tmp_path / "evil.bin", "rb") as opened:
        pickle.load(opened) if file == "bare" else torch.load(opened, weights_only=False)  # noqa: S301
    assert canary.exists()  # so the bomb works


def test_row_27_code_inside_a_zip_beside_the_pickle_is_not_run(autoencoder, tmp_path):
    """TorchScript keeps Python in ``code/``; torch refuses it as it refuses any other class."""
    source = source_of("official pickle", autoencoder, tmp_path)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("mae/code/__torch__.py", f"open({str(tmp_path / 'canary')!r}, 'w')")
        archive.writestr("mae/constants.pkl", pickle.dumps(()))
    with pytest.raises(IntegrityError, match="No code in it was run"):
        convert(source, tmp_path / "out", **SAID)
    assert not (tmp_path / "canary").exists()


def test_paths_in_the_arguments_of_a_checkpoint_are_read_as_text(autoencoder, tmp_path):
    """As checkpoints of ScaleMAE hold them; under Python 3.13 their class has another name."""
    arguments = argparse.Namespace(output_dir=pathlib.PosixPath("/data/runs"), lr=1e-3)
    torch.save({"model": official(autoencoder), "args": arguments}, tmp_path / "a.pth")
    torch.save({"model": official(autoencoder), "args": arguments}, tmp_path / "b.pth", _use_new_zipfile_serialization=False)  # fmt: skip  # noqa: E501
    newer = (tmp_path / "b.pth").read_bytes().replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")
    (tmp_path / "c.pth").write_bytes(newer)
    assert b"pathlib._local" in newer
    for name in ("a.pth", "b.pth", "c.pth"):
        found = read_pickle(tmp_path / name)
        assert found.beside == ("args",)
        assert set(found.tensors) == set(official(autoencoder))


def test_a_pickle_that_is_written_has_the_same_bytes_each_time(tmp_path):
    tensors = official(make_encoder(TINY))
    for name in ("a.pth", "b.pth"):
        write_pickle(tmp_path / name, dict(reversed(tensors.items())) if name == "b.pth" else tensors, "model")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    found = read_pickle(tmp_path / "a.pth").tensors
    assert all(torch.equal(value, found[name]) for name, value in tensors.items())


@pytest.mark.parametrize("place", ["beside", "inside", "whole"])
@pytest.mark.parametrize("zipped", [True, False])
def test_row_27_a_malicious_pickle_runs_nothing(autoencoder, tmp_path, place, zipped):
    canary, state = tmp_path / "canary", official(autoencoder)
    content = {
        "beside": {"model": state, "args": Canary(canary)},
        "inside": {"model": state | {"cls_token": Canary(canary)}},
        "whole": Canary(canary),
    }[place]
    source = tmp_path / "evil.pth"
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(IntegrityError, match="No code in it was run") as caught:
        convert(source, tmp_path / "out", **SAID)
    assert "weights_only=False" not in str(caught.value)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    torch.load(source, weights_only=False)
    assert canary.exists()  # so the canary works


@pytest.mark.parametrize("version", ["2.5.1", "2.9.1+cu128"])
def test_row_27_an_old_torch_reads_no_pickle(autoencoder, tmp_path, monkeypatch, version):
    source = source_of("official pickle", autoencoder, tmp_path)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(UsageError, match=rf"torch 2\.10 or newer, and this is {version[:3]}.*Nothing was read"):
        convert(source, tmp_path / "out", **SAID)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02 nonsense", b"text", b"\x80\x02]q\x00."])
def test_a_broken_pickle_is_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"a\.pth") as caught:
        convert(tmp_path / "a.pth", tmp_path / "out")
    assert str(caught.value).count("\n") < 6
    assert not (tmp_path / "out").exists()


def test_a_truncated_pickle_is_refused(autoencoder, tmp_path):
    source = source_of("official pickle", autoencoder, tmp_path)
    content = source.read_bytes()
    for length in (1, 100, len(content) // 2, len(content) - 1):
        source.write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            read_pickle(source)


@pytest.mark.parametrize("content", [3, [1], {}, {"model": {}}, {"model": {"a": 3}}, {"a": torch.eye(2).to_sparse()}])
def test_a_pickle_of_other_things_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(IntegrityError):
        read_pickle(tmp_path / "a.pth")


def test_a_conversion_that_changes_the_outputs_is_not_kept(autoencoder, tmp_path, monkeypatch):
    from maehub.weights import keys

    table = keys._TRANSFORMERS["transformers-4"]
    swap = {"query": "key", "key": "query"}
    wrong = {re.sub(r"query|key", lambda found: swap[found[0]], theirs): official for theirs, official in table.items()}
    source = source_of("safetensors", autoencoder, tmp_path)
    right = keys._to_transformers

    def writes_wrongly(state):
        with monkeypatch.context() as patch:
            patch.setitem(keys._TRANSFORMERS, "transformers-4", wrong)
            return right(state)

    monkeypatch.setattr(keys, "_to_transformers", writes_wrongly)
    with pytest.raises(IntegrityError, match="differs from the original"):
        convert(source, tmp_path / "out", to="transformers", **SAID)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_known_or_done_is_said_before_any_work(autoencoder, tmp_path):
    source = source_of("official pickle", autoencoder, tmp_path)
    with pytest.raises(UsageError, match="heads="):
        convert(source, tmp_path / "out")
    with pytest.raises(UsageError, match="one of maehub"):
        convert(source, tmp_path / "out", to="keras")
    with pytest.raises(UsageError, match="no file"):
        convert(tmp_path / "none.pth", tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "a").touch()
    with pytest.raises(UsageError, match="not empty"):
        convert(source, tmp_path / "used", **SAID)
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / "two" / name).touch()
    with pytest.raises(UsageError, match=r"a\.pth, b\.pth"):
        convert(tmp_path / "two", tmp_path / "out", **SAID)
    convert(source, tmp_path / "out", **SAID)
    convert(source, tmp_path / "out", **SAID, overwrite=True)


def test_a_published_file_keeps_its_licence(tmp_path, monkeypatch):
    path = tmp_path / "mine.safetensors"
    write_tensors(path, official(make_encoder(TINY)))
    row = catalog.model_info("vit-b")
    source = replace(row.sources[-1], md5=hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()[:6])
    monkeypatch.setattr(catalog, "_models", lambda: {"vit-b": replace(row, sources=(source,))})
    convert(path, tmp_path / "out", heads=TINY.heads)
    origin = open_encoder(tmp_path / "out").origin
    assert (origin.name, origin.licence) == ("vit-b", "CC-BY-NC-4.0")
    assert "license: cc-by-nc-4.0" in (tmp_path / "out" / "README.md").read_text()
