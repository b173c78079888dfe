"""What every variation of a pretraining step costs: counted FLOPs, and measured time beside the default in one run.

    python benchmarks/variants.py                              # FLOPs, vit-b
    python benchmarks/variants.py --rounds 5                   # and the time of a step on the CPU
    python benchmarks/variants.py --rounds 20 --device cuda --batch 128

FLOPs are those of matrix products and attention, forward and backward, counted by torch's own counter on the meta
device. Times are of forward and backward of `Objective`, without loader and optimizer, interleaved (A B C A B C …); on
the CPU they are CPU time, which a busy machine disturbs least. The ratio is the median over rounds of the time divided
by the default's in the same round.
"""

import argparse
import contextlib
import gc
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS
from maehub.models.masking import kept_count, random_masks
from maehub.models.patches import patchify
from maehub.train.pretraining.objective import Components, Objective, store_components


@dataclass(frozen=True)
class Variant:
    """One row: what differs from the paper's default."""

    name: str
    network: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    mask_ratio: float = 0.75


_MEAN_COLOURS = {"target": "tokens", "outputs": 512, "tokenizer": "mean-colour"}
_IN_ENCODER = {"mask_tokens": "encoder"}
_LINEAR = _IN_ENCODER | {"decoder_depth": 0}
VARIANTS = [
    Variant("default"),
    *(Variant(f"mask ratio {ratio}", mask_ratio=ratio) for ratio in (0.5, 0.6, 0.9)),
    *(Variant(f"decoder depth {depth}", {"decoder_depth": depth}) for depth in (1, 2, 4, 12)),
    *(Variant(f"decoder width {width}", {"decoder_width": width}) for width in (128, 256, 768, 1024)),
    Variant("mask tokens in the encoder", _IN_ENCODER),
    Variant("mask tokens in the encoder, linear head", _LINEAR),
    Variant("pixels", {"target": "pixels"}),
    Variant("96 PCA coefficients", {"target": "pca", "outputs": 96}),
    Variant("512 mean colours", _MEAN_COLOURS),
    Variant("8192 tokens", {"target": "tokens", "outputs": 8192}),
    Variant("loss on all patches", objective={"loss_on": "all"}),
    *(Variant(f"predict share {share}", objective={"predict_share": share}) for share in (0.5, 0.25)),
    Variant(
        "ViT's masked prediction",
        _LINEAR | _MEAN_COLOURS,
        {"corruption": (0.8, 0.1, 0.1)},
        0.5,
    ),
    Variant("BEiT's", _LINEAR | {"target": "tokens", "outputs": 8192}, mask_ratio=0.4),
]


def objective(variant: Variant, preset: str, device: str) -> Objective:
    """The module of a step, with random weights."""
    config = replace(AutoencoderConfig(PRESETS[preset]), **variant.network)
    encoder = config.encoder
    with torch.device(device):
        model = MaskedAutoencoder(config)
        tokenizer = None
        if config.target == "pca":
            store_components(
                model, Components(torch.zeros(config.patch_values), torch.zeros(config.outputs, config.patch_values))
            )
        if config.target == "tokens" and not config.tokenizer:

            def tokenizer(images: Tensor) -> Tensor:  # of no cost: a real one has its own
                patches = patchify(images, encoder.patch_size)
                return torch.zeros(patches.shape[:2], dtype=torch.int64, device=images.device)

        kept = kept_count(encoder.grid[0] * encoder.grid[1], variant.mask_ratio)
        made = Objective(model, model.preprocess, kept=kept, tokenizer=tokenizer, **variant.objective)
    return made.train()


def step(made: Objective, batch: int, device: str) -> None:
    """Forward and backward of one batch of noise."""
    encoder = made.model.config.encoder
    pixels = torch.zeros(batch, *encoder.size, encoder.channels, dtype=torch.uint8, device=device)
    seeds = torch.arange(batch, device=device)
    masked = random_masks(seeds, encoder.grid[0] * encoder.grid[1], made.kept)
    half = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    with half:
        loss = made(pixels, masked, seeds)
    loss.backward()
    made.zero_grad(set_to_none=True)


def flops(variant: Variant, preset: str) -> int:
    """Of one view, forward and backward."""
    made = objective(variant, preset, "meta")
    if made.tokenizer is not None and hasattr(made.tokenizer, "has_run"):
        made.tokenizer.has_run = True  # on the meta device there are no values to look at
    with FlopCounterMode(display=False) as counter:
        step(made, 1, "meta")
    return counter.get_total_flops()


def seconds(preset: str, batch: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Of a step of every variant in every round."""
    times: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    clock = time.perf_counter if device == "cuda" else time.process_time
    step(objective(VARIANTS[0], preset, device), batch, device)
    for _ in range(rounds):
        for variant in VARIANTS:
            made = objective(variant, preset, device)
            if device == "cuda":
                step(made, batch, device)
                torch.cuda.synchronize()
            start = clock()
            step(made, batch, device)
            if device == "cuda":
                torch.cuda.synchronize()
            times[variant.name].append(clock() - start)
            del made
            gc.collect()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="vit-b", choices=list(PRESETS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=0, help="0 counts FLOPs alone")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    told = parser.parse_args()
    counted = {variant.name: flops(variant, told.preset) for variant in VARIANTS}
    times = seconds(told.preset, told.batch, told.rounds, told.device) if told.rounds else {}
    print(f"{told.preset}, torch {torch.__version__}, {torch.get_num_threads()} threads", end="")
    print(f", batch {told.batch}, {told.rounds} rounds, {told.device}\n" if times else "\n")
    print("| | GFLOP a view | FLOPs | time | s a step |\n|---|---|---|---|---|")
    for name, count in counted.items():
        row = f"| {name} | {count / 1e9:.1f} | {count / counted['default']:.2f} |"
        if times:
            ratio = statistics.median(a / b for a, b in zip(times[name], times["default"], strict=True))
            row += f" {ratio:.2f} | {statistics.median(times[name]):.2f} |"
        print(row if times else row + " | |")


if __name__ == "__main__":
    main()
