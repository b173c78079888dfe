"""Conversion between the published forms, and pickles. Fault rows 27 and 28."""

import argparse
import collections
import hashlib
import json
import os
from dataclasses import replace

import pytest
import torch
from peers import TINY, assert_equal_outputs, autoencoder_config, images, make_autoencoder, make_encoder, official
from torch.torch_version import TorchVersion
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel

import maehub
from maehub import catalog
from maehub.conversion import convert, read_pickle
from maehub.encoder import PRESETS, Encoder, Origin
from maehub.errors import IntegrityError, UsageError
from maehub.files import sha256_file
from maehub.keys import from_official, is_decoder
from maehub.tensorfile import read_header, read_tensors, write_tensors
from maehub.weights import open_autoencoder, open_encoder, save

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
    from maehub import keys

    swap = {"attn.query": "attn.key", "attn.key": "attn.query"}
    wrong = tuple((swap.get(row[0], row[0]), *row[1:]) for row in keys._BLOCK_PARTS)
    source = source_of("safetensors", autoencoder, tmp_path)
    right = keys._to_transformers

    def writes_wrongly(state):
        with monkeypatch.context() as patch:
            patch.setattr(keys, "_BLOCK_PARTS", wrong)
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
