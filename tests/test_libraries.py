"""Model folders in other libraries, without maehub: as old and as new as ``config.json`` claims.

Here with the installed versions. scripts/test-libraries installs others and names their interpreters in
MAEHUB_LIBRARIES; MAEHUB_FOLDER names a model folder that is checked too.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import torch
from peers import TINY, autoencoder_config, images, make_autoencoder, make_encoder, noise_for, official
from PIL import Image
from safetensors.torch import save_file

import maehub
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import Encoder
from maehub.train.pretraining.objective import Components, store_components
from maehub.weights.tensorfile import read_tensors

PYTHONS = os.environ.get("MAEHUB_LIBRARIES", sys.executable).split(":")
ROOT = Path(__file__).parent.parent
READER = ROOT / "tests" / "library_reader.py"
PICTURE = Path(maehub.__file__).parent / "assets" / "cat.jpg"
TOLERANCE = 1e-5


def models():
    """One of each kind that a folder is written of, the embedded model first."""
    nano = maehub.load_autoencoder("vit-nano")
    named = replace(TINY, classes=3, pool="mean", class_names=("cat", "dog", "newt"))
    yield "vit-nano", nano
    yield "normalised", make_autoencoder(autoencoder_config("tiny", TINY, "normalised_pixels"))
    yield "encoder", maehub.load("vit-nano")
    yield "wide", make_encoder(replace(TINY, image_size=(32, 48), channels=4))
    yield "classifier", make_encoder(replace(TINY, classes=5))
    yield "mean-pooled", make_encoder(named)
    yield "not-square", make_autoencoder(autoencoder_config("tiny", replace(TINY, image_size=(32, 48))))
    yield "pca", with_components(AutoencoderConfig(TINY, 32, 2, 4, "pca", outputs=16))
    yield "mask-tokens", make_autoencoder(AutoencoderConfig(TINY, 32, 2, 4, mask_tokens="encoder"))


NO_CLAIM = ("not-square", "pca", "mask-tokens")


def with_components(config):
    model = make_autoencoder(config)
    basis = torch.linalg.qr(torch.randn(config.patch_values, config.outputs)).Q.T
    store_components(model, Components(torch.randn(config.patch_values), basis))
    return model


@torch.inference_mode()
def expected_of(model):
    """What maehub computes, by name."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    config = encoder.config
    pictures = images(config)
    found = {"images": pictures, "output": encoder(pictures)}
    if config.pool == "cls":
        found["tokens"] = encoder.norm(encoder.encode(encoder.embed(pictures)))
    if isinstance(model, MaskedAutoencoder):
        output = model(pictures, seeds=[5, 6])
        found |= {"mask": output.masked.float(), "noise": noise_for(output.masked).float()}
        found |= {"prediction": output.prediction, "loss": output.loss[None]}
        if encoder.preprocess.crop_fraction == 1:  # an odd margin is cut elsewhere
            found["pixels"] = encoder.preprocess(picture())[None]
    return {name: value.contiguous() for name, value in found.items()}


def picture():
    """Wide, so that a processor that squashes shows, and scaled without a remainder."""
    with Image.open(PICTURE) as opened:
        return opened.convert("RGB").resize((288, 192))


def in_hub_cache(cache, name, folder):
    """Lay a folder out as the Hub's client caches a repository."""
    repo, commit = cache / f"models--maehub--{name}", "0123456789" * 4
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)


def claims(folder):
    return json.loads((folder / "config.json").read_text())["maehub"]["verified"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folders, what they compute, and a plan for the reader, which knows nothing of maehub."""
    work = tmp_path_factory.mktemp("libraries")
    (work / "folders").mkdir()
    (work / "expected").mkdir()
    picture().save(work / "picture.png")
    plan = {}

    def add(name, model, folder):
        save_file(expected_of(model), work / "expected" / f"{name}.safetensors")
        in_hub_cache(work / "hub", name, folder)
        kind = "encoder" if isinstance(model, Encoder) else "autoencoder"
        plan[name] = {"kind": kind, "transformers": "transformers" in claims(folder)}

    for name, model in models():
        add(name, model, maehub.save(model, work / "folders" / name))
    if given := os.environ.get("MAEHUB_FOLDER"):
        shutil.copytree(given, work / "folders" / "given")
        is_autoencoder = json.loads((Path(given) / "config.json").read_text())["maehub"]["kind"] == "autoencoder"
        model = (maehub.load_autoencoder if is_autoencoder else maehub.load)(given)
        add("given", model, work / "folders" / "given")
    (work / "plan.json").write_text(json.dumps(plan))
    return work


@pytest.fixture(scope="module", params=PYTHONS, ids=lambda python: Path(python).parent.parent.name)
def report(work, request):
    """What the libraries of one environment make of the folders."""
    command = [request.param, "-W", "ignore", str(READER), str(work)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, timeout=280, env=env, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif("MAEHUB_LIBRARIES" not in os.environ, reason="scripts/test-libraries makes the environments")
@pytest.mark.parametrize("python", PYTHONS)
def test_maehub_is_not_in_the_other_environments(python):
    command = [python, "-P", "-c", "import torch, maehub"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert "No module named 'maehub'" in done.stderr


def test_every_output_is_the_same(report):
    levels = {name: value for name, value in report["differences"].items() if name.endswith("grey levels")}
    outputs = {name: value for name, value in report["differences"].items() if name not in levels}
    assert {name: value for name, value in outputs.items() if not value <= TOLERANCE} == {}
    assert {name: value for name, value in levels.items() if not value <= 1.5} == {}
    assert len(outputs) > 30
    assert any(name.startswith("vit-nano ViTModel") for name in outputs)


def test_no_tensor_is_missing_or_too_many(report):
    assert report["keys"] == {}


def test_transformers_claims(work):
    assert {name for name, _ in models() if "transformers" in claims(work / "folders" / name)} == {
        "vit-nano",
        "normalised",
    }


@pytest.mark.parametrize("name", NO_CLAIM)
def test_what_transformers_cannot_compute_is_saved_without_its_claim(work, name):
    folder = work / "folders" / name
    values = json.loads((folder / "config.json").read_text())
    assert "model_type" not in values
    assert "architectures" not in values
    assert values["maehub"]["verified"].keys() == {"timm"}
    assert not (folder / "preprocessor_config.json").exists()
    names = set(read_tensors(folder / "model.safetensors").tensors)
    assert names == set(official(maehub.load_autoencoder(folder)))
    card = (folder / "README.md").read_text()
    assert "ViTMAEForPreTraining" not in card


def test_what_transformers_saves_again_is_read(work, report):
    """5.x saves the decoder under names of its own, which older versions do not read."""
    version = report["versions"]["transformers"]
    for name in ("vit-nano", "normalised"):
        ours = maehub.load_autoencoder(work / "folders" / name)
        again = maehub.load_autoencoder(work / "again" / f"{name}-{version}")
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


def test_the_claimed_versions_are_run(work):
    """The oldest and the newest of each library that a folder claims are among the environments."""
    script = (ROOT / "scripts" / "test-libraries").read_text()
    for library, versions in claims(work / "folders" / "vit-nano").items():
        for version in [versions] if isinstance(versions, str) else versions:
            assert f"{library}=={version}" in script or version == installed(library), f"{library} {version}"
