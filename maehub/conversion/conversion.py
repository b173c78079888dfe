"""Convert weights between the forms in which they are published.

Every form is read into the official names, built as a network, written, read again and compared; what was compared,
renamed and left out stands in the certificate beside the weights.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from maehub import weights
from maehub.conversion.certificate import (
    CERTIFICATE,
    LARGEST_DIFFERENCE,
    Certificate,
    Difference,
    difference,
    fixed_images,
    largest,
    left_out,
    names_table,
)
from maehub.conversion.checkpoints import Checkpoint, open_checkpoint
from maehub.conversion.exporting import EXPORTED, check_exportable, checked_shapes, export_versions, run_exported
from maehub.conversion.library_folders import (
    PICKLE,
    TENSORS,
    ForeignForm,
    check_foreign_form,
    is_exported,
    is_foreign_form,
    write_foreign,
)
from maehub.errors import IntegrityError, UsageError, log
from maehub.files import check_free, is_detector, is_segmenter, sha256_file, whole_folder, write_json
from maehub.hub import file_hashes, is_model, load, load_autoencoder, locate, model_info, published_as
from maehub.images import Preprocess
from maehub.models import AutoencoderConfig, Encoder, MaskedAutoencoder, Origin, Target, patchify
from maehub.version import __version__

Form = Literal["maehub", "official", "timm", "transformers"] | ForeignForm
"""What `convert` writes. The first four are folders that maehub loads too, and so are lightly's and mmpretrain's."""

FORMS = ("maehub", "official", "timm", "transformers", "lightly", "mmpretrain", "detectron2", "onnx", "torch-export")

LARGEST_EXPORTED_DIFFERENCE = 1e-4
"""As `LARGEST_DIFFERENCE`, of a graph, whose operations are another library's."""

# Everything that any form is made of, so that writing over another form leaves nothing of it.
_MEMBERS = tuple(dict.fromkeys((*weights.MEMBERS, CERTIFICATE, PICKLE, *EXPORTED.values(), f"{EXPORTED['onnx']}.data")))

_LAYOUTS: dict[str, weights.Layout] = {
    "maehub": "maehub",
    "official": "official",
    "timm": "maehub",  # of an encoder the two are one
    "transformers": "transformers",
}

_ENCODER_FORMS = ("timm", "detectron2", "onnx", "torch-export")


class Conversion(NamedTuple):
    """What `convert` wrote."""

    folder: Path
    difference: float  # largest, relative to the largest output, after reading it back
    dropped: tuple[str, ...]  # tensors and entries of the file that no network here has, left out on purpose
    certificate: Certificate


class _Source(NamedTuple):
    state: dict[str, Tensor]  # official names
    config: weights.Config
    preprocess: Preprocess | None
    origin: Origin
    where: str
    names: weights.OfficialNames  # of the tensors as the file has them
    beside: tuple[str, ...]
    files: dict[str, str]  # sha256 of what was read, by name


