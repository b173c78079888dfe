"""What `maehub push` publishes: a repository that every named library reads, and nothing of the author's data."""

import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_writes import Token
from huggingface_hub import ModelCard
from PIL import Image

import maehub
from maehub.cli import command_line as cli
from maehub.errors import HubError, IntegrityError, MaehubError, UsageError
from maehub.models.encoder import Origin
from maehub.publishing import pushing, repository
from maehub.publishing.gate import Verdict
from maehub.publishing.leaks import refuse_leaks
from maehub.publishing.licences import settle_licence
from maehub.publishing.pushing import push
from maehub.train import FinetuneConfig, PretrainConfig, finetune, pretrain

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
        (lambda: tiny(mask_tokens="encoder"), "mask tokens"),
        (lambda: tiny(target="pca", outputs=6), "predicts pixels"),
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
        from safetensors.torch import save_file

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
    assert re.search(r"model\.safetensors +\d+\.\d kB  [0-9a-f]{12}  new", text)
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


def test_row_79_what_the_weights_say_of_their_origin_is_searched_too(hub, unread):
    model = tiny()
    model.encoder.origin = Origin("/home/jane/weights.pth", licence="mit")
    text = fails(UsageError, model, REPO)
    assert "model.safetensors: a path of a machine" in text
    assert not sent_anything(hub)


def test_leaks_are_found_inside_of_pictures(tmp_path):
    from PIL.PngImagePlugin import PngInfo

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
