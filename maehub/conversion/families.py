"""The families of vision networks that a state dictionary can be told to be, by names and shapes alone.

Names and shapes only: nothing of a tensor's values is read. What cannot be told with certainty is in no row: a plain
Vision Transformer of DINO, of supervised training and of a masked autoencoder have the same tensors.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Family(NamedTuple):
    """One family: what it is, its signs, and what to do with a file of it."""

    name: str
    title: str
    advice: str
    signs: tuple[str, ...]  # regular expressions; each must be found in the name of some tensor
    absent: tuple[str, ...] = ()  # and these in none
    stem: tuple[int | None, ...] = ()  # the last dimensions of the patch kernel, None for any; () does not ask
    stem_rank: int = 0  # its number of dimensions; 0 does not ask


# The first row that fits is the answer. The names were read off the classes of timm 1.0.31 and transformers 5.23, or
# the published code of the family.
FAMILIES = (
    Family(
        "siglip",
        "SigLIP's image encoder",
        "load it with transformers' SiglipVisionModel, or by its name in timm",
        (r"attn_pool\.latent$|(^|\.)head\.probe$",),
    ),
    Family(
        "clip",
        "CLIP, or its image encoder",
        "load it with transformers' CLIPModel or CLIPVisionModel, with open_clip, or by its name in timm",
        (r"text_model\.|token_embedding\.weight$|class_embedding$|(norm_pre|ln_pre|pre_layrnorm)\.weight$",),
    ),
    Family(
        "sam2",
        "the Hiera encoder of SAM 2",
        "load it by its name in timm (sam2_hiera_…), or with the code of SAM 2",
        (r"pos_embed_window$",),
    ),
    Family(
        "sam",
        "Segment Anything (SAM), whose image encoder began as a masked autoencoder",
        "load it with transformers' SamModel, or its encoder by its name in timm (samvit_…)",
        (r"\.attn\.rel_pos_h$", r"(^|\.)neck\."),
    ),
    Family(
        "vitdet",
        "a ViTDet backbone: a ViT with relative positions, tuned for detection",
        "load it with detectron2, whose network it is",
        (r"\.attn\.rel_pos_h$", r"(^|\.)blocks\.\d+\.attn\.qkv\.weight$", r"(^|\.)pos_embed$"),
        (r"\.attn\.(pool|norm)_[qkv]\.",),  # of MViT, which has relative positions too
    ),
    Family(
        "vitdet",
        "a ViTDet backbone, which has no class token and no final norm",
        "load it with detectron2, whose network it is, or convert the file that it was made from",
        (r"(^|\.)net\.blocks\.\d+\.attn\.qkv\.weight$",),
        (r"(^|\.)cls_token$",),
    ),
    Family(
        "hiera",
        "Hiera, a hierarchical network that is pre-trained as a masked autoencoder",
        "load it by its name in timm (hiera_….mae), or with transformers' HieraModel or HieraForPreTraining",
        (r"(^|\.)blocks\.\d+\.proj\.weight$|stages\.\d+\.layers\.\d+\.attn\.qkv\.weight$",),
        stem=(7, 7),
    ),
    Family(
        "convnextv2",
        "ConvNeXt V2, a convolutional network that is pre-trained as a masked autoencoder (FCMAE)",
        "load it by its name in timm (convnextv2_….fcmae), or with transformers' ConvNextV2Model",
        (r"\.grn\.(weight|gamma)$", r"\.(conv_dw|dwconv)\.weight$"),
    ),
    Family(
        "convnext",
        "ConvNeXt, a convolutional network",
        "load it by its name in timm, or with transformers' ConvNextModel",
        (r"\.(conv_dw|dwconv)\.weight$",),
        (r"\.grn\.",),
    ),
    Family(
        "simmim",
        "SimMIM: masked image modelling with a decoder of one convolution, on a Swin or a ViT",
        "load it with transformers' SwinForMaskedImageModeling or ViTForMaskedImageModeling",
        (r"mask_token$", r"^decoder\.0\.weight$"),
    ),
    Family(
        "swin",
        "a Swin Transformer",
        "load it by its name in timm, or with transformers' SwinModel or Swinv2Model",
        (r"relative_position_bias_table$|\.cpb_mlp\.|continuous_position_bias", r"layers\.\d+\.blocks\.\d+\."),
    ),
    Family(
        "videomae",
        "VideoMAE, a masked autoencoder of video",
        "load it with transformers' VideoMAEModel, VideoMAEForPreTraining or VideoMAEForVideoClassification",
        (r"^videomae\.|encoder_to_decoder\.weight$|\.attn\.q_bias$",),
        (r"(^|\.)cls_token$",),
        stem_rank=5,
    ),
    Family(
        "prithvi",
        "a masked autoencoder of image series with three-dimensional patches, laid out as Prithvi's",
        "load it with terratorch, or with the prithvi_mae.py of its repository",
        (r"(^|\.)cls_token$", r"(^|\.)pos_embed$", r"(^|\.)blocks\.\d+\.attn\.qkv\.weight$"),
        stem_rank=5,
    ),
    Family(
        "video",
        "a transformer of video clips or image series: its patches have three dimensions",
        "maehub reads networks of single pictures; load it with the library that it comes from",
        (),
        stem_rank=5,
    ),
    Family(
        "satmae",
        "SatMAE with groups of channels, a masked autoencoder of multi-spectral pictures",
        "load it with the code of SatMAE: every group of channels has a patch embedding of its own",
        (r"patch_embed\.\d+\.proj\.weight$", r"channel_embed$"),
    ),
    Family(
        "crossmae",
        "CrossMAE, a masked autoencoder whose decoder only attends to the encoder",
        "load it with the code of CrossMAE; its encoder is a plain ViT, its decoder is not MAE's",
        (r"decoder_blocks\.\d+\.cross_attn\.",),
    ),
    Family(
        "dinov3",
        "DINOv3",
        "load it with transformers' DINOv3ViTModel, or by its name in timm",
        (r"(register_tokens|reg_token|storage_tokens)$", r"\.(layer_scale1\.lambda1|ls1\.gamma|gamma_1)$"),
        (r"(pos_embed|position_embeddings)$",),
    ),
    Family(
        "dinov2",
        "DINOv2",
        "load it with transformers' Dinov2Model (Dinov2WithRegistersModel), or by its name in timm",
        (r"\.(layer_scale1\.lambda1|ls1\.gamma)$", r"(register_tokens|reg_token|mask_token)$"),
    ),
    Family(
        "dinov2",
        "DINOv2",
        "load it with transformers' Dinov2Model, or by its name in timm",
        (r"\.(layer_scale1\.lambda1|ls1\.gamma)$", r"(^|\.)cls_token$"),
        stem=(14, 14),
    ),
    Family(
        "deit",
        "DeiT with a distillation token",
        "load it by its name in timm, or with transformers' DeiTModel",
        (r"(dist_token|distillation_token)$",),
    ),
    Family(
        "beit",
        "BEiT, or data2vec's image encoder, which has the same tensors",
        "load it by its name in timm, or with transformers' BeitModel or Data2VecVisionModel",
        (r"relative_position_bias_table$", r"(^|\.)cls_token$", r"(blocks|layers?)\.\d+\."),
    ),
    Family(
        "beit",
        "BEiT, or data2vec's image encoder, which has the same tensors",
        "load it with transformers' BeitModel or Data2VecVisionModel",
        (r"layers?\.\d+\.lambda_1$", r"(^|\.)cls_token$"),
    ),
)

_STEM = re.compile(r"(patch_embed\.(\d+\.)?proj|patch_embed\.projection|patch_embeddings?(\.proj(ection)?)?)\.weight$")


def recognise(shapes: Shapes) -> Family | None:
    """The family that tensors are of, None if no row fits.

    Args:
        shapes: of every tensor, by its name, without wrappers such as ``module.``.
    """
    stem = next((shape for name, shape in shapes.items() if _STEM.search(name) and len(shape) in (4, 5)), ())
    if class_tokens(shapes) > 1:
        return _several_tokens(class_tokens(shapes))
    return next((family for family in FAMILIES if _fits(family, shapes, stem)), None)


def _fits(family: Family, names: Iterable[str], stem: tuple[int, ...]) -> bool:
    if family.stem_rank and len(stem) != family.stem_rank:
        return False
    if family.stem and stem[-len(family.stem) :] != family.stem:
        return False
    found = (any(re.search(sign, name) for name in names) for sign in family.signs)
    return all(found) and not any(re.search(sign, name) for sign in family.absent for name in names)


def class_tokens(shapes: Shapes) -> int:
    """How many class tokens there are; 0 where none is stored."""
    found = (shape for name, shape in shapes.items() if re.search(r"(^|\.)cls_token$", name))
    return next((shape[1] for shape in found if len(shape) == 3), 0)


def _several_tokens(count: int) -> Family:
    return Family(
        "pixio",
        f"a ViT with {count} class tokens, as Pixio has several",
        "load it with transformers' PixioModel; the networks here have one class token",
        (),
    )


def generalised(shapes: Shapes, most: int = 8) -> tuple[str, ...]:
    """The first names with their shapes, block numbers as N, each once: what a person needs to see of a stranger."""
    seen: dict[str, None] = {}
    for name, shape in shapes.items():
        seen.setdefault(f"{without_numbers(name)[:80]} {'×'.join(map(str, shape)) or 'number'}", None)
        if len(seen) > 10 * most:  # names of a hostile file need not repeat
            break
    return tuple(seen)[:most]


def without_numbers(name: str) -> str:
    """A name with the numbers of its blocks as N."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "N", name)
