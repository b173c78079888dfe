"""What `maehub push` publishes: a repository that every named library reads, and nothing of the author's data."""

import io
import json
import re
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_writes import Token
from huggingface_hub import ModelCard
from map_files import lay_maps
from markdown_it import MarkdownIt
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from safetensors.torch import save_file

import maehub
from maehub.cli import command_line as cli
from maehub.data import MapClasses, ObjectClasses
from maehub.dense import Detector, DetectorConfig, Segmenter, SegmenterConfig, save_detector
from maehub.errors import HubError, IntegrityError, MaehubError, UsageError, visible
from maehub.files import markdown_text
from maehub.models.encoder import Origin
from maehub.publishing import provenance, pushing, repository
from maehub.publishing.gate import Verdict
from maehub.publishing.leaks import refuse_leaks
from maehub.publishing.licences import Licence, settle_licence
from maehub.publishing.provenance import Provenance, _public_name, base_model_of, public_origin, read_run
from maehub.publishing.published_card import published_card
from maehub.publishing.pushing import push
from maehub.train import FinetuneConfig, PretrainConfig, finetune, pretrain
from maehub.weights.model_card import model_card

REPO = "user/shapes"
TOKEN = "hf_" + "t0k3n" * 7
MAGENTA, GREEN = (255, 0, 255), (0, 255, 0)


