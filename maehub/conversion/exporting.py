"""The encoder as a graph that runs without maehub: ONNX and torch.export, for any batch and any image size.

Both graphs take ``images`` (B, C, H, W), float32, preprocessed, H and W divisible by the patch and at least two
patches each, and give

    features  (B, D)        the feature of `EncoderConfig.pool`, as `Encoder.features` gives it
    tokens    (B, N, D)     every patch, after the final norm
    logits    (B, classes)  if there is a head
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from maehub.errors import MissingDependencyError, UsageError
from maehub.images import grid_size
from maehub.models import Encoder, EncoderConfig, Origin, patchify, sincos_table

ExportForm = Literal["onnx", "torch-export"]

EXPORTED: dict[ExportForm, str] = {"onnx": "encoder.onnx", "torch-export": "encoder.pt2"}
"""The file of each form. Of an encoder over 2 GB the weights are in ``encoder.onnx.data``, which ONNX needs then."""

OUTPUTS = ("features", "tokens", "logits")

OPSET = 20
"""The first with GELU as an operator of its own."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_ONE_FILE = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB

# What tracing notes beside each operation: where in the source it stands, with paths of this machine.
_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class AnySize(nn.Module):
    """An encoder without choices: what it does depends on no size, so that one graph serves all.

    The position table is resized even where the grid is the native one, which changes nothing then.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = OUTPUTS[: 3 if encoder.config.classes else 2]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to the outputs of this module, in the order of ``names``."""
        encoder, config = self.encoder, self.encoder.config
        rows, columns = grid_size(images.shape[2], images.shape[3], config.patch_size)
        patches = patchify(images, config.patch_size)
        patches = encoder.patch_embed(patches) + self._positions(rows, columns)  # (B, N, D)
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(images.shape[0], -1, -1)
        tokens = encoder.encode(torch.cat([cls, patches], dim=1))  # (B, N + 1, D)
        normed = encoder.final_norm(tokens)
        feature = normed[:, 0] if config.pool == "cls" else encoder.final_norm(tokens[:, 1:].mean(dim=1))
        outputs = (feature, normed[:, 1:])
        return (*outputs, encoder.head(feature)) if config.classes else outputs

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The positions of the patches, (1, rows · columns, D)."""
        config, table = self.encoder.config, self.encoder.pos_embed[:, 1:]
        if config.positions == "sincos":
            return sincos_table(config.width, (rows, columns))[None]
        image = table.reshape(1, *config.grid, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns) of the native grid
        antialias = config.positions == "antialias"
        image = F.interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False, antialias=antialias)
        return image.flatten(2).transpose(1, 2)


def write_exported(encoder: Encoder, folder: Path, form: ExportForm) -> None:
    """Write an encoder, on the CPU and in float32, as a graph; the same weights give the same bytes."""
    config = encoder.config
    if config.positions == "sincos":
        fresh = sincos_table(config.width, config.grid)
        if not torch.allclose(encoder.pos_embed[0, 1:].cpu(), fresh, atol=1e-5):
            raise UsageError(
                "this encoder computes positions afresh for other sizes and was trained with others at its own; a "
                "graph does one of the two. Save what load(..., positions='antialias') gives, and convert that folder"
            )
    module = AnySize(encoder).eval()
    patch = config.patch_size
    sizes = {2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    if patch == 1:
        sizes = {2: Dim("height", min=2), 3: Dim("width", min=2)}
    example = torch.zeros(2, config.channels, *_other_size(config))
    write_graph(module, module.names, example, {0: Dim("batch", min=1)} | sizes, encoder, folder / EXPORTED[form], form)


def write_graph(
    module: nn.Module,
    names: Sequence[str],
    example: Tensor,
    sizes: dict[int, Any],
    encoder: Encoder,
    path: Path,
    form: ExportForm,
) -> None:
    """Write what a module makes of ``images``, its outputs called by ``names``; ``sizes`` are free, by their axis."""
    with warnings.catch_warnings(), torch.no_grad():
        # Both are under development, and say so in warnings that no user of this can act upon.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.export.export(module, (example,), dynamic_shapes={"images": sizes}, strict=False)
        # Where on this machine it was made, and in which order sizes happened to be looked at, is not kept.
        for node in program.graph_module.graph.nodes:
            for note in _NOTES:
                node.meta.pop(note, None)
        ranges = sorted(program.range_constraints.items(), key=lambda item: str(item[0]))
        program.range_constraints.clear()
        program.range_constraints.update(ranges)
        if form == "torch-export":
            torch.export.save(program, path)
        else:
            _write_onnx(program, names, encoder, path)


def run_exported(path: Path, form: ExportForm, pictures: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
    """What a graph gives for each of some images (B, C, H, W)."""
    if form == "torch-export":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.10
            module = torch.export.load(path).module()
        yield from (dict(zip(OUTPUTS, module(images), strict=False)) for images in pictures)
        return
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for images in pictures:
        values = session.run(names, {"images": images.numpy()})
        yield {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def check_exportable(form: str) -> None:
    """Refuse before any work a form that cannot be written or checked here."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise MissingDependencyError(
            f"writing and checking ONNX needs {', '.join(missing)}, which is not installed; nothing was written. "
            "Install it: pip install 'maehub[onnx]'"
        )


def export_versions(form: ExportForm) -> dict[str, str]:
    """The versions of what wrote and ran the graph, by package."""
    if form == "torch-export":
        return {}
    from importlib.metadata import version

    return {name: version(name) for name in _ONNX_PACKAGES} | {"opset": str(OPSET)}


def checked_shapes(config: EncoderConfig) -> tuple[tuple[int, int, int, int], ...]:
    """The inputs (B, C, H, W) with which a graph is compared: two sizes, two batch sizes."""
    return tuple((batch, config.channels, *size) for size in (config.size, _other_size(config)) for batch in (1, 3))


def _other_size(config: EncoderConfig) -> tuple[int, int]:
    """A small size that is not the native one and not square, so that nothing is mistaken for a constant."""
    rows, columns = config.grid
    return (rows // 2 + 2) * config.patch_size, (columns // 2 + 3) * config.patch_size


def _write_onnx(program: ExportedProgram, names: Sequence[str], encoder: Encoder, path: Path) -> None:
    """Write an ONNX file that says of itself its transform as JSON, and where its weights come from."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):  # the exporter prints its progress
            exported = torch.onnx.export(
                program, dynamo=True, output_names=list(names), opset_version=OPSET, verbose=False
            )
    finally:
        log.setLevel(level)
    assert exported is not None
    model = exported.model
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
    origin = encoder.origin or Origin("")
    parts = {"source": origin.name, "source_sha256": origin.sha256, "licence": origin.licence}
    notes = {"preprocess": json.dumps(encoder.preprocess.to_dict(), sort_keys=True)}
    notes |= {name: value for name, value in parts.items() if value}
    model.metadata_props.update(sorted(notes.items()))
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    exported.save(path, external_data=size > _LARGEST_ONE_FILE)
