"""Convert weights between the forms in which they are published, and make pickles safe to load.

This is the only place that opens a pickle, and it opens it with torch's restricted reader: tensors and plain values
come out, no code runs.
"""

import argparse
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.serialization import safe_globals

from maehub.autoencoder import AutoencoderConfig, MaskedAutoencoder, Target
from maehub.building import build_autoencoder, build_encoder
from maehub.catalog import published_as
from maehub.encoder import Encoder, EncoderConfig, Origin
from maehub.errors import IntegrityError, UsageError
from maehub.folders import check_free, whole_folder
from maehub.images import Preprocess
from maehub.keys import to_official
from maehub.shapes import infer_config
from maehub.tensorfile import read_tensors
from maehub.verification import digest
from maehub.weights import MEMBERS, find_model_folder, open_autoencoder, open_encoder, read_config, write_members

log = logging.getLogger("maehub")

Form = Literal["maehub", "official", "timm", "transformers"]
"""What `convert` writes. Each is a folder that maehub loads too."""

LARGEST_DIFFERENCE = 1e-5
"""Largest difference, relative to the largest output, that a reloaded network may show."""

# The restricted reader was itself exploitable before (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)

_WRAPPED_IN = ("model", "state_dict", "model_state_dict")
_PICKLE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")


class Conversion(NamedTuple):
    """What `convert` wrote."""

    folder: Path
    difference: float  # largest, relative to the largest output, after reloading
    dropped: tuple[str, ...]  # tensors and entries that were left out on purpose


class _Source(NamedTuple):
    state: dict[str, Tensor]  # official names
    config: EncoderConfig | AutoencoderConfig
    preprocess: Preprocess | None
    origin: Origin
    where: str
    dropped: tuple[str, ...]


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    to: Form = "maehub",
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: Target | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert the official, timm or transformers form of a model to another; the same input gives the same bytes.

    The result is loaded again and compared on a fixed input before it gets its name. Weights are written in float32.

    Args:
        source: a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, or a folder with one and perhaps its
            ``config.json``.
        folder: what is written; must not exist or be empty, unless ``overwrite``.
        to: ``"maehub"``: a model folder for all three libraries. ``"official"``: the official names. ``"timm"``: the
            encoder for timm. ``"transformers"``: for ViTMAEForPreTraining, ViTModel or ViTForImageClassification.
        heads: attention heads of the encoder, where neither a configuration nor the published networks tell.
        decoder_heads: of the decoder, where its width is not 512.
        target: what the decoder was trained to predict; without it ``"unknown"``, unless a configuration says it.
        overwrite: replace a model folder.

    Raises:
        UsageError: there is no such file, the folder is in use, or something must be said (``heads`` …).
        IntegrityError: the file is broken, hostile, or no masked autoencoder; nothing is written.
        CheckpointError: the disk is full or cannot be written.
    """
    if to not in get_args(Form):
        raise UsageError(f"to={to!r} is not one of {', '.join(get_args(Form))}")
    check_free(folder, overwrite, MEMBERS)
    read = _read(Path(source), heads, decoder_heads, target)
    build = build_autoencoder if isinstance(read.config, AutoencoderConfig) and to != "timm" else build_encoder
    model = build(read.state, read.config, read.preprocess, origin=read.origin, where=read.where)
    with whole_folder(folder, overwrite=overwrite, members=MEMBERS) as staging:
        write_members(staging, Path(folder).absolute().name, model, layout="maehub" if to == "timm" else to)
        difference = _difference(model, staging)
        if not difference <= LARGEST_DIFFERENCE:
            raise IntegrityError(
                f"{read.where}: the converted network differs from the original by {difference:.1e}, more than "
                f"{LARGEST_DIFFERENCE:.0e} of the largest output; nothing was written"
            )
    return Conversion(Path(folder), difference, read.dropped)


def read_pickle(path: str | Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a PyTorch pickle, read without running code.

    Args:
        path: a ``.pth`` or ``.bin`` file: a dictionary of tensors, or one inside ``{"model": …}``.

    Returns:
        The tensors under the names of the file, and the names of what else it has (``optimizer``, ``args`` …).

    Raises:
        UsageError: this torch is too old to read pickles safely.
        IntegrityError: the file is broken, or asks for more than tensors.
    """
    version = torch.__version__
    if version < _SAFE_TORCH:  # type: ignore[operator]
        raise UsageError(
            f"reading the pickle {path} needs torch {_SAFE_TORCH[0]}.{_SAFE_TORCH[1]} or newer, and this is {version}: "
            "the restricted reader of older ones can be broken out of. Nothing was read; update torch"
        )
    try:
        # The training checkpoints of the official code hold their command line as a Namespace.
        with safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        wants = f"it asks for {asked[1]}" if asked else "it is damaged, or asks for what is not allowed"
        raise IntegrityError(f"{path} is not a file of tensors alone: {wants}. No code in it was run") from error
    except Exception as error:  # a damaged pickle raises nearly every type there is
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise IntegrityError(f"{path} cannot be read: {reason}. No code in it was run") from error
    return _unwrapped(content, path)


