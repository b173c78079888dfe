"""The optimizers of the paper, their schedule as a pure function of the step, and the guard against bad updates."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up from 0 to the ``peak``, then half a cosine to ``floor`` (He et al. 2021, table 8).

    ``step`` is 0 … steps − 1, and ``warmup`` the share of the steps that the rise takes. In a run of fewer than ten
    steps none is taken at a rate of 0.
    """
    rise = warmup * steps
    if step < rise:
        return peak * (step + (steps < 10)) / (rise + (steps < 10))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def linear_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up to the ``peak``, then linearly down to 0 after the last step; arguments as in `learning_rate`.

    A polynomial of power 1, by which segmentation is trained (docs/segmentation.md).
    """
    rise = warmup * steps
    return peak * min((step + 1) / max(1.0, rise), (steps - step) / max(1.0, steps - rise))


def peak_rate(base_lr: float, batch_size: int) -> float:
    """The highest rate of a global batch, from that of 256.

    Linear from 256 on (Goyal et al. 2017, as He et al. 2021 use it). Below, by the square root: the linear rule makes
    rates of small batches so low that nothing is learned, and Adam's step does not shrink with the noise.
    """
    share = batch_size / 256
    return base_lr * (share if share >= 1 else math.sqrt(share))


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW by the published betas, the groups being `matrix_groups`."""
    return torch.optim.AdamW(matrix_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)


def matrix_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters, with no decay on biases and norms; frozen parameters are left out."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def decayed_groups(model: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters for layer-wise decay of the learning rate (Clark et al. 2020; Bao et al. 2021).

    What stands before the first block is layer 0, block i is layer i + 1, and ``fc_norm`` and the head are layer
    depth + 1; ``norm``, which normalises tokens, counts to the last block, as in timm. A layer's rate is multiplied by
    ``layer_decay`` once for each layer above it, the ``lr_scale`` of its group. Biases and norms, the class token and
    the positions have no weight decay. Frozen parameters are left out.

    The model is an `Encoder` of ``depth`` blocks, or what names its parameters in the same way.
    """
    layers = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "norm": depth}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        first, *rest = name.split(".")
        layer = int(rest[0]) + 1 if first == "blocks" else layers.get(first, depth + 1)
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        settings = {"lr_scale": layer_decay ** (depth + 1 - layer), "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((layer, decays), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate: ``rate`` times its ``lr_scale``, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradient of all parameters, () float32 on their device; the same in every process."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Of a DTensor; its class takes a second to import.
    spread: Callable[[], Tensor] | None = getattr(norm, "full_tensor", None)
    return spread() if spread else norm


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    norm: Tensor,
    nonfinite: Tensor,
    clip: float | None = None,
) -> None:
    """Change the weights, and forget the gradients. Where those are not finite, neither weights nor state change.

    With AdamW the device decides, so the host need not wait for it: its fused kernel reads the flag that a gradient
    scaler would set. Other optimizers wait. ``norm`` is what `gradient_norm` gives, ``clip`` its largest, and
    ``nonfinite`` () float32 on the device, 1 for no update.
    """
    if clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = nonfinite  # type: ignore[attr-defined]
        optimizer.step()
    elif not nonfinite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
