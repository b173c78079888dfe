"""Speed, memory and counted FLOPs of the networks beside timm and transformers, in one run.

    python benchmarks/networks.py                      # CPU, float32
    python benchmarks/networks.py --bf16               # CPU with tile units: ours in bf16, theirs in float32
    python benchmarks/networks.py --device cuda        # and bf16, compiled, memory

Runs are interleaved (A B C A B C …) and medians are compared, since machines are shared and drift. FLOPs are counted by
torch's own counter.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from maehub import AutoencoderConfig, Encoder, MaskedAutoencoder
from maehub.models.devices import multiplies_in_tiles
from maehub.models.encoder import PRESETS
from maehub.models.masking import kept_count, random_masks
from maehub.train.finetuning.classifier import as_classifier


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def table(title: str, times: dict[str, list[float]], images: int, flops: dict[str, float], extra: str = "") -> None:
    """Median, images per second, and the ratio of the peer's median to ours (above 1: we are faster)."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["maehub"]
    print(f"\n### {title}\n\n| | median s | min–max s | images/s | peer's median / ours | GFLOP |")
    print("|---|---|---|---|---|---|")
    for name, median in medians.items():
        low, high = min(times[name]), max(times[name])
        count = f"{flops[name] / 1e9:.1f}" if name in flops else ""
        print(
            f"| {name} | {median:.4g} | {low:.4g}–{high:.4g} | {images / median:.1f} | {median / ours:.3f} | {count} |"
        )
    if extra:
        print(f"\n{extra}")


def flops_of(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def encoder_forward(device: str, dtype: torch.dtype, batch: int, rounds: int, compiled: bool) -> None:
    """ViT-B, features of the class token."""
    size = PRESETS["vit-b"]
    ours = Encoder(size)
    peers = {
        "timm": timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0),
        "transformers": ViTModel(ViTConfig(), add_pooling_layer=False),
    }
    models = {"maehub": ours, **peers}
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    calls = {}
    for name, model in models.items():
        ready = model.to(device, dtype).eval()
        run = torch.compile(ready) if compiled else ready
        calls[name] = lambda run=run: run(images)
    with torch.inference_mode():
        counted = {} if compiled else {name: flops_of(call) for name, call in calls.items()}
        times = interleaved(calls, rounds, device)
    kind = f"{str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}"
    table(f"Encoder forward, ViT-B, batch {batch}, {kind}, {device}", times, batch, counted)


def pretraining_step(device: str, batch: int, rounds: int, autocast: bool, compiled: bool) -> None:
    """ViT-B, forward and backward of the loss at 75 %, normalised pixels, masks drawn."""
    ours = MaskedAutoencoder(AutoencoderConfig(PRESETS["vit-b"])).to(device).train()
    theirs = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6)).to(device).train()
    images = torch.randn(batch, 3, 224, 224, device=device)
    kept = kept_count(196, 0.75)
    seeds = torch.arange(batch, device=device)
    our_loss = torch.compile(ours.loss) if compiled else ours.loss
    their_forward = torch.compile(theirs) if compiled else theirs

    def step(loss: Callable[[], torch.Tensor], model: torch.nn.Module) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        model.zero_grad(set_to_none=True)

    calls = {
        "maehub": lambda: step(lambda: our_loss(images, random_masks(seeds, 196, kept), kept=kept), ours),
        "transformers": lambda: step(lambda: their_forward(images).loss, theirs),
    }
    counted = {} if compiled else {name: flops_of(call) for name, call in calls.items()}
    note = f"FLOPs: {1 - counted['maehub'] / counted['transformers']:.1%} fewer than transformers." if counted else ""
    memory = {}
    if device == "cuda":
        for name, call in calls.items():
            call()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
        note += " Peak memory above the weights: " + ", ".join(f"{n} {v:.2f} GiB" for n, v in memory.items())
    times = interleaved(calls, rounds, device)
    kind = f"{'bf16' if autocast else 'fp32'}{', compiled' if compiled else ''}"
    table(f"Pretraining step (forward, backward), ViT-B, batch {batch}, {kind}, {device}", times, batch, counted, note)


