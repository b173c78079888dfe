"""How many views a process computes at once, so that they fit into memory."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maehub.autoencoder import AutoencoderConfig
from maehub.errors import CheckpointError
from maehub.train.config import Precision, PretrainConfig
from maehub.train.costs import activation_bytes, block_parameters, count_parameters, fixed_bytes, work_of
from maehub.train.data import Batch, Key, View
from maehub.train.distributed import Group
from maehub.train.machine import available_bytes
from maehub.train.parallel import computes_bf16

log = logging.getLogger("maehub")

_ADAM = 2  # tensors of the size of the weights that the optimizer will add
_SHARE = 0.5  # of the memory that is free on a CPU, where what does not fit is killed instead of refused


def micro_batch(
    config: PretrainConfig,
    objective: nn.Module,
    network: AutoencoderConfig,
    view: View,
    kept: int,
    group: Group,
    autocast: Any,
) -> int:
    """The largest divisor of this process's part of the batch that fits, the same in every process.

    On a GPU forward and backward are tried; on a CPU, where nothing says no, memory is estimated.

    Raises:
        CheckpointError: not even one view fits.
    """
    part = config.batch_size // group.size
    if config.micro_batch:
        return min(config.micro_batch, part)
    sizes = [size for size in range(part, 0, -1) if part % size == 0]
    if group.device.type == "cuda" and not config.fsdp:
        fits = next((size for size in sizes if _fits(objective, view, size, group.device, autocast)), 0)
    else:
        precision: Precision = "bf16" if computes_bf16(config, group.device) else "fp32"
        free = available_bytes() / group.local_size
        if group.device.type == "cuda":
            free = torch.cuda.mem_get_info(group.device)[0]
        corrupts = config.corruption[0] < 1
        work = work_of(network, kept, share=config.predict_share, loss_on=config.loss_on, corrupts=corrupts)
        each = activation_bytes(network, kept, precision, work=work, checkpoint=config.checkpoint_activations)
        shards = group.size if config.fsdp else 1
        free -= fixed_bytes(
            count_parameters(network), precision, shards=shards, largest_block=block_parameters(network)
        )
        fits = next((size for size in sizes if size * each <= _SHARE * free), 0)
    fits = min(group.all(fits, "finding the micro-batch"))
    if not fits:
        raise CheckpointError(
            f"not even one view of {view.size[0]}×{view.size[1]} fits into the memory of {group.device}. Nothing was "
            "written. Use --checkpoint-activations, --fsdp, a smaller model or --image-size; `maehub plan` estimates."
        )
    if fits < part:
        log.info("%d views do not fit at once: gradients are accumulated over %d × %d", part, part // fits, fits)
    return fits


@contextlib.contextmanager
def within_memory(views: int, device: torch.device) -> Iterator[None]:
    """Say what helps where memory runs out in a step.

    Raises:
        CheckpointError: of an allocation that failed, on a device or on the host.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise CheckpointError(
            f"the memory of {device} ran out with {views} views at once. Checkpoints are kept. Resume with a smaller "
            "--micro-batch, which changes no result but the rounding, or with --checkpoint-activations or --fsdp."
        ) from error


def _fits(objective: nn.Module, view: View, size: int, device: torch.device, autocast: Any) -> bool:
    """Whether a forward and backward pass of so many views fits beside what the optimizer will need."""
    keys = [Key(0, number, number) for number in range(size)]
    batch: Batch = view.batch(view.empty(size).zero_(), keys).to(device)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    try:
        values = sum(parameter.numel() for parameter in parameters)
        reserved = torch.empty(_ADAM * values, dtype=torch.float32, device=device)
        with autocast:
            loss = objective(batch.pixels, batch.masked, batch.seeds)
        loss.backward()
        del reserved
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.empty_cache()