@pytest.fixture
def hub(hub, monkeypatch):
    """The Hub on loopback knows a token that may write as user."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.tokens[TOKEN] = Token()
    return hub


@pytest.fixture
def unread(monkeypatch):
    """No other library reads the repository, which takes seconds for each: those tests are about what comes after."""
    verdict = Verdict({"maehub": maehub.__version__}, {"timm": "it was not tried"})
    monkeypatch.setattr(repository, "check_repository", lambda folder, model: verdict)


def tiny(**changes):
    """An autoencoder of 16 pixels with weights of its own."""
    torch.manual_seed(0)
    encoder = maehub.EncoderConfig(**({"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 4}))
    settings = {"encoder": encoder, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4, "target": "pixels"}
    model = maehub.MaskedAutoencoder(maehub.AutoencoderConfig(**(settings | changes))).eval()
    if model.config.target == "pca":
        model.decoder.centre.data.zero_()
        model.decoder.components.data.copy_(torch.eye(*model.decoder.components.shape))
    return model


def patients(folder, count=8):
    """Pictures of two colours that no photo of ours has, under names that must not leave."""
    for kind in ("healthy", "ill"):
        for number in range(count):
            path = folder / "st-marys-hospital" / kind / f"jane-doe-{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((24, 24, 3), MAGENTA if kind == "ill" else GREEN, np.uint8)
            pixels[number : number + 4] = 128
            Image.fromarray(pixels).save(path)
    return folder / "st-marys-hospital"


def pretrained(folder, data, **settings):
    config = {"steps": 3, "batch_size": 4, "image_size": (16,), "decoder_depth": 1, "decoder_width": 32}
    config |= {"decoder_heads": 4, "target": "pixels", "validate_every": 2, "device": "cpu", "workers": 0}
    pretrain(PretrainConfig(str(data), folder, quiet=True, **(config | settings)))
    return folder


def held(hub, at="main"):
    """What the Hub holds, without the file that it makes itself."""
    repo = hub.repos[REPO]
    return {name: one.read() for name, one in repo.commits[repo.resolve(at)].items() if name != ".gitattributes"}


def sent_anything(hub):
    return bool(hub.asked("POST")) or bool(hub.asked("PUT"))


def fails(kind, *args, **options):
    """The text of an error that is short and holds no secret."""
    with pytest.raises(kind) as caught:
        push(*args, **({"progress": False} | options))
    text = str(caught.value)
    assert len(text.splitlines()) <= 6
    assert TOKEN not in text
    return text


@pytest.mark.parametrize("line", [b"{", b"5", b"\xff", b"[" * 100_000], ids=["half", "number", "bytes", "nested"])
def test_a_broken_curve_is_not_published(line, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + line)
    with pytest.raises(IntegrityError, match=r"metrics.jsonl has a line that is no JSON object"):
        read_run(tmp_path, None)


def test_a_curve_without_end_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes(b"\n" * 1001)
    monkeypatch.setattr(provenance, "_MOST_METRICS", 1000)
    with pytest.raises(IntegrityError, match=r"metrics.jsonl is too long: it has 1,001 bytes"):
        read_run(tmp_path, None)


# -- a run becomes a repository ----------------------------------------------------------------------------------------


def test_a_run_is_published_and_every_library_reads_it(hub, tmp_path):
    """The whole way with nothing replaced: timm and transformers read the repository in processes of their own."""
    data = patients(tmp_path)
    run = pretrained(tmp_path / "secret-project", data)
    (tmp_path / "about.md").write_text("Scans of two kinds.")
    done = push(run, REPO, licence="apache-2.0", about="Scans of two kinds.", private=True, progress=False)
    there = held(hub, done.committed.commit)
    assert {"README.md", "config.json", "model.safetensors", "timm/model.safetensors", "recipe.json"} <= set(there)
    assert {"preprocessor_config.json", "metrics.jsonl", "checksums.sha256", "figures/curve.png"} <= set(there)
    assert "figures/reconstruction.png" in there
    verified = json.loads(there["config.json"])["maehub"]["verified"]
    assert set(verified) == {"timm", "transformers"}
    assert hub.repos[REPO].private
    loaded = maehub.load_autoencoder(f"{REPO}@{done.committed.commit}", cache_dir=tmp_path / "cache")
    images = torch.randn(2, 3, 16, 16)
    mine = maehub.load_autoencoder(run)
    assert torch.equal(loaded(images).prediction, mine(images).prediction)
    nothing_of_the_data(there, tmp_path, data, run)


def nothing_of_the_data(there, *places):
    """Neither names nor pixels of the data, nor paths, are in what was published."""
    names = {part for place in places for part in (str(place), place.name)} | {"jane-doe", "st-marys", "secret-project"}
    for name, content in there.items():
        for word in names:
            assert word.encode() not in content, f"{name} holds {word}"
        if name.endswith(".png"):
            picture = Image.open(io.BytesIO(content))
            assert not picture.info, name
            pixels = np.asarray(picture.convert("RGB"), np.int16)
            for colour in (MAGENTA, GREEN):
                assert np.abs(pixels - colour).max(axis=2).min() > 60, f"{name} shows the data"


def test_the_search_for_the_data_finds_it(tmp_path):
    file = io.BytesIO()
    Image.open(next(patients(tmp_path).rglob("ill/*.png"))).save(file, "PNG")
    with pytest.raises(AssertionError, match="shows the data"):
        nothing_of_the_data({"figures/x.png": file.getvalue()}, tmp_path)
    with pytest.raises(AssertionError, match="holds"):
        nothing_of_the_data({"recipe.json": b'{"data": "jane-doe-0001.png"}'}, tmp_path)


def test_a_classifier_has_its_numbers_in_the_card(hub, tmp_path, unread):
    data = patients(tmp_path)
    run = tmp_path / "run"
    settings = {"steps": 2, "batch_size": 8, "image_size": (16,), "device": "cpu", "workers": 0, "skip_twins": True}
    finetune(FinetuneConfig(str(data), run, model="untrained/vit-nano", quiet=True, **settings))
    (run / "twins.csv").write_text("kind,testing,training\nnear,jane-doe-1.png,a.png\nnear,jane-doe-1.png,b.png\n")
    done = push(run, REPO, licence="mit", dataset="Two Shapes", progress=False)
    there = held(hub)
    card = ModelCard(there["README.md"].decode())
    facts = card.data.to_dict()
    assert facts["license"] == "mit"
    assert facts["pipeline_tag"] == "image-classification"
    (result,) = facts["model-index"]
    scores = json.loads((run / "scores.json").read_text())["scores"]
    assert result["results"][0]["dataset"]["name"] == "Two Shapes"
    assert result["results"][0]["metrics"][0]["value"] == pytest.approx(scores["top1"] / 100, abs=1e-4)
    assert "held-out pictures of Two Shapes, a stratified split by seed" in card.text
    assert json.loads(there["metrics.json"])["n"] == scores["n"]
    assert "| healthy | 2 |" in card.text
    assert "1 of them look nearly like a training picture" in card.text
    assert "maehub finetune DATA --model untrained/vit-nano" in card.text
    assert done.plan.licence.reason == "chosen by the author"
    nothing_of_the_data(there, tmp_path, data, run)


def test_the_command_is_what_was_typed_without_the_users_words(tmp_path, hub, unread):
    data = patients(tmp_path)
    run = pretrained(tmp_path / "run", data, mask_ratio=0.5, hflip=False, group=1, seed=7)
    push(run, REPO, licence="mit", progress=False)
    recipe = json.loads(held(hub)["recipe.json"])
    words = recipe["command"].split()
    assert words[:3] == ["maehub", "pretrain", "DATA"]
    assert "--mask-ratio 0.5" in recipe["command"]
    assert "--no-hflip" in words
    assert "--group COLUMN" in recipe["command"]
    assert "--seed 7" in recipe["command"]
    assert recipe["settings"]["mask_ratio"] == 0.5


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny(encoder=maehub.EncoderConfig((16, 24), 4, width=32, depth=2, heads=4)), "square images"),
        pytest.param(lambda: tiny(mask_tokens="encoder"), "mask tokens", marks=pytest.mark.slow),
        pytest.param(lambda: tiny(target="pca", outputs=6), "predicts pixels", marks=pytest.mark.slow),
    ],
    ids=["not square", "mask tokens in the encoder", "pca"],
)
def test_what_transformers_cannot_compute_is_not_claimed(model, words, hub, tmp_path):
    done = push(model(), REPO, licence="mit", progress=False)
    there = held(hub)
    assert "transformers" not in done.plan.verified
    assert words in done.plan.missing["transformers"]
    config = json.loads(there["config.json"])
    assert "model_type" not in config
    assert set(config["maehub"]["verified"]) == {"timm"}
    assert words in there["README.md"].decode()
    assert "transformers" not in ModelCard(there["README.md"].decode()).data.tags
    assert "preprocessor_config.json" not in there


def test_checksums_are_those_of_sha256sum(hub, unread, tmp_path):
    push(tiny(), REPO, licence="mit", progress=False)
    for name, content in held(hub).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    lines = (tmp_path / "checksums.sha256").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == set(held(hub)) - {"checksums.sha256"}
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=tmp_path, check=True)


# -- the gate ----------------------------------------------------------------------------------------------------------


def test_a_library_that_computes_something_else_stops_it(hub, monkeypatch):
    real = repository.write_members

    def wrong(folder, name, model, **options):
        real(folder, name, model, **options)
        state = maehub.weights.model_folder.read_tensors(folder / "timm" / "model.safetensors").tensors
        changed = {key: tensor.clone() for key, tensor in state.items()}
        changed["blocks.1.mlp.fc2.bias"][0] += 0.1
        save_file(changed, folder / "timm" / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(repository, "write_members", wrong)
    text = fails(IntegrityError, tiny(), REPO, licence="mit")
    assert "nothing was sent" in text
    assert not sent_anything(hub)


def test_row_78_weights_with_nan_are_refused_before_the_first_request(hub):
    model = tiny()
    with torch.no_grad():
        model.encoder.blocks[0].mlp.fc1.bias[0] = float("nan")
    assert "blocks.0.mlp.fc1.bias" in fails(IntegrityError, model, REPO, licence="mit")
    assert not hub.log


def test_row_78_a_folder_that_is_no_model_is_refused_before_the_first_request(hub, tmp_path):
    folder = maehub.save(tiny(), tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\0\0")
    assert "sha256 differs" in fails(IntegrityError, folder, REPO, licence="mit")
    weights.unlink()
    assert "lacks model.safetensors" in fails(IntegrityError, folder, REPO, licence="mit")
    weights.write_bytes(whole)
    (folder / "config.json").unlink()
    fails(MaehubError, folder, REPO, licence="mit")
    assert not hub.log


# -- rows of the fault table -------------------------------------------------------------------------------------------


def test_row_77_foreign_files_stay_and_the_plan_says_so(hub, unread):
    hub.add_repo(REPO, {"NOTES.txt": "mine", "README.md": "---\nlicense: gpl-3.0\n---\n"})
    plans = []
    done = push(tiny(), REPO, licence="mit", progress=False, confirm=lambda plan: plans.append(plan) or True)
    assert held(hub)["NOTES.txt"] == b"mine"
    text = plans[0].describe()
    assert "left alone: NOTES.txt" in text
    assert "licence gpl-3.0, this one says mit" in text
    assert re.search(r"model\.safetensors +\d+ kB  [0-9a-f]{12}  new", text)
    assert re.search(r"README\.md .* changed", text)
    again = push(tiny(), REPO, licence="mit", progress=False)
    assert again.committed.commit == done.committed.commit
    assert "nothing was sent" in again.describe()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"parent": "abcdef0"}, HubError, "remote changed: abcdef0"),
        ({"private": True}, UsageError, "is public, and private was asked for"),
        ({"pull_request": True, "revision": "v2"}, UsageError, "goes to the main branch"),
    ],
)
def test_what_cannot_be_done_there_is_refused_before_anything_is_built(options, kind, words, dry_run, hub, monkeypatch):
    hub.add_repo(REPO, {"README.md": "# theirs"})
    monkeypatch.setattr(pushing, "build_repository", lambda *_: pytest.fail("built"))
    assert words in fails(kind, tiny(), REPO, licence="mit", dry_run=dry_run, **options)
    assert not sent_anything(hub)


def test_row_77_a_no_sends_nothing(hub, unread):
    done = push(tiny(), REPO, licence="mit", progress=False, confirm=lambda plan: False)
    assert done.committed is None
    assert REPO not in hub.repos


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("log in with hf_" + "A" * 34, "a token of the Hub"),
        ("our folder is /mnt/scans/jane", "a path of a machine"),
        (f"see {Path.home()}/x", "a path of a machine"),
        ("from s3://key:secret@bucket/x", "a password"),
        ("AKIAIOSFODNN7EXAMPLE", "a key of AWS"),
    ],
)
def test_row_79_secrets_and_paths_are_refused(text, what, hub, unread):
    found = fails(UsageError, tiny(), REPO, licence="mit", about=text)
    assert f"README.md: {what}" in found
    assert "AAAA" not in found
    assert "secret" not in found
    assert not sent_anything(hub)


def test_row_79_where_local_weights_lie_is_not_published(hub, unread):
    model = tiny()
    model.encoder.origin = Origin("/home/jane/weights.pth", licence="mit")
    push(model, REPO, progress=False)
    assert {name for name, content in held(hub).items() if b"jane" in content} == set()


@pytest.mark.parametrize(
    ("changes", "origin", "files"),
    [
        ({"classes": 2, "class_names": ("cat", "/mnt/scans/jane")}, None, {"config.json"}),
        ({}, Origin("/mnt/scans/jane", "a" * 40, licence="mit"), {"config.json", "model.safetensors", "README.md"}),
    ],
)
def test_row_79_what_the_weights_and_the_configuration_say_is_searched_too(changes, origin, files, hub, unread):
    model = maehub.Encoder(maehub.EncoderConfig(16, 4, 3, 32, 2, 4, **changes)).eval()
    model.origin = origin
    text = fails(UsageError, model, REPO, licence="mit")
    assert set(re.findall(r"^(\S+): a path of a machine \(/mnt/scans/jane\)$", text, re.MULTILINE)) == files
    assert not sent_anything(hub)


SECRET = "hf_" + "A" * 34


@pytest.mark.parametrize(
    "place", ["text", "the token in use", "a name of the data", "a user name and host", "the home folder"]
)
@pytest.mark.parametrize("ending", ["json", "jsonl", "md", "txt", "csv", "sha256", "", "safetensors", "png", "jpg"])
def test_row_79_every_file_is_searched(place, ending, tmp_path, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "jdoe")
    monkeypatch.setenv("HOME", "/jane")
    words = {
        "text": SECRET,
        "the token in use": "t/o/k",
        "a name of the data": "st-marys",
        "a user name and host": "jdoe@box",
        "the home folder": "/jane",
    }
    path = tmp_path / f"x.{ending}".rstrip(".")
    if ending == "safetensors":
        save_file({"a": torch.zeros(1)}, path, {"note": words[place]})
    elif ending == "png":
        info = PngInfo()
        info.add_text("Source", words[place])
        Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    elif ending == "jpg":
        Image.new("RGB", (4, 4)).save(path, comment=words[place].encode())
    else:
        path.write_text(f"a {words[place]} b")
    with pytest.raises(UsageError) as error:
        refuse_leaks({path.name: path}, token="t/o/k", names=["st-marys"])
    _, leak, _ = str(error.value).split("\n")
    assert leak.startswith(f"{path.name}: {'a token of the Hub' if place == 'text' else place}")
    assert SECRET not in leak


@pytest.mark.parametrize("given", [True, False])
def test_row_79_push_knows_the_token_in_use_whatever_it_looks_like(given, hub, unread, monkeypatch):
    own = "of-our-own-hub"
    hub.tokens[own] = Token()
    if not given:
        monkeypatch.setenv("HF_TOKEN", own)
    about = f"log in with {own}"
    found = fails(UsageError, tiny(), REPO, licence="mit", about=about, token=own if given else None)
    assert "README.md: the token in use" in found
    assert own not in found
    assert not sent_anything(hub)


def test_row_79_push_knows_where_the_data_of_the_run_lay(hub, unread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = pretrained(Path("run"), patients(Path("scans")))
    found = fails(UsageError, run, REPO, licence="mit", about="Pictures of scans/st-marys-hospital.")
    assert "README.md: a name of the data (scans/st-marys-hospital)" in found
    assert not sent_anything(hub)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "x.pkl", "x.bin", "x.npz", "x.py", "x.html"])
def test_row_79_files_of_other_kinds_are_refused_whatever_is_in_them(name, hub, unread, monkeypatch):
    real = repository.write_members

    def more(folder, *arguments, **options):
        real(folder, *arguments, **options)
        (folder / name).write_bytes(b"harmless")

    monkeypatch.setattr(repository, "write_members", more)
    assert f"{name} is no file that a model repository has" in fails(UsageError, tiny(), REPO, licence="mit")
    assert not sent_anything(hub)


def test_row_79_nothing_that_lies_in_the_folders_goes_along(hub, unread, tmp_path):
    """Checkpoints with the state of the optimizer, logs, whatever the author put beside the model."""
    run = pretrained(tmp_path / "run", patients(tmp_path))
    assert (run / "checkpoints" / "step-3" / "optimizer.safetensors").is_file()
    for place in (run, run / "model", run / "model" / "timm"):
        place.mkdir(exist_ok=True)
        (place / "notes.txt").write_text("patient jane")
        (place / ".env").write_text(SECRET)
        (place / "optimizer.safetensors").write_bytes((run / "checkpoints/step-3/optimizer.safetensors").read_bytes())
    push(run, REPO, licence="mit", progress=False)
    assert set(held(hub)) == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("timm/model.safetensors", "recipe.json", "metrics.jsonl", "checksums.sha256"),
        *("figures/curve.png", "figures/reconstruction.png"),
    }


def test_leaks_are_found_inside_of_pictures(tmp_path):
    info = PngInfo()
    info.add_text("Source", "/home/jane/scan.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UsageError, match=r"\nx\.png: a path of a machine \(/home/jane/scan\.png\)\nTake"):
        refuse_leaks({"x.png": tmp_path / "x.png"})
    (tmp_path / "y.md").write_text("patches of /16, https://a.org/b/c, and/or, hf-hub:user/repo, 3/4 and ~90 %")
    refuse_leaks({"y.md": tmp_path / "y.md"})


@pytest.mark.parametrize(
    ("asked", "base", "expected"),
    [
        (None, Origin("vit-b", licence="CC-BY-NC-4.0"), "cc-by-nc-4.0"),
        ("CC-BY-NC-4.0", Origin("vit-b", licence="CC-BY-NC-4.0"), "cc-by-nc-4.0"),
        ("cc-by-nc-sa-4.0", Origin("vit-b", licence="CC-BY-NC-4.0"), "cc-by-nc-sa-4.0"),
        ("mit", Origin("vit-nano", licence="Apache-2.0"), "mit"),
        (None, Origin("vit-nano", licence="Apache-2.0"), "apache-2.0"),
        ("mit", None, "mit"),
        ("mit", Origin("x"), "mit"),
        ("mit", Origin("vit-b", licence="CC-BY-NC-4.0"), "does not allow mit"),
        ("apache-2.0", Origin("x", licence="gpl-3.0"), "does not allow apache-2.0"),
        ("cc-by-4.0", Origin("x", licence="cc-by-sa-4.0"), "does not allow"),
        (None, None, "name it by --licence"),
        (None, Origin("x"), "is not recorded"),
        ("All rights reserved", None, "an identifier of the Hub"),
    ],
)
def test_row_80_the_licence_of_the_base_is_inherited(asked, base, expected):
    if " " in expected:
        with pytest.raises(UsageError, match=expected):
            settle_licence(asked, base)
    else:
        assert settle_licence(asked, base).identifier == expected


def test_row_80_fine_tuned_from_non_commercial_weights(hub, unread):
    model = tiny()
    model.encoder.origin = Origin("vit-b-pixel", licence="CC-BY-NC-4.0")
    assert "does not allow mit" in fails(UsageError, model, REPO, licence="mit")
    assert not hub.log
    push(model, REPO, progress=False)
    facts = ModelCard(held(hub)["README.md"].decode()).data.to_dict()
    assert facts["license"] == "cc-by-nc-4.0"
    assert facts["base_model"] == "facebook/vit-mae-base"


def test_row_82_no_login(hub, monkeypatch, unread):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert "token" in fails(HubError, tiny(), REPO, licence="mit")
    done = push(tiny(), REPO, licence="mit", dry_run=True, progress=False)
    assert done.committed is None
    assert "was not looked at" in done.plan.describe()


# -- pictures that the author names ------------------------------------------------------------------------------------


def test_named_pictures_are_published_as_pixels_alone(hub, unread, tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x8825] = "a camera", {1: "N", 2: (48.0, 8.0, 0.0)}
    Image.new("RGB", (20, 10), MAGENTA).save(tmp_path / "jane-doe.jpg", exif=exif, comment=b"patient jane")
    push(tiny(), REPO, licence="mit", with_pictures=[tmp_path / "jane-doe.jpg"], progress=False)
    there = held(hub)
    picture = Image.open(io.BytesIO(there["pictures/1.png"]))
    assert (picture.size, dict(picture.getexif()), picture.info) == ((20, 10), {}, {})
    assert "![pictures/1.png](pictures/1.png)" in there["README.md"].decode()
    assert not any(b"jane" in content for content in there.values())


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_asks_first(hub, unread, tmp_path, capsys, monkeypatch):
    folder = str(maehub.save(tiny(), tmp_path / "model"))
    assert cli.main(["push", folder, REPO, "--licence", "mit"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not hub.log
    assert cli.main(["push", folder, REPO, "--licence", "mit", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "licence mit" in out
    assert out.endswith("nothing was sent\n")
    assert REPO not in hub.repos
    assert cli.main(["push", folder, REPO, "--licence", "mit", "--yes", "--json", "--private"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["committed"]["commit"] == hub.repos[REPO].refs["main"]
    assert {file["name"] for file in facts["plan"]["files"]} == set(held(hub))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model", "no-owner", "--yes"], "names no owner"),
        (["model", "a/b/c", "--yes"], "cannot be a repository"),
        (["missing", REPO, "--yes"], "push takes a run folder or a model folder"),
        (["model/timm", REPO, "--yes"], "has no config.json"),
        (["model", REPO, "--yes", "--licence", "mit", "--about", "missing.md"], "missing.md cannot be read"),
        (["model", REPO, "--yes", "--dry-run"], "one of the two"),
    ],
)
def test_wrong_arguments(words, text, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maehub.save(tiny(), "model")
    assert cli.main(["push", *words]) == 2
    assert text in capsys.readouterr().err
    assert not sent_anything(hub)


# -- names in the card -------------------------------------------------------------------------------------------------

HOSTILE = {
    "element": "<img src=x onerror=alert(1)>",
    "script": "</td></table><script>alert(1)</script>",
    "entity": "&lt;b&gt; &amp;",
    "link": "[press](https://evil.example)",
    "image": "![x](https://evil.example/x.png)",
    "reference": "[press][1] [^1]",
    "address": "<https://evil.example>",
    "bare": "https://evil.example www.evil.example me@evil.example",
    "cells": "a | b | c",
    "escaped": "a \\| b \\",
    "lines": "a\n\n# b\n\n- c\r\n```\nd",
    "emphasis": "**a** _b_ ~~c~~ `d`",
    "terminal": "\x1b]0;title\x07\x1b[2Jred\x9b31m",
    "direction": "\u202egpj.exe",
    "bytes": "fl\udce8che",
    "quotes": "\"'}}{{ 7*7 }}{% raw %}",
}


def card_of(name):
    """The published card, and that of a model folder, of a model around which everything is called so."""
    origin = Origin(name, licence="cc-by-4.0", sha256="0" * 64)
    encoder = maehub.EncoderConfig(image_size=16, patch_size=4, width=32, depth=2, heads=4, classes=2)
    model = maehub.Encoder(encoder)
    model.origin = origin
    row = {"name": name, "n": 3, "recall": 50.0, "precision": None}
    scores = {"n": 6, "top1": 50.0, "low": 10.0, "high": 90.0, "per_class": [row, row]}
    told = Provenance(
        "finetune", f"maehub finetune DATA --model {name!r}", {}, name, {"maehub": name}, scores=scores, split=name
    )
    verdict = Verdict({"maehub": name, "timm": name}, {"transformers": name})
    licence = Licence("cc-by-4.0", f"inherited from {name}")
    whole = published_card(REPO, model, licence, told, verdict, "**about**", name, {"curve": "figures/curve.png"}, [])
    return whole, model_card(name, encoder, model.preprocess, origin)


def shown(card):
    """Tags of a card, and its text, as a reader's browser has them."""
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(ModelCard(card).text)
    tags = re.findall(r"<(/?\w+)[^>]*>", html)
    return tags, unescape(re.sub(r"<[^>]+>", "", html))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_name_is_nothing_but_text_in_a_card(kind):
    name = HOSTILE[kind]
    for card, plain in zip(card_of(name), card_of("name"), strict=True):
        tags, text = shown(card)
        assert tags == shown(plain)[0]
        assert visible(" ".join(name.split())) in text
        assert visible(card, "\n") == card
        ModelCard(card).data.to_dict()


