"""Checkpoints of a run: ``checkpoints/step-N/`` with weights and optimizer in safetensors, and a manifest written last.

A checkpoint is put together beside its place and renamed when it is whole, so a folder ``step-N`` that lacks a file or
has one that differs from its manifest was damaged later. No pickle is involved, except in runs that shard their weights
(`maehub.train.engine.sharded`).
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maehub.errors import CheckpointError, DivergedError, IntegrityError, first_names, log
from maehub.files import free_space_guard, read_json, sha256_file, whole_folder, write_error, write_json
from maehub.weights import check_finite, read_tensors, write_tensors

_MANIFEST, _MODEL, _OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
_FILES = (_MODEL, _OPTIMIZER)
_FORMAT = 1
_KEPT = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Lars": ("momentum_buffer",)}  # of each parameter, by optimizers
_TORN = re.compile(r"\.step-\d+\.[0-9a-f]+\.partial")  # what a process that was killed while it saved leaves


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must not change between its parts."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The settings that the result depends on, as JSON keeps them."""
    data: str
    """`digest` of the pictures."""
    processes: int = 1
    """How many wrote it; a resumed run may have another number."""
    micro_batch: int = 0
    """Views that each computed at once; with as many processes it is used again, for equal sums."""


def save_checkpoint(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int = 2
) -> Path:
    """Write a checkpoint, then delete older ones, so that ``keep`` are left."""
    names = parameter_names(model, optimizer)
    moments = {
        f"{key}/{names[number]}": value  # exp_avg/encoder.blocks.0.… and so on
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    parts = {_MODEL: model.state_dict(), _OPTIMIZER: moments}
    for name, tensors in parts.items():
        check_converging(tensors, f"{name} of step {progress.step}")
    with checkpoint_folder(run, progress, [one for part in parts.values() for one in part.values()], keep) as staging:
        write_manifest(staging, progress, {name: write_tensors(staging / name, parts[name]) for name in _FILES})
    return run / "checkpoints" / f"step-{progress.step}"


@contextlib.contextmanager
def checkpoint_folder(run: Path, progress: Progress, tensors: Iterable[Tensor], keep: int) -> Iterator[Path]:
    """Where to put a checkpoint together; when the block ends without error it gets its name, and ``keep`` are left."""
    checkpoints = run / "checkpoints"
    for remains in checkpoints.glob(".step-*.partial"):
        if _TORN.fullmatch(remains.name):
            shutil.rmtree(remains, ignore_errors=True)
    free_space_guard(checkpoints, sum(tensor.nbytes for tensor in tensors))
    with whole_folder(checkpoints / f"step-{progress.step}", overwrite=False, members=()) as staging:
        yield staging
    _rotate(run, progress.step, keep)


def write_manifest(staging: Path, progress: Progress, hashes: Mapping[str, str]) -> None:
    """What makes a folder a checkpoint: written last. ``hashes`` are the sha256 of its files, by name."""
    listed = {name: {"bytes": (staging / name).stat().st_size, "sha256": sha256} for name, sha256 in hashes.items()}
    write_json(staging / _MANIFEST, {"format": _FORMAT, "progress": asdict(progress), "files": listed})


def _rotate(run: Path, newest: int, keep: int) -> None:
    """Delete checkpoints older than the newest, so that ``keep`` are left; others' folders are left alone."""
    older = [step for step in _steps(run) if step < newest]
    for step in older[: max(0, len(older) - (keep - 1))]:
        try:
            shutil.rmtree(run / "checkpoints" / f"step-{step}")
        except OSError as error:
            log.warning("the old checkpoint of step %d cannot be deleted: %s", step, error)


def check_converging(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights or optimizer state with NaN or infinity."""
    try:
        check_finite(tensors, what)
    except IntegrityError as error:
        raise DivergedError(f"{error}. Not saved; checkpoints before it are kept. Try a lower --base-lr.") from error


def newest_checkpoint(run: Path) -> tuple[Path, Progress] | None:
    """The newest valid checkpoint of a run, or None where none was ever committed.

    A damaged one is renamed to ``step-N.corrupt`` with a warning.
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


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, spread: bool = False) -> None:
    """Put a checkpoint's weights and optimizer state back: all of them, or where they do not fit none.

    Args:
        spread: whether the weights of the model are spread over processes, each of which calls this.
    """
    tensors = read_tensors(folder / _OPTIMIZER).tensors | read_tensors(folder / _MODEL).tensors
    check_fits(folder, model, optimizer, {name: f"{tuple(v.shape)} {v.dtype}" for name, v in tensors.items()})
    weights: dict[str, Any] = {name: tensors[name] for name in model.state_dict()}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameter_names(model, optimizer)}
    for joined in tensors.keys() - weights.keys():
        key, name = joined.split("/", 1)
        moments[name][key] = tensors[joined]
    if not spread:
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(enumerate(moments.values()))})
        return
    # Here, since it takes a second to import.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    state: dict[str, Any] = {"state": moments, "param_groups": get_state_dict(model, optimizer)[1]["param_groups"]}
    whole = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=whole)


def check_fits(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, found: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another network or optimizer, before a number of it is written anywhere.

    ``found`` are shape and dtype of its weights, and of the optimizer's tensors as ``exp_avg/encoder.…``, of which a
    parameter that never had a gradient has none.
    """
    wanted = {name: f"{tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()}
    updated = {joined.partition("/")[2] for joined in found}
    for name in updated.intersection(parameter_names(model, optimizer)):
        for key in _KEPT[type(optimizer).__name__]:
            wanted[f"{key}/{name}"] = "() torch.float32" if key == "step" else wanted[name]
    wrong = [
        f"{name} {found.get(name, 'missing')} instead of {wanted.get(name, 'nothing')}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        differs = first_names(wrong, 3, "; ")
        raise CheckpointError(f"checkpoint {folder} is of another network or optimizer: {differs}. Nothing was changed")


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint was written by a run that shards its weights."""
    return not (folder / _MODEL).exists() and (folder / ".metadata").exists()


def _verified(folder: Path, step: int) -> Progress:
    """What a manifest says, once every byte was compared with it."""
    manifest = read_json(folder / _MANIFEST)
    version = manifest.get("format", _FORMAT)
    if type(version) is int and version > _FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {version!r}, and this maehub reads {_FORMAT}. Nothing was changed. "
            "Update maehub."
        )
    try:
        progress = Progress(**manifest["progress"])
        kinds = [type(value) for value in vars(progress).values()]
        if version != _FORMAT or kinds != [int, dict, str, int, int] or progress.processes < 1:
            raise TypeError("a value of another type")
        listed = manifest["files"]
        wanted = {*listed, *(() if is_sharded(folder) else _FILES)}
        facts = {name: (listed[name]["bytes"], listed[name]["sha256"]) for name in wanted}
    except (LookupError, TypeError) as error:
        raise IntegrityError(f"its manifest is malformed at {error}") from error
    if progress.step != step:
        raise IntegrityError(f"its manifest is of step {progress.step}")
    for name, (size, sha256) in facts.items():
        path = folder / name
        if not os.path.isfile(path):  # which knows no name that is an error
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


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its own numbering."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
