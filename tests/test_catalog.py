"""The table of models, and what a name means."""

import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import maehub
from maehub.errors import UsageError
from maehub.hub import catalog
from maehub.hub.catalog import is_model, list_models, model_info, resolve

ROOT = Path(__file__).parent.parent
ROWS = [model_info(name) for name in list_models()]
SIZES = ["vit-b", "vit-l", "vit-h"]
NOT_SAID = ("webssl-", "vc1-", "retfound-")  # whose publishers do not say what was predicted


def test_every_published_file_has_a_row():
    kinds = ["", "-pixel", "-normpix-full", "-in1k", "-448"]
    names = {f"{size}{kind}" for size in SIZES for kind in kinds}
    others = {f"webssl-mae-{size}" for size in ("300m", "700m", "1b")} | {"vc1-b", "vc1-l"}
    others |= {"retfound-cfp", "retfound-oct"}
    assert set(list_models()) == names | others | {"vit-nano", "vit-l-gan", "vit-h-448-in1k-mmpretrain"}


def test_patterns():
    assert list_models("vit-l-*n") == ["vit-l-gan"]
    assert list_models("VIT-*") == []
    assert list_models("vit-?-in1k") == [f"{size}-in1k" for size in SIZES]


@pytest.mark.parametrize("info", ROWS, ids=lambda info: info.name)
def test_a_row_is_whole(info):
    assert info.title
    assert info.licence in ("CC-BY-NC-4.0", "Apache-2.0")
    assert (info.target is None) == (info.role == "classifier" or info.name.startswith(NOT_SAID))
    assert (info.classes > 0) == (info.role == "classifier") == (info.pool == "mean")
    for number in info.numbers:
        assert 0 < number.value < 100
        assert number.metric.startswith("ImageNet-1k top-")
        assert number.source
    for source in info.sources:
        assert source.format == ("safetensors" if source.filename.endswith(".safetensors") else "pickle")
        assert re.fullmatch(r"([0-9a-f]{8}|[0-9a-f]{64})?", source.sha256)
        assert re.fullmatch(r"([0-9a-f]{6})?", source.md5)
        assert re.fullmatch(r"([0-9a-f]{7,40})?", source.commit)
        if source.kind == "hub":
            assert source.format == "safetensors" or info.unsupported  # no pickle is taken from the Hub
            assert re.fullmatch(r"main|refs/pr/\d+|[0-9a-f]{40}", source.revision)
            assert source.pinned == (len(source.revision) == 40 and len(source.sha256) == 64)
        if source.kind == "url":
            assert source.url.startswith("https://")
    # FAIR's weights keep their licence, whatever a card says
    fair = [one for one in info.sources if one.url.startswith(catalog.FAIR_BASE)]
    assert not fair or info.licence == "CC-BY-NC-4.0"


@pytest.mark.parametrize("info", ROWS, ids=lambda info: info.name)
def test_a_row_has_the_shape_of_its_architecture(info):
    """The table repeats the presets, since it must be readable without torch."""
    from maehub.models.encoder import PRESETS, EncoderConfig

    preset = (PRESETS | {"web-1b": EncoderConfig(224, 14, 3, 1536, 40, 24)})[info.architecture]
    assert (info.patch_size, info.width, info.depth, info.heads) == (
        preset.patch_size,
        preset.width,
        preset.depth,
        preset.heads,
    )
    assert preset.size == info.native_size or info.name == "vit-h-448-in1k-mmpretrain"
    assert all(side % info.patch_size == 0 for side in info.image_size)