@pytest.mark.parametrize("kind", HOSTILE)
def test_bare_addresses_are_no_links_where_readers_make_them(kind):
    escaped = markdown_text(HOSTILE[kind])
    assert not re.search(r"https?://|www\.\w|\w@\w", escaped)


# -- what files say besides their pixels, and names of the author's files ----------------------------------------------

WORD = "Geheimsache"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + WORD.encode()
RESOURCE = b"Photoshop 3.0\0" + WORD.encode()
XMP = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a>{WORD}</a></x:xmpmeta>'.encode()


def exif():
    tags = Image.Exif()
    tags[0x010E] = tags[0x013B] = WORD
    tags.get_ifd(0x8769)[0x9286] = WORD.encode()
    return tags


def text(**how):
    info = PngInfo()
    (info.add_itxt if how.pop("international", False) else info.add_text)("Comment", WORD, **how)
    return info


def tiff_tags():
    tags = ImageFileDirectory_v2()
    for number in (269, 270, 271, 272, 285, 305, 315, 316, 33432):
        tags[number] = WORD
    tags[33723] = tags[700] = WORD.encode()
    return tags


KINDS = {
    "exif.jpg": lambda: {"exif": exif()},
    "icc.jpg": lambda: {"icc_profile": PROFILE},
    "xmp.jpg": lambda: {"xmp": XMP},
    "comment.jpg": lambda: {"comment": WORD},
    "app13.jpg": lambda: {"extra": b"\xff\xed" + struct.pack(">H", 2 + len(RESOURCE)) + RESOURCE},
    "text.png": lambda: {"pnginfo": text()},
    "ztxt.png": lambda: {"pnginfo": text(zip=True)},
    "itxt.png": lambda: {"pnginfo": text(international=True)},
    "itxt-z.png": lambda: {"pnginfo": text(international=True, zip=True)},
    "exif.png": lambda: {"exif": exif()},
    "icc.png": lambda: {"icc_profile": PROFILE},
    "exif.webp": lambda: {"exif": exif()},
    "icc.webp": lambda: {"icc_profile": PROFILE},
    "xmp.webp": lambda: {"xmp": XMP},
    "tags.tif": lambda: {"tiffinfo": tiff_tags()},
    "icc.tif": lambda: {"icc_profile": PROFILE},
    "exif.tif": lambda: {"exif": exif()},
}  # fmt: skip


