"""The device that a caller names, if it is there."""

import torch

from maehub.errors import UsageError


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
