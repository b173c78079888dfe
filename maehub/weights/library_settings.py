"""What timm's and transformers' folders say beside the network: names of classes, and the transform of pictures.

Every setting of theirs is known here. One that changes pixels in a way that our transform has not is refused by name;
one that nobody knows is warned of.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from maehub.errors import IntegrityError, UsageError, log
from maehub.images import Preprocess, Size
from maehub.models import EncoderConfig

_INSTEAD = "without this file the published evaluation is used, and extract_features(..., preprocess=) takes any"

_RESIZES = {"center": "centre-crop", "squash": "squash", "border": "pad"}  # timm's crop_mode
_RESAMPLES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
# Settings of transformers' ViTImageProcessor and BitImageProcessor, old and fast: read below, or no pixel's business.
_PROCESSOR = {
    *("do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "do_rescale"),
    *("rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb"),
    *("image_processor_type", "feature_extractor_type", "processor_class", "image_seq_length", "return_tensors"),
    *("data_format", "input_data_format", "device", "disable_grouping", "_valid_processor_keys", "auto_map"),
}
# And of timm's pretrained_cfg. What begins with test_ is used only when asked for, not by default.
_PRETRAINED = {
    *("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "label_names"),
    *("label_descriptions", "test_input_size", "test_crop_pct", "min_input_size", "fixed_input_size", "pool_size"),
    *("test_pool_size", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag"),
    *("custom_load", "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids"),
    *("notes", "label_offset"),
}


def with_class_names(config: EncoderConfig, values: Mapping[str, Any], where: str) -> EncoderConfig:
    """The network with the names of its classes or numbers, and what they are, where the folder tells.

    transformers' ``id2label`` or ``label2id``; timm's ``label_names``, or else its ``label_descriptions``.
    """
    if not config.classes:
        return config
    pretrained = values.get("pretrained_cfg")
    told = (pretrained if isinstance(pretrained, dict) else {}) | {key: value for key, value in values.items() if value}
    names: Any = told.get("label_names")
    if not names and isinstance(described := told.get("label_descriptions"), dict | list):
        names = list(described)
    if not names:
        names = told.get("id2label") or {str(number): name for name, number in (told.get("label2id") or {}).items()}
        numbers = [str(number) for number in range(config.classes)]
        names = [names[number] for number in numbers] if names.keys() == set(numbers) else names
    if not names or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names):  # which say nothing
        return config
    right = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not right or len(names) != config.classes:
        log.warning("%s names %d classes and the head has %d: they are not read", where, len(names), config.classes)
        return config
    kind = values.get("problem_type")
    several, numeric = kind == "multi_label_classification", kind == "regression"
    return replace(config, class_names=tuple(names), multi_label=several, numeric=numeric)


def timm_transform(settings: Mapping[str, Any], config: EncoderConfig, where: str) -> Preprocess:
    """timm's evaluation transform as ours: the inverse of what `timm_config` writes, with timm's own defaults.

    Args:
        settings: ``pretrained_cfg``; without mean and std, the published evaluation.
        config: of the encoder.
        where: for messages.
    """
    _warn_of_unknown(settings, _PRETRAINED, where)
    published = Preprocess.evaluation(config.size, config.channels, config.patch_size)
    statistics = _statistics(settings.get("mean"), settings.get("std"), config.channels, where)
    if not statistics:
        return published
    mode, share = settings.get("crop_mode") or "center", float(settings.get("crop_pct") or 0.875)
    interpolation = settings.get("interpolation") or "bicubic"
    if interpolation not in ("bicubic", "bilinear") or mode not in _RESIZES or (mode != "center" and share != 1):
        raise UsageError(
            f"{where}: timm's transform (interpolation={interpolation!r}, crop_mode={mode!r}, crop_pct={share:g}) is "
            "none that maehub has; without mean and std the published is used; from_timm(..., preprocess=) takes any"
        )
    fraction = crop_fraction(share, min(config.size))
    changes: dict[str, Any] = {"resize": _RESIZES[mode], "crop_fraction": fraction, "interpolation": interpolation}
    return replace(published, **statistics, **changes)


def crop_fraction(share: float, short: int) -> float:
    """Our fraction for timm's ``crop_pct``: the inverse of what `timm_config` writes.

    Args:
        share: ``crop_pct``.
        short: the shorter side in pixels.
    """
    cover = max(short, math.floor(short / share))  # timm rounds down
    return share if round(short / share) == cover else short / cover


def transformers_transform(settings: Mapping[str, Any], config: EncoderConfig, where: str) -> Preprocess:
    """The transform of transformers' ViTImageProcessor or BitImageProcessor as ours.

    Args:
        settings: ``preprocessor_config.json``; empty is the published evaluation.
        config: of the encoder.
        where: for messages.

    Raises:
        UsageError: it does to pixels what no transform here does.
    """
    published = Preprocess.evaluation(config.size, config.channels, config.patch_size)
    if not settings:
        return published
    for name in sorted(set(settings) - _PROCESSOR):
        if name.startswith("do_") and settings[name]:
            raise UsageError(f"{where}: {name} changes pixels in a way that is not known here; {_INSTEAD}")
    _warn_of_unknown(settings, _PROCESSOR, where)
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViT")
    crops = bool(settings.get("do_center_crop", kind.startswith("Bit")))
    changes: dict[str, Any] = {"resize": "native"}
    if settings.get("do_resize", True):
        resample = settings.get("resample", 3 if kind.startswith("Bit") else 2)
        if resample not in _RESAMPLES:
            raise UsageError(f"{where}: resample={resample!r} is neither 2 (bilinear) nor 3 (bicubic); {_INSTEAD}")
        changes = _resize(settings, config.size, crops, where) | {"interpolation": _RESAMPLES[resample]}
    elif crops:
        raise UsageError(f"{where}: do_center_crop without do_resize is no transform that maehub has; {_INSTEAD}")
    # Values times the factor, then mean and deviation; ours are for values divided by 255.
    factor = 255 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0
    mean, std = settings.get("image_mean", 0.5), settings.get("image_std", 0.5)  # ViT's; BiT's are always written
    if not settings.get("do_normalize", True):
        mean, std = 0.0, 1.0
    statistics = _statistics(mean, std, config.channels, where)
    changes |= {name: tuple(value / factor for value in values) for name, values in statistics.items()}
    return replace(published, **changes)


def _resize(settings: Mapping[str, Any], target: Size, crops: bool, where: str) -> dict[str, Any]:
    """Squash to the input size, or cover and crop."""
    size, crop = settings.get("size", target[0]), settings.get("crop_size", target[0])
    whole, cropped = (
        (one.get("height"), one.get("width")) if isinstance(one, dict) else (one, one) for one in (size, crop)
    )
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    if not crops and whole == target:
        return {"resize": "squash", "crop_fraction": 1.0}
    if crops and cropped == target and type(short) is int and short >= min(target):
        return {"resize": "centre-crop", "crop_fraction": min(target) / short}
    crop = f" and crop_size={crop!r}" if crops else ""
    raise UsageError(f"{where}: size={size!r}{crop} is no transform to {target[0]}×{target[1]}; {_INSTEAD}")


def _statistics(mean: Any, std: Any, channels: int, where: str) -> dict[str, Any]:
    """mean and std of each channel, where one number stands for all; empty where there are none for these channels."""
    if mean is None or std is None:
        return {}
    both = [list(value) if isinstance(value, Sequence) else [value] for value in (mean, std)]
    numbers = all(type(number) in (int, float) and math.isfinite(number) for values in both for number in values)
    if not numbers or min(both[1], default=1) <= 0:
        raise IntegrityError(
            f"{where}: mean and std must be numbers or lists of numbers, std above 0, not {mean!r:.60}, {std!r:.60}"
        )
    means, stds = (tuple(map(float, values * channels if len(values) == 1 else values)) for values in both)
    if len(means) == len(stds) == channels:
        return {"mean": means, "std": stds}
    log.warning("%s: mean and std are of %d channels and the network takes %d: not read", where, len(means), channels)
    return {}


def _warn_of_unknown(settings: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(settings) - known):
        log.warning("%s: nothing is known here of its %s", where, ", ".join(unknown)[:200])
