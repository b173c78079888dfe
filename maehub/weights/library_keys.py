"""The names of tensors in lightly, mmpretrain and detectron2, whose networks hold the same tensors one by one.

    official                lightly                        mmpretrain                       ViTDet: backbone.net and
    patch_embed.proj        backbone.vit.patch_embed.proj  backbone.patch_embed.projection  .patch_embed.proj
    blocks.0.norm1          backbone.vit.blocks.0.norm1    backbone.layers.0.ln1            .blocks.0.norm1
    blocks.0.mlp.fc1        backbone.vit.blocks.0.mlp.fc1  backbone.layers.0.ffn.layers.0.0 .blocks.0.mlp.fc1
    norm                    backbone.vit.norm              backbone.ln1                     –
    decoder_blocks.0.norm1  decoder.blocks.0.norm1         neck.decoder_blocks.0.ln1        –
    decoder_pred            prediction_head                neck.decoder_pred                –

lightly builds on timm's or on torchvision's Vision Transformer and has had three decoders: the one above since 1.6,
``MAEDecoderTIMM`` (``decoder.decoder_blocks``) and torchvision's (``decoder.layers.encoder_layer_0``). All are read.
A backbone that was saved alone has no ``backbone.`` in front.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

from maehub.errors import UsageError

ForeignDialect = Literal["lightly", "mmpretrain", "detectron2"]

# what only this dialect has, behind an optional "backbone."
_SIGNS: dict[ForeignDialect, str] = {
    "lightly": r"(backbone\.)?(vit\.(blocks|patch_embed|cls_token|pos_embed)\b|(vit\.)?(class_token|conv_proj)\b"
    r"|(vit\.)?encoder\.layers\.encoder_layer_)",
    "mmpretrain": r"(backbone\.)?(patch_embed\.projection|layers\.\d+\.(ln1|ln2|ffn))\.|neck\.decoder_",
    "detectron2": r"(backbone\.)?net\.(blocks|patch_embed|pos_embed)\b",
}

# official, torchvision
_TORCHVISION_PARTS = (
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj", "conv_proj"),
    ("norm", "encoder.ln"),
    ("head", "heads.head"),
)

# official, torchvision, and its names until 0.13
_TORCHVISION_BLOCK = (
    ("norm1", "ln_1", "ln_1"),
    ("attn.qkv", "self_attention.in_proj", "self_attention.in_proj"),
    ("attn.proj", "self_attention.out_proj", "self_attention.out_proj"),
    ("norm2", "ln_2", "ln_2"),
    ("mlp.fc1", "mlp.0", "mlp.linear_1"),
    ("mlp.fc2", "mlp.3", "mlp.linear_2"),
)

# official, lightly since 1.6, its MAEDecoderTIMM, its MAEDecoder of torchvision
_LIGHTLY_DECODER = (
    ("mask_token", "decoder.mask_token", "decoder.mask_token", "mask_token"),
    ("decoder_embed", "decoder_embed", "decoder.decoder_embed", "decoder.decoder_embed"),
    ("decoder_pos_embed", "decoder.pos_embed", "decoder.decoder_pos_embed", "decoder.pos_embedding"),
    ("decoder_norm", "decoder.norm", "decoder.decoder_norm", "decoder.ln"),
    ("decoder_pred", "prediction_head", "decoder.decoder_pred", "decoder.prediction_head"),
)

# official, mmpretrain
_MMPRETRAIN_PARTS = (
    ("cls_token", "backbone.cls_token"),
    ("pos_embed", "backbone.pos_embed"),
    ("patch_embed.proj", "backbone.patch_embed.projection"),
    ("norm", "backbone.ln1"),
    ("fc_norm", "backbone.ln2"),
    ("head", "head.fc"),
    ("mask_token", "neck.mask_token"),
    ("decoder_embed", "neck.decoder_embed"),
    ("decoder_pos_embed", "neck.decoder_pos_embed"),
    ("decoder_norm", "neck.ln1"),
    ("decoder_pred", "neck.decoder_pred"),
)
_MMPRETRAIN_TOKEN_HEAD = "head.layers.head"  # of VisionTransformerClsHead, which pools the class token
_MMPRETRAIN_PROBE = "neck.bn."  # of ClsBatchNormNeck, in front of a linear probe's head
_MMPRETRAIN_BLOCK = (
    ("norm1", "ln1"),
    ("attn.qkv", "attn.qkv"),
    ("attn.proj", "attn.proj"),
    ("norm2", "ln2"),
    ("mlp.fc1", "ffn.layers.0.0"),
    ("mlp.fc2", "ffn.layers.1"),
)

LIGHTLY_MASK_TOKEN = "backbone.mask_token"
"""What every masked encoder of lightly has, and its MAE never uses."""

_UNUSED_TOKEN = "the mask token of lightly's encoder, which its MAE never uses"
_UNUSED_HEAD = "the classifier that timm and torchvision put on every network, which MAE does not train"
_PROBE = "the classifier that lightly trains beside the network, for watching it"


def is_foreign(dialect: str) -> TypeGuard[ForeignDialect]:
    """Whether a dialect is one of those here."""
    return dialect in get_args(ForeignDialect)


def detect_foreign(names: Iterable[str]) -> ForeignDialect | None:
    """Which of the dialects here these names are, wrappers stripped; None if none of them."""
    names = list(names)
    for dialect, sign in _SIGNS.items():
        if any(re.match(sign, name) for name in names):
            return dialect
    return None


def foreign_official_name(name: str, dialect: ForeignDialect) -> str:
    """One name, wrappers stripped, as the official one; unknown names come back as they are."""
    if dialect == "lightly":
        return _from_lightly(name)
    if dialect == "mmpretrain":
        return _from_mmpretrain(name)
    return re.sub(r"^(backbone\.)?net\.", "", name)


def foreign_extras(names: Iterable[str], dialect: ForeignDialect) -> dict[str, str]:
    """The names that are left out on purpose, and why."""
    names = set(names)
    if dialect != "lightly":
        return {}
    extras = {name: _PROBE for name in names if name.startswith("online_classifier.")}
    if LIGHTLY_MASK_TOKEN in names:
        extras[LIGHTLY_MASK_TOKEN] = _UNUSED_TOKEN
    elif "mask_token" in names and any(name.startswith("vit.") for name in names):
        extras["mask_token"] = _UNUSED_TOKEN  # of an encoder that was saved alone
    if any(_from_lightly(name).startswith("decoder_") for name in names):
        extras |= {name: _UNUSED_HEAD for name in names if re.fullmatch(r"(head)\.(weight|bias)", _from_lightly(name))}
    return extras


def check_foreign(state: Mapping[str, Tensor], dialect: ForeignDialect) -> None:
    """Refuse a network of these libraries that no network here computes.

    Args:
        state: official names.
    """
    if dialect == "detectron2" and "cls_token" not in state:
        raise UsageError(
            "a ViTDet backbone has no class token and no final norm, which every network here has, so it cannot be "
            "read; convert the file that it was made from"
        )
    if dialect == "mmpretrain" and {"norm.weight", "fc_norm.weight"} <= set(state):
        raise UsageError(
            "this mmpretrain network normalises every token and then their mean (final_norm=True with avg_featmap), "
            "and a network here does one of the two; MAE is fine-tuned with final_norm=False"
        )


def to_foreign(state: Mapping[str, Tensor], dialect: ForeignDialect) -> dict[str, Tensor]:
    """Rename official names to a dialect here.

    ``lightly`` names the modules of its examples since 1.6, with timm's Vision Transformer, and adds the mask token
    of its encoder, zero as lightly has it. ``mmpretrain`` names MAEViT and MAEPretrainDecoder, or VisionTransformer
    and its head. ``detectron2`` is the backbone of ViTDet alone: no class token, no final norm, no decoder, no head.
    """
    if dialect == "detectron2":
        kept = ("pos_embed", "patch_embed.", "blocks.")
        return {f"backbone.net.{name}": value for name, value in state.items() if name.startswith(kept)}
    renamed = {}
    for name, value in state.items():
        theirs = _to_lightly(name) if dialect == "lightly" else _to_mmpretrain(name, "fc_norm.weight" in state)
        if theirs is None:
            raise UsageError(f"{dialect} has no place for {name}; write to='maehub'")
        renamed[theirs] = value
    if dialect == "lightly":
        renamed[LIGHTLY_MASK_TOKEN] = torch.zeros_like(state["cls_token"])
    return renamed


def _from_lightly(name: str) -> str:
    for official, *theirs in _LIGHTLY_DECODER:
        if renamed := _renamed(name, theirs, official):
            return renamed
    if match := re.fullmatch(r"decoder\.(?:decoder_)?blocks\.(.+)", name):
        return f"decoder_blocks.{match[1]}"
    if match := re.fullmatch(r"decoder\.layers\.encoder_layer_(\d+)\.(.+)", name):
        return _torchvision_block("decoder_blocks", match[1], match[2]) or name
    bare = re.sub(r"^(backbone\.)?(vit\.)?", "", name)
    if match := re.fullmatch(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)", bare):
        return _torchvision_block("blocks", match[1], match[2]) or name
    for official, theirs_ in _TORCHVISION_PARTS:
        if renamed := _renamed(bare, [theirs_], official):
            return renamed
    return bare


def _torchvision_block(stack: str, number: str, rest: str) -> str | None:
    part, _, leaf = rest.rpartition(".")
    if rest.startswith("self_attention.in_proj_"):  # one parameter of the attention, not of a linear layer in it
        part, leaf = "self_attention.in_proj", rest.removeprefix("self_attention.in_proj_")
    official = next((row[0] for row in _TORCHVISION_BLOCK if part in row[1:]), None)
    return f"{stack}.{number}.{official}.{leaf}" if official and leaf in ("weight", "bias") else None


def _from_mmpretrain(name: str) -> str:
    whole = name if name.startswith(("backbone.", "neck.", "head.")) else f"backbone.{name}"
    if match := re.fullmatch(r"(?:backbone\.layers|neck\.(decoder_blocks))\.(\d+)\.(.+)\.(weight|bias)", whole):
        decoder, number, part, leaf = match.groups()
        official = next((official for official, theirs in _MMPRETRAIN_BLOCK if theirs == part), None)
        return f"{decoder or 'blocks'}.{number}.{official}.{leaf}" if official else name
    if whole.startswith(_MMPRETRAIN_PROBE):
        return whole.replace(_MMPRETRAIN_PROBE, "head.0.", 1)
    for official, theirs in (*_MMPRETRAIN_PARTS, ("head", _MMPRETRAIN_TOKEN_HEAD)):
        if renamed := _renamed(whole, [theirs], official):
            return renamed
    return name


def _to_lightly(official: str) -> str | None:
    for ours, theirs, *_ in _LIGHTLY_DECODER:
        if renamed := _renamed(official, [ours], theirs):
            return renamed
    if official.startswith("decoder_blocks."):
        return official.replace("decoder_blocks.", "decoder.blocks.", 1)
    if official.startswith(("decoder_", "encoder_")):  # a component of a PCA, a mask token of the encoder
        return None
    return f"backbone.vit.{official}"


def _to_mmpretrain(official: str, pools_mean: bool) -> str | None:
    if match := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", official):
        decoder, number, part, leaf = match.groups()
        theirs = dict(_MMPRETRAIN_BLOCK).get(part)
        stack = "neck.decoder_blocks" if decoder else "backbone.layers"
        return f"{stack}.{number}.{theirs}.{leaf}" if theirs else None
    for ours, theirs in _MMPRETRAIN_PARTS:
        if ours == "head" and not pools_mean:
            theirs = _MMPRETRAIN_TOKEN_HEAD
        if renamed := _renamed(official, [ours], theirs):
            return renamed
    return None


def _renamed(name: str, stems: Iterable[str], to: str) -> str | None:
    """The name with a stem replaced, if it is one of the stems or a weight or bias of one."""
    for stem in stems:
        if name in (stem, f"{stem}.weight", f"{stem}.bias"):
            return to + name.removeprefix(stem)
    return None