def mask_tokens(device: str, batch: int, rounds: int, autocast: bool) -> None:
    """Table 1c and table 2 of the paper: what leaving mask tokens out of the encoder saves, ViT-L, 8 decoder blocks."""
    config = AutoencoderConfig(PRESETS["vit-l"])
    images = torch.randn(batch, 3, 224, 224, device=device)
    kept = kept_count(196, 0.75)
    masked = random_masks(torch.arange(batch, device=device), 196, kept)
    calls = {}
    for name, place in (("maehub", "decoder"), ("with mask tokens in the encoder", "encoder")):
        model = MaskedAutoencoder(replace(config, mask_tokens=place)).to(device).train()

        def step(model: MaskedAutoencoder = model) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = model.loss(images, masked, kept=kept)
            loss.backward()
            model.zero_grad(set_to_none=True)

        calls[name] = step
    full = {}
    for name, place in (("maehub", "decoder"), ("with mask tokens in the encoder", "encoder")):
        with torch.device("meta"):
            model = MaskedAutoencoder(replace(config, mask_tokens=place))
            blank, hidden = torch.empty(1, 3, 224, 224), torch.empty(1, 196, dtype=torch.bool)
        full[name] = flops_of(lambda model=model, blank=blank, hidden=hidden: model.loss(blank, hidden, kept=kept))
    names = list(full)
    note = f"FLOPs of the forward, one image: {full[names[1]] / full[names[0]]:.2f} times fewer without (paper: 3.3)."
    times = interleaved(calls, rounds, device)
    kind = "bf16" if autocast else "fp32"
    table(f"ViT-L pretraining step, batch {batch}, {kind}, {device}", times, batch, full, note)


def tiles(rounds: int, features: int, training: int) -> None:
    """What ``--precision auto`` gains in commands on a CPU with tile units: ours in bf16, ours and peers in float32."""
    half = torch.autocast("cpu", torch.bfloat16)
    ours = Encoder(PRESETS["vit-b"]).eval()
    peer = timm.create_model("vit_base_patch16_224.mae", pretrained=False, num_classes=0).eval()
    images = torch.randn(features, 3, 224, 224)
    calls: dict[str, Callable[[], object]] = {
        "maehub": lambda: within(half, lambda: ours.features(images)),
        "maehub, float32": lambda: ours.features(images),
        "timm, float32": lambda: peer(images),
    }
    with torch.inference_mode():
        times = interleaved(calls, rounds, "cpu")
    table(f"Features, ViT-B, batch {features}, bf16 on the CPU", times, features, {})

    model = MaskedAutoencoder(AutoencoderConfig(PRESETS["vit-b"])).train()
    theirs = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6)).train()
    images, kept, seeds = torch.randn(training, 3, 224, 224), kept_count(196, 0.75), torch.arange(training)

    def loss() -> torch.Tensor:
        return model.loss(images, random_masks(seeds, 196, kept), kept=kept)

    calls = {
        "maehub": lambda: differentiated(within(half, loss), model),
        "maehub, float32": lambda: differentiated(loss(), model),
        "transformers, float32": lambda: differentiated(theirs(images).loss, theirs),
    }
    times = interleaved(calls, rounds, "cpu")
    table(f"Pretraining step (forward, backward), ViT-B, batch {training}, bf16 on the CPU", times, training, {})

    tuned = as_classifier(Encoder(PRESETS["vit-b"]), [str(number) for number in range(100)], pool="mean").train()
    peer = timm.create_model("vit_base_patch16_224", num_classes=100, global_pool="avg").train()
    labels = torch.arange(training)
    calls = {
        "maehub": lambda: differentiated(cross_entropy(within(half, lambda: tuned(images)).float(), labels), tuned),
        "maehub, float32": lambda: differentiated(cross_entropy(tuned(images), labels), tuned),
        "timm, float32": lambda: differentiated(cross_entropy(peer(images), labels), peer),
    }
    times = interleaved(calls, rounds, "cpu")
    table(f"Fine-tuning step (forward, backward), ViT-B, batch {training}, bf16 on the CPU", times, training, {})


def within(context: torch.autocast, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with context:
        return call()


def differentiated(loss: torch.Tensor, model: torch.nn.Module) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="ours in bf16 on the CPU beside peers in float32")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, timm {timm.__version__}, {where}, {options.rounds} interleaved rounds")
    if options.bf16:
        print(f"tile units: {multiplies_in_tiles()}")
        return tiles(options.rounds, 16, 8)
    if options.device == "cpu":
        encoder_forward("cpu", torch.float32, 16, options.rounds, compiled=False)
        pretraining_step("cpu", 8, options.rounds, autocast=False, compiled=False)
        return mask_tokens("cpu", 2, options.rounds + 2, autocast=False)
    for compiled in (False, True):
        encoder_forward("cuda", torch.bfloat16, 256, options.rounds * 3, compiled)
        pretraining_step("cuda", 256, options.rounds * 3, autocast=True, compiled=compiled)
    return mask_tokens("cuda", 128, options.rounds * 3, autocast=True)


if __name__ == "__main__":
    main()
