"""What a repository must pass before anything is sent: it loads in every library that it names, and computes the same.

Each library reads it in a process of its own, in which maehub is not imported, as if from the Hub: from a cache that
holds this one repository.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from maehub.conversion import LARGEST_DIFFERENCE, difference, fixed_images
from maehub.errors import IntegrityError
from maehub.files import own_folder
from maehub.models import Encoder, MaskedAutoencoder, make_masks
from maehub.version import __version__
from maehub.weights import open_autoencoder, open_encoder, read_tensors, why_not_transformers, write_tensors

_REPO, _COMMIT = "maehub/gate", "0" * 40
_SECONDS = 900  # that a library may take to read and compute


class Verdict(NamedTuple):
    """What the libraries make of a repository."""

    verified: dict[str, str]  # library to the version that computes the same; maehub first
    missing: dict[str, str]  # library to why it is not among them, as the end of "since …"


@torch.inference_mode()
def check_repository(folder: Path, model: Encoder | MaskedAutoencoder) -> Verdict:
    """Load a folder again with maehub and every library that could compute it, and compare on a fixed input.

    ``model``, on the CPU and in eval mode, is what the folder was made of.
    """
    encoder = model if isinstance(model, Encoder) else model.encoder
    config = encoder.config
    images = fixed_images((2, config.channels, *config.size))
    inputs, expected, read = {"images": images}, {"forward": encoder(images)}, {"forward": open_encoder(folder)(images)}
    verified, missing = {"maehub": __version__}, {}
    if isinstance(model, Encoder):
        missing["transformers"] = "this folder has an encoder in timm's layout"
    else:
        rows, columns = (side // config.patch_size for side in config.size)
        masked = make_masks("random", torch.tensor([0, 1]), (rows, columns), 0.75)
        # transformers keeps the patches with the least noise, in its order; this is ours.
        inputs["noise"] = masked.float() + torch.arange(rows * columns) / (2 * rows * columns)
        tokens = encoder.norm(encoder.encode(encoder.embed(images)))
        expected |= {"prediction": model(images, masked).prediction, "tokens": tokens}
        read["prediction"] = open_autoencoder(folder)(images, masked).prediction
        if reason := why_not_transformers(model.config):
            missing["transformers"] = reason
    _compare("maehub", read, expected)
    for library in ("timm", "transformers"):
        if library in missing:
            continue
        try:
            installed = version(library)
        except PackageNotFoundError:
            missing[library] = "it was not installed where this was made, so it was not tried"
            continue
        _compare(library, _read_back(folder, library, inputs), expected)
        verified[library] = installed
    return Verdict(verified, missing)


def _read_back(folder: Path, library: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What another library computes, in a process whose Hub is a cache with this repository alone."""
    with own_folder(Path(tempfile.gettempdir(), "maehub-gate"), 0o700) as home:
        repo = home / "hub" / f"models--{_REPO.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(_COMMIT)
        (repo / "snapshots").mkdir()
        (repo / "snapshots" / _COMMIT).symlink_to(folder.resolve(), target_is_directory=True)
        write_tensors(home / "inputs.safetensors", inputs, {}, torch.float32)
        files = {side: str(home / f"{side}.safetensors") for side in ("inputs", "outputs")}
        (home / "job.json").write_text(json.dumps({"library": library, "repo": _REPO} | files))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
        script = str(Path(__file__).resolve().with_name("round_trip.py"))
        try:
            done = subprocess.run(
                [sys.executable, "-P", script, "job.json"],  # -P: its neighbours must not hide other modules
                env=environment | offline | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1"},
                cwd=home,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise IntegrityError(f"{library} did not read this repository in {_SECONDS} s; nothing was sent") from error
        if done.returncode:
            last_line = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it was killed")
            raise IntegrityError(
                f"{library} {version(library)} does not read this repository: {last_line:.300}; nothing was sent\n"
                f"if that is of {library} itself, install another version of it, or push where it is not installed"
            )
        return {name: tensor.clone() for name, tensor in read_tensors(home / "outputs.safetensors").tensors.items()}


def _compare(library: str, outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse outputs that are not the model's."""
    for name, tensor in outputs.items():
        if tensor.shape != expected[name].shape:
            raise IntegrityError(
                f"read with {library} this repository gives {name} of shape {list(tensor.shape)}, and the model "
                f"{list(expected[name].shape)}; nothing was sent"
            )
        relative = difference(tensor, expected[name]).relative
        if not relative <= LARGEST_DIFFERENCE:  # NaN too
            raise IntegrityError(
                f"read with {library} this repository computes {name} otherwise than the model: the largest difference "
                f"is {relative:.1e} of the largest output, more than {LARGEST_DIFFERENCE:.0e}; nothing was sent"
            )
