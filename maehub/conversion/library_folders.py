"""Folders for lightly, mmpretrain, detectron2, ONNX and torch.export: their files, and a page on how to use them.

    config.json         our block alone
    model.safetensors   the tensors under the names of the library
    model.pth           the same as a pickle, where the library's loader reads nothing else
    README.md           how to load it there

Of ONNX and torch.export there is ``encoder.onnx`` or ``encoder.pt2`` in place of the tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeGuard, get_args

import torch
from huggingface_hub import ModelCardData

from maehub.conversion.exporting import ExportForm, write_exported
from maehub.errors import UsageError
from maehub.files import write_json, write_text
from maehub.models import AutoencoderConfig, Encoder, MaskedAutoencoder
from maehub.version import __version__
from maehub.weights import (
    Config,
    ForeignDialect,
    from_official,
    is_foreign,
    our_block,
    to_official,
    write_pickle,
    write_tensors,
)

ForeignForm = ForeignDialect | ExportForm
"""What is written here."""

PICKLE = "model.pth"

TENSORS = "model.safetensors"

# what is around the tensors in the pickle of a library whose loader reads pickles alone
_INSIDE: dict[str, Literal["state_dict", "model"]] = {"mmpretrain": "state_dict", "detectron2": "model"}


def is_foreign_form(form: str) -> TypeGuard[ForeignForm]:
    """Whether a form is written here."""
    return is_foreign(form) or is_exported(form)


def is_exported(form: str) -> TypeGuard[ExportForm]:
    """Whether a form is a graph rather than tensors."""
    return form in get_args(ExportForm)


def check_foreign_form(config: Config, form: ForeignForm) -> None:
    """Refuse before any work what a library cannot compute."""
    encoder = config.encoder if isinstance(config, AutoencoderConfig) else config
    square = encoder.size[0] == encoder.size[1]
    if form == "detectron2":
        if not square:
            raise UsageError(
                f"ViTDet takes the position table of a square image, and this one is for {encoder.size[0]}×"
                f"{encoder.size[1]}; load(..., image_size=) makes it square; save that, and convert the folder"
            )
    elif isinstance(config, AutoencoderConfig) and not is_exported(form):
        reasons = {
            "its decoder takes square images alone": not square,
            "its encoder never sees mask tokens": config.mask_tokens == "encoder",
            "its decoder has at least one block": config.decoder_depth == 0,
            "it has no place for the components of a PCA": config.target == "pca",
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            raise UsageError(
                f"{form} would not compute the same, since {reason}; write to='maehub', or save the encoder and "
                "convert that"
            )


def write_foreign(staging: Path, name: str, model: Encoder | MaskedAutoencoder, form: ForeignForm) -> None:
    """Write the files of a form into an empty folder."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    hashes: dict[str, str] = {}
    if is_exported(form):
        write_exported(encoder, staging, form)
    elif is_foreign(form):
        tensors = from_official(to_official(model.state_dict()).state, form)
        metadata = {"format": "pt", "maehub": __version__}
        if encoder.origin:
            metadata |= {"source": encoder.origin.name, "source_sha256": encoder.origin.sha256}
        hashes[TENSORS] = write_tensors(staging / TENSORS, tensors, metadata, torch.float32)
        if form in _INSIDE:
            write_pickle(staging / PICKLE, tensors, _INSIDE[form])
    block = our_block(model.config, model.preprocess, encoder.origin, torch.float32, hashes)
    write_json(staging / "config.json", {"maehub": block | {"verified": {}}})
    write_text(staging / "README.md", _page(name, model, form))


def _page(name: str, model: Encoder | MaskedAutoencoder, form: ForeignForm) -> str:
    encoder = model if isinstance(model, Encoder) else model.encoder
    config, origin = encoder.config, encoder.origin
    licence = origin.licence if origin else ""
    tags = ["mae", "masked-autoencoder", "vision", form]
    head = ModelCardData(license=licence.lower() or None, library_name=form, tags=tags).to_yaml()
    facts = {
        "height": config.size[0],
        "width": config.size[1],
        "patch": config.patch_size,
        "channels": config.channels,
        "dim": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "hidden": int(config.width * config.mlp_ratio),
        "ratio": f"{config.mlp_ratio:g}",
        "patches": config.grid[0] * config.grid[1],
        "classes": config.classes,
        "pool": "avg" if config.pool == "mean" else "token",
    }
    if isinstance(model, MaskedAutoencoder):
        decoder = model.config
        facts |= {
            "decoder": decoder.decoder_width,
            "blocks": decoder.decoder_depth,
            "outputs": decoder.prediction_width,
            "decoder_heads": decoder.decoder_heads,
            "norm_pix": decoder.target == "normalised_pixels",
        }
    body = _USES.get((form, isinstance(model, MaskedAutoencoder)), _USES[form, False])
    mean, std = ([round(value, 6) for value in values] for values in (encoder.preprocess.mean, encoder.preprocess.std))
    transform = (
        f"Pictures: {encoder.preprocess.resize} to {config.size[0]}×{config.size[1]}, channel means {mean}, deviations "
        f"{std}; `config.json` has the whole transform. Licence of the weights: {licence or 'not stated'}. "
        "`certificate.json` says what was compared, which tensor became which, and the hashes."
    )
    return f"---\n{head}\n---\n\n# {name}\n\n{body.format_map(facts)}\n\n{transform}\n"


