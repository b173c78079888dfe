"""Loading by name, from a Hub on loopback: catalog names, repositories, folders, files, official pickles."""

import argparse
import copy
import logging
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from peers import assert_equal_outputs, images, make_autoencoder, make_encoder, noise_for, official
from PIL import Image
from transformers import AutoImageProcessor, ViTMAEForPreTraining

import maehub
from maehub.errors import HubError, IntegrityError, UsageError
from maehub.hub import catalog
from maehub.hub import loading as hub_module
from maehub.hub.fetching import locate
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import Encoder, EncoderConfig
from maehub.weights.keys import from_official
from maehub.weights.model_folder import pack
from maehub.weights.pickles import read_pickle
from maehub.weights.tensorfile import read_header, write_tensors

ASSETS = Path(maehub.__file__).parent / "assets"
TINY = EncoderConfig(32, 8, 3, 32, 2, 2)
TINY_MAE = AutoencoderConfig(TINY, 32, 1, 2, "normalised_pixels")
# what the catalog's networks are for these tests; a decoder of width 512 has the published heads
SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
ROW = EncoderConfig(32, 8, 3, 32, 2, 2)
ROW_MAE = AutoencoderConfig(ROW, 512, 1, 16, "pixels")
VIT_B = "timm/vit_base_patch16_224.mae"
VIT_B_PIXEL = "facebook/vit-mae-base"


@pytest.fixture(scope="module")
def mae():
    return make_autoencoder(TINY_MAE)


@pytest.fixture
def small_rows(hub, monkeypatch):
    """The catalog as it is, but with tiny networks, other hashes, and official files at the test server."""
    table = copy.deepcopy(catalog._table())
    for name in ("vit-b", "vit-l", "vit-h"):
        table["architectures"][name] = SHAPE
    for row in table["models"].values():
        for source in row.get("sources", ()):
            source.pop("md5", None)
    monkeypatch.setattr(catalog, "_table", lambda: table)
    monkeypatch.setattr(catalog, "FAIR_BASE", hub.endpoint + "/")
    catalog._models.cache_clear()
    yield hub
    catalog._models.cache_clear()


def saved(folder, model):
    """A model folder as the files of a repository."""
    maehub.save(model, folder)
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def tensors(path, model, dialect=None):
    state = official(model)
    write_tensors(path, from_official(state, dialect) if dialect else state, {"format": "pt"})
    return path


