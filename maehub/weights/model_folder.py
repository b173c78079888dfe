"""Model folders: what is loaded and published.

    config.json                  transformers' keys, timm's keys, and ours under "maehub"
    model.safetensors            every tensor, under the names of transformers 4.x
    timm/model.safetensors       the encoder, queries, keys and values fused
    preprocessor_config.json     transformers' image processor
    README.md                    the model card

This is the folder of an autoencoder. Where transformers would not compute the same, ``model.safetensors`` has the
official names, and there are no keys of transformers and no processor. The folder of an encoder or classifier is a
plain timm one with our block.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import torch
from torch import Tensor

from maehub.errors import IntegrityError, UsageError, log
from maehub.files import atomic_write, check_free, free_space_guard, read_json, whole_folder, write_json, write_text
from maehub.images import Preprocess
from maehub.models import AutoencoderConfig, Encoder, EncoderConfig, MaskedAutoencoder, Origin, Target
from maehub.version import __version__
from maehub.weights import config_json
from maehub.weights.building import AS_STORED, LoadOptions, Network, build, check_finite
from maehub.weights.config_inference import NO_HINTS, Config, Hints, infer_config, refusing, with_target
from maehub.weights.keys import from_official, to_official
from maehub.weights.library_settings import timm_transform, transformers_transform, with_class_names
from maehub.weights.model_card import model_card
from maehub.weights.tensorfile import read_header, read_tensors, write_tensors

Layout = Literal["maehub", "official", "transformers"]
"""``maehub`` is the folder above; ``official`` has its names and our block; ``transformers`` its part."""

_CONFIG = "config.json"
_TENSORS = "model.safetensors"
_PROCESSOR = "preprocessor_config.json"
MEMBERS = (_CONFIG, _TENSORS, "timm", _PROCESSOR, "README.md", "certificate.json")
"""What a model folder is made of; saving over one replaces these and keeps the rest."""

_PACKED = "maehub_config"  # our block in the header of a file that holds a whole model, as the embedded one does


@dataclass(frozen=True)
class ModelFolder:
    """A folder or file that was read, its tensors apart."""

    config: Config
    preprocess: Preprocess | None  # None: the published evaluation
    origin: Origin | None
    tensors: Path  # every tensor
    encoder_tensors: Path  # the encoder, fused; the same file where there is no second one
    sha256: dict[str, str] = field(default_factory=dict)  # recorded when saved, by name inside the folder
    state: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)  # if read, official names


def save(
    model: Encoder | MaskedAutoencoder,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder, which maehub loads and, where they can compute the same, timm and transformers load too.

    The folder appears whole or not at all; saving over the folder that the model was loaded from is safe.

    Args:
        model: an `Encoder` or a `MaskedAutoencoder`.
        folder: must not exist or be empty, unless ``overwrite``.
        dtype: of the weights on disk; None means float32.
        card: Markdown for the model card: what the model was trained on, what was measured.
        overwrite: replace a model folder. Files in it that are not part of one are kept.

    Returns:
        ``folder``.

    Raises:
        UsageError: the folder is in use, or the model is neither.
        IntegrityError: the weights hold NaN or infinity.
        CheckpointError: the disk is full or cannot be written; what was there is untouched.
    """
    folder = Path(folder)
    if not isinstance(model, Encoder | MaskedAutoencoder):
        raise UsageError(f"save takes an Encoder or a MaskedAutoencoder, not a {type(model).__name__}")
    dtype = dtype or torch.float32
    check_free(folder, overwrite, MEMBERS)
    copies = 1 if isinstance(model, Encoder) else 2
    free_space_guard(folder, copies * sum(value.numel() for value in model.state_dict().values()) * dtype.itemsize)
    with whole_folder(folder, overwrite=overwrite, members=MEMBERS) as staging:
        write_members(staging, folder.absolute().name, model, dtype=dtype, card=card)
    return folder


