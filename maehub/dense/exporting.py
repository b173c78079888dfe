"""A segmenter as a graph that runs without maehub: ONNX and torch.export.

The graph takes ``images`` (B, C, H, W), float32, preprocessed, of one window, and gives ``scores`` (B, classes, H, W).
Beside it lies segmenter.json, which names the classes; how pictures are scaled and seen by windows stays with the
caller.
"""

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
    ExportForm,
    check_exportable,
    difference,
    export_versions,
    fixed_images,
    largest,
    run_exported,
    write_graph,
)
from maehub.dense.folder import load_segmenter
from maehub.dense.segmenter import Segmenter
from maehub.errors import IntegrityError
from maehub.files import SEGMENTER, check_free, sha256_file, whole_folder, write_json
from maehub.version import __version__

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
        certificate = Certificate(
            source="maehub",
            to=form,
            compared=f"the graph run by {'onnxruntime' if form == 'onnx' else 'torch.export'}, with maehub",
            inputs=tuple(tuple(images.shape) for images in pictures),
            bound=LARGEST_EXPORTED_DIFFERENCE,
            differences={"scores": largest(each)},
            names={name: {tensor: [tensor] for tensor in model.state_dict()}},
            left_out={},
            added={},
            read={},
            written={path.name: sha256_file(path) for path in sorted(staging.iterdir())},
            versions={"maehub": __version__, "torch": torch.__version__} | export_versions(form),
        )
        if not certificate.holds:
            raise IntegrityError(
                f"{source}: the graph differs from the segmenter by {certificate.difference.relative:.1e} of the "
                "largest score; nothing was written"
            )
        write_json(staging / CERTIFICATE, certificate.to_dict())
    return Conversion(folder, certificate.difference.relative, (), certificate)
