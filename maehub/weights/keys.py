"""The names of tensors: every dialect in which a masked autoencoder or a Vision Transformer is published.

The official names are the canonical ones: everything is read into them and written from them. Functions here take and
give dictionaries and know nothing of files; tensors are touched only where a dialect splits queries, keys and values.

    official                  transformers 4.x                        transformers 5.x, in memory   our modules
    blocks.0.attn.qkv         vit.encoder.layer.0.attention.attention vit.layers.0.attention        encoder.blocks.0.…
                              .query, .key, .value                    .q_proj, .k_proj, .v_proj
    decoder_blocks.0          decoder.decoder_layers.0                decoder.decoder_layers.0      decoder.blocks.0

transformers 5.23 saves the decoder as ``decoder.decoder_encoder.layer.0``, a dialect of its own. timm writes the
official names, encoder only. Those of lightly, mmpretrain and detectron2 are in `maehub.weights.library_keys`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from maehub.errors import IntegrityError, UsageError, first_names
from maehub.weights import library_keys
from maehub.weights.library_keys import ForeignDialect

Dialect = Literal["official", "module", "transformers-4", "transformers-5", "transformers-5-saved"] | ForeignDialect
"""How a state dictionary names its tensors; timm's is ``official``."""

WrittenDialect = Literal["official", "timm", "transformers-4", "module"] | ForeignDialect
"""The dialects that are written; ``timm`` is ``official`` without a decoder."""


class OfficialNames(NamedTuple):
    """What the names of a state dictionary are officially."""

    names: dict[str, str]  # every name as the file has it; separate queries, keys and values stay separate
    dialect: Dialect
    dropped: dict[str, str]  # names that are left out on purpose, and why


class OfficialState(NamedTuple):
    """A state dictionary under official names."""

    state: dict[str, Tensor]
    dialect: Dialect  # what the names were
    dropped: dict[str, str]  # names, wrappers stripped, that were left out on purpose, and why


WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "net.", "network.", "student.", "teacher.")
"""Prefixes of DistributedDataParallel, torch.compile, FSDP and training scripts, stripped where every key has them."""

ENCODER_MASK_TOKEN = "encoder_mask_token"
"""The mask token of an autoencoder whose encoder sees it. No published file has one, so the name is ours."""

# our modules to the official names, which are ours where no published file has such a tensor
_MODULE = {
    "mask_token": ENCODER_MASK_TOKEN,
    "decoder.mask_token": "mask_token",
    "decoder.embed": "decoder_embed",
    "decoder.pos_embed": "decoder_pos_embed",
    "decoder.blocks": "decoder_blocks",
    "decoder.norm": "decoder_norm",
    "decoder.pred": "decoder_pred",
    "decoder.centre": "decoder_centre",
    "decoder.components": "decoder_components",
}