def _unwrapped(content: Any, path: str | Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    beside: list[str] = []
    while isinstance(content, dict):
        inner = next((key for key in _WRAPPED_IN if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        beside += [str(key) for key in content if key != inner]
        content = content[inner]
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{path} holds no dictionary of tensors but a {type(content).__name__}")
    others = [
        str(name) for name, value in content.items() if not isinstance(value, Tensor) or value.layout != torch.strided
    ]
    if others:
        raise IntegrityError(f"{path} holds other things than plain tensors: {', '.join(others[:5])}")
    if not all(isinstance(name, str) for name in content):
        raise IntegrityError(f"{path} holds tensors under keys that are no text")
    return content, tuple(beside)


def _read(path: Path, heads: int | None, decoder_heads: int | None, target: Target | None) -> _Source:
    """Tensors, configuration and origin of a file or folder."""
    config, file = _find(path)
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    if _is_pickle(file):
        tensors, beside = read_pickle(file)
    else:
        tensors, beside = read_tensors(file).tensors, ()
    official = to_official(tensors)
    dropped = beside + official.dropped
    if dropped:
        log.info("%s: left out %s", file, ", ".join(dropped))
    origin = _origin(file, file.name if file == path else path.name)
    if config is None:
        network = infer_config(official.state, heads=heads, decoder_heads=decoder_heads, target=target, where=str(file))
        return _Source(official.state, network, None, origin, str(file), dropped)
    known = read_config(config, file, heads=heads, decoder_heads=decoder_heads, target=target, state=official.state)
    if known.origin:
        origin = Origin(known.origin.name, known.origin.revision, origin.sha256, known.origin.licence)
    return _Source(official.state, known.config, known.preprocess, origin, str(file), dropped)


def _origin(file: Path, name: str) -> Origin:
    """Where a file comes from: a published one is known by its content, and so is its licence."""
    hashes = digest(file, "md5")
    info = published_as(hashes.sha256, hashes.other)
    return Origin(info.name if info else name, sha256=hashes.sha256, licence=info.licence if info else "")


def _find(path: Path) -> tuple[Path | None, Path]:
    """The configuration, if there is one, and the weights."""
    if not path.is_dir():
        return None, path
    folder = find_model_folder(path)
    config = folder / "config.json"
    weights = folder / "model.safetensors"
    if not weights.exists():
        pickles = [entry for entry in folder.iterdir() if entry.suffix in _PICKLE_ENDINGS and entry.is_file()]
        usual = [entry for entry in pickles if entry.name == "pytorch_model.bin"] or pickles
        if len(usual) != 1:
            names = ", ".join(sorted(entry.name for entry in usual)) or "none"
            raise UsageError(f"{folder} has no model.safetensors and not one pickle but {names}; name the file")
        weights = usual[0]
    return config if config.exists() else None, weights


def _is_pickle(file: Path) -> bool:
    """By content where it shows, else by name."""
    with open(file, "rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{":
        return False
    return start[:4] == b"PK\x03\x04" or file.suffix in _PICKLE_ENDINGS


def _difference(model: Encoder | MaskedAutoencoder, folder: Path) -> float:
    """The largest difference between a network and what a folder gives, relative to the largest output."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    pairs = [(_tokens(open_encoder(folder)), _tokens(encoder))]
    if isinstance(model, MaskedAutoencoder):
        pairs.append((_prediction(open_autoencoder(folder)), _prediction(model)))
    return max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


@torch.inference_mode()
def _tokens(encoder: Encoder) -> Tensor:
    images = _fixed_images(encoder.config)
    return torch.cat([encoder(images).flatten(), encoder.features(images, pool="tokens").flatten()])


@torch.inference_mode()
def _prediction(autoencoder: MaskedAutoencoder) -> Tensor:
    return autoencoder(_fixed_images(autoencoder.config.encoder)).prediction


def _fixed_images(config: EncoderConfig) -> Tensor:
    """One image that is the same everywhere and no two values of which repeat: (1, C, H, W)."""
    values = torch.arange(config.channels * config.size[0] * config.size[1], dtype=torch.float64)
    return (2 * (values * 0.618033988749895).sin()).float().reshape(1, config.channels, *config.size)
