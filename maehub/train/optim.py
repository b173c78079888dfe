"""The optimizer of the paper, its schedule as a pure function of the step, and the guard against bad updates."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up from 0, then half a cosine to 0 (He et al. 2021, table 8).

    Args:
        step: 0 … steps − 1.
        steps: length of the run.
        peak: highest rate.
        warmup: share of the steps that the rise takes.
    """
    rise = warmup * steps
    if step < rise:
        return peak * step / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def peak_rate(base_lr: float, batch_size: int) -> float:
    """The highest rate of a global batch, from that of 256.

    Linear from 256 on (Goyal et al. 2017, as He et al. 2021 use it). Below, by the square root: the linear rule makes
    rates of small batches so low that nothing is learned, and Adam's step does not shrink with the noise.
    """
    share = batch_size / 256
    return base_lr * (share if share >= 1 else math.sqrt(share))


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """Fused AdamW with no decay on biases and norms; frozen parameters are left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradient of all parameters, () float32 on their device; the same in every process."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def guarded_step(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """An update, unless ``bad`` (() float32 on the device) is 1: then nothing changes, neither weights nor state.

    The device decides, so the host need not wait for it: fused AdamW reads the flag that a gradient scaler would set.
    """
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