# official, transformers 4.x, transformers 5.x
_BLOCK_PARTS = (
    ("norm1", "layernorm_before", "layernorm_before"),
    ("attn.query", "attention.attention.query", "attention.q_proj"),
    ("attn.key", "attention.attention.key", "attention.k_proj"),
    ("attn.value", "attention.attention.value", "attention.v_proj"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    ("norm2", "layernorm_after", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
)


def _transformers(encoder: str, decoder: str, column: int) -> dict[str, str]:
    """Their names, the encoder's without ``vit.``, to the official ones, by their stacks of blocks; see `renamed`."""
    stacks = ((encoder, "blocks"), (decoder, "decoder_blocks"))
    return {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "classifier": "head",
        "decoder.mask_token": "mask_token",
        **{f"decoder.decoder_{one}": f"decoder_{one}" for one in ("embed", "pos_embed", "norm", "pred")},
        **{f"{stack}.N.{row[column]}": f"{ours}.N.{row[0]}" for stack, ours in stacks for row in _BLOCK_PARTS},
    }


_TRANSFORMERS = {
    "transformers-4": _transformers("encoder.layer", "decoder.decoder_layers", 1),
    "transformers-5": _transformers("layers", "decoder.decoder_layers", 2),
    "transformers-5-saved": _transformers("encoder.layer", "decoder.decoder_encoder.layer", 1),
}

_PROBE_EPS = 1e-6  # of the BatchNorm in front of a linear probe, as in the published code and mmpretrain's

# A published linear probe is BatchNorm without parameters, "head.0", and a linear layer, "head.1": together one linear
# layer. What of them is in which tensor of it.
_PROBE_PARTS = {
    "head.0.running_mean": ("head.bias",),
    "head.0.running_var": ("head.weight", "head.bias"),
    "head.1.weight": ("head.weight", "head.bias"),
    "head.1.bias": ("head.bias",),
}

HARMLESS_EXTRAS = {
    "pooler.dense.weight": "the tanh pooler of transformers' ViTModel, which MAE does not train",
    "pooler.dense.bias": "the tanh pooler of transformers' ViTModel, which MAE does not train",
    "embeddings.mask_token": "the mask token of transformers' ViTForMaskedImageModeling, which no forward here uses",
}
"""transformers names that are left out on purpose, and why; every other unknown name stays for the strict check."""


def is_decoder(name: str) -> bool:
    """Whether an official name belongs to the decoder, or to the hiding of patches, rather than to the encoder."""
    return name.startswith("decoder_") or name in ("mask_token", ENCODER_MASK_TOKEN)


def strip_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """The keys without the `WRAPPERS` that all of them share: old name to new name."""
    names = {key: key for key in keys}
    # A backbone of ViTDet has all its names in "net." and no class token: that is no wrapper.
    known = [prefix for prefix in WRAPPERS if prefix != "net." or any(key.endswith("net.cls_token") for key in names)]
    while prefix := next((p for p in known if names and all(n.startswith(p) for n in names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return names


def detect(keys: Iterable[str]) -> Dialect:
    """The dialect of a state dictionary's keys, wrappers allowed."""
    stripped = strip_wrappers(keys).values()
    if foreign := library_keys.detect_foreign(stripped):
        return foreign
    names = [name.removeprefix("vit.") for name in stripped]

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if has("embeddings.", "decoder.decoder_"):
        if has("decoder.decoder_encoder."):
            return "transformers-5-saved"
        return "transformers-5" if has("layers.") else "transformers-4"
    if has("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.", "encoder.blocks.", "decoder.embed."):
        return "module"
    if has("cls_token", "pos_embed", "patch_embed.", "blocks.", "decoder_embed."):
        return "official"
    some = first_names(names, 5) or "none"
    raise IntegrityError(
        f"these tensors are not of a Vision Transformer or masked autoencoder that is known here: {some}; "
        "known are the names of the official code, timm, transformers, lightly, mmpretrain and detectron2's ViTDet"
    )


def official_names(keys: Iterable[str]) -> OfficialNames:
    """What each name of a state dictionary is officially, without looking at tensors.

    Names that the dialect does not have stay as they are.
    """
    stripped = strip_wrappers(keys)
    dialect = detect(stripped)
    dropped: dict[str, str] = {}
    if library_keys.is_foreign(dialect):
        dropped = library_keys.foreign_extras(stripped.values(), dialect)
    elif dialect.startswith("transformers"):
        bare = {name: name.removeprefix("vit.") for name in stripped.values()}
        dropped = {name: HARMLESS_EXTRAS[short] for name, short in bare.items() if short in HARMLESS_EXTRAS}
    names = {key: _official_name(name, dialect) for key, name in stripped.items() if name not in dropped}
    if counter := next((key for key, name in names.items() if name == "head.0.num_batches_tracked"), None):
        dropped[stripped[counter]] = "how many batches a linear probe was trained on"
        del names[counter]
    return OfficialNames(names, dialect, dropped)


def to_official(state: Mapping[str, Tensor]) -> OfficialState:
    """Rename any dialect to the official names; separate queries, keys and values become one tensor.

    The BatchNorm of a linear probe, as MAE publishes it, becomes part of the linear layer behind it. Names that the
    dialect does not have stay as they are, so that the strict check lists them.
    """
    known = official_names(state)
    named: dict[str, Tensor] = {}
    for key, official in known.names.items():
        if official in named:
            raise IntegrityError(f"two tensors of this file are both {official}; one of them is {key}")
        named[official] = state[key]
    if library_keys.is_foreign(known.dialect):
        library_keys.check_foreign(named, known.dialect)
    return OfficialState(_with_plain_head(_fuse(named)), known.dialect, known.dropped)


def from_official(state: Mapping[str, Tensor], dialect: WrittenDialect) -> dict[str, Tensor]:
    """Rename official names to a dialect.

    ``timm`` leaves the decoder out. ``transformers-4`` names ViTMAEForPreTraining's tensors where there is a decoder,
    ViTForImageClassification's where there is a head, else ViTModel's; queries, keys and values are views of the
    fused tensors. ``module`` names `MaskedAutoencoder`'s tensors where there is a decoder, else `Encoder`'s. The others
    are those of `maehub.weights.library_keys.to_foreign`.
    """
    if dialect == "official":
        return dict(state)
    if dialect == "timm":
        return {name: value for name, value in state.items() if not is_decoder(name)}
    if dialect == "module":
        if not any(is_decoder(name) for name in state):
            return dict(state)
        table = {official: module for module, official in _MODULE.items()}
        return {_by_stem(name, table) or f"encoder.{name}": value for name, value in state.items()}
    if dialect == "transformers-4":
        return _to_transformers(state)
    return library_keys.to_foreign(state, dialect)


def parts(official: str) -> tuple[str, ...]:
    """The tensors that a fused one is counted in: queries, keys and values, or the layer that a probe becomes.

    Any other name is alone.
    """
    if official in _PROBE_PARTS:
        return _PROBE_PARTS[official]
    stem, fused, leaf = official.partition(".qkv.")
    return tuple(f"{stem}.{one}.{leaf}" for one in ("query", "key", "value")) if fused else (official,)


def _official_name(name: str, dialect: Dialect) -> str:
    """One name, wrappers stripped; unknown names come back as they are."""
    if dialect == "official":
        return name
    if library_keys.is_foreign(dialect):
        return library_keys.foreign_official_name(name, dialect)
    if dialect == "module":
        return _by_stem(name, _MODULE) or name.removeprefix("encoder.")
    return library_keys.renamed(name.removeprefix("vit."), _TRANSFORMERS[dialect]) or name


def _by_stem(name: str, table: Mapping[str, str]) -> str | None:
    """A name that begins with a stem of the table, with what stands there in its place; None if with none of them."""
    return next((to + name.removeprefix(stem) for stem, to in table.items() if f"{name}.".startswith(f"{stem}.")), None)


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join ``attn.query``, ``attn.key`` and ``attn.value`` to ``attn.qkv``, in that order along the first dimension."""
    fused = {}
    for name, value in state.items():
        if not (match := re.fullmatch(r"(.*\.attn)\.(query|key|value)\.(weight|bias)", name)):
            fused[name] = value
            continue
        stem, part, leaf = match.groups()
        whole = [state[one] for one in parts(f"{stem}.qkv.{leaf}") if one in state]
        if len(whole) < 3 or len({(tensor.shape, tensor.dtype) for tensor in whole}) > 1 or not value.ndim:
            fused[name] = value  # a part is missing or does not fit: left for the strict check to name
        elif part == "query":
            fused[f"{stem}.qkv.{leaf}"] = torch.cat(whole)
    return fused


def _with_plain_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear probe's BatchNorm and linear layer as the one layer that they are; of mmpretrain that is ``head``."""
    mean, var = (state.get(f"head.0.running_{one}") for one in ("mean", "var"))
    first = "head.1" if "head.1.weight" in state else "head"
    weight, bias = (state.get(f"{first}.{leaf}") for leaf in ("weight", "bias"))
    if mean is None or var is None or weight is None or bias is None or "head.0.weight" in state:
        return state
    classes = weight.shape[:1]
    if weight.ndim != 2 or bias.shape != classes or mean.shape != weight.shape[1:] or var.shape != weight.shape[1:]:
        return state  # left for the strict check to name
    scale = (var.double() + _PROBE_EPS).rsqrt()
    scaled = weight.double() * scale
    folded = {"head.weight": scaled, "head.bias": bias.double() - scaled @ mean.double()}
    gone = {*_PROBE_PARTS, "head.weight", "head.bias"}
    kept = {name: value for name, value in state.items() if name not in gone}
    return kept | {name: value.to(weight.dtype) for name, value in folded.items()}


def _to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers 4.x, which every version reads."""
    if any(name.startswith("fc_norm.") for name in state):
        raise UsageError(
            "a classifier that pools the mean (fc_norm) has no transformers form: its ViT pools the class token; "
            "write to='timm' or to='maehub'"
        )
    if ENCODER_MASK_TOKEN in state:
        raise UsageError("an autoencoder whose encoder sees mask tokens has no transformers form; write to='maehub'")
    if "decoder_centre" in state or "decoder_components" in state:
        raise UsageError("an autoencoder that predicts PCA coefficients has no transformers form; write to='maehub'")
    prefix = "vit." if any(is_decoder(name) or name.startswith("head.") for name in state) else ""
    table = {official: theirs for theirs, official in _TRANSFORMERS["transformers-4"].items()}
    written: dict[str, Tensor] = {}
    for name, value in state.items():
        before = "" if is_decoder(name) or name.startswith("head.") else prefix
        names = parts(name)
        for part, piece in zip(names, value.chunk(len(names)), strict=True):
            theirs = library_keys.renamed(part, table)
            assert theirs, part  # a network here has no other tensors
            written[before + theirs] = piece
    return written
