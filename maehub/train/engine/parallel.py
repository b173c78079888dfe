"""What is put around a network for training: it knows nothing of processes, precision or compilation itself."""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from maehub.models import Block, Precision
from maehub.train.engine.distributed import Group

Network = TypeVar("Network", bound=nn.Module)


def wrapped(
    module: nn.Module, group: Group, precision: Precision, *, compile: bool, fsdp: bool, checkpoint_activations: bool
) -> nn.Module:
    """The module as the loop calls it; its parameters are those of ``module``, which stays what is saved.

    From the inside to the outside:

    1. activation checkpointing, so that what is compiled includes the second forward;
    2. compilation, of single blocks where FSDP2 gathers their weights one by one;
    3. FSDP2, or DDP, which overlap communication with the backward pass.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    if checkpoint_activations:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if fsdp and group.size > 1:
        for block in blocks if compile else ():
            block.compile()
        shard(module, group, precision)
        return module
    called: nn.Module = torch.compile(module) if compile else module  # type: ignore[assignment]
    if group.size == 1:
        return called
    device = None if group.device.type == "cpu" else [group.device]
    with warnings.catch_warnings():
        # Newer versions want another name for broadcast_buffers, which older ones do not have.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            called,
            device_ids=device,
            process_group=group.step_group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def shard(module: nn.Module, group: Group, precision: Precision) -> None:
    """Spread the weights of a module over the processes (FSDP2)."""
    from torch.distributed.device_mesh import DeviceMesh  # here, since they take a second to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert group.step_group is not None
    mesh = DeviceMesh.from_group(group.step_group, group.device.type)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for part in (*[block for block in module.modules() if isinstance(block, Block)], module):
        fully_shard(part, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def accumulating(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Run forward and backward of a micro-batch; gradients are exchanged with the ``last`` one of a step alone."""
    if sync := getattr(module, "set_requires_gradient_sync", None):  # of FSDP2
        sync(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Deterministic algorithms for a while: slower on a GPU, and there what makes two runs equal bit for bit."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses; it reads it at its first call
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def single_network(network: Network, empty: Network | None, group: Group) -> Network | None:
    """The network as one process can call it alone; where weights are spread, in rank 0 a copy, None elsewhere.

    ``empty`` is the network without weights, where they are spread over all processes; else None.
    """
    if empty is None:
        return network
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(network, options=options)  # empty but in rank 0
    if not group.is_main:
        return None
    whole = copy.deepcopy(empty)
    whole.load_state_dict({name: value for name, value in weights.items() if isinstance(value, Tensor)}, assign=True)
    return whole.to(group.device)