_USES: Mapping[tuple[str, bool], str] = {
    ("lightly", False): """\
The encoder in the names of lightly's `MaskedVisionTransformerTIMM`, as `self.backbone` of a module of yours:

```python
vit = VisionTransformer(img_size=({height}, {width}), patch_size={patch}, in_chans={channels}, embed_dim={dim},
                        depth={depth}, num_heads={heads}, mlp_ratio={ratio}, num_classes={classes},
                        global_pool="{pool}")
self.backbone = MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization="skip")
self.load_state_dict(safetensors.torch.load_file("model.safetensors"))
```""",
    ("lightly", True): """\
A masked autoencoder in the names of lightly's MAE example, lightly 1.6 or newer:

```python
vit = VisionTransformer(img_size={height}, patch_size={patch}, in_chans={channels}, embed_dim={dim}, depth={depth},
                        num_heads={heads}, mlp_ratio={ratio}, num_classes=0)
self.backbone = MaskedVisionTransformerTIMM(vit=vit)
self.decoder_embed = nn.Linear({dim}, {decoder})
self.decoder = MaskedVisionTransformerDecoderTIMM(num_patches={patches}, embed_dim={decoder}, depth={blocks},
                                                  num_heads={decoder_heads}, mlp_ratio={ratio})
self.prediction_head = nn.Linear({decoder}, {outputs})
self.load_state_dict(safetensors.torch.load_file("model.safetensors"))
```""",
    ("mmpretrain", False): """\
The network in the names of mmpretrain's `VisionTransformer`; mmpretrain's loader reads `model.pth`:

```python
backbone = dict(type="VisionTransformer", img_size=({height}, {width}), patch_size={patch}, in_channels={channels},
                arch=dict(embed_dims={dim}, num_layers={depth}, num_heads={heads}, feedforward_channels={hidden}),
                init_cfg=dict(type="Pretrained", checkpoint="model.pth", prefix="backbone."))
```

A network that pools the mean needs `out_type="avg_featmap", final_norm=False` too, and a `LinearClsHead`; one that
pools the class token a `VisionTransformerClsHead`.""",
    ("mmpretrain", True): """\
A masked autoencoder in the names of mmpretrain's `MAE`; its loader reads `model.pth`:

```python
load_from = "model.pth"
model = dict(
    type="MAE",
    backbone=dict(type="MAEViT", img_size={height}, patch_size={patch}, patch_cfg=dict(in_channels={channels}),
                  arch=dict(embed_dims={dim}, num_layers={depth}, num_heads={heads}, feedforward_channels={hidden})),
    neck=dict(type="MAEPretrainDecoder", num_patches={patches}, patch_size={patch}, in_chans={channels},
              embed_dim={dim}, decoder_embed_dim={decoder}, decoder_depth={blocks}, decoder_num_heads={decoder_heads},
              mlp_ratio={ratio}),
    head=dict(type="MAEPretrainHead", norm_pix={norm_pix}, patch_size={patch}, in_channels={channels},
              loss=dict(type="PixelReconstructionLoss", criterion="L2")))
```""",
    ("detectron2", False): """\
The backbone of ViTDet in detectron2, for `model.backbone.net` of its ViTDet configurations; its loader reads
`model.pth`. ViTDet has no class token and no final norm, so neither is here:

```python
train.init_checkpoint = "model.pth"
model.backbone.net.update(patch_size={patch}, in_chans={channels}, embed_dim={dim}, depth={depth}, num_heads={heads},
                          mlp_ratio={ratio}, pretrain_img_size={height}, pretrain_use_cls_token=True)
```""",
    ("onnx", False): """\
The encoder as ONNX, for any batch and any height and width divisible by {patch}. Outputs are `features` (B, {dim}),
`tokens` (B, N, {dim}), and `logits` where there is a classifier:

```python
session = onnxruntime.InferenceSession("encoder.onnx")
(features,) = session.run(["features"], {{"images": images}})  # (B, {channels}, H, W) float32, preprocessed
```""",
    ("torch-export", False): """\
The encoder as a torch.export program, for any batch and any height and width divisible by {patch} of at least two
patches each. Its outputs are features (B, {dim}), tokens (B, N, {dim}), and logits where there is a classifier:

```python
encoder = torch.export.load("encoder.pt2").module()
features, tokens, *logits = encoder(images)  # (B, {channels}, H, W) float32, preprocessed
```""",
}
