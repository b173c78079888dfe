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

# official, torchvision, and its names until 0.13; N is the number of a block
_TORCHVISION_BLOCK = (
    ("norm1", "ln_1", "ln_1"),
    ("attn.qkv.weight", "self_attention.in_proj_weight", "self_attention.in_proj_weight"),
    ("attn.qkv.bias", "self_attention.in_proj_bias", "self_attention.in_proj_bias"),
    ("attn.proj", "self_attention.out_proj", "self_attention.out_proj"),
    ("norm2", "ln_2", "ln_2"),
    ("mlp.fc1", "mlp.0", "mlp.linear_1"),
    ("mlp.fc2", "mlp.3", "mlp.linear_2"),
)
_TORCHVISION = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.ln": "norm",
    "heads.head": "head",
} | {f"encoder.layers.encoder_layer_N.{one}": f"blocks.N.{part}" for part, *both in _TORCHVISION_BLOCK for one in both}

# official, lightly since 1.6, its MAEDecoderTIMM, its MAEDecoder of torchvision
_LIGHTLY_DECODER = (
    ("mask_token", "decoder.mask_token", "decoder.mask_token", "mask_token"),
    ("decoder_embed", "decoder_embed", "decoder.decoder_embed", "decoder.decoder_embed"),
    ("decoder_pos_embed", "decoder.pos_embed", "decoder.decoder_pos_embed", "decoder.pos_embedding"),
    ("decoder_norm", "decoder.norm", "decoder.decoder_norm", "decoder.ln"),
    ("decoder_pred", "prediction_head", "decoder.decoder_pred", "decoder.prediction_head"),
)
_LIGHTLY = {one: official for official, *three in _LIGHTLY_DECODER for one in three} | {
    f"decoder.layers.encoder_layer_N.{one}": f"decoder_blocks.N.{part}"
    for part, *both in _TORCHVISION_BLOCK
    for one in both
}

_MMPRETRAIN_BLOCK = {
    "ln1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "ln2": "norm2",
    "ffn.layers.0.0": "mlp.fc1",
    "ffn.layers.1": "mlp.fc2",
}
_MMPRETRAIN_PROBE = "neck.bn."  # of ClsBatchNormNeck, in front of a linear probe's head
_MMPRETRAIN = (
    {
        "backbone.cls_token": "cls_token",
        "backbone.pos_embed": "pos_embed",
        "backbone.patch_embed.projection": "patch_embed.proj",
        "backbone.ln1": "norm",
        "backbone.ln2": "fc_norm",
        "head.layers.head": "head",  # of VisionTransformerClsHead, which pools the class token
        "head.fc": "head",
        "neck.mask_token": "mask_token",
        "neck.decoder_embed": "decoder_embed",
        "neck.decoder_pos_embed": "decoder_pos_embed",
        "neck.ln1": "decoder_norm",
        "neck.decoder_pred": "decoder_pred",
    }
    | {f"backbone.layers.N.{theirs}": f"blocks.N.{part}" for theirs, part in _MMPRETRAIN_BLOCK.items()}
    | {f"neck.decoder_blocks.N.{theirs}": f"decoder_blocks.N.{part}" for theirs, part in _MMPRETRAIN_BLOCK.items()}
)

LIGHTLY_MASK_TOKEN = "backbone.mask_token"
"""What every masked encoder of lightly has, and its MAE never uses."""


def is_foreign(dialect: str) -> TypeGuard[ForeignDialect]:
    """Whether a dialect is one of those here."""
    return dialect in get_args(ForeignDialect)


def detect_foreign(names: Iterable[str]) -> ForeignDialect | None:
    """Which of the dialects here these names are, wrappers stripped; None if none of them."""
    names = list(names)
    return next((dialect for dialect, sign in _SIGNS.items() if any(re.match(sign, name) for name in names)), None)


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """A name by a table of names that have N for the number of a block, and no ``weight`` or ``bias``."""
    number = re.search(r"(?<=[._])\d+(?=\.)", name)
    plain = f"{name[: number.start()]}N{name[number.end() :]}" if number else name
    stem = plain if plain in table else re.sub(r"\.(weight|bias)$", "", plain)
    if stem not in table:
        return None
    return table[stem].replace("N", number[0] if number else "N", 1) + plain.removeprefix(stem)


def foreign_official_name(name: str, dialect: ForeignDialect) -> str:
    """One name, wrappers stripped, as the official one; unknown names come back as they are."""
    if dialect == "detectron2":
        return re.sub(r"^(backbone\.)?net\.", "", name)
    if dialect == "mmpretrain":
        whole = name if name.startswith(("backbone.", "neck.", "head.")) else f"backbone.{name}"
        if whole.startswith(_MMPRETRAIN_PROBE):
            return whole.replace(_MMPRETRAIN_PROBE, "head.0.", 1)
        return renamed(whole, _MMPRETRAIN) or name
    if of_decoder := renamed(name, _LIGHTLY):
        return of_decoder
    bare = re.sub(r"^(backbone\.)?(vit\.)?", "", name)
    return renamed(bare, _TORCHVISION) or re.sub(r"^decoder\.(decoder_)?blocks\.", "decoder_blocks.", bare)


def foreign_extras(names: Iterable[str], dialect: ForeignDialect) -> dict[str, str]:
    """The names that are left out on purpose, and why."""
    names = set(names)
    if dialect != "lightly":
        return {}
    probe = "the classifier that lightly trains beside the network, for watching it"
    extras = {name: probe for name in names if name.startswith("online_classifier.")}
    is_alone = any(name.startswith("vit.") for name in names)  # an encoder that was saved without its autoencoder
    token = "mask_token" if is_alone and LIGHTLY_MASK_TOKEN not in names else LIGHTLY_MASK_TOKEN
    if token in names:
        extras[token] = "the mask token of lightly's encoder, which its MAE never uses"
    official = {name: foreign_official_name(name, dialect) for name in names}
    if any(name.startswith("decoder_") for name in official.values()):
        unused = "the classifier that timm and torchvision put on every network, which MAE does not train"
        extras |= {name: unused for name, bare in official.items() if bare in ("head.weight", "head.bias")}
    return extras


def check_foreign(state: Mapping[str, Tensor], dialect: ForeignDialect) -> None:
    """Refuse a network of these libraries (official names) that no network here computes."""
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
    if dialect == "lightly":
        table = {ours: theirs for ours, theirs, *_ in _LIGHTLY_DECODER}
        written = {LIGHTLY_MASK_TOKEN: torch.zeros_like(state["cls_token"])}
    else:
        heads = {"head": "head.fc" if "fc_norm.weight" in state else "head.layers.head"}
        table, written = {official: theirs for theirs, official in _MMPRETRAIN.items()} | heads, {}
    for name, value in state.items():
        theirs = renamed(name, table)
        if theirs is None and dialect == "lightly":
            if name.startswith("decoder_blocks."):
                theirs = name.replace("decoder_blocks.", "decoder.blocks.", 1)
            elif not name.startswith(("decoder_", "encoder_")):  # a component of a PCA, a mask token of the encoder
                theirs = f"backbone.vit.{name}"
        if theirs is None:
            raise UsageError(f"{dialect} has no place for {name}; write to='maehub'")
        written[theirs] = value
    return written