@pytest.mark.parametrize("info", [row for row in ROWS if row.parameters], ids=lambda info: info.name)
def test_parameters_are_what_the_network_has(info):
    import torch

    from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
    from maehub.models.encoder import Encoder, EncoderConfig

    config = EncoderConfig(
        info.native_size, info.patch_size, 3, info.width, info.depth, info.heads, classes=info.classes, pool=info.pool
    )
    with torch.device("meta"):
        decoder = (160, 5, 5) if info.name == "vit-nano" else (512, 8, 16)
        autoencoder = info.role == "autoencoder"
        network = MaskedAutoencoder(AutoencoderConfig(config, *decoder)) if autoencoder else Encoder(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == info.parameters


def test_web_ssl_has_the_bytes_that_the_model_registry_states():
    """MiB of the files, as mteb computes them from their headers: these networks with the pooler of ViTModel."""
    for size, stated in {"300m": 1161, "700m": 2412, "1b": 4337}.items():
        info = model_info(f"webssl-mae-{size}")
        pooler = info.width**2 + info.width
        assert (info.parameters + pooler) * 4 // 2**20 == stated


def test_the_sizes_of_files_that_were_seen():
    """GB: VC-1's large one is an autoencoder, RETFound's is one with the two moments of its optimizer."""
    assert round(model_info("vc1-l").parameters * 4 / 1e9, 2) == 1.32
    assert round(model_info("retfound-cfp").parameters * 3 * 4 / 1e9, 2) == 3.95


@pytest.mark.parametrize("name", ["retfound-cfp", "retfound-oct"])
def test_a_gated_row_says_how_to_get_access(name):
    info = model_info(name)
    assert info.gated
    source = info.sources[0]
    with pytest.raises(UsageError) as caught:
        resolve(name, "encoder")
    with pytest.raises(UsageError) as refused:
        maehub.download(name)
    for text in (str(caught.value), str(refused.value), info.describe()):
        assert f"https://huggingface.co/{source.repo}" in text
        assert "hf auth login" in text
        assert f"hf download {source.repo} {source.filename}" in text
        assert f"maehub convert {source.filename}" in text
    assert info.to_dict()["gated"] is True
    assert not any(row.gated for row in ROWS if not row.name.startswith("retfound-"))


def test_a_row_whose_architecture_has_no_decoder_anywhere():
    with pytest.raises(UsageError, match="without a decoder; no row of its architecture has one"):
        resolve("webssl-mae-1b", "autoencoder")
    with pytest.raises(UsageError, match="vit-l-pixel"):
        resolve("webssl-mae-300m", "autoencoder")


def test_heads_of_an_architecture():
    assert catalog.architecture_heads(1536, 40, 14) == 24
    assert catalog.architecture_heads(768, 12, 16) == 12
    assert catalog.architecture_heads(768, 12, 8) is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("end", ["", "-448"])
def test_a_short_name_means_what_is_asked(size, end):
    encoder, pixels, going_on = (resolve(size + end, want) for want in ("encoder", "autoencoder", "pretrain"))
    assert (encoder.name, encoder.role) == (size + end, "encoder")
    assert (pixels.name, pixels.target) == (f"{size}-pixel{end}", "pixels")
    assert (going_on.name, going_on.target) == (f"{size}-normpix-full{end}", "normalised_pixels")
    assert "pretrain" in going_on.sources[0].url
    assert going_on.sources[0].url.endswith("_full.pth")
    side = 448 if end else 224
    assert {row.image_size for row in (encoder, pixels, going_on)} == {(side, side)}


def test_the_order_of_sources():
    def places(name):
        return [one.where().removeprefix(catalog.FAIR_BASE) for one in model_info(name).sources]

    official = "mae/visualize/mae_visualize_vit_"
    assert places("vit-b") == ["timm/vit_base_patch16_224.mae", "mae/pretrain/mae_pretrain_vit_base.pth"]
    assert places("vit-b-pixel") == ["facebook/vit-mae-base", f"{official}base.pth"]
    repo = "facebook/vit-mae-large"
    assert places("vit-l-pixel") == [repo, f"{repo}@refs/pr/1", f"{official}large.pth"]
    assert model_info("vit-l-pixel").sources[1].commit == "dc39720"
    assert places("vit-l-gan") == [f"{official}large_ganloss.pth"]


@pytest.mark.parametrize("size", SIZES)
def test_448_is_the_224_weights_and_says_so(size):
    info, native = model_info(f"{size}-448"), model_info(size)
    assert info.sources == native.sources
    assert (info.image_size, info.native_size) == ((448, 448), (224, 224))
    assert info.numbers == ()
    assert "Pre-trained at 224" in info.note
    assert "448×448 (weights 224×224)" in info.describe()


def test_vit_h_448_is_honest():
    text = model_info("vit-h-448").describe()
    assert "87.8" in text
    assert "needs fine-tuning at 448" in text
    other = model_info("vit-h-448-in1k-mmpretrain")
    assert (other.numbers[0].value, other.image_size, other.native_size) == (87.3, (448, 448), (448, 448))
    assert resolve("vit-h-448-in1k-mmpretrain", "encoder") == other


@pytest.mark.parametrize("name", ["vit-b-encoder", "vit-b-in1k", "vit-b-448-encoder"])
@pytest.mark.parametrize("want", ["autoencoder", "pretrain"])
def test_a_row_without_a_decoder_names_those_that_have_one(name, want):
    with pytest.raises(UsageError) as caught:
        resolve(name, want)
    assert "vit-b-pixel" in str(caught.value)
    assert "vit-b-normpix-full" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_with_more_than_is_asked_gives_it():
    assert resolve("vit-b-in1k", "encoder").classes == 1000
    assert resolve("vit-l-gan", "encoder").role == "autoencoder"
    assert resolve("vit-l-gan", "pretrain").name == "vit-l-gan"
    assert resolve("vit-nano", "encoder") == resolve("vit-nano", "autoencoder") == model_info("vit-nano")
    assert model_info("vit-b-encoder") == model_info("vit-b")
    assert all(is_model(name) for name in ["vit-b-encoder", "vit-h-pixel-448", *list_models()])


def test_the_embedded_model():
    info = model_info("vit-nano")
    assert (info.image_size, info.patch_size, info.target, info.licence) == ((96, 96), 8, "pixels", "Apache-2.0")
    assert [(one.kind, one.filename) for one in info.sources] == [("package", "assets/vit-nano.safetensors")]


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("vit_b", "vit-b"),
        ("vit-h448", "vit-h-448"),
        ("vit-b-pixels", "vit-b-pixel"),
        ("vit-nano-448", "vit-nano"),
        ("vit-b-pixel-encoder", "vit-b-pixel"),
        ("vit-b-in1k-448", "vit-b-in1k"),
        ("VIT-L", None),
        ("", None),
    ],
)
def test_an_unknown_name_gets_close_ones(name, close):
    with pytest.raises(UsageError) as caught:
        model_info(name)
    assert close is None or close in str(caught.value)
    assert "maehub list" in str(caught.value)
    assert not is_model(name)


