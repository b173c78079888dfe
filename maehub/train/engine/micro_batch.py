"""How many views a process computes at once, so that they fit into memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maehub.errors import CheckpointError, log
from maehub.models import Precision, autocast
from maehub.train.engine.distributed import Group
from maehub.train.engine.environment import available_bytes

_ADAM = 2  # tensors of the size of the weights that the optimizer will add
_MEMORY_SHARE = 0.5  # of the memory that is free on a CPU, where what does not fit is killed instead of refused


def find_micro_batch(
    part: int, group: Group, fits: Callable[[int], bool], size: str, *, asked: int | None = None, multiple: int = 1
) -> int:
    """The largest divisor of this process's ``part`` of the batch that ``fits``, the same in every process.

    Nothing is tried where the user ``asked`` for one. It is a multiple of ``multiple``, where the part is. An error
    tells the ``size`` of the pictures.
    """
    if asked:
        return min(asked, part)
    sizes = [size for size in range(part, 0, -1) if part % size == 0 and (size % multiple == 0 or part % multiple)]
    found = min(group.all(next(filter(fits, sizes), 0), "finding the micro-batch"))
    if not found:
        raise CheckpointError(
            f"not even one view of {size} fits into the memory of {group.device}. Nothing was "
            "written. Use --checkpoint-activations, --fsdp, a smaller model or --image-size; `maehub plan` estimates."
        )
    if found < part:
        log.info("%d views do not fit at once: gradients are accumulated over %d × %d", part, part // found, found)
    return found


def pictures_fit(
    objective: nn.Module,
    blank: Callable[[int], Sequence[Tensor]],
    group: Group,
    precision: Precision,
    *,
    shard: bool,
    estimate: Callable[[], tuple[float, float]] | None = None,
) -> Callable[[int], bool]:
    """Whether training on so many pictures at once fits. ``objective`` gives a loss, ``blank`` its arguments.

    On a GPU forward and backward are tried. A CPU never says no: there an ``estimate`` counts, the bytes that a process
    needs beside its pictures, and those of each picture; without one what the forward of two keeps for the backward.
    """
    device, precise = group.device, autocast(precision, group.device)
    if device.type == "cuda" and not shard:
        return lambda size: pass_fits(objective, blank(size), device, precise)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes() / group.local_size
    if estimate:
        fixed, each = estimate()
    else:
        trained = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
        fixed = (_ADAM + 1) * trained / (group.size if shard else 1)
        each = _kept_bytes(objective, blank(2), precise) / 2
    return lambda size: size * each <= _MEMORY_SHARE * (free - fixed)


def pass_fits(objective: nn.Module, arguments: Sequence[Tensor], device: torch.device, precise: Any) -> bool:
    """Whether a forward and backward pass fits beside what the optimizer will need."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    try:
        values = sum(parameter.numel() for parameter in parameters)
        reserved = torch.empty(_ADAM * values, dtype=torch.float32, device=device)
        with precise:
            loss = objective(*arguments)
        loss.backward()
        del reserved
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for parameter in parameters:
            parameter.grad = None
        torch.cuda.empty_cache()


def _kept_bytes(objective: nn.Module, arguments: Sequence[Tensor], precise: Any) -> int:
    """What a forward pass keeps for the backward, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with precise, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(*arguments)
    return sum(kept.values())
