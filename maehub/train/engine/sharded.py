"""Checkpoints of runs that shard their weights (FSDP2), in the format of torch.distributed.checkpoint.

Every process writes its shards; a run with another number of processes, or with one that shards nothing, reads them.
The format has a pickle inside (``.metadata``), so such a folder is read from the user's own run alone, after its hashes
were compared.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from maehub.errors import CheckpointError
from maehub.files import is_disk_full, sha256_file, sync_folder
from maehub.train.engine.checkpoint import Progress, check_converging, check_fits, checkpoint_folder, write_manifest
from maehub.train.engine.distributed import Group


def save_shards(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int, group: Group
) -> None:
    """Write a checkpoint, every process its shards, then delete older ones, so that ``keep`` are left."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    local: dict[str, Any] = {
        name: value.to_local() if isinstance(value, DTensor) else value for name, value in weights.items()
    }
    with contextlib.ExitStack() as stack:
        with group.together(f"saving step {progress.step}"):
            check_converging(local, f"the weights of step {progress.step}")
            tensors = [*local.values()] * 3  # AdamW has two more of each
            entered = checkpoint_folder(run, progress, tensors, keep)
            staging = stack.enter_context(entered) if group.is_main else None
        folder = group.first(staging, "the name of the checkpoint")
        assert folder is not None
        with group.together(f"saving step {progress.step}"), _as_checkpoint_errors(folder):
            save(state, storage_writer=FileSystemWriter(folder))
        with group.together(f"saving step {progress.step}"):
            if group.is_main:
                hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
                sync_folder(folder)
                write_manifest(folder, progress, hashes)
                stack.close()


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Put a sharded checkpoint back, into a model that is sharded otherwise or not at all."""
    with _as_checkpoint_errors(folder):
        stored = FileSystemReader(folder).read_metadata()
    found = {}
    for flat, way in stored.planner_data.items():  # its way through the dictionaries that were saved
        if isinstance(value := stored.state_dict_metadata[flat], TensorStorageMetadata):
            name = way[1] if way[0] == "model" else f"{way[-1]}/{way[2]}"
            found[name] = f"{tuple(value.size)} {value.properties.dtype}"
    check_fits(folder, model, optimizer, found)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with _as_checkpoint_errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")  # which is what is wanted
        load(state, storage_reader=FileSystemReader(folder), no_dist=group.size == 1)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


@contextlib.contextmanager
def _as_checkpoint_errors(folder: Path) -> Iterator[None]:
    """torch reports what went wrong in any process as one exception that no ``except Exception`` catches."""
    try:
        yield
    except (CheckpointException, RuntimeError, KeyError, ValueError, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        full = isinstance(cause, Exception) and is_disk_full(cause)
        reason = "the disk is full" if full else str(cause).strip().splitlines()[0][:300]
        raise CheckpointError(
            f"checkpoint {folder} cannot be written or read: {reason}. Older checkpoints are untouched."
        ) from error
