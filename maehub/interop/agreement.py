"""Whether a network of another library computes what ours does: both on one input, exactly and on the CPU."""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from maehub.conversion import LARGEST_DIFFERENCE, difference, fixed_images, largest
from maehub.errors import UsageError
from maehub.models import EncoderConfig
from maehub.weights import to_official

Network = TypeVar("Network", bound=nn.Module)


def exact_dtype(network: nn.Module) -> torch.dtype:
    """float64 of a network that has it, else float32, into which every other type goes without loss."""
    has_double = any(value.dtype == torch.float64 for value in network.parameters())
    return torch.float64 if has_double else torch.float32


def evaluable(network: Network, dtype: torch.dtype) -> Network:
    """The network on the CPU, in a dtype and in eval mode: itself where it is that already, else a copy."""
    ready = all(value.device.type == "cpu" and value.dtype == dtype for value in network.parameters())
    if ready and not any(module.training for module in network.modules()):
        return network
    return copy.deepcopy(network).to("cpu", dtype).eval()


def exact_state(network: nn.Module) -> dict[str, Tensor]:
    """Copies of its tensors under its own names, on the CPU, in `exact_dtype`."""
    state, dtype = network.state_dict(), exact_dtype(network)
    if any(value.is_meta for value in state.values()):
        raise UsageError(f"this {type(network).__name__} lies on the meta device: it has no weights yet")
    return {name: value.to("cpu", dtype, copy=True) for name, value in state.items()}


def images_for(config: EncoderConfig, dtype: torch.dtype) -> Tensor:
    """Two images that are the same everywhere: (2, C, H, W)."""
    return fixed_images((2, config.channels, *config.size)).to(dtype)


def check_same(what: str, outputs: Callable[[torch.dtype], Iterable[tuple[Tensor, Tensor]]]) -> None:
    """Compare outputs in float32 and, where they differ, in float64, in which deep networks do not differ by rounding.

    ``outputs`` gives pairs of ours and theirs, computed in a dtype; ``what`` they are of, for messages.
    """
    for dtype in (torch.float32, torch.float64):
        with torch.inference_mode():
            pairs = list(outputs(dtype))
        if wrong := [(ours.shape, theirs.shape) for ours, theirs in pairs if ours.shape != theirs.shape]:
            raise UsageError(f"{what} has outputs of {tuple(wrong[0][1])} where ours are {tuple(wrong[0][0])}")
        worst = largest(difference(*pair) for pair in pairs).relative
        if worst <= LARGEST_DIFFERENCE:
            return
    raise UsageError(
        f"{what} computes something else: on a fixed input the outputs differ by {worst:.1e} of the largest, and "
        f"{LARGEST_DIFFERENCE:.0e} is allowed; nothing was made"
    )


def names_there(theirs: nn.Module) -> dict[str, list[str]]:
    """Official names to the parameters of another library's network; separate queries, keys, values in that order."""
    names = [name for name, _ in theirs.named_parameters()]
    numbers = to_official({name: torch.tensor([number]) for number, name in enumerate(names)}).state
    return {official: [names[number] for number in indices.tolist()] for official, indices in numbers.items()}


def finish(made: Network, like: nn.Module) -> Network:
    """Give a network the device, dtype, mode and frozen parameters of the one that it was made from.

    Both have the same official names, one of them with fused queries, keys and values.
    """
    first = next(like.parameters())
    made.to(first.device, first.dtype)
    made.train(like.training)
    there, parameters, flags = names_there(made), dict(made.named_parameters()), dict(like.named_parameters())
    for official, names in names_there(like).items():
        trains = any(flags[name].requires_grad for name in names)
        for name in there.get(official, []):  # what is left out on purpose, such as a pooler, has no counterpart
            parameters[name].requires_grad_(trains)
    return made
