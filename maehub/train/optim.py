"""The optimizer of the paper and its schedule, a pure function of the step."""

import math

import torch
from torch import nn


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


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW with no decay on biases and norms; frozen parameters are left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type == "cuda" for parameter in trained)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused or None)
