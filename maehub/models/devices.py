"""The device that a caller names, if it is there, and what it multiplies matrices in."""

import contextlib
import functools
import time
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maehub.errors import UsageError

Precision = Literal["auto", "fp32", "bf16"]

_PRODUCT = 512  # side of the matrices that are multiplied to see how fast that is
_TILES_GAIN = 2.5  # of bf16 over fp32 with tile units, 3 to 8 here; vector units give at most 2


def usable_device(name: str | torch.device) -> torch.device:
    """The device that a name means; "auto" is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices can only be named
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UsageError(f"device {name} cannot be used here: {reason}; cpu always can, auto chooses") from error
    return device


def settled_precision(precision: Precision, device: torch.device) -> Precision:
    """What ``auto`` means on a device: bf16 on a GPU that computes it natively.

    Commands take bf16 on CPUs too, where `multiplies_in_tiles` says so.
    """
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if precision == "bf16" or (precision == "auto" and capable) else "fp32"


def computed_in(precision: Precision) -> Precision:
    """What ``auto`` means where nobody settled it, as in a Python call that measures: fp32."""
    return "bf16" if precision == "bf16" else "fp32"


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Products in bf16 and weights in float32 where that is asked for; it can be entered again and again."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


@functools.cache
def multiplies_in_tiles() -> bool:
    """Whether this CPU has tile units for bf16, as AMX is: by the time of a product, some milliseconds in all."""
    left, right = torch.randn(2, _PRODUCT, _PRODUCT, generator=torch.Generator().manual_seed(0))

    def seconds(dtype: torch.dtype) -> float:
        one, other, spent = left.to(dtype), right.to(dtype), []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(one, other)
            spent.append(time.perf_counter() - start)
        return min(spent)

    return seconds(torch.float32) > _TILES_GAIN * seconds(torch.bfloat16)


class FullPrecision(nn.Linear):
    """A linear layer in the precision of its weights, whatever autocast says: of 157.3 bf16 would leave 157."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))
