"""What a stranger's checkpoint is: families, names, sizes, targets, advice, and files that are hostile or broken."""

import argparse
import contextlib
import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import WITH_TESTS, peak
from peers import TINY, autoencoder_config, make_autoencoder, make_encoder, official
from torch import nn

import maehub
from maehub.cli.command_line import main
from maehub.conversion import identifying
from maehub.conversion.families import families
from maehub.conversion.identifying import identify
from maehub.conversion.plain_vit import grid_of_table
from maehub.conversion.target_detection import _measured
from maehub.errors import IntegrityError, MaehubError, UsageError
from maehub.hub.verification import FileHashes
from maehub.images.decoding import open_image
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.models.patches import normalise_patches, patchify
from maehub.models.positions import sincos_table, with_cls_row
from maehub.weights.keys import from_official, to_official
from maehub.weights.model_folder import save
from maehub.weights.tensorfile import read_tensors, write_tensors

MAE = autoencoder_config("tiny", TINY, "unknown")
ASSETS = Path(maehub.__file__).parent / "assets"
NANO = ASSETS / "vit-nano.safetensors"


@pytest.fixture(scope="module")
def mae():
    return make_autoencoder(MAE)


def pickled(path, content):
    torch.save(content, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# plain networks


def test_a_training_checkpoint_of_the_official_code(mae, tmp_path):
    beside = {"optimizer": {"state": {0: {"step": 3}}}, "epoch": 799, "args": argparse.Namespace(model="mae_vit")}
    found = identify(pickled(tmp_path / "checkpoint-799.pth", {"model": official(mae), **beside}))
    assert (found.family, found.role, found.dialect, found.format) == ("vit", "autoencoder", "official", "pickle")
    assert (found.entry, found.beside) == ("model", ("optimizer", "epoch", "args"))
    network = found.network
    assert (network.width, network.depth, network.patch_size, network.channels) == (64, 3, 8, 3)
    assert (network.image_size, network.size_from, network.positions) == ((32, 32), "positions", "sine-cosine")
    assert (network.decoder.width, network.decoder.depth) == (32, 2)
    assert network.heads is network.decoder.heads is None  # shapes do not tell
    assert (found.target, found.parameters) == ("unknown", sum(value.numel() for value in mae.parameters()))
    assert "--heads" in found.target_from
    assert found.loadable
    assert found.exit_code == 0
    assert len(found.sha256) == 64


@pytest.mark.parametrize("entry", ["", "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_entry_of_a_pickle_is_found_without_running_it(mae, entry, legacy, tmp_path):
    content = {"epoch": 3, entry: official(mae)} if entry else official(mae)
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = identify(tmp_path / "a.pth")
    assert (found.entry, found.family) == (entry, "vit")


@pytest.mark.parametrize(
    ("dialect", "prefix"),
    [
        ("official", ""),
        ("official", "module."),
        ("official", "_orig_mod."),
        ("module", ""),
        ("transformers-4", ""),
        ("lightly", ""),
        ("mmpretrain", ""),
    ],
)
def test_every_dialect(mae, dialect, prefix, tmp_path):
    state = {prefix + name: value for name, value in from_official(official(mae), dialect).items()}
    write_tensors(tmp_path / "a.safetensors", state)
    found = identify(tmp_path / "a.safetensors", heads=4, decoder_heads=4)
    assert (found.dialect, found.prefix, found.role, found.problems) == (dialect, prefix, "autoencoder", ())
    assert (found.network.decoder.depth, found.network.heads, found.network.decoder.heads) == (2, 4, 4)


def test_transformers_5_in_memory(tmp_path):
    config = transformers.ViTMAEConfig(
        **SMALL, image_size=32, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )  # fmt: skip
    network = transformers.ViTMAEForPreTraining(config)
    found = identify(pickled(tmp_path / "a.bin", network.state_dict()))
    assert (found.family, found.dialect, found.role) == ("vit", "transformers-5", "autoencoder")
    network.save_pretrained(tmp_path / "saved")
    found = identify(tmp_path / "saved")
    assert (found.dialect, found.network.heads, found.network.decoder.heads) == ("transformers-5-saved", 2, 2)
    assert (found.target, found.target_from) == ("pixels", "as its configuration says")  # norm_pix_loss is false


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_from_a_header_alone(name, tmp_path, monkeypatch):
    """Sparse files of the real sizes: 2.5 GB of ViT-H are named without being read."""
    preset = replace(PRESETS[name], image_size=PRESETS[name].size)
    with torch.device("meta"):
        state = maehub.Encoder(preset).state_dict()
    path = tmp_path / "a.safetensors"
    sparse(path, {key: tuple(value.shape) for key, value in state.items()})
    monkeypatch.setattr(identifying, "file_hashes", lambda *_: FileHashes("0" * 64, "1" * 32, []))
    with peak() as grown:
        found = identify(path)
    assert grown[0] < 100_000  # kB
    assert found.network.name.lower() == f"{name}/{preset.patch_size}".lower()
    assert (found.network.heads, found.network.image_size) == (preset.heads, preset.size)
    assert (found.network.positions, found.network.size_from) == ("learned", "square")  # zeros are no sine-cosine table
    assert found.parameters == sum(value.numel() for value in state.values())
    assert found.advice == (f"maehub.load({str(path)!r})",)


def sparse(path, shapes):
    """A safetensors file whose tensors are a hole."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def test_heads_of_the_catalog_are_known(tmp_path, monkeypatch):
    with torch.device("meta"):
        state = maehub.Encoder(EncoderConfig(224, 14, 3, 1536, 40, 24)).state_dict()
    sparse(tmp_path / "web.safetensors", {key: tuple(value.shape) for key, value in state.items()})
    monkeypatch.setattr(identifying, "file_hashes", lambda *_: FileHashes("0" * 64, "1" * 32, []))
    found = identify(tmp_path / "web.safetensors")
    assert found.network.heads == 24
    assert "heads=24" in found.advice[0]


def test_a_grid_is_read_off_a_sine_cosine_table(tmp_path):
    for grid in [(1, 1), (4, 4), (2, 8), (8, 2), (1, 16), (16, 1), (3, 5), (64, 8)]:
        table = with_cls_row(sincos_table(32, grid))
        assert grid_of_table(table) == grid or grid == (1, 1)
        assert grid_of_table(table.half()) == grid_of_table(table.bfloat16()) == grid_of_table(table)
        assert grid_of_table(table + 0.02) is None
    encoder = make_encoder(replace(TINY, image_size=(16, 48), channels=1))
    write_tensors(tmp_path / "a.safetensors", official(encoder))
    network = identify(tmp_path / "a.safetensors", heads=4).network
    assert (network.image_size, network.size_from, network.channels) == ((16, 48), "positions", 1)


@pytest.mark.parametrize("form", ["pickle", "safetensors"])
@pytest.mark.parametrize("positions", ["learned", "sine-cosine"])
def test_a_table_that_is_no_square_needs_a_configuration(form, positions, tmp_path, monkeypatch):
    """No argument says such a size, so the advice has the config.json that does; it is followed to the letter."""
    monkeypatch.chdir(tmp_path)
    autoencoder = make_autoencoder(replace(MAE, encoder=replace(TINY, image_size=(16, 48))))
    if positions == "learned":
        with torch.no_grad():
            autoencoder.encoder.pos_embed += torch.randn_like(autoencoder.encoder.pos_embed)
    Path("FOLDER").mkdir()
    file = Path("FOLDER", "model.safetensors" if form == "safetensors" else "a.pth")
    write = write_tensors if form == "safetensors" else lambda path, state: torch.save(state, path)
    write(file, official(autoencoder))
    found = identify(file, heads=4, decoder_heads=4, decide_target=False)
    network = found.network
    assert network.positions == positions
    assert network.image_size == (None if positions == "learned" else (16, 48))
    configuration, *lines = found.advice
    text = configuration[configuration.index("{") :].replace("HEIGHT", "16").replace("WIDTH", "48")
    Path("FOLDER", "config.json").write_text(text)
    for line in lines:
        if line.startswith("maehub convert"):
            assert main(shlex.split(line)[1:]) == 0
            assert maehub.load("OUT").config.size == (16, 48)
        else:
            loaded = eval(line, {"maehub": maehub})  # noqa: S307
            assert getattr(loaded, "encoder", loaded).config.size == (16, 48)
    assert len(lines) == 1


def heads_of(kind, tmp_path):
    encoder = make_encoder(replace(TINY, classes=0 if kind in ("probe", "fc_norm") else 7, pool="mean" if "fc" in kind else "cls"))  # fmt: skip  # noqa: E501
    state = official(encoder)
    if kind == "learned":
        state["pos_embed"] = state["pos_embed"] + 0.1
    if kind == "probe":
        norm = nn.BatchNorm1d(64, affine=False).state_dict()
        state |= {f"head.0.{name}": value for name, value in norm.items()}
        state |= {f"head.1.{name}": value for name, value in nn.Linear(64, 7).state_dict().items()}
    return identify(pickled(tmp_path / "a.pth", {"model": state}), heads=4)


@pytest.mark.parametrize(
    ("kind", "classes", "tuning", "pool"),
    [
        ("fc_norm and head", 7, "fine-tuned", "mean"),
        ("fc_norm", 0, "none", "mean"),
        ("learned", 7, "fine-tuned", "cls"),
        ("head", 7, "head", "cls"),
        ("probe", 7, "linear probe", "cls"),
    ],
)
def test_what_was_trained_after_pretraining(kind, classes, tuning, pool, tmp_path):
    found = heads_of(kind, tmp_path)
    assert (found.network.classes, found.network.tuning, found.network.pool) == (classes, tuning, pool)
    assert (found.role == "classifier") == (classes > 0)
    assert found.loadable
    assert found.family == "vit"
    assert found.exit_code == 0


# ---------------------------------------------------------------------------------------------------------------------
# what to do with it


def followed(found, folder):
    """Do what the advice says, in a folder: the networks that come of it."""
    loaded = []
    for line in found.advice:
        if line.startswith("maehub convert"):
            words = shlex.split(line)[1:]
            words[words.index("-o") + 1] = str(folder / "converted")
            assert main(words) == 0
            loaded.append(maehub.load(folder / "converted"))
        elif line.startswith("maehub.load"):
            loaded.append(eval(line, {"maehub": maehub}))  # noqa: S307
    return loaded


@pytest.mark.parametrize("form", ["pickle", "safetensors", "folder"])
def test_the_advice_is_true(mae, form, tmp_path):
    if form == "folder":
        file = tmp_path / "my model"
        save(mae, file)
    else:
        file = tmp_path / f"my model.{'pth' if form == 'pickle' else 'safetensors'}"
        state = official(mae)
        if form == "pickle":
            torch.save(state, file)
        else:
            write_tensors(file, state)
    found = identify(file)
    assert any("is a guess" in line for line in found.advice) == (form != "folder")
    networks = followed(found, tmp_path)
    assert len(networks) == (1 if form == "pickle" else 2)
    for network in networks:
        encoder = network.encoder if isinstance(network, MaskedAutoencoder) else network
        assert torch.equal(encoder.patch_embed.proj.weight, mae.encoder.patch_embed.proj.weight)


def test_a_published_file_is_known_by_its_bytes(tmp_path):
    (tmp_path / "stranger.safetensors").write_bytes(NANO.read_bytes())
    found = identify(tmp_path / "stranger.safetensors")
    assert (found.published, found.licence) == ("vit-nano", "Apache-2.0")
    assert found.advice[0] == "maehub.load_autoencoder('vit-nano')"
    assert "licence Apache-2.0" in found.describe()
    with torch.no_grad():
        state = read_tensors(NANO).tensors
        state["cls_token"] = state["cls_token"] + 1
    write_tensors(tmp_path / "changed.safetensors", state)
    assert identify(tmp_path / "changed.safetensors").published == ""


def test_text_and_values(mae, tmp_path, capsys):
    path = pickled(tmp_path / "a.pth", {"model": official(mae), "epoch": 1})
    assert main(["identify", str(path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (values["family"], values["network"]["width"], values["entry"]) == ("vit", 64, "model")
    assert main(["identify", str(path), "--heads", "4", "--decoder-heads", "4"]) == 0
    text = capsys.readouterr().out
    for words in ("masked autoencoder", "32×32 pixels", "2 blocks of width 32, 4 heads", "inside 'model'", "epoch"):
        assert words in text
    assert len(text.splitlines()) < 20


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_folders(mae, tmp_path):
    save(mae, tmp_path / "model")
    assert identify(tmp_path / "model").network.heads == 4
    assert identify(tmp_path / "model" / "model.safetensors").network.heads == 4
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="no exported model"):
        identify(tmp_path / "run")
    for step in (9, 10):
        (tmp_path / "run" / "checkpoints" / f"step-{step}").mkdir()
        write_tensors(tmp_path / "run" / "checkpoints" / f"step-{step}" / "model.safetensors", official(mae))
    assert "step-10" in identify(tmp_path / "run").file
    save(mae, tmp_path / "run" / "model")
    assert identify(tmp_path / "run").file.endswith("run/model/model.safetensors")


def test_a_folder_with_one_checkpoint_and_others(mae, tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "README.md").write_text("# a model")
    with pytest.raises(UsageError, match=r"no file of weights .* but README.md"):
        identify(folder)
    pickled(folder / "weights.ckpt", official(mae))
    assert identify(folder).file.endswith("weights.ckpt")
    pickled(folder / "other.pt", official(mae))
    with pytest.raises(UsageError, match=r"2 files of weights: other.pt, weights.ckpt"):
        identify(folder)
    pickled(folder / "pytorch_model.bin", official(mae))
    assert identify(folder).file.endswith("pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="several files"):
        identify(folder)


@pytest.mark.parametrize("path", ["nowhere.pth", "a" * 5000, ""])
def test_there_is_no_such_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        identify(path)
    assert main(["identify", path or "x"]) == 2
    with pytest.raises(UsageError, match="`maehub info vit-b`"):
        identify("vit-b")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(UsageError, match="not a file"):
        identify(tmp_path / "a.pth")


def test_a_configuration_that_cannot_be_read_is_said(mae, tmp_path):
    write_tensors(tmp_path / "model.safetensors", official(mae))
    (tmp_path / "config.json").write_text('{"model_type": "hiera"}')
    found = identify(tmp_path)
    assert (found.family, found.network.width) == ("vit", 64)
    assert "hiera" in found.advice[-1]


# ---------------------------------------------------------------------------------------------------------------------
# other families, from the real classes

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
TIMM = {
    "vit_small_patch14_dinov2.lvd142m": ("dinov2", {"img_size": 28, **VIT}),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("dinov2", {"img_size": 28, **VIT}),
    "vit_small_patch16_dinov3": ("dinov3", {"img_size": 32, "depth": 2}),
    "vit_small_patch16_224.dino": ("vit", {"img_size": 32, **VIT}),
    "beit_base_patch16_224": ("beit", {"img_size": 32, **VIT}),
    "hiera_tiny_224": ("hiera", {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "convnextv2_atto.fcmae": ("convnextv2", FOUR),
    "convnext_atto": ("convnext", FOUR),
    "samvit_base_patch16": ("sam", {"img_size": 64, "global_attn_indexes": (1,), **VIT}),
    "sam2_hiera_tiny": ("sam2", {}),
    "swin_tiny_patch4_window7_224": ("swin", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1), "img_size": 56}),
    "swinv2_tiny_window8_256": ("swin", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1), "img_size": 64}),
    "vit_base_patch16_clip_224.openai": ("clip", {"img_size": 32, **VIT}),
    "vit_base_patch16_siglip_224": ("siglip", {"img_size": 32, **VIT}),
    "deit_tiny_distilled_patch16_224": ("deit", {"img_size": 32, **VIT}),
    # not certain enough for a family
    "deit3_small_patch16_224": ("unknown", {"img_size": 32, **VIT}),
    "eva02_tiny_patch14_224": ("unknown", {"img_size": 28, "depth": 2}),
    "mvitv2_tiny": ("unknown", {}),
    "resnet18": ("unknown", {}),
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name, tmp_path):
    family, arguments = TIMM[name]
    if not timm.is_model(name.partition(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    found = identify(pickled(tmp_path / "a.pth", timm.create_model(name, **arguments).state_dict()))
    assert found.family == family
    assert found.exit_code == (4 if family == "unknown" else 0)
    assert found.loadable == (family == "vit")
    assert bool(found.seen) == (family == "unknown")
    assert found.family == "vit" or "maehub.load" not in " ".join(found.advice)


IMAGE = {"image_size": 32, "patch_size": 8}
MODELS = {
    "VideoMAEForPreTraining": (
        "videomae",
        {
            **SMALL,
            **IMAGE,
            "num_frames": 4,
            "decoder_num_attention_heads": 2,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 64,
        },
    ),
    "VideoMAEForVideoClassification": ("videomae", {**SMALL, **IMAGE, "num_frames": 4}),
    "Dinov2Model": ("dinov2", {**SMALL, "image_size": 28, "patch_size": 14}),
    "Dinov2WithRegistersModel": ("dinov2", {**SMALL, "image_size": 28, "patch_size": 14}),
    "HieraModel": ("hiera", {"embed_dim": 8, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1] * 4}),
    "HieraForPreTraining": (
        "hiera",
        {
            "embed_dim": 8,
            "image_size": [224, 224],
            "depths": [1] * 4,
            "num_heads": [1] * 4,
            "decoder_hidden_size": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 1,
        },
    ),
    "BeitModel": ("beit", {**SMALL, **IMAGE}),
    "Data2VecVisionModel": ("beit", {**SMALL, **IMAGE}),
    "ViTModel": ("vit", {**SMALL, **IMAGE}),
    "ViTForMaskedImageModeling": ("simmim", {**SMALL, **IMAGE, "encoder_stride": 8}),
    "SwinModel": ("swin", {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]}),
    "SwinForMaskedImageModeling": (
        "simmim",
        {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4},
    ),
    "ConvNextV2Model": ("convnextv2", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    "CLIPVisionModel": ("clip", {**SMALL, **IMAGE}),
    "PixioModel": ("pixio", {**SMALL, **IMAGE}),
    "DINOv3ViTModel": ("dinov3", {**SMALL, **IMAGE}),
    "DeiTModel": ("deit", {**SMALL, **IMAGE}),
    "IJepaModel": ("unknown", {**SMALL, **IMAGE}),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_of_transformers(name, tmp_path):
    """In memory and as their own save_pretrained writes them, which are other names."""
    family, arguments = MODELS[name]
    kind = getattr(transformers, name)
    network = kind(kind.config_class(**arguments))
    torch.save(network.state_dict(), tmp_path / "a.bin")
    network.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "a.bin", tmp_path / "saved"):
        found = identify(file)
        assert found.family == family, found.describe()
        assert found.exit_code == (4 if family == "unknown" else 0)
        assert found.loadable == (family == "vit")


def test_networks_whose_code_is_not_installed(mae, tmp_path):
    """By the names in their published code, on the tensors of a tiny network."""
    state = official(mae)
    clips = state["patch_embed.proj.weight"][:, :, None]
    stem = {name: value for name, value in state.items() if not name.startswith("patch_embed")}
    cross = {
        name.replace(".attn.qkv.", ".cross_attn.kv.") if "decoder" in name else name: v for name, v in state.items()
    }
    groups = {"channel_embed": torch.zeros(1, 2, 16)}
    groups |= {f"patch_embed.{n}.proj.weight": state["patch_embed.proj.weight"] for n in (0, 1)}
    files = {
        "crossmae": cross,
        "satmae": stem | groups,
        "prithvi": {f"encoder.{name}": value for name, value in (state | {"patch_embed.proj.weight": clips}).items()},
        "video": {"backbone.patch_embed.proj.weight": clips, "backbone.blocks.0.norm1.weight": torch.zeros(64)},
        "vitdet": from_official(official(mae.encoder), "detectron2"),
    }
    for family, tensors in files.items():
        found = identify(pickled(tmp_path / "a.pth", tensors))
        assert (found.family, found.loadable) == (family, False), found.describe()


def test_every_family_is_tested():
    tested = {family for family, _ in (*TIMM.values(), *MODELS.values())}
    assert {family.name for family in families()} | {"vit", "unknown", "pixio"} == tested | {"crossmae", "satmae", "prithvi", "video", "vitdet"}  # fmt: skip  # noqa: E501


# ---------------------------------------------------------------------------------------------------------------------
# the target, decided by predictions


def nano_without_words(folder, **changes):
    """The embedded model as a stranger publishes it: names and numbers alone."""
    state = {name: value.float() for name, value in read_tensors(NANO).tensors.items()} | changes
    write_tensors(folder / "nano.safetensors", state)
    return folder / "nano.safetensors"


def test_the_embedded_model_predicts_pixels(tmp_path):
    found = identify(nano_without_words(tmp_path), decoder_heads=5)
    assert (found.target, found.target_from) == ("pixels", "by its predictions on two photos")
    assert found.judgement.means > 0.8
    assert found.judgement.pixels > 0.6
    assert any("target='pixels'" in line for line in found.advice)
    assert followed(found, tmp_path)[0].config.target == "pixels"
    assert found.judgement.describe() in found.describe()


def test_random_weights_predict_nothing(tmp_path):
    config = AutoencoderConfig(EncoderConfig(96, 8, 3, 192, 5, 6), 160, 5, 5)
    for seed in range(2):
        torch.manual_seed(seed)
        write_tensors(tmp_path / f"{seed}.safetensors", official(MaskedAutoencoder(config)))
        found = identify(tmp_path / f"{seed}.safetensors", decoder_heads=5)
        assert found.target == "unknown"
        assert abs(found.judgement.scale) < 0.1  # their patches have mean 0 and variance about 1 too
        assert found.judgement.normalised < 0


def true_patches():
    """Of the photos, as a network sees them: (M, 192)."""
    preprocess = maehub.Preprocess.evaluation(96, 3, 8)
    images = torch.stack([preprocess(open_image(ASSETS / name)) for name in ("cat.jpg", "coffee.jpg")])
    return patchify(images, 8).flatten(0, 1)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("pixels", "pixels"),
        ("normalised", "normalised_pixels"),
        ("pca", "unknown"),
        ("noise", "unknown"),
        ("flat", "unknown"),
        ("negative", "unknown"),
        ("mean", "unknown"),
        ("faint", "unknown"),
    ],
)
def test_the_decision_by_means_and_variances(kind, target):
    """Predictions of known kind, half explained and half noise, as trained networks give them."""
    true = true_patches()
    normalised = normalise_patches(true[None]).patches[0]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    centred = true - true.mean(dim=0)
    predicted = {
        "pixels": 0.7 * true + 0.3 * noise,
        "normalised": 0.6 * normalised + 0.3 * noise,
        "pca": centred @ torch.linalg.svd(centred, full_matrices=False).Vh.T,
        "noise": noise,
        "flat": torch.zeros_like(true),
        "negative": -true,
        "faint": 0.1 * true,  # follows the picture and explains a fifth of it, and no trained network is so timid
        "mean": true.mean(dim=1, keepdim=True).expand_as(true) * 1e-3,
    }[kind]
    assert _measured(predicted, true).target == target


def test_when_the_decoder_is_run(tmp_path, monkeypatch):
    path = nano_without_words(tmp_path)
    assert "--decoder-heads" in identify(path).target_from  # the decoder is 160 wide, and nothing tells its heads
    assert identify(path, decoder_heads=5, decide_target=False).judgement is None
    monkeypatch.setattr(identifying, "LARGEST_RUN", 1000)
    found = identify(path, decoder_heads=5)
    assert (found.target, found.judgement) == ("unknown", None)
    assert "--decide" in found.target_from
    assert identify(path, decoder_heads=5, decide_target=True).target == "pixels"
    assert identify(NANO, decide_target=True).judgement.target == "pixels"  # asked, though its configuration says it


def test_a_configuration_that_says_another_target(tmp_path):
    nano = maehub.load_autoencoder("vit-nano")
    nano.config = replace(nano.config, target="normalised_pixels")
    save(nano, tmp_path / "liar")
    assert identify(tmp_path / "liar").problems == ()
    found = identify(tmp_path / "liar", decide_target=True)
    assert "look like those of pixels" in found.problems[0]
    assert found.exit_code == 4


def test_targets_that_photos_cannot_decide(tmp_path):
    def target_of(config, **changes):
        write_tensors(tmp_path / "a.safetensors", official(make_autoencoder(config)) | changes)
        found = identify(tmp_path / "a.safetensors", heads=4, decoder_heads=4)
        (tmp_path / "a.safetensors").unlink()
        return found.target, found.target_from

    tokens = replace(MAE, target="tokens", outputs=50)
    assert target_of(tokens) == ("unknown", "it predicts 50 values a patch, not its 192 of pixels")
    assert target_of(replace(MAE, target="pca", outputs=24)) == ("pca", "by its components")
    many = replace(MAE, encoder=replace(TINY, channels=6))
    assert target_of(many) == ("unknown", "photos have 1 or 3 channels, and it takes 6")
    bad = torch.full((64, 3, 8, 8), torch.nan)
    assert "NaN" in target_of(MAE, **{"patch_embed.proj.weight": bad})[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", ["normalised_pixels", "pixels", "pca"])
def test_networks_that_are_trained_here(target, tmp_path):
    """The embedded photos, cut into pieces, a small network and two hundred steps: a minute or two each."""
    from maehub.train import PretrainConfig, pretrain

    (tmp_path / "photos").mkdir()
    for name in ("cat.jpg", "coffee.jpg"):
        image = open_image(ASSETS / name)
        for number in range(12):
            left, top = (number % 4) * image.width // 5, (number // 4) * image.height // 4
            image.crop((left, top, left + image.width // 4, top + image.height // 3)).save(
                tmp_path / "photos" / f"{number}-{name}"
            )
    config = PretrainConfig(
        str(tmp_path / "photos"), tmp_path / "run", target=target, steps=200, batch_size=16, base_lr=4e-3,
        decoder_depth=2, image_size=(48,), holdout=0, workers=0, cache=True, device="cpu", pca_components=192,
        validate_every=1000, quiet=True,
    )  # fmt: skip
    pretrain(config)
    state = read_tensors(tmp_path / "run" / "model" / "model.safetensors").tensors
    state = to_official(state).state
    for name in ("decoder_components", "decoder_centre"):  # as a stranger's file, which has no such tensors
        state.pop(name, None)
    write_tensors(tmp_path / "stranger.safetensors", state)
    found = identify(tmp_path / "stranger.safetensors", decoder_heads=5)
    assert found.target == ("unknown" if target == "pca" else target), found.describe()


# ---------------------------------------------------------------------------------------------------------------------
# malformed and hostile files


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def hostile(kind, mae, folder):
    """A file, and what `maehub identify` says and returns."""
    path, state = folder / "a.pth", official(mae)
    if kind == "pickle bomb":
        torch.save({"model": {"weight": Bomb(folder / "canary")}}, path)
        return path, 4, "asks for posix.system. No code in it was run"
    if kind == "bare pickle bomb":
        path.write_bytes(pickle.dumps(Bomb(folder / "canary"), protocol=2))
        return path, 4, "No code in it was run"
    if kind == "Namespace":
        torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, path)
        return path, 0, "masked autoencoder"
    if kind == "zip of nothing":
        zipfile.ZipFile(path, "w").close()
        return path, 4, "zip archive that PyTorch did not write"
    if kind == "zip of pictures":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("photos/cat.jpg", b"\xff\xd8\xff")
        return path, 4, "no data.pkl but cat.jpg"
    if kind == "LFS pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 343000000\n")
        return path, 4, "git lfs pull"
    if kind == "HTML page":
        path.write_bytes(b"\n<!DOCTYPE html><html><body>Sign in</body></html>")
        return path, 4, "gated repository"
    if kind == "wrong keys":
        torch.save({f"layer{number}.conv.weight": torch.zeros(3) for number in range(9)}, path)
        return path, 4, "layer0.conv.weight 3"
    if kind == "half the keys":
        write_tensors(folder / "a.safetensors", dict(list(state.items())[::2]))
        return folder / "a.safetensors", 4, "missing, "
    if kind == "other keys in a ViT":
        torch.save(state | {"blocks.0.attn.q_norm.weight": torch.zeros(16)}, path)
        return path, 4, "blocks.N.attn.q_norm.weight"
    if kind == "empty":
        path.write_bytes(b"")
        return path, 4, "0 bytes"
    if kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
        return path, 4, "neither a safetensors file nor a PyTorch pickle"
    if kind == "cut pickle":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-5000])
        return path, 4, "damaged zip archive"
    if kind == "TorchScript":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
        return path, 4, "TorchScript program"
    if kind == "compressed":
        torch.save(state, folder / "b.pth")
        with zipfile.ZipFile(folder / "b.pth") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return path, 4, "is compressed. Nothing of it was unpacked"
    if kind == "strides":
        torch.save({"pos_embed": torch.zeros(1).expand(10**9, 10**6), "cls_token": torch.zeros(1)}, path)
        return path, 4, "claims 1,000,000,000,000,000 values"
    if kind == "many tensors":
        write_tensors(folder / "a.safetensors", {f"blocks.{number}.x": torch.zeros(0) for number in range(20_001)} | {"a": torch.zeros(1)})  # fmt: skip  # noqa: E501
        return folder / "a.safetensors", 4, "20,002 tensors"
    if kind == "deep and narrow":
        write_tensors(folder / "a.safetensors", state | {"blocks.498.norm1.weight": torch.zeros(64)})
        return folder / "a.safetensors", 4, "too few or too small"
    if kind == "deeper":
        write_tensors(folder / "a.safetensors", state | {"blocks.998.norm1.weight": torch.zeros(64)})
        return folder / "a.safetensors", 4, "its shapes are those of no network that can be built"
    raise AssertionError(kind)


KINDS = ["pickle bomb", "bare pickle bomb", "Namespace", "zip of nothing", "zip of pictures", "LFS pointer", "HTML page", "wrong keys", "half the keys", "other keys in a ViT", "empty", "random bytes", "cut pickle", "TorchScript", "compressed", "strides", "many tensors", "deep and narrow", "deeper"]  # fmt: skip  # noqa: E501


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_23_to_28_of_group_b(kind, mae, tmp_path, capsys):
    """Fault rows 23 (what a file is that is no weights), 24, 25, 27 and 28."""
    path, code, words = hostile(kind, mae, tmp_path)
    assert main(["identify", str(path)]) == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "canary").exists()


@pytest.mark.slow
def test_row_22_a_large_file_takes_little_memory(tmp_path):
    """2.5 GB of ViT-H: what is read is the hash's buffer, the header and one table."""
    with torch.device("meta"):
        state = maehub.Encoder(PRESETS["vit-h"]).state_dict()
    sparse(tmp_path / "h.safetensors", {key: tuple(value.shape) for key, value in state.items()})
    code = f"""
from maehub.conversion.identifying import identify
from memory import peak
with peak() as grown:
    assert identify({str(tmp_path / "h.safetensors")!r}).network.name == "ViT-H/14"
print(grown[0])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=WITH_TESTS)
    assert int(ran.stdout) < 100_000  # kB


def never_a_traceback(path):
    with contextlib.suppress(MaehubError):
        found = identify(path)
        found.describe()
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.exit_code in (0, 4)


SLOWLY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
STARTS = [b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x04", b"<html", b"version https://git-lfs", b"{", b"\x93NUMPY"]  # fmt: skip  # noqa: E501


@SLOWLY
@given(st.sampled_from(STARTS), st.binary(max_size=300), st.sampled_from([".pth", ".safetensors", ".bin", ".ckpt", ""]))
def test_arbitrary_bytes(tmp_path, start, rest, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(start + rest)
    never_a_traceback(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of small whole files, by ending."""
    folder = tmp_path_factory.mktemp("whole")
    tiny = make_autoencoder(AutoencoderConfig(EncoderConfig(8, 4, 1, 8, 1, 2), 8, 1, 2, "unknown"))
    write_tensors(folder / "a.safetensors", official(tiny))
    torch.save({"model": official(tiny), "epoch": 3}, folder / "a.pth")
    torch.save({"model": official(tiny)}, folder / "a.bin", _use_new_zipfile_serialization=False)
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@SLOWLY
@given(st.sampled_from([".safetensors", ".pth", ".bin"]), st.data())
def test_damaged_files(tmp_path, whole, ending, data):
    """Bytes changed, a cut, or a piece taken out, anywhere."""
    content = bytearray(whole[ending])
    where = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["change", "cut", "remove"]))
    if how == "change":
        for place in range(where, min(len(content), where + data.draw(st.integers(1, 8)))):
            content[place] = data.draw(st.integers(0, 255))
    else:
        del content[where : where + data.draw(st.integers(1, 200)) if how == "remove" else None]
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    never_a_traceback(path)


PARTS = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.7.norm1.weight", "norm.weight", "head.weight", "head.1.weight", "head.0.running_mean", "mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_pred.weight", "decoder_blocks.0.attn.qkv.bias", "vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight", "decoder_components", "encoder_mask_token", "module.x", "fc_norm.weight", "backbone.vit.cls_token", "backbone.layers.0.ln1.weight", "neck.decoder_pred.weight"]  # fmt: skip  # noqa: E501


@SLOWLY
@given(
    st.dictionaries(st.sampled_from(PARTS) | st.text(max_size=8), st.lists(st.integers(0, 9), max_size=5), min_size=1)
)
def test_any_names_and_shapes(tmp_path, shapes):
    sparse(tmp_path / "a.safetensors", shapes)
    never_a_traceback(tmp_path / "a.safetensors")


def test_a_head_that_is_one_number(tmp_path):
    shapes = {"cls_token": [1, 1, 8], "pos_embed": [1, 5, 8], "patch_embed.proj.weight": [8, 3, 4, 4]}
    sparse(tmp_path / "a.safetensors", shapes | {"head.weight": [], "decoder_pos_embed": [1, 5, 8]})
    never_a_traceback(tmp_path / "a.safetensors")


def test_a_header_of_impossible_numbers(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(IntegrityError, match="cut off"):
        identify(tmp_path / "a.safetensors")