def write_members(
    staging: Path,
    name: str,
    model: Encoder | MaskedAutoencoder,
    *,
    layout: Layout = "maehub",
    dtype: torch.dtype = torch.float32,
    card: str | None = None,
) -> None:
    """Write every file of a model folder into an empty one; see `save` and `Layout`."""
    preprocess, config = model.preprocess, model.config
    origin = model.origin if isinstance(model, Encoder) else model.encoder.origin
    state = to_official(model.state_dict()).state
    check_finite(state, "the weights to save")
    metadata = {"format": "pt", "maehub": __version__}
    if origin:
        sources = {"source": origin.name, "source_revision": origin.revision, "source_sha256": origin.sha256}
        metadata |= {key: value for key, value in sources.items() if value}
    whole = config if layout == "maehub" and isinstance(config, AutoencoderConfig) else None
    is_theirs = layout == "transformers" or (whole and not config_json.why_not_transformers(whole))
    values = config_json.transformers_config(config, dtype) if is_theirs else {}
    files = {_TENSORS: from_official(state, "transformers-4" if is_theirs else "official")}
    if is_theirs:
        processor = config_json.transformers_processor(preprocess)
        write_json(staging / _PROCESSOR, processor)
        # A local folder with timm's pretrained_cfg is one of timm to transformers, which then looks here for it.
        values |= processor if whole else {}
    if whole:
        files[config_json.TIMM_ENCODER] = from_official(state, "timm")
        values |= config_json.timm_config(whole.encoder, preprocess, origin, config_json.TIMM_ENCODER)
    elif layout == "maehub" and isinstance(config, EncoderConfig):
        values |= config_json.timm_config(config, preprocess, origin, _TENSORS)
    hashes = {}
    for filename, tensors in files.items():
        (staging / filename).parent.mkdir(exist_ok=True)
        hashes[filename] = write_tensors(staging / filename, tensors, metadata, dtype)
    values["maehub"] = config_json.our_block(config, preprocess, origin, dtype, hashes)
    write_text(staging / "README.md", model_card(name, config, preprocess, origin, card))
    write_json(staging / _CONFIG, values)


def pack(model: MaskedAutoencoder, path: Path, dtype: torch.dtype) -> None:
    """Write a model with its configuration into one file; a file that is there is replaced."""
    block = config_json.our_block(model.config, model.preprocess, model.encoder.origin, dtype, {})
    state = to_official(model.state_dict()).state
    with atomic_write(path) as temporary:
        temporary.unlink()  # it is written as a new file
        write_tensors(temporary, state, {"format": "pt", _PACKED: json.dumps(block, sort_keys=True)}, dtype)


def packed_block(metadata: Mapping[str, str], where: str) -> config_json.Block | None:
    """The configuration in a file's header; None where the file is no packed model."""
    if _PACKED not in metadata:
        return None
    try:
        values = json.loads(metadata[_PACKED])
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: the configuration in its header is no JSON") from error
    return config_json.read_block(values, where)


def read_folder(folder: str | Path, hints: Hints = NO_HINTS, whole: bool = True) -> ModelFolder:
    """Read what a folder says about its model; of the tensors only their shapes, where nothing else tells.

    A model folder; a run folder with a model folder ``model`` in it; or a plain folder of timm's ViT or transformers'
    ViTMAE or ViT. A plain folder gets the published evaluation transform with its own channel statistics. Nothing in a
    folder is executed, and keys of other libraries are ignored. A target that a model folder contradicts is refused;
    not ``whole`` asks nothing about the decoder of a plain folder.
    """
    folder = find_model_folder(folder)
    if not (folder / _CONFIG).exists():
        raise UsageError(f"{folder} is no model folder: it has no {_CONFIG}")
    if not (folder / _TENSORS).exists():
        names = {entry.name for entry in folder.iterdir()}
        instead = f"has a {_CONFIG} but no {_TENSORS}"
        if f"{_TENSORS}.index.json" in names:
            instead = f"has its weights in several files, which is not read here; join them into one {_TENSORS}"
        elif pickle := min((name for name in names if name.endswith((".bin", ".pth", ".pt"))), default=""):
            command = f"maehub convert {quote(str(folder / pickle))} -o FOLDER"
            instead = f"has no {_TENSORS}, only the pickle {pickle}; convert it once with `{command}`"
        raise UsageError(f"{folder} {instead}")
    files = read_config(folder / _CONFIG, folder / _TENSORS, hints, whole=whole)
    fused = folder / config_json.TIMM_ENCODER
    is_ours = files.state is None  # of another library's folder tensors were looked at
    return replace(files, encoder_tensors=fused) if is_ours and fused.exists() else files


