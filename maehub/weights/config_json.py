"""What ``config.json`` says, in the words of three libraries: transformers, timm and our own block.

Dictionaries in, dictionaries out; files are written and read in `model_folder`. One ``config.json`` serves all three:
transformers and timm ignore top-level keys that they do not know, and our block lies under ``"maehub"``.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from maehub.errors import IntegrityError, UsageError
from maehub.images import Preprocess, Size, as_size
from maehub.models import AutoencoderConfig, EncoderConfig, Origin, Target
from maehub.version import __version__
from maehub.weights.config_inference import Config, Hints, refusing

FORMAT = 1
"""Version of our block; a reader refuses a newer one."""

VERIFIED = {"timm": ["1.0.3", "1.0.31"], "transformers": ["4.57.6", "5.24.0"]}
"""The oldest and the newest version with which a folder of each kind was loaded and gave the same outputs; see
``scripts/test-libraries``."""

TIMM_ENCODER = "timm/model.safetensors"
"""Where an autoencoder's folder has its encoder for timm, with fused queries, keys and values."""

_TOLD_TO_TIMM = "timm/model.bin"
"""How ``config.json`` names that file: of a name that ends so, every timm takes the safetensors file beside it. A
safetensors file that is named itself timm opens as a pickle before 1.0.29: torch 2.10 refuses it, 2.14 reads it."""

# (width, depth, heads, patch) to the timm architecture that is just this network
_TIMM_ARCHITECTURES = {
    (192, 12, 3, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 16): "vit_small_patch16_224",
    (768, 12, 12, 16): "vit_base_patch16_224",
    (1024, 24, 16, 16): "vit_large_patch16_224",
    (1280, 32, 16, 14): "vit_huge_patch14_224",
}

# transformers' field, what the networks here always have
_TRANSFORMERS_FIXED = {"hidden_act": "gelu", "qkv_bias": True}

Fields = TypeVar("Fields", EncoderConfig, AutoencoderConfig, Origin)


@dataclass(frozen=True)
class Block:
    """Our part of ``config.json``."""

    config: Config
    preprocess: Preprocess
    origin: Origin | None
    sha256: dict[str, str]  # of the tensor files, by name inside the folder


