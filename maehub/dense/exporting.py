"""A segmenter as a graph that runs without maehub, ONNX and torch.export; and published networks as our folders.

The graph takes ``images`` (B, C, H, W), float32, preprocessed, of one window, and gives ``scores`` (B, classes, H, W).
Beside it lies segmenter.json, which names the classes; how pictures are scaled and seen by windows stays with the
caller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from maehub.conversion import (
    CERTIFICATE,
    LARGEST_EXPORTED_DIFFERENCE,
    Certificate,
    Conversion,
    Difference,
    ExportForm,
    check_exportable,
    difference,
    export_versions,
    fixed_images,
    largest,
    run_exported,
    write_graph,
)
from maehub.dense.attention import plain
from maehub.dense.detector import Detector
from maehub.dense.folder import load_detector, load_segmenter, write_beside
from maehub.dense.published import read_published
from maehub.dense.segmenter import Segmenter
from maehub.errors import IntegrityError
from maehub.files import DETECTOR, SEGMENTER, check_free, sha256_file, whole_folder, write_json
from maehub.version import __version__
from maehub.weights import MEMBERS, write_members

_FILES: dict[ExportForm, str] = {"onnx": "segmenter.onnx", "torch-export": "segmenter.pt2"}
_BATCHES = (1, 3)


class _Graph(nn.Module):
    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model(images),)


def export_segmenter(
    source: str | Path, folder: str | Path, form: ExportForm, *, overwrite: bool = False
) -> Conversion:
    """Write a segmenter's folder as a graph, which is run and compared before the folder gets its name.

    Args:
        source: what `maehub.load_segmenter` loads.
        folder: what is written; must not exist or be empty, unless ``overwrite``.

    Raises:
        UsageError: there is no segmenter, the folder is in use, or packages are not installed.
        IntegrityError: the graph computes something else; nothing is kept.
    """
    name, folder = _FILES[form], Path(folder)
    members = (name, f"{name}.data", SEGMENTER, CERTIFICATE)
    check_free(folder, overwrite, members)
    check_exportable(form)
    model = load_segmenter(source)
    shape = (model.encoder.config.channels, *model.encoder.config.size)
    pictures = [fixed_images((batch, *shape)) for batch in _BATCHES]
    with whole_folder(folder, overwrite=overwrite, members=members) as staging:
        sizes = {0: Dim("batch", min=1)}
        write_graph(_Graph(model), ["scores"], pictures[1], sizes, model.encoder, staging / name, form)
        write_json(staging / SEGMENTER, asdict(model.config))
        found = run_exported(staging / name, form, pictures)
        with torch.inference_mode():
            graphs = [next(iter(one.values())) for one in found]
            each = [difference(one, model(images)) for one, images in zip(graphs, pictures, strict=True)]
        runner = "onnxruntime" if form == "onnx" else "torch.export"
        words = f"the graph run by {runner}, with maehub"
        certificate = _certified(staging, model, name, form, words, pictures, largest(each), export_versions(form))
    return Conversion(folder, certificate.difference.relative, (), certificate)


def convert_published(source: str | Path, folder: str | Path, *, overwrite: bool = False) -> Conversion:
    """Write a published segmenter or detector as a folder of ours, read again and compared; see `read_published`."""
    model, folder = read_published(source), Path(folder)
    name = SEGMENTER if isinstance(model, Segmenter) else DETECTOR
    members = (*MEMBERS, name, Path(name).with_suffix(".safetensors").name, CERTIFICATE)
    check_free(folder, overwrite, members)
    with whole_folder(folder, overwrite=overwrite, members=members) as staging:
        write_members(staging, folder.absolute().name, plain(model.encoder))
        write_beside(staging, model)
        again = load_segmenter(staging) if isinstance(model, Segmenter) else load_detector(staging)
        state = again.state_dict()
        each = [difference(state[key].float(), value.float()) for key, value in model.state_dict().items()]
        words = "the tensors that maehub reads from what was written, with those that it read from the input"
        certificate = _certified(staging, model, name, "maehub", words, [], largest(each), {})
    return Conversion(folder, certificate.difference.relative, (), certificate)


def _certified(
    staging: Path,
    model: Segmenter | Detector,
    name: str,
    to: str,
    compared: str,
    pictures: Sequence[Tensor],
    found: Difference,
    versions: Mapping[str, str],
) -> Certificate:
    origin = model.encoder.origin
    certificate = Certificate(
        source="maehub" if pictures else "published",
        to=to,
        compared=compared,
        inputs=tuple(tuple(images.shape) for images in pictures),
        bound=LARGEST_EXPORTED_DIFFERENCE,
        differences={"scores" if pictures else "tensors": found},
        names={name: {tensor: [tensor] for tensor in model.state_dict()}} if pictures else {},
        left_out={},
        added={},
        read={origin.name: origin.sha256} if origin and not pictures else {},
        written={path.name: sha256_file(path) for path in sorted(staging.iterdir())},
        versions={"maehub": __version__, "torch": torch.__version__} | dict(versions),
    )
    if not certificate.holds:
        raise IntegrityError(
            f"what was written differs by {certificate.difference.relative:.1e} of the largest value; nothing was kept"
        )
    write_json(staging / CERTIFICATE, certificate.to_dict())
    return certificate