def find_model_folder(folder: str | Path) -> Path:
    """The folder itself, or the model folder of a run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    model = folder / "model"
    if (model / _CONFIG).exists() and ((folder / "run.json").exists() or not (folder / _CONFIG).exists()):
        return model
    if (folder / "run.json").exists():
        raise UsageError(f"the run {folder} has no exported model yet; it is written to {model} at its end")
    return folder


def read_config(
    config: Path,
    tensors: Path,
    hints: Hints = NO_HINTS,
    *,
    state: Mapping[str, Tensor] | None = None,
    whole: bool = True,
) -> ModelFolder:
    """Read a ``config.json`` for tensors that need not lie beside it; arguments and errors as in `read_folder`.

    ``state`` has the tensors under official names, where they were read already.
    """
    values, where = read_json(config), str(config)
    # transformers keeps our block when it saves a model that it loaded, with the old hashes; then its own keys count.
    if "maehub" in values and "transformers_version" not in values:
        files = _described(config_json.read_block(values["maehub"], where), tensors)
    else:
        state = _official(tensors) if state is None else state
        with refusing(where, config.with_name(_PROCESSOR)):
            files = _read_foreign(values, config, tensors, state if whole else from_official(state, "timm"), hints)
    network, target = files.config, hints.target
    if isinstance(network, AutoencoderConfig) and target is not None and network.target != target:
        if network.target != "unknown":
            raise UsageError(
                f"{config} says that its decoder predicts {network.target}, and target={target!r} was asked for; "
                "leave target= out"
            )
        files = replace(files, config=with_target(network, target, where))
    return files


def open_encoder(
    path: str | Path,
    *,
    config: Path | None = None,
    heads: int | None = None,
    options: LoadOptions = AS_STORED,
    origin: Origin | None = None,
) -> Encoder:
    """An `Encoder` from a folder (see `read_folder`) or from one safetensors file of any dialect.

    Args:
        path: folder or file.
        config: the ``config.json`` of a file; None takes the network from its header or reads it off the shapes.
        heads: see `infer_config`.
        options: how the network should differ from its file.
        origin: where the weights come from; None means what the folder says.
    """
    return _open(Encoder, Path(path), config, Hints(heads), options, origin)


def open_autoencoder(
    path: str | Path,
    *,
    config: Path | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: Target | None = None,
    options: LoadOptions = AS_STORED,
    origin: Origin | None = None,
) -> MaskedAutoencoder:
    """A `MaskedAutoencoder` from a folder or a file; arguments as in `open_encoder` and `infer_config`."""
    return _open(MaskedAutoencoder, Path(path), config, Hints(heads, decoder_heads, target), options, origin)


def _open(
    kind: type[Network], path: Path, config: Path | None, hints: Hints, options: LoadOptions, origin: Origin | None
) -> Network:
    whole = kind is MaskedAutoencoder  # of an encoder's decoder nothing is needed, so its heads need not be known
    if config:
        files = read_config(config, path, hints, whole=whole)
    elif path.is_dir():
        files = read_folder(path, hints, whole)
    elif block := packed_block(read_header(path).metadata, str(path)):
        files = _described(block, path)
    else:
        state = _official(path)
        network = infer_config(state if whole else from_official(state, "timm"), hints, str(path))
        files = ModelFolder(network, None, None, path, path, state=state)
    tensors, origin = files.tensors if whole else files.encoder_tensors, origin or files.origin
    official = _official(tensors) if files.state is None else files.state
    return build(kind, official, files.config, files.preprocess, options=options, origin=origin, where=str(tensors))


def _described(block: config_json.Block, tensors: Path) -> ModelFolder:
    return ModelFolder(block.config, block.preprocess, block.origin, tensors, tensors, block.sha256)


def _official(path: Path) -> dict[str, Tensor]:
    official = to_official(read_tensors(path).tensors)
    if official.dropped:
        log.info("%s: left out %s", path, ", ".join(official.dropped))
    return official.state


def _read_foreign(
    values: dict[str, Any], config: Path, tensors: Path, state: Mapping[str, Tensor], hints: Hints
) -> ModelFolder:
    """A configuration of timm or transformers: the shapes of the tensors, and what it adds to them."""
    where = str(config)
    if values.get("model_type") in ("vit_mae", "vit"):
        said = config_json.transformers_hints(values, where)
    elif "model_type" in values:
        raise UsageError(f"{where} is of model_type {values['model_type']!s:.60}; vit_mae and vit are read here")
    elif "architecture" in values:
        said = config_json.timm_hints(values, where)
    else:
        raise UsageError(f"{where} is of no model that is read here: maehub, timm's ViT, transformers' ViTMAE and ViT")
    told = {name: value for name, value in hints._asdict().items() if value}
    inferred = infer_config(state, said._replace(**told), where)
    if isinstance(inferred, EncoderConfig):
        inferred = with_class_names(inferred, values, where)
    encoder = inferred if isinstance(inferred, EncoderConfig) else inferred.encoder
    if "model_type" in values:
        processor = config.with_name(_PROCESSOR)
        settings = read_json(processor) if processor.exists() else {}
        preprocess = transformers_transform(settings, encoder, str(processor))
    else:
        preprocess = timm_transform(values.get("pretrained_cfg") or {}, encoder, where)
    return ModelFolder(inferred, preprocess, None, tensors, tensors, state=state)
