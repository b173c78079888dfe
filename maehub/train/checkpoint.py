"""Checkpoints of a run: ``checkpoints/step-N/`` with weights and optimizer in safetensors, and a manifest written last.

A checkpoint is put together beside its place and renamed when it is whole, so a folder ``step-N`` that lacks a file or
has one that differs from its manifest was damaged later. No pickle is involved.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maehub.building import check_finite
from maehub.errors import CheckpointError, DivergedError, IntegrityError
from maehub.files import free_space_guard, sha256_file, write_error
from maehub.folders import read_json, whole_folder, write_json
from maehub.tensorfile import read_tensors, write_tensors

log = logging.getLogger("maehub")

_MANIFEST, _MODEL, _OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
_FILES = (_MODEL, _OPTIMIZER)
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must not change between its parts."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The settings that the result depends on, as JSON keeps them."""
    data: str
    """`Samples.digest` of the pictures."""


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write a checkpoint, then delete all older ones but the one before it.

    Raises:
        DivergedError: weights or optimizer state are not finite; nothing was written.
        CheckpointError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    checkpoints = run / "checkpoints"
    for remains in checkpoints.glob(".step-*.partial"):  # of a process that was killed while it saved
        shutil.rmtree(remains, ignore_errors=True)
    parts = {_MODEL: model.state_dict(), _OPTIMIZER: _optimizer_tensors(model, optimizer)}
    for name, tensors in parts.items():
        check_converging(tensors, f"{name} of step {progress.step}")
    free_space_guard(checkpoints, sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values()))
    folder = checkpoints / f"step-{progress.step}"
    with whole_folder(folder, overwrite=False, members=()) as staging:
        files = {}
        for name, tensors in parts.items():
            sha256 = write_tensors(staging / name, tensors)
            files[name] = {"bytes": (staging / name).stat().st_size, "sha256": sha256}
        write_json(staging / _MANIFEST, {"format": _FORMAT, "progress": asdict(progress), "files": files})
    older = [step for step in _steps(run) if step < progress.step]
    for step in older[:-1]:
        try:
            shutil.rmtree(checkpoints / f"step-{step}")
        except OSError as error:
            log.warning("the old checkpoint of step %d cannot be deleted: %s", step, error)
    return folder


def check_converging(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights or optimizer state with NaN or infinity.

    Raises:
        DivergedError: the text names the tensors.
    """
    try:
        check_finite(tensors, what)
    except IntegrityError as error:
        raise DivergedError(f"{error}. Not saved; checkpoints before it are kept. Try a lower --base-lr.") from error


def newest_checkpoint(run: Path) -> tuple[Path, Progress] | None:
    """The newest valid checkpoint of a run, or None where none was ever committed.

    A damaged one is renamed to ``step-N.corrupt`` with a warning.

    Raises:
        CheckpointError: checkpoints exist and none of them is valid, or a newer maehub wrote them.
    """
    for step in reversed(_steps(run)):
        folder = run / "checkpoints" / f"step-{step}"
        try:
            return folder, _verified(folder, step)
        except IntegrityError as error:
            kept = _free_name(folder)
            log.warning("checkpoint %s is damaged and kept as %s: %s", folder, kept.name, error)
            try:
                folder.rename(kept)
            except OSError as error:
                raise write_error(folder, error) from error
    if any((run / "checkpoints").glob("step-*.corrupt")):
        raise CheckpointError(
            f"{run} has checkpoints, but none of them is whole. Nothing was deleted: they are kept as "
            f"{run}/checkpoints/*.corrupt. Restore one under its old name, or start again with --overwrite."
        )
    return None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state back.

    Raises:
        CheckpointError: it is of another network.
    """
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    state = optimizer.state_dict()
    state["state"] = {number: {} for number in numbers.values()}
    try:
        model.load_state_dict(read_tensors(folder / _MODEL).tensors)
        for joined, tensor in read_tensors(folder / _OPTIMIZER).tensors.items():
            key, name = joined.split("/", 1)
            state["state"][numbers[name]][key] = tensor
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} is of another network: {error}. Nothing was changed.") from error
    optimizer.load_state_dict(state)


def _verified(folder: Path, step: int) -> Progress:
    """What a manifest says, once every byte was compared with it."""
    manifest = read_json(folder / _MANIFEST)
    version = manifest.get("format")
    if isinstance(version, int) and version > _FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {version}, and this maehub reads {_FORMAT}. Nothing was changed. "
            "Update maehub."
        )
    try:
        progress = Progress(**manifest["progress"])
        facts = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in _FILES}
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"its manifest is malformed at {error}") from error
    if progress.step != step:
        raise IntegrityError(f"its manifest is of step {progress.step}")
    for name, (size, sha256) in facts.items():
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{name} is missing")
        if path.stat().st_size != size or sha256_file(path) != sha256:
            raise IntegrityError(f"{name} differs from the manifest")
    return progress


def _steps(run: Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    names = [folder.name.removeprefix("step-") for folder in (run / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _free_name(folder: Path) -> Path:
    """``step-N.corrupt``, or with a number where that is taken."""
    name, number = folder.with_name(f"{folder.name}.corrupt"), 2
    while name.exists():
        name, number = folder.with_name(f"{folder.name}.{number}.corrupt"), number + 1
    return name


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its own numbering."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``exp_avg/encoder.blocks.0.…`` and so on."""
    names = _parameter_names(model, optimizer)
    return {
        f"{key}/{names[number]}": value
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
