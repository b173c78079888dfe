"""Checkpoints of a run: ``checkpoints/step-N/`` with weights and optimizer in safetensors, and a manifest written last.

A folder without a manifest, or with a file that differs from it, is not a checkpoint. No pickle is involved.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maehub.errors import CheckpointError
from maehub.files import atomic_write, sha256_file

log = logging.getLogger("maehub")

_MANIFEST, _MODEL, _OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
_FORMAT = 1
_KEPT = 2


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and a hash of what must not change between parts of a run."""

    step: int
    config: str
    data: str


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write a checkpoint, then delete older ones but the one before it."""
    folder = run / "checkpoints" / f"step-{progress.step}"
    if folder.exists():  # left by a save that was cut off, or replaced after an invalid one
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, tensors in ((_MODEL, weights), (_OPTIMIZER, _optimizer_tensors(model, optimizer))):
        with atomic_write(folder / name) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in (_MODEL, _OPTIMIZER)
    }
    manifest = {"format": _FORMAT, "progress": asdict(progress), "files": files}
    with atomic_write(folder / _MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    for old in _steps(run):
        if old not in _steps(run)[-_KEPT:]:
            shutil.rmtree(run / "checkpoints" / f"step-{old}", ignore_errors=True)
    return folder


def newest_checkpoint(run: Path) -> tuple[Path, Progress] | None:
    """The newest valid checkpoint of a run, or None where none was ever committed.

    An invalid one is renamed to ``step-N.corrupt`` with a warning.

    Raises:
        CheckpointError: checkpoints exist and none of them is valid.
    """
    committed = False
    for step in reversed(_steps(run)):
        folder = run / "checkpoints" / f"step-{step}"
        if not (folder / _MANIFEST).exists():
            continue
        committed = True
        try:
            return folder, _verified(folder)
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is not valid (%s); kept as %s.corrupt", folder, error, folder.name)
            folder.rename(folder.with_name(folder.name + ".corrupt"))
    if committed or list((run / "checkpoints").glob("step-*.corrupt")):
        raise CheckpointError(
            f"{run} has checkpoints, but none of them is valid. Nothing was deleted: the broken ones are kept as "
            f"{run}/checkpoints/*.corrupt. Restore one, or start again with --overwrite."
        )
    return None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state back."""
    try:
        model.load_state_dict(load_file(folder / _MODEL))
        tensors = load_file(folder / _OPTIMIZER)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {folder} does not fit this model: {error}") from error
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    state = optimizer.state_dict()
    state["state"] = {number: {} for number in numbers.values()}
    for joined, tensor in tensors.items():
        key, name = joined.split("/", 1)
        state["state"][numbers[name]][key] = tensor
    optimizer.load_state_dict(state)


def _verified(folder: Path) -> Progress:
    manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    if manifest["format"] != _FORMAT:
        raise CheckpointError(f"its format is {manifest['format']}, this version reads {_FORMAT}")
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise CheckpointError(f"{name} is missing or differs from the manifest")
    return Progress(**manifest["progress"])


def _steps(run: Path) -> list[int]:
    names = [folder.name.removeprefix("step-") for folder in (run / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its own numbering."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``exp_avg/blocks.0.…`` and so on."""
    names = _parameter_names(model, optimizer)
    return {
        f"{key}/{names[number]}": value.contiguous()
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