def same_weights(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


# -- names of the catalog


def test_a_catalog_name(small_rows, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="maehub")
    model = make_encoder(ROW)
    commit = small_rows.add_repo(VIT_B, {"model.safetensors": tensors(tmp_path / "m.safetensors", model)})
    encoder = maehub.load("vit-b")
    assert same_weights(encoder, model)
    assert not encoder.training
    assert (encoder.origin.name, encoder.origin.revision) == ("vit-b", commit)
    assert encoder.origin.licence == "CC-BY-NC-4.0"
    assert len(encoder.origin.sha256) == 64
    assert VIT_B in caplog.text
    assert "CC-BY-NC-4.0" in caplog.text
    small_rows.log.clear()
    assert same_weights(maehub.load("vit-b", offline=True), model)
    assert same_weights(maehub.load("vit-b", verify=True), model)
    assert not small_rows.log


def test_448_resizes_positions_and_says_so(small_rows, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="maehub")
    small_rows.add_repo(VIT_B, {"model.safetensors": tensors(tmp_path / "m.safetensors", make_encoder(ROW))})
    encoder = maehub.load("vit-b-448")
    assert "vit-b-448: Pre-trained at 32 pixels, positions resized to the 56×56 grid" in caplog.text
    assert "no 448 weights were published" in caplog.text
    assert encoder.config.size == encoder.preprocess.size == (448, 448)
    assert encoder.preprocess.crop_fraction == 1.0
    assert encoder.pos_embed.shape == (1, 56 * 56 + 1, 32)
    assert same_weights(encoder, maehub.load("vit-b", image_size=448))
    smaller = maehub.load("vit-b-448", image_size=(64, 32))
    assert smaller.config.size == (64, 32)


def test_what_a_short_name_means(small_rows, tmp_path):
    mae = make_autoencoder(ROW_MAE)
    file = tensors(tmp_path / "m.safetensors", mae, "transformers-4")
    small_rows.add_repo(VIT_B_PIXEL, {"model.safetensors": file, "config.json": "{}"})
    loaded = maehub.load_autoencoder("vit-b")
    assert same_weights(loaded, mae)
    assert (loaded.encoder.origin.name, loaded.config.target) == ("vit-b-pixel", "pixels")
    assert {one.path.split("/resolve/")[0] for one in small_rows.asked("HEAD", "/resolve/")} == {f"/{VIT_B_PIXEL}"}
    assert same_weights(maehub.load_autoencoder("vit-b-pixel"), mae)
    assert same_weights(maehub.load("vit-b-pixel"), mae.encoder)  # of an autoencoder its encoder
    large = maehub.load_autoencoder("vit-b-448")
    assert large.config.encoder.size == (448, 448)
    assert large.encoder.origin.name == "vit-b-pixel-448"
    with pytest.raises(UsageError, match="trained to predict pixels, not normalised_pixels"):
        maehub.load_autoencoder("vit-b", target="normalised_pixels")
    assert catalog.resolve("vit-b", "pretrain").name == "vit-b-normpix-full"


@pytest.mark.parametrize("name", ["vit-b-in1k", "vit-b-encoder"])
def test_a_row_without_a_decoder_names_those_that_have_one(hub, name):
    with pytest.raises(UsageError, match=r"without a decoder; vit-b-pixel .* vit-b-normpix-full"):
        maehub.load_autoencoder(name)
    assert not hub.log


def test_names_that_are_none(hub):
    for name in ("vit-nano-448", "vit-b-in1k-448", "vit-x"):
        with pytest.raises(UsageError, match=r"no model is called .*\n`maehub list`"):
            maehub.load(name)
    with pytest.raises(UsageError, match="cannot be loaded"):
        maehub.load("retfound-cfp")
    assert not hub.log


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_official_pickle_is_converted_once(small_rows, tmp_path, monkeypatch, caplog, wrapped):
    caplog.set_level(logging.INFO, logger="maehub")
    mae = make_autoencoder(replace(ROW_MAE, target="normalised_pixels"))
    content = {"model": official(mae)}
    if wrapped:  # a checkpoint of the training itself
        content |= {"args": argparse.Namespace(lr=1e-3), "epoch": 1599, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "full.pth")
    small_rows.add_page("/mae/pretrain/mae_pretrain_vit_base_full.pth", tmp_path / "full.pth")
    loaded = maehub.load_autoencoder("vit-b-normpix-full")
    assert same_weights(loaded, mae)
    assert loaded.config.target == "normalised_pixels"
    assert caplog.text.count("converting") == 1
    (converted,) = (Path(small_rows.env()["MAEHUB_CACHE"]) / "converted").iterdir()
    assert converted.suffix == ".safetensors"
    assert read_header(converted).metadata["source_sha256"] == loaded.encoder.origin.sha256

    small_rows.log.clear()
    monkeypatch.setattr(hub_module, "read_pickle", lambda path: pytest.fail("read again"))
    assert same_weights(maehub.load_autoencoder("vit-b-normpix-full"), mae)
    assert not small_rows.log
    monkeypatch.setattr(hub_module, "read_pickle", read_pickle)
    converted.write_bytes(converted.read_bytes()[:-4] + b"\1\2\3\4")
    assert same_weights(maehub.load_autoencoder("vit-b-normpix-full", verify=True), mae)


def test_an_official_classifier(small_rows, tmp_path):
    model = make_encoder(replace(ROW, classes=10, pool="mean"))
    torch.save({"model": official(model)}, tmp_path / "c.pth")
    small_rows.add_page("/mae/finetune/mae_finetuned_vit_base.pth", tmp_path / "c.pth")
    loaded = maehub.load("vit-b-in1k")
    assert same_weights(loaded, model)
    assert (loaded.config.classes, loaded.config.pool) == (10, "mean")
    assert loaded(images(ROW)).shape == (2, 10)


def test_row_27_a_hostile_official_pickle(small_rows, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    (tmp_path / "c.pth").write_bytes(pickle.dumps({"model": Hostile()}))
    small_rows.add_page("/mae/finetune/mae_finetuned_vit_base.pth", tmp_path / "c.pth")
    with pytest.raises(IntegrityError, match="No code in it was run"):
        maehub.load("vit-b-in1k")
    assert not (tmp_path / "canary").exists()


# -- repositories


def test_a_repository_at_a_branch_a_tag_and_a_commit(hub, tmp_path, mae):
    other = make_autoencoder(TINY_MAE, seed=5)
    first = hub.add_repo("user/repo", saved(tmp_path / "a", mae), revision="v1")
    second = hub.add_repo("user/repo", saved(tmp_path / "b", other))
    for source, revision, expected in (
        ("user/repo", None, other),
        ("user/repo@v1", None, mae),
        ("user/repo", "v1", mae),
        (f"user/repo@{first}", None, mae),
        ("user/repo", second, other),
    ):
        loaded = maehub.load_autoencoder(source, revision=revision)
        assert same_weights(loaded, expected)
        assert loaded.encoder.origin.revision == (first if expected is mae else second)
        assert same_weights(maehub.load(source, revision=revision), expected.encoder)
    assert loaded.encoder.origin.name == "user/repo"
    with pytest.raises(HubError, match="none"):
        maehub.load("user/repo@none")
    with pytest.raises(UsageError, match="two revisions"):
        maehub.load("user/repo@v1", revision="main")


def test_an_encoder_asks_for_the_encoder_alone(hub, tmp_path, mae):
    hub.add_repo("user/repo", saved(tmp_path / "a", mae))
    assert same_weights(maehub.load("user/repo"), mae.encoder)
    weights = [one.path for one in hub.asked("GET", store=True)]
    assert len(weights) == 1
    assert "/timm/model.safetensors" in weights[0]


def test_a_published_folder_comes_back_whole(hub, tmp_path):
    transform = replace(maehub.Preprocess.evaluation((32, 64), patch_size=8), mean=(0.1, 0.2, 0.3))
    model = MaskedAutoencoder(AutoencoderConfig(replace(TINY, image_size=(32, 64)), 32, 1, 2, "pixels"), transform)
    hub.add_repo("user/wide", saved(tmp_path / "a", model))
    loaded = maehub.load_autoencoder("user/wide")
    assert (loaded.config, loaded.preprocess) == (model.config, transform)
    assert maehub.load("user/wide").preprocess == transform


def test_row_26_damage_in_the_decoder_is_found_after_its_encoder_was_loaded(hub, tmp_path):
    mae = make_autoencoder(ROW_MAE)
    state = official(mae)
    state["decoder_pred.bias"][3] = torch.nan
    write_tensors(tmp_path / "m.safetensors", state, {"format": "pt"})
    hub.add_repo("user/bare", {"model.safetensors": tmp_path / "m.safetensors", "config.json": timm_config()})
    with pytest.raises(IntegrityError, match=r"decoder_pred\.bias"):
        maehub.load_autoencoder("user/bare")
    assert same_weights(maehub.load("user/bare", heads=2), mae.encoder)
    with pytest.raises(IntegrityError, match=r"decoder_pred\.bias"):
        maehub.load_autoencoder("user/bare")


def timm_config():
    return '{"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 2}, "pretrained_cfg": {}}'


def test_row_26_damage_in_a_head_is_found_after_another_was_asked_for(hub, tmp_path):
    state = official(make_encoder(replace(TINY, classes=3)))
    state["head.bias"][0] = torch.inf
    write_tensors(tmp_path / "m.safetensors", state, {"format": "pt"})
    hub.add_repo("user/bare", {"model.safetensors": tmp_path / "m.safetensors", "config.json": timm_config()})
    maehub.load("user/bare", classes=5)
    with pytest.raises(IntegrityError, match=r"head\.bias"):
        maehub.load("user/bare")


# -- one repository, three libraries


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_a_folder_of_ours_loads_in_three_libraries(hub, tmp_path, target):
    native = replace(TINY, image_size=224, patch_size=16)
    model = make_autoencoder(replace(TINY_MAE, encoder=native, target=target))
    hub.add_repo("user/repo", saved(tmp_path / "a", model))
    pictures = images(native)

    ours = maehub.load_autoencoder("user/repo")
    encoder = maehub.load("user/repo")
    theirs, report = ViTMAEForPreTraining.from_pretrained("user/repo", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        output = ours(pictures)
        expected = theirs.eval()(pictures, noise=noise_for(output.masked))
        assert_equal_outputs(output.prediction, expected.logits)
        assert_equal_outputs(output.loss, expected.loss)
        assert torch.equal(encoder(pictures), ours.encoder(pictures))

    processor = AutoImageProcessor.from_pretrained("user/repo")
    with Image.open(ASSETS / "coffee.jpg") as picture:
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        grey = (ours.preprocess(picture) - pixels[0]) * torch.tensor(ours.preprocess.std)[:, None, None] * 255
    assert grey.abs().max() <= 2

    of_timm = timm.create_model("hf-hub:user/repo", pretrained=True).eval()
    with torch.inference_mode():
        tokens = of_timm.forward_features(pictures)
        assert_equal_outputs(encoder.features(pictures, pool="cls"), tokens[:, 0])
        assert_equal_outputs(encoder.features(pictures, pool="tokens"), tokens[:, 1:])
    libraries = {"maehub/", "transformers/", "timm/"}
    agents = " ".join(one.headers["user-agent"] for one in hub.asked(contains="/user/repo/"))
    assert all(library in agents for library in libraries)


# -- folders, files, and what is none


def test_folders_files_and_runs(tmp_path, mae, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maehub.save(mae, tmp_path / "model")
    maehub.save(mae, tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    tensors(tmp_path / "file.safetensors", mae)
    pack(mae, tmp_path / "packed.safetensors", torch.float32)
    for source in ("model", "./model", tmp_path / "model", "run", "run/model", "packed.safetensors"):
        loaded = maehub.load_autoencoder(source)
        assert same_weights(loaded, mae)
        assert (loaded.config, loaded.preprocess) == (mae.config, mae.preprocess)
        assert same_weights(maehub.load(source), mae.encoder)
    loaded = maehub.load_autoencoder("file.safetensors", heads=2, decoder_heads=2, target="pixels")
    assert same_weights(loaded, mae)
    assert same_weights(maehub.load(Path("file.safetensors"), heads=2), mae.encoder)
    with pytest.raises(UsageError, match="heads="):
        maehub.load("file.safetensors")
    assert maehub.load_autoencoder("file.safetensors", heads=2, decoder_heads=2).config.target == "unknown"


def test_a_name_is_a_name_and_a_path_is_a_path(tmp_path, mae, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maehub.save(mae, tmp_path / "vit-nano")
    assert maehub.load("vit-nano").config.width == 192
    for source in (Path("vit-nano"), "./vit-nano", str(tmp_path / "vit-nano"), "vit-nano/"):
        assert maehub.load(source).config == mae.config.encoder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert maehub.load("~/vit-nano").config == mae.config.encoder


def test_what_is_not_there(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = ("no.safetensors", "./no", "a/b/c", str(tmp_path / "no"), "~/no", Path("user/repo"), "no.pth", "u/no.pth")
    for source in missing:
        with pytest.raises(UsageError, match="there is no file or folder"):
            maehub.load(source)
    assert not hub.log


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".ckpt"])
def test_a_pickle_is_refused_with_the_line_to_type(tmp_path, mae, ending):
    torch.save(official(mae), tmp_path / f"m{ending}")
    with pytest.raises(IntegrityError, match=rf"maehub convert {tmp_path}/m\{ending} -o FOLDER$"):
        maehub.load(tmp_path / f"m{ending}")


def test_located_models_are_taken_as_they_are(hub, tmp_path, mae):
    hub.add_repo("user/repo", saved(tmp_path / "a", mae))
    located = locate("user/repo", "autoencoder")
    assert not hub.asked(contains="/timm/")
    hub.log.clear()
    assert same_weights(maehub.load_autoencoder(located), mae)
    assert not hub.log


def test_an_encoder_folder_has_no_autoencoder(tmp_path):
    maehub.save(make_encoder(TINY), tmp_path / "e")
    with pytest.raises(IntegrityError, match="without the decoder"):
        maehub.load_autoencoder(tmp_path / "e")


# -- the parameters of load


@pytest.fixture
def folder(tmp_path, mae):
    return maehub.save(mae, tmp_path / "model")


def test_parameters(folder, mae):
    pictures = images(TINY)
    assert maehub.load(folder, classes=7)(pictures).shape == (2, 7)
    for channels in (1, 4):
        encoder = maehub.load(folder, channels=channels)
        assert encoder(pictures[:, [0] * channels]).shape == (2, 32)
        assert encoder.preprocess.channels == channels
        wide = maehub.load_autoencoder(folder, channels=channels)
        assert wide(pictures[:, [0] * channels]).prediction.shape == (2, 16, 64 * channels)
    wide = maehub.load(folder, image_size=(32, 64))
    assert wide.config.size == wide.preprocess.size == (32, 64)
    assert wide(images(TINY, size=(32, 64))).shape == (2, 32)
    half = maehub.load(folder, dtype=torch.bfloat16, device="cpu")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    difference = half(pictures.bfloat16()).float() - mae.encoder(pictures)
    assert difference.abs().max() < 0.2
    assert maehub.load(folder, positions="antialias").config.positions == "antialias"
    for wrong, says in (
        ({"device": "cuda:99"}, "device"),
        ({"image_size": 30}, "divisible"),
        ({"channels": 0}, "chan"),
    ):
        with pytest.raises(UsageError, match=says):
            maehub.load(folder, **wrong)
    with pytest.raises(UsageError, match="no head"):
        maehub.load_autoencoder(folder, classes=3)


def test_copies_keep_everything(folder, mae):
    for model in (maehub.load(folder), maehub.load_autoencoder(folder)):
        encoder = model if isinstance(model, Encoder) else model.encoder
        encoder.origin = maehub.load("vit-nano").origin
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            assert same_weights(again, model)
            assert (again.config, again.preprocess, again.training) == (model.config, model.preprocess, False)
            assert (again if isinstance(again, Encoder) else again.encoder).origin == encoder.origin


def test_two_threads(folder):
    """Loading and computing, each in its own thread, at another size."""
    results = {}

    def work(number):
        encoder = maehub.load(folder)
        autoencoder = maehub.load_autoencoder(folder)
        pictures = images(TINY, size=(32, 32 + 8 * number))
        with torch.inference_mode():
            results[number] = [shared.features(pictures), encoder.features(pictures), autoencoder(pictures).prediction]

    shared = maehub.load(folder)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together, results = results, {}
    for number in range(4):
        work(number)
        for one, other in zip(together[number], results[number], strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


# -- the embedded model


def test_the_embedded_model_says_where_it_is_from():
    mae = maehub.load_autoencoder("vit-nano")
    assert mae.encoder.origin.name == "vit-nano"
    assert mae.encoder.origin.licence == "Apache-2.0"
    assert (mae.config.target, mae.config.encoder.size) == ("pixels", (96, 96))
    assert mae.preprocess.crop_fraction == 1.0
    assert {value.dtype for value in mae.parameters()} == {torch.float32}
    assert same_weights(maehub.load("vit-nano"), mae.encoder)
    assert (ASSETS / "vit-nano.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize("size", [192, (96, 160)])
def test_the_embedded_model_at_another_size(size):
    mae = maehub.load_autoencoder("vit-nano", image_size=size)
    panels = maehub.reconstruct(mae, ASSETS / "coffee.jpg", seed=1)
    height, width = (size, size) if isinstance(size, int) else size
    assert panels.original.shape == (height, width, 3)
    assert panels.mask.shape == (height // 8, width // 8)
    hidden = panels.mask.repeat(8, axis=0).repeat(8, axis=1)
    filled = np.where(hidden[:, :, None], panels.original[~hidden].mean(axis=0), panels.original)
    error = np.square(panels.pasted.astype(float) - panels.original).mean()
    assert error < 0.6 * np.square(filled - panels.original).mean()  # than the mean of what is visible


# -- the largest


@pytest.mark.slow
def test_vit_h_448_end_to_end(hub, tmp_path, caplog, monkeypatch):
    """A file of the published shape, in half precision."""
    caplog.set_level(logging.INFO, logger="maehub")
    with torch.device("meta"):
        shape = official(Encoder(maehub.models.encoder.PRESETS["vit-h"]))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.empty(value.shape, dtype=torch.float16) for name, value in shape.items()}
    for name, value in state.items():
        value.normal_(std=0.02, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value.add_(1)
    write_tensors(tmp_path / "h.safetensors", state, {"format": "pt"}, torch.float16)
    hub.add_repo("timm/vit_huge_patch14_224.mae", {"model.safetensors": tmp_path / "h.safetensors"})

    encoder = maehub.load("vit-h-448")
    assert "no 448 weights were published" in caplog.text
    assert "32×32 grid" in caplog.text
    assert encoder.config == replace(maehub.models.encoder.PRESETS["vit-h"], image_size=(448, 448))
    assert sum(value.numel() for value in encoder.parameters()) == 630_764_800 + (32 * 32 - 16 * 16) * 1280
    assert torch.equal(encoder.blocks[31].mlp.fc2.weight, state["blocks.31.mlp.fc2.weight"].float())
    with Image.open(ASSETS / "cat.jpg") as picture, torch.inference_mode():
        feature = encoder(encoder.preprocess(picture)[None])
    assert feature.shape == (1, 1280)
    assert feature.isfinite().all()
    assert feature.std() > 0.1