def says(data):
    """Whether a picture holds the word, also where it is compressed."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
        warnings.simplefilter("ignore")
        picture.load()
        tags = [*picture.getexif().values(), *picture.getexif().get_ifd(0x8769).values(), *picture.info.values()]
    return WORD in repr(tags) or WORD.encode() in data


@pytest.mark.parametrize("dry_run", [True, False])
def test_no_picture_is_published_with_more_than_its_pixels(hub, unread, tmp_path, monkeypatch, dry_run):
    for name, options in KINDS.items():
        pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, **options())
        assert says((tmp_path / name).read_bytes()), name
    sent = {}

    def kept(files, **_):
        sent.update({name: path.read_bytes() for name, path in files.items()})

    monkeypatch.setattr(pushing, "refuse_leaks", kept)
    pictures = [tmp_path / name for name in KINDS]
    push(tiny(), REPO, licence="mit", with_pictures=pictures, progress=False, dry_run=dry_run)
    there = held(hub) if not dry_run else sent
    published = [there[f"pictures/{number + 1}.png"] for number in range(len(KINDS))]
    assert [name for name, data in zip(KINDS, published, strict=True) if says(data)] == []
    for data in published:  # what this test does not know of is not in it either
        chunks, place = set(), 8
        while place < len(data):
            chunks.add(data[place + 4 : place + 8])
            place += 12 + int.from_bytes(data[place : place + 4])
        assert chunks == {b"IHDR", b"IDAT", b"IEND"}
    assert not [name for name, data in there.items() if WORD.encode() in data]


def started_from(tmp_path, monkeypatch):
    """A run that began with a folder of the author's, which has the form of a Hub id."""
    data = patients(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    network = maehub.EncoderConfig(image_size=16, patch_size=4, width=32, depth=2, heads=4)
    maehub.save(tiny(encoder=network), Path(WORD, "vit-b"))
    return pretrained(tmp_path / "run", data, from_=f"{WORD}/vit-b")


@pytest.mark.parametrize("recorded", ["as it is now", "as version 0.1 did"])
def test_a_folder_of_the_author_is_no_name_of_the_hub(hub, unread, tmp_path, monkeypatch, recorded):
    run = started_from(tmp_path, monkeypatch)
    if recorded == "as version 0.1 did":
        config = json.loads((run / "config.json").read_text()) | {"from_": f"{WORD}/vit-b"}
        (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    push(run, REPO, licence="mit", progress=False)
    there = held(hub)
    assert not [name for name, content in there.items() if WORD.encode() in content]
    card = there["README.md"].decode()
    assert "fresh weights" not in card
    assert "It started from weights that are not public." in card
    assert "MODEL" in json.loads(there["recipe.json"])["command"]


def test_the_name_of_a_converted_pickle_stays_here(hub, unread, tmp_path):
    model = tiny()
    torch.save({"model": model.state_dict()}, tmp_path / f"{WORD}.pth")
    folder = tmp_path / "model"
    maehub.convert(tmp_path / f"{WORD}.pth", folder, heads=4, decoder_heads=4, target="pixels")
    assert WORD in (folder / "config.json").read_text()
    push(folder, REPO, licence="mit", progress=False)
    there = held(hub)
    assert {"README.md", "config.json", "model.safetensors", "timm/model.safetensors"} <= set(there)
    assert not [name for name, content in there.items() if WORD.encode() in content]
    assert "fresh weights" not in there["README.md"].decode()


@pytest.mark.parametrize(
    ("name", "origin", "told"),
    [
        ("vit-b", None, "vit-b"),
        ("untrained/vit-b", None, "untrained/vit-b"),
        ("user/repo", Origin("user/repo", "a" * 40), "user/repo"),
        ("user/repo", None, "MODEL"),
        ("user/repo", Origin("vit-b", "a" * 40), "MODEL"),
        ("user/repo", Origin("user/repo"), "MODEL"),
        ("/home/jane/vit-b", None, "MODEL"),
        ("./vit-b", None, "MODEL"),
    ],
)
def test_only_what_was_downloaded_has_a_name_of_the_hub(name, origin, told):
    assert _public_name(name, origin) == told


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        (Origin("vit-b-pixel", licence="cc-by-nc-4.0"), "facebook/vit-mae-base"),
        (Origin("vit-b"), ""),  # a folder or file that is called so
        (Origin("user/repo@v1", "a" * 40), "user/repo"),
        (Origin("user/repo"), ""),
        (Origin("x.pth", licence="mit"), ""),
        (None, ""),
    ],
)
def test_a_base_is_named_where_anybody_can_have_it(origin, told):
    public = public_origin(origin, "")
    assert base_model_of(public) == told
    if not told and origin:
        assert (public.name, public.licence) == ("weights that are not public", origin.licence)