def why_not_transformers(config: AutoencoderConfig) -> str | None:
    """Why transformers' ViTMAEForPreTraining would not compute the same, or None if it does."""
    height, width = config.encoder.size
    reasons = {
        "its ViTMAE takes square images alone": height != width,
        "its encoder never sees mask tokens": config.mask_tokens == "encoder",
        "its decoder has at least one block": config.decoder_depth == 0,
        "what this decoder was trained to predict is unknown": config.target == "unknown",
        "its decoder predicts pixels": config.target in ("pca", "tokens"),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def our_block(
    config: Config, preprocess: Preprocess, origin: Origin | None, dtype: torch.dtype, sha256: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that maehub needs to build the network again."""
    verified = dict(VERIFIED)
    if isinstance(config, EncoderConfig) or why_not_transformers(config):
        del verified["transformers"]
    return {
        "format": FORMAT,
        "version": __version__,
        "kind": "encoder" if isinstance(config, EncoderConfig) else "autoencoder",
        "network": _network(config),
        "preprocess": preprocess.to_dict(),
        "origin": asdict(origin) if origin else None,
        "dtype": str(dtype).removeprefix("torch."),
        "verified": verified,
        "sha256": dict(sha256),
    }


def _network(config: Config) -> dict[str, Any]:
    """As JSON; what earlier versions do not know is left out where it says nothing."""
    values = asdict(config)
    encoder = values.get("encoder", values)
    if not encoder["numeric"]:
        del encoder["numeric"]
    return values


def read_block(block: Any, where: str) -> Block:
    """The inverse of `our_block`."""
    if not isinstance(block, dict):
        raise IntegrityError(f"{where}: the maehub block must be an object, not {type(block).__name__}")
    if isinstance(block.get("format"), int) and block["format"] > FORMAT:
        raise UsageError(
            f"{where} is of format {block['format']}, written by maehub {block.get('version')}; this is {__version__}, "
            f"which reads up to format {FORMAT}: update maehub"
        )
    known = {"format", "version", "kind", "network", "preprocess", "origin", "dtype", "verified", "sha256"}
    _only_known(block, known, f"{where}: the maehub block")
    if block.get("format") != FORMAT or block.get("kind") not in ("encoder", "autoencoder"):
        raise IntegrityError(
            f"{where}: the maehub block has format={block.get('format')!r}, kind={block.get('kind')!r}"
        )
    network, preprocess, hashes = block.get("network"), block.get("preprocess"), block.get("sha256", {})
    if not isinstance(network, dict) or not isinstance(preprocess, dict):
        raise IntegrityError(f"{where}: the maehub block needs the objects network and preprocess")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise IntegrityError(f"{where}: sha256 in the maehub block must map file names to hexadecimal digits")
    config: Config
    if block["kind"] == "autoencoder":
        encoder = _from_fields(EncoderConfig, network.get("encoder"), where)
        config = _from_fields(AutoencoderConfig, network | {"encoder": encoder}, where)
    else:
        config = _from_fields(EncoderConfig, network, where)
    origin = _from_fields(Origin, block["origin"], where) if block.get("origin") is not None else None
    with refusing(where):
        return Block(config, Preprocess.from_dict(preprocess), origin, hashes)


def timm_config(config: EncoderConfig, preprocess: Preprocess, origin: Origin | None, filename: str) -> dict[str, Any]:
    """timm's part: a registered architecture, arguments for what differs from it, and the transform."""
    height, width = config.size
    key = (config.width, config.depth, config.heads, config.patch_size)
    own = {"patch_size": config.patch_size, "embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    pool = "avg" if config.pool == "mean" else "token"
    usual = {
        "img_size": (_side_or_sides(config.size), 224),
        "mlp_ratio": (config.mlp_ratio, 4),
        "in_chans": (config.channels, 3),
        "global_pool": (pool, "token"),
    }
    arguments: dict[str, Any] = {} if key in _TIMM_ARCHITECTURES else own
    arguments |= {name: value for name, (value, default) in usual.items() if value != default}
    pretrained = {
        "tag": "mae",
        "custom_load": False,
        "input_size": [config.channels, height, width],
        "fixed_input_size": True,
        "interpolation": preprocess.interpolation,
        "crop_pct": _crop_share(preprocess),
        "crop_mode": {"squash": "squash", "pad": "border"}.get(preprocess.resize, "center"),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "num_classes": config.classes,
        "classifier": "head",
    }
    if config.channels == 3:  # otherwise older versions would adapt kernels that fit already
        pretrained["first_conv"] = "patch_embed.proj"
    if filename == TIMM_ENCODER:
        pretrained["hf_hub_filename"] = _TOLD_TO_TIMM
    if origin and origin.licence:
        pretrained["license"] = origin.licence
    names = {"label_names": list(config.class_names)} if config.class_names else {}
    return names | {
        "architecture": _TIMM_ARCHITECTURES.get(key, "vit_base_patch16_224"),
        "num_classes": config.classes,
        "num_features": config.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def _crop_share(preprocess: Preprocess) -> float:
    """timm's ``crop_pct``, under which it scales to just the size that our transform covers: it rounds down."""
    if preprocess.resize != "centre-crop":
        return 1.0
    short = min(preprocess.size)
    cover = round(short / preprocess.crop_fraction)
    exact_enough = math.floor(short / preprocess.crop_fraction) == cover
    return preprocess.crop_fraction if exact_enough else short / (cover + 0.5)


def transformers_config(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """transformers' part, for ViTMAEForPreTraining, ViTForImageClassification or ViTModel."""
    encoder = config if isinstance(config, EncoderConfig) else config.encoder
    common = {
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": int(encoder.width * encoder.mlp_ratio),
        "layer_norm_eps": 1e-6,
        "image_size": _side_or_sides(encoder.size),
        "patch_size": encoder.patch_size,
        "num_channels": encoder.channels,
        **_TRANSFORMERS_FIXED,
    }
    if isinstance(config, EncoderConfig):
        if config.pool == "mean":
            raise UsageError("transformers' ViT pools the class token, and this encoder the mean; say to='timm'")
        words = config.class_names or [f"LABEL_{number}" for number in range(config.classes)]
        labels = {str(number): word for number, word in enumerate(words)}
        head: dict[str, Any] = {
            "id2label": labels,
            "label2id": {label: int(number) for number, label in labels.items()},
        }
        if config.multi_label or config.numeric:
            head["problem_type"] = "regression" if config.numeric else "multi_label_classification"
        names = ["ViTForImageClassification"] if config.classes else ["ViTModel"]
        return {"architectures": names, "model_type": "vit"} | common | (head if config.classes else {})
    if reason := why_not_transformers(config):
        hint = " or target=" if config.target == "unknown" else ""
        raise UsageError(f"transformers would not compute the same, since {reason}; say to='maehub'{hint}")
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **common,
        "decoder_hidden_size": config.decoder_width,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": int(config.decoder_width * encoder.mlp_ratio),
        "mask_ratio": 0.75,
        "norm_pix_loss": config.target == "normalised_pixels",
    }


def transformers_processor(preprocess: Preprocess) -> dict[str, Any]:
    """``preprocessor_config.json``: transformers' BitImageProcessor with our resize, crop and statistics.

    ``pad`` and ``native`` have no such form; for them it crops the centre.
    """
    low, high = preprocess.value_range
    rows, columns = preprocess.size
    squash = preprocess.resize == "squash"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": preprocess.channels == 3,
        "do_resize": True,
        "size": {"height": rows, "width": columns}
        if squash
        else {"shortest_edge": round(min(rows, columns) / preprocess.crop_fraction)},
        "resample": 3 if preprocess.interpolation == "bicubic" else 2,
        "do_center_crop": not squash,
        "crop_size": {"height": rows, "width": columns},
        "do_rescale": True,
        "rescale_factor": 1 / (high - low),
        "do_normalize": True,
        "image_mean": [mean + low / (high - low) for mean in preprocess.mean],
        "image_std": list(preprocess.std),
    }


def transformers_hints(config: Mapping[str, Any], where: str) -> Hints:
    """What a plain transformers ``config.json`` of ViTMAE or ViT says beyond the tensors.

    ``layer_norm_eps`` 1e-12 is accepted and read as 1e-6: the published conversions say 1e-12, but the weights were
    trained, and their accuracies measured, with 1e-6.
    """
    for name, value in _TRANSFORMERS_FIXED.items():
        if config.get(name, value) != value:
            raise UsageError(f"{where} has {name}={config[name]!r}; the networks here have {value!r}")
    eps = config.get("layer_norm_eps", 1e-12)
    if eps not in (1e-6, 1e-12):
        raise UsageError(f"{where} has layer_norm_eps={eps!r}; the networks here have 1e-6")
    heads, image_size = config.get("num_attention_heads", 12), as_size(config.get("image_size", 224), "image_size")
    if config["model_type"] == "vit":
        return Hints(heads, image_size=image_size)
    target: Target = "normalised_pixels" if config.get("norm_pix_loss", False) else "pixels"
    return Hints(heads, config.get("decoder_num_attention_heads", 16), target, image_size)


def timm_hints(config: Mapping[str, Any], where: str) -> Hints:
    """What a plain timm ``config.json`` says beyond the tensors."""
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or {}
    if not isinstance(arguments, dict) or not isinstance(pretrained, dict):
        raise IntegrityError(f"{where}: model_args and pretrained_cfg must be objects")
    if not str(config["architecture"]).startswith("vit_"):
        raise UsageError(f"{where} is a {config['architecture']!s:.60}; of timm's networks only the plain ViT is read")
    named = {name: key[2] for key, name in _TIMM_ARCHITECTURES.items()}
    heads = arguments.get("num_heads", named.get(config["architecture"]))
    size = arguments.get("img_size") or list(pretrained.get("input_size", ()))[1:] or None
    return Hints(heads or None, image_size=as_size(size, "img_size") if size else None)


def _side_or_sides(size: Size) -> int | list[int]:
    """A square by its side alone, as both libraries say it."""
    return size[0] if size[0] == size[1] else list(size)


def _only_known(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise IntegrityError(
            f"{where} has unknown keys: {', '.join(unknown)[:200]}; known are {', '.join(sorted(known))}"
        )


def _from_fields(kind: type[Fields], values: Any, where: str) -> Fields:
    if not isinstance(values, dict):
        raise IntegrityError(f"{where}: {kind.__name__} in the maehub block must be an object")
    _only_known(values, {field.name for field in fields(kind)}, f"{where}: {kind.__name__} in the maehub block")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if kind is Origin and not all(isinstance(value, str) for value in given.values()):
        raise IntegrityError(f"{where}: origin in the maehub block must be text")
    with refusing(where):
        return kind(**given)
