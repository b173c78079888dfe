"""Folders for lightly, mmpretrain, detectron2, ONNX and torch.export: their files, and a page on how to use them.

    config.json         our block alone
    model.safetensors   the tensors under the names of the library
    model.pth           the same as a pickle, where the library's loader reads nothing else
    README.md           how to load it there

Of ONNX and torch.export there is ``encoder.onnx`` or ``encoder.pt2`` in place of the tensors.
"""

from pathlib import Path
from typing import Literal, TypeGuard, get_args

import torch
from huggingface_hub import ModelCardData

from maehub.conversion.exporting import ExportForm, write_exported
from maehub.errors import UsageError
from maehub.files import fill_template, write_json, write_text
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
    licence = encoder.origin.licence if encoder.origin else ""
    tags = ["mae", "masked-autoencoder", "vision", form]
    values = {
        "head": ModelCardData(license=licence.lower() or None, library_name=form, tags=tags).to_yaml(),
        "name": name,
        "form": form,
        "config": encoder.config,
        "decoder": None if isinstance(model, Encoder) else model.config,
        "preprocess": encoder.preprocess,
        "licence": licence,
    }
    return fill_template(Path(__file__).with_name("library_page.md.jinja"), values)