def test_what_a_killed_push_left_goes_at_the_next_one(hub, unread, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, pathlib, signal; from maehub.files import own_folder\n"
        f"with own_folder(pathlib.Path({str(tmp_path)!r}, 'maehub-push')) as folder:\n"
        "    (folder / 'weights').write_text('mine'); os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM
    (rest,) = tmp_path.iterdir()
    (tmp_path / ".maehub-push.mine.partial").write_text("decoy")
    push(tiny(), REPO, licence="mit", progress=False, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == [".maehub-push.mine.partial"], rest


# ---- segmenters and detectors


def dense_of(kind):
    """A small segmenter or detector, and its own loader and saver."""
    encoder = maehub.Encoder(maehub.EncoderConfig(32, 8, 3, 24, 2, 2))
    torch.manual_seed(0)
    if kind == "segmenter":
        classes = MapClasses(("sea", "land"), (0, 1), (0, 1))
        return Segmenter(encoder, SegmenterConfig(classes)), maehub.load_segmenter, maehub.save_segmenter
    config = DetectorConfig(ObjectClasses(("ship", "buoy"), (1, 2)), True, 16, 0, 32)
    return Detector(encoder, config), maehub.load_detector, save_detector


@pytest.mark.parametrize("kind", ["segmenter", "detector"])
def test_what_tells_pixels_and_objects_is_published_and_loaded_again(kind, hub, unread, tmp_path):
    model, load, save = dense_of(kind)
    save(model, tmp_path / "model")
    done = push(tmp_path / "model", REPO, licence="mit", progress=False)
    assert {f"{kind}.json", f"{kind}.safetensors", "config.json", "model.safetensors"} <= set(done.committed.uploaded)
    again = load(REPO)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    card = held(hub)["README.md"].decode()
    assert f"maehub.load_{kind}(" in card
    assert all(name in card for name in model.config.classes.names)
    tag = {"segmenter": "image-segmentation", "detector": "object-detection"}[kind]
    assert f"pipeline_tag: {tag}" in card
    assert maehub.load(REPO).config.depth == 2


def test_the_numbers_of_a_run_stand_in_its_card(hub, unread, tmp_path):
    lay_maps(tmp_path / "d", 20)
    config = FinetuneConfig(
        str(tmp_path / "d"), tmp_path / "run", model="vit-nano", task="segment", steps=2, batch_size=4, workers=0,
        image_size=(32,), device="cpu", quiet=True, skip_twins=True,
    )  # fmt: skip
    finetune(config)
    push(tmp_path / "run", REPO, progress=False)
    card = held(hub)["README.md"].decode()
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert f"| mIoU | {scores['miou']:.1f} % |" in card
    assert "| class | pictures | IoU | found | precision |\n|---|---|---|---|---|\n" in card
    assert "figures/accuracy.png" in card
    assert "mean_iou" in card
    html = MarkdownIt("commonmark").enable("table").render(card)
    assert html.count("<table>") == 2
