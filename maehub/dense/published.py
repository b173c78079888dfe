"""Published segmenters and detectors of MAE, read into ours: mmsegmentation's UPerNet and detectron2's ViTDet.

    UPerNet     the code that the published one points to (``backbone.blocks.…``, ``backbone.fpn1.…``), and
                mmsegmentation's own (``backbone.layers.…``, ``neck.upsample_4x.…``); ADE20K's 150 classes
    ViTDet      ``model_final_….pkl``: numpy arrays, read without running code; COCO's 80 classes

Both were trained on pictures with ImageNet's mean and deviation, the latter on 1024×1024 pixels.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from maehub.data import MapClasses, ObjectClasses
from maehub.dense.attention import AttentionConfig
from maehub.dense.detector import Detector, DetectorConfig
from maehub.dense.segmenter import Segmenter, SegmenterConfig
from maehub.errors import IntegrityError, UsageError
from maehub.files import sha256_file
from maehub.models import Encoder, EncoderConfig, Origin, resize_table
from maehub.weights import read_pickle

_SIZE = 1024  # pixels of ViTDet's pictures
_PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks")
_Dense = TypeVar("_Dense", Segmenter, Detector)
_COCO_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""COCO's numbers of its 80 classes."""
_ADE20K = 150

# Patterns of names in a file, and what they become; the first that fits counts.
_BLOCK = {
    r"layers\.(\d+)\.ln([12])\.(.*)": r"blocks.\1.norm\2.\3",
    r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)": r"blocks.\1.mlp.fc1.\2",
    r"layers\.(\d+)\.ffn\.layers\.1\.(.*)": r"blocks.\1.mlp.fc2.\2",
    r"layers\.(\d+)\.(.*)": r"blocks.\1.\2",
    r"patch_embed\.proj(?:ection)?\.(.*)": r"patch_embed.proj.\1",
    r"(.*)": r"\1",
}
_UPERNET = {
    r"decode_head\.psp_modules\.(\d)\.1\.(.*)": r"pool.\1.\2",
    r"decode_head\.bottleneck\.(.*)": r"bottleneck.\1",
    r"decode_head\.lateral_convs\.(\d)\.(.*)": r"lateral.\1.\2",
    r"decode_head\.fpn_convs\.(\d)\.(.*)": r"smooth.\1.\2",
    r"decode_head\.fpn_bottleneck\.(.*)": r"fuse.\1",
    r"decode_head\.conv_seg\.(.*)": r"classify.\1",
    r"auxiliary_head\.convs\.0\.(.*)": r"auxiliary.0.\1",
    r"auxiliary_head\.conv_seg\.(.*)": r"auxiliary.2.\1",
    r"(?:backbone\.fpn1|neck\.upsample_4x)\.(.*)": r"neck.0.\1",
    r"(?:backbone\.fpn2|neck\.upsample_2x)(?:\.0)?\.(.*)": r"neck.1.0.\1",
}
_VITDET = {
    r"backbone\.simfp_2\.([013])\.(.*)": r"pyramid.levels.0.resample.\1.\2",
    r"backbone\.simfp_2\.4\.(.*)": r"pyramid.levels.0.project.\1",
    r"backbone\.simfp_2\.5\.(.*)": r"pyramid.levels.0.smooth.\1",
    r"backbone\.simfp_3\.0\.(.*)": r"pyramid.levels.1.resample.0.\1",
    r"backbone\.simfp_3\.1\.(.*)": r"pyramid.levels.1.project.\1",
    r"backbone\.simfp_3\.2\.(.*)": r"pyramid.levels.1.smooth.\1",
    r"backbone\.simfp_4\.0\.(.*)": r"pyramid.levels.2.project.\1",
    r"backbone\.simfp_4\.1\.(.*)": r"pyramid.levels.2.smooth.\1",
    r"backbone\.simfp_5\.1\.(.*)": r"pyramid.levels.3.project.\1",
    r"backbone\.simfp_5\.2\.(.*)": r"pyramid.levels.3.smooth.\1",
    r"proposal_generator\.rpn_head\.conv\.conv(\d)\.(.*)": r"regions.proposals.head.conv.\1.0.\2",
    r"proposal_generator\.rpn_head\.objectness_logits\.(.*)": r"regions.proposals.head.cls_logits.\1",
    r"proposal_generator\.rpn_head\.anchor_deltas\.(.*)": r"regions.proposals.head.bbox_pred.\1",
    r"roi_heads\.box_head\.fc1\.(.*)": r"regions.heads.box_head.5.\1",
    r"roi_heads\.box_predictor\.(.*)": r"regions.heads.box_predictor.\1",
    r"roi_heads\.mask_head\.deconv\.(.*)": r"regions.heads.mask_predictor.deconvolve.\1",
    r"roi_heads\.mask_head\.predictor\.(.*)": r"regions.heads.mask_predictor.classify.\1",
}