def test_row_21_an_unknown_name_fails_at_once_without_a_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(UsageError, match="did you mean"):
        model_info("vit-hb")
    code = """
import sys, time
start = time.process_time()
from maehub.hub.catalog import resolve
try:
    resolve("vit-bb", "encoder")
except ValueError as error:
    assert "vit-b" in str(error)
    assert time.process_time() - start < 0.2, time.process_time() - start
    assert not {"torch", "huggingface_hub", "requests", "numpy"} & set(sys.modules)
"""
    monkeypatch.undo()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_rows_as_values_and_as_text():
    import json

    for info in ROWS:
        values = json.loads(json.dumps(info.to_dict()))
        assert values["pinned"] == info.pinned
        assert values["name"] in info.describe()
        assert info.licence in info.describe()
        if not info.pinned:
            assert "unpinned" in info.describe()


def test_docs_agree_with_the_catalog():
    document = (ROOT / "docs" / "models.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts" / "models-table"))
    assert script["markdown_table"]() in document, "run scripts/models-table"
    for name in list_models():
        assert f"| `{name}` |" in document


@pytest.fixture
def pin_catalog(hub, tmp_path, monkeypatch):
    """The script's main, on a copy of the table, with the network on loopback: a function of its flags."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    loader = SourceFileLoader("pin_catalog", str(ROOT / "scripts" / "pin-catalog"))
    module = module_from_spec(spec_from_loader("pin_catalog", loader))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr(catalog, "FAIR_BASE", hub.endpoint + "/")
    table = """# a comment
[[models.vit-b.sources]]
kind = "hub"
repo = "timm/b"
revision = "main"
filename = "model.safetensors"
format = "safetensors"  # another
sha256 = ""

[[models.vit-b.sources]]
kind = "url"
filename = "b.pth"
format = "pickle"
md5 = "MD5"

[[models.vit-l.sources]]
kind = "hub"
repo = "facebook/l"
revision = "refs/pr/1"
commit = "dc39720"
filename = "model.safetensors"
format = "safetensors"
"""
    path = tmp_path / "catalog.toml"
    import hashlib

    path.write_text(table.replace("MD5", hashlib.md5(b"official").hexdigest()[:6]))
    hub.add_repo("timm/b", {"model.safetensors": b"weights"})
    hub.add_page("/b.pth", b"official")

    def run(*flags):
        return module.main(["--catalog", str(path), *flags]), path.read_text()

    return run


def test_pin_catalog_fills_in_what_stands_and_names_what_does_not(hub, pin_catalog, capsys):
    import hashlib
    import tomllib

    code, text = pin_catalog()
    assert code == 1
    commit = hub.repos["timm/b"].refs["main"]
    models = tomllib.loads(text)["models"]
    assert models["vit-b"]["sources"][0]["revision"] == commit
    assert models["vit-b"]["sources"][0]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert "sha256" not in models["vit-b"]["sources"][1]
    assert models["vit-l"]["sources"][0]["revision"] == "refs/pr/1"
    assert text.startswith("# a comment\n")
    assert "# another" in text
    assert "NOT  vit-l: facebook/l@refs/pr/1" in capsys.readouterr().out

    commit = hub.add_repo("facebook/l", {"model.safetensors": b"pull request"}, revision="refs/pr/1")
    pin_catalog()
    assert f"is at {commit[:12]}, not at dc39720" in capsys.readouterr().out


def test_pin_catalog_pins_official_files_when_asked(hub, pin_catalog):
    import hashlib

    _, text = pin_catalog("--official")
    assert f'sha256 = "{hashlib.sha256(b"official").hexdigest()}"' in text
    assert text.index('md5 = "') < text.index(hashlib.sha256(b"official").hexdigest()) < text.index("models.vit-l")


def test_pin_catalog_never_changes_a_pin(hub, pin_catalog, capsys):
    _, text = pin_catalog("--official")
    hub.add_page("/b.pth", b"other")
    hub.add_repo("timm/b", {"model.safetensors": b"moved"})
    code, after = pin_catalog("--official")
    assert (code, after) == (1, text)
    out = capsys.readouterr().out
    assert "md5" in out
    # the pinned commit still gives the pinned bytes, though main moved
    assert "ok   vit-b: timm/b@" in out


def test_pin_catalog_check_writes_nothing(pin_catalog):
    _, before = pin_catalog("--check")
    assert 'sha256 = ""' in before