class _Compared(NamedTuple):
    differences: dict[str, Difference]  # by output
    compared: str  # what with what, in words
    inputs: tuple[tuple[int, ...], ...]
    bound: float


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    to: Form = "maehub",
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: Target | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert the form of a model to another; the same input gives the same bytes.

    What was written is read again and compared on fixed images before it gets its name. Weights are written in float32.

    Args:
        source: a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` file with the names of the official code,
            timm, transformers, lightly or mmpretrain; a folder with one and perhaps its ``config.json``; a name of the
            catalog, ``vit-b`` being the encoder and ``vit-b-pixel`` the autoencoder; or a Hub id
            ``user/repo[@revision]``. A `Path` is never a name.
        folder: what is written; must not exist or be empty, unless ``overwrite``.
        to: ``"maehub"``: a model folder for all three libraries. ``"official"``: the official names. ``"timm"``: the
            encoder for timm. ``"transformers"``: for ViTMAEForPreTraining, ViTModel or ViTForImageClassification.
            ``"lightly"``, ``"mmpretrain"``: what the source is, in their names. ``"detectron2"``: the backbone of
            ViTDet. ``"onnx"``, ``"torch-export"``: the encoder as a graph for any batch and image size.
        heads: attention heads of the encoder, where neither a configuration nor the published networks tell.
        decoder_heads: of the decoder, where its width is not 512.
        target: what the decoder was trained to predict; without it ``"unknown"``, unless a configuration says it.
        overwrite: replace a model folder.

    Returns:
        The folder, the largest difference, and the certificate that also lies in the folder.

    Raises:
        UsageError: there is no such file or name, the folder is in use, something must be said (``heads`` …), or the
            form cannot hold this network.
        IntegrityError: the file is broken, hostile, or no masked autoencoder, or what was written computes something
            else; nothing is kept.
        HubError: a named model cannot be downloaded.
        CheckpointError: the disk is full or cannot be written.
    """
    if to not in FORMS:
        raise UsageError(f"to={to!r} is not one of {', '.join(FORMS)}")
    check_free(folder, overwrite, _MEMBERS)
    check_exportable(to)
    if is_segmenter(source) or is_detector(source):
        what = "segmenter" if is_segmenter(source) else "detector"
        log.warning("%s holds a %s: its encoder alone is converted", source, what)
    read = _read(source, weights.Hints(heads, decoder_heads, target))
    if is_foreign_form(to):
        check_foreign_form(read.config, to)
    whole = isinstance(read.config, AutoencoderConfig) and to not in _ENCODER_FORMS
    kind: Any = MaskedAutoencoder if whole else Encoder
    model = weights.build(kind, read.state, read.config, read.preprocess, origin=read.origin, where=read.where)
    with whole_folder(folder, overwrite=overwrite, members=_MEMBERS) as staging:
        name = Path(folder).absolute().name
        if is_foreign_form(to):
            write_foreign(staging, name, model, to)
        else:
            weights.write_members(staging, name, model, layout=_LAYOUTS[to])
        certificate = _certify(read, model, staging, to)
        if not certificate.holds:
            raise IntegrityError(
                f"{read.where}: the converted network differs from the original by "
                f"{certificate.difference.relative:.1e}, more than {certificate.bound:.0e} of the largest output; "
                "nothing was written"
            )
        write_json(staging / CERTIFICATE, certificate.to_dict())
    dropped = (*read.beside, *read.names.dropped)
    return Conversion(Path(folder), certificate.difference.relative, dropped, certificate)


def _read(source: str | Path, hints: weights.Hints) -> _Source:
    """Tensors, configuration and origin of a file, a folder, or what a name means."""
    path = Path(source)
    if isinstance(source, str) and not os.path.exists(path):
        return _read_named(source, hints)
    checkpoint = open_checkpoint(weights.find_model_folder(path) if path.is_dir() else path)
    file = checkpoint.file
    stated = file_hashes(file, "md5")
    info = published_as(stated.sha256, stated.other)  # a published file is known by its content, and so is its licence
    name = info.name if info else path.name
    origin = Origin(name, sha256=stated.sha256, licence=info.licence if info else "")
    return _read_tensors(checkpoint, checkpoint.config if path.is_dir() else None, origin, hints)


def _read_named(name: str, hints: weights.Hints) -> _Source:
    """A row of the catalog as it is loaded, or the weights of a repository on the Hub."""
    if not is_model(name):
        located = locate(name, "autoencoder")
        fetched = located.fetched
        assert fetched is not None  # what is no file here was fetched
        origin = Origin(name, fetched.revision, fetched.sha256, fetched.licence)
        return _read_tensors(open_checkpoint(located.path), fetched.config, origin, hints)
    model: Encoder | MaskedAutoencoder
    if model_info(name).role == "autoencoder":
        located = locate(name, "autoencoder")
        model = load_autoencoder(located, heads=hints.heads, decoder_heads=hints.decoder_heads, target=hints.target)
    else:
        located = locate(name, "encoder")
        model = load(located, heads=hints.heads)
    origin = (model if isinstance(model, Encoder) else model.encoder).origin or Origin(name)
    state = weights.to_official(model.state_dict()).state
    read = {located.path.name: origin.sha256}
    return _Source(state, model.config, model.preprocess, origin, name, weights.official_names(state), (), read)


def _read_tensors(checkpoint: Checkpoint, config: Path | None, origin: Origin, hints: weights.Hints) -> _Source:
    """An opened file, and the configuration that belongs to it."""
    file, beside, tensors = checkpoint.file, checkpoint.beside, checkpoint.values()
    block = weights.packed_block(checkpoint.metadata, str(file))
    state, names = weights.to_official(tensors).state, weights.official_names(tensors)
    if dropped := (*beside, *names.dropped):
        log.info("%s: left out %s", file, ", ".join(dropped))
    files = {file.name: origin.sha256}
    network: weights.Config
    preprocess = None
    if block:
        network, preprocess, origin = block.config, block.preprocess, block.origin or origin
    elif config is None:
        network = weights.infer_config(state, hints, str(file))
    else:
        stored = weights.read_config(config, file, hints, state=state)
        network, preprocess = stored.config, stored.preprocess
        processor = config.with_name("preprocessor_config.json")
        files |= {one.name: sha256_file(one) for one in (config, processor) if one.exists()}
        if stored.origin:
            origin = replace(stored.origin, sha256=origin.sha256)
    return _Source(state, network, preprocess, origin, str(file), names, beside, files)


def _certify(read: _Source, model: Encoder | MaskedAutoencoder, staging: Path, to: str) -> Certificate:
    """Read back what was written, compare it, and gather what became of every tensor."""
    compared = _compare(model, staging, to)
    written = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    tables = {
        name: names_table(read.names, weights.official_names(weights.read_header(staging / name).tensors))
        for name in written
        if name.endswith(".safetensors")
    }
    if is_exported(to):  # a graph has tensors of its own; the names are those of the network in it
        tables[EXPORTED[to]] = names_table(read.names, weights.official_names(model.state_dict()))
    if to in ("mmpretrain", "detectron2"):
        tensors = weights.read_tensors(staging / TENSORS).tensors
        pickled = weights.read_pickle(staging / PICKLE).tensors
        if set(tensors) != set(pickled) or not all(torch.equal(one, pickled[name]) for name, one in tensors.items()):
            raise IntegrityError(f"{PICKLE} and {TENSORS} differ in what was just written; nothing was kept")
        tables[PICKLE] = tables[TENSORS]
    kept = {name for table in tables.values() for name in table}
    added = {weights.LIGHTLY_MASK_TOKEN: "zero, as lightly has it; its MAE never uses it"} if to == "lightly" else {}
    versions = {"maehub": __version__, "torch": torch.__version__}
    if is_exported(to):
        versions |= export_versions(to)
    return Certificate(
        source=read.names.dialect,
        to=to,
        **compared._asdict(),
        names=tables,
        left_out=left_out(read.names, kept, read.beside, to),
        added=added,
        read=dict(sorted(read.files.items())),
        written={name: sha256_file(staging / name) for name in written},
        versions=versions,
    )


def _compare(model: Encoder | MaskedAutoencoder, staging: Path, to: str) -> _Compared:
    """The outputs of a network and of what was written of it, on fixed images."""
    encoder = model if isinstance(model, Encoder) else model.encoder
    config = encoder.config
    if is_exported(to):  # at two sizes and two batch sizes
        shapes = checked_shapes(config)
        pictures = [fixed_images(shape) for shape in shapes]
        by_output: dict[str, Difference] = {}
        for images, theirs in zip(pictures, run_exported(staging / EXPORTED[to], to, pictures), strict=True):
            for name, ours in _outputs(encoder, images).items():
                one = difference(theirs[name], ours)
                by_output[name] = largest([by_output.get(name, one), one])
        runner = "onnxruntime" if to == "onnx" else "torch.export"
        return _Compared(by_output, f"the graph run by {runner}, with maehub", shapes, LARGEST_EXPORTED_DIFFERENCE)
    shape = (1, config.channels, *config.size)
    images = fixed_images(shape)
    if to == "detectron2":
        written = weights.read_tensors(staging / TENSORS).tensors
        names = weights.official_names(written).names
        state = encoder.state_dict() | {official: written[name] for name, official in names.items()}
        backbone = weights.build(Encoder, state, config, encoder.preprocess, where="what was written")
        words = "the last block's patches without a class token, as ViTDet computes them without windows"
        maps = {"map": difference(_blocks_alone(backbone, images), _blocks_alone(encoder, images))}
        return _Compared(maps, words, (shape,), LARGEST_DIFFERENCE)
    outputs, expected = _outputs(weights.open_encoder(staging), images), _outputs(encoder, images)
    if isinstance(model, MaskedAutoencoder):
        with torch.inference_mode():
            outputs["prediction"] = weights.open_autoencoder(staging)(images).prediction
            expected["prediction"] = model(images).prediction
    words = "the network that maehub reads from what was written, with the one that it read from the input"
    differences = {name: difference(outputs[name], value) for name, value in expected.items()}
    return _Compared(differences, words, (shape,), LARGEST_DIFFERENCE)


@torch.inference_mode()
def _outputs(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    outputs = {"features": encoder.features(images), "tokens": encoder.features(images, pool="tokens")}
    return outputs | ({"logits": encoder(images)} if encoder.config.classes else {})


@torch.inference_mode()
def _blocks_alone(encoder: Encoder, images: Tensor) -> Tensor:
    patches = encoder.patch_embed(patchify(images, encoder.config.patch_size))
    return encoder.encode(patches + encoder.position_table(encoder.config.grid)[:, 1:])