def read_published(source: str | Path) -> Segmenter | Detector:
    """A published segmenter or detector, on the CPU and in eval mode.

    Raises:
        IntegrityError: the file is broken or hostile, or holds other tensors than these networks have.
    """
    path = Path(source)
    try:
        if path.suffix == ".pkl":
            model: Segmenter | Detector = _detector(_arrays(path), str(path))
        else:
            model = _segmenter(read_pickle(path).tensors, str(path))
    except (KeyError, IndexError, ValueError, ZeroDivisionError, RuntimeError, UsageError) as error:
        raise IntegrityError(f"{path} is no such network as was published: {str(error)[:200]}") from error
    model.encoder.origin = Origin(path.name, sha256=sha256_file(path))
    return model.eval()


def _segmenter(tensors: Mapping[str, Tensor], where: str) -> Segmenter:
    body = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    state = _renamed(body, _BLOCK)
    depth, width, patch = _shape(state, where)
    heads = state["blocks.0.attn.relative_position_bias_table"].shape[1]
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    for number in range(depth):
        attn = f"blocks.{number}.attn"
        state[f"{attn}.table"] = state.pop(f"{attn}.relative_position_bias_table")
        state.pop(f"{attn}.relative_position_index", None)
        query, value = (state.pop(f"{attn}.{one}_bias") for one in "qv")
        state[f"{attn}.qkv.bias"] = torch.cat([query, torch.zeros_like(value), value])  # keys have none
    head = _renamed(tensors, _UPERNET)
    head = {re.sub(r"\.bn\.", ".1.", re.sub(r"\.conv\.", ".0.", name)): value for name, value in head.items()}
    count = head["classify.weight"].shape[0]
    classes = _ade20k() if count == _ADE20K else tuple(f"class {number + 1}" for number in range(count))
    values = tuple(range(1, len(classes) + 1))  # of ADE20K's label maps, where 0 is ignored
    said = MapClasses(classes, (*values, 0), (*range(len(classes)), -1))
    encoder = Encoder(EncoderConfig(side * patch, patch, 3, width, depth, heads))
    layers = tuple(depth * part // 12 - 1 for part in (4, 6, 8, 12))
    config = SegmenterConfig(
        said, "upernet", layers, head["fuse.0.weight"].shape[0], "batch", auxiliary=True, short_side=side * patch,
        attention=AttentionConfig(relative="table", layer_scale=True),
    )  # fmt: skip
    named = {f"encoder.{name}": value for name, value in state.items() if name.split(".")[0] in _PARTS}
    return _loaded(Segmenter(encoder, config), named | {f"decoder.{name}": one for name, one in head.items()}, where)


def _detector(tensors: Mapping[str, Tensor], where: str) -> Detector:
    start = "backbone.net."
    state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    depth, width, patch = _shape(state, where)
    heads = width // state["blocks.0.attn.rel_pos_h"].shape[1]
    grid, old = _SIZE // patch, round((state["pos_embed"].shape[1] - 1) ** 0.5)
    state["pos_embed"] = resize_table(state["pos_embed"], (old, old), (grid, grid), "bicubic")
    state["cls_token"] = torch.zeros(1, 1, width)  # there is none
    rest = _renamed(tensors, _VITDET)
    for kind, target in (("box_head.conv", "box_head"), ("mask_head.mask_fcn", "mask_head")):
        for number in range(4):
            layer = f"roi_heads.{kind}{number + 1}."
            found = {name.removeprefix(layer): one for name, one in tensors.items() if name.startswith(layer)}
            for name, one in found.items():
                place = name.replace("norm.", "1.") if name.startswith("norm.") else f"0.{name}"
                rest[f"regions.heads.{target}.{number}.{place}"] = one
    for name in [name for name in rest if re.search(r"levels\.\d\.(project|smooth)\.", name)]:
        first, _, last = name.rpartition(".")
        rest[f"{first.removesuffix('.norm')}.{1 if first.endswith('.norm') else 0}.{last}"] = rest.pop(name)
    for kind in ("weight", "bias"):  # nothing comes last there, and first here
        scores = f"regions.heads.box_predictor.cls_score.{kind}"
        rest[scores] = rest[scores].roll(1, 0)
        for name, each in (("box_predictor.bbox_pred", 4), ("mask_predictor.classify", 1)):
            one = rest[f"regions.heads.{name}.{kind}"]
            rest[f"regions.heads.{name}.{kind}"] = torch.cat([one.new_zeros(each, *one.shape[1:]), one])
    count = rest["regions.heads.box_predictor.cls_score.bias"].shape[0] - 1
    ids = _COCO_IDS if count == len(_COCO_IDS) else tuple(range(1, count + 1))
    window = (state["blocks.0.attn.rel_pos_h"].shape[0] + 1) // 2
    whole = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    config = DetectorConfig(
        ObjectClasses(_coco() if ids == _COCO_IDS else tuple(f"class {number}" for number in ids), ids),
        masks=True,
        attention=AttentionConfig(window, whole, "decomposed", cls=False),
    )
    encoder = Encoder(EncoderConfig(_SIZE, patch, 3, width, depth, heads))
    named = {f"pyramid.encoder.{name}": value for name, value in state.items()}
    return _loaded(Detector(encoder, config), named | rest, where)


def _ade20k() -> tuple[str, ...]:
    """The 150 classes of ADE20K's benchmark (Zhou et al. 2017), in the order of their numbers."""
    return tuple((files("maehub") / "assets" / "ade20k.txt").read_text("utf-8").split("\n")[:_ADE20K])


def _coco() -> tuple[str, ...]:
    """The 80 classes of COCO, by torchvision's list of all 91 numbers."""
    from torchvision.models._meta import _COCO_CATEGORIES

    return tuple(_COCO_CATEGORIES[number] for number in _COCO_IDS)


def _shape(state: Mapping[str, Tensor], where: str) -> tuple[int, int, int]:
    """Depth, width and patch."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if not depth or "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise IntegrityError(f"{where} holds no Vision Transformer by the names of UPerNet's or ViTDet's files")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    return depth, width, patch


def _renamed(tensors: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    """Those that a rule names, by their new names."""
    found = {}
    for name, value in tensors.items():
        rule = next((rule for rule in rules if re.fullmatch(rule, name)), None)
        if rule is not None:
            found[re.sub(rule, rules[rule], name)] = value
    return found


def _loaded(model: _Dense, state: dict[str, Tensor], where: str) -> _Dense:
    """With these tensors: all that it has but the final norm, which is not used."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not re.search(r"encoder\.norm\.", name)]
    wrong = [name for name, one in state.items() if name not in expected or expected[name].shape != one.shape]
    if missing or wrong:
        raise IntegrityError(
            f"{where} is no such network as was published: it lacks {missing[:3]}, and {wrong[:3]} do not fit"
        )
    model.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()}, strict=False)
    return model


class _Arrays(pickle.Unpickler):
    """Numpy's arrays and dtypes in dictionaries; whatever else a pickle names is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        raise IntegrityError(f"it names {module}.{name}, and arrays need no such thing: no code in it was run")


def _latin(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise IntegrityError(f"it has text in {encoding!r:.20}")
    return text.encode("latin1")


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a pickle of detectron2."""
    try:
        with open(path, "rb") as file:
            said = _Arrays(file, encoding="latin1").load()
    except IntegrityError as error:
        raise IntegrityError(f"{path} was not read: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly every type there is
        raise IntegrityError(f"{path} cannot be read: {str(error)[:200] or type(error).__name__}") from error
    said = said.get("model", said) if isinstance(said, dict) else said
    values = said.values() if isinstance(said, dict) else [said]
    if not all(isinstance(one, np.ndarray) and one.dtype.kind in "fiu" for one in values):
        raise IntegrityError(f"{path} holds other things than arrays of numbers by names")
    return {str(name): torch.from_numpy(np.ascontiguousarray(one)) for name, one in said.items()}
