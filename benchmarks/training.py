"""Whole training steps and runs: processes, checkpoints and, on a GPU, the peer, the hardware's limit and the loader.

    OMP_NUM_THREADS=1 python benchmarks/training.py              # CPU: processes side by side, checkpoints
    python benchmarks/training.py --device cuda                  # steps beside transformers, and end to end from JPEGs

Runs are interleaved (A B A B …) and medians are compared. FLOPs of a training step are 6 for each multiplication of a
matrix product in the forward pass; what is computed again is not counted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from maehub.images.preprocess import Preprocess
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS
from maehub.models.masking import random_masks
from maehub.train.engine.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint
from maehub.train.engine.optim import adamw, gradient_norm, update
from maehub.train.networks.costs import forward_flops, work_of
from maehub.train.pretraining.objective import Objective

ASSETS = Path(__file__).parent.parent / "maehub" / "assets"
KEPT = {"vit-b": 49, "vit-l": 49}


def photos(folder: Path, size: tuple[int, int], count: int) -> Path:
    """JPEGs of one size (width, height) out of the two photos that come with maehub."""
    folder.mkdir(parents=True)
    sources = [Image.open(path).convert("RGB") for path in sorted(ASSETS.glob("*.jpg"))]
    for number in range(count):
        picture = sources[number % len(sources)]
        shift = 1 + number % 7 / 20
        box = (0, 0, picture.width / shift, picture.height / shift)
        picture.resize(size, Image.Resampling.BICUBIC, box=box).save(folder / f"{number:05d}.jpg", quality=90)
    return folder


def rate_of(command: list[str], out: Path, threads: int) -> float:
    """Images a second of a run of the command line, its first step included."""
    shutil.rmtree(out, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=env, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines if "loss" in line)


def processes(folder: Path, rounds: int, steps: int) -> None:
    """One process of two threads beside two processes of one, the same global batch."""
    data, out = photos(folder / "small", (256, 256), 64), folder / "run"
    words = ["-m", "maehub", "pretrain", str(data), "-o", str(out), "--model", "vit-b", "--steps", str(steps)]
    words += ["--batch-size", "32", "--workers", "0", "--cache", "--holdout", "0", "--device", "cpu", "--quiet"]
    words += ["--validate-every", "100000", "--checkpoint-every", "100000"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one, two = [], []
    for _ in range(rounds):
        one.append(rate_of([sys.executable, *words], out, 2))
        two.append(rate_of([sys.executable, *torchrun, *words], out, 1))
    ratio = statistics.median(two) / statistics.median(one)
    print("\n### ViT-B, global batch 32, images a second\n")
    print("| | median | all |\n|---|---|---|")
    for name, values in (("one process of two threads", one), ("two processes of one thread", two)):
        print(f"| {name} | {statistics.median(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
    print(f"\nTwo processes: {ratio:.3f} of one (goal: at least 0.9).")


def checkpoints(folder: Path, rounds: int) -> None:
    """What saving and resuming ViT-B costs."""
    model = MaskedAutoencoder(AutoencoderConfig(PRESETS["vit-b"]))
    optimizer = adamw(model, 0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    saves, finds, loads = [], [], []
    for number in range(rounds):
        start = time.perf_counter()
        save_checkpoint(folder, model, optimizer, Progress(number, {}, ""), keep=1)
        saves.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = newest_checkpoint(folder)
        finds.append(time.perf_counter() - start)
        assert found is not None
        load_checkpoint(found[0], model, optimizer)
        loads.append(time.perf_counter() - start)
    size = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    print(f"\n### Checkpoints of ViT-B, {size / 1e9:.2f} GB\n\n| | median s | all |\n|---|---|---|")
    for name, values in (("save", saves), ("find and verify", finds), ("find, verify and load", loads)):
        print(f"| {name} | {statistics.median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")
    share = statistics.median(saves) / 300
    print(f"\nOne save in five minutes: {share:.2%} of the time (goal: under 2 %). Resume ready under 10 s.")


def median_step(step: Callable[[], None], rounds: int) -> float:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def our_step(name: str, batch: int, compiled: bool) -> Callable[[], None]:
    """Everything that the loop does on the device in a step: normalise, mask, forward, backward, guard, update."""
    model = MaskedAutoencoder(AutoencoderConfig(PRESETS[name])).cuda().train()
    objective = Objective(model, Preprocess.evaluation(224), kept=KEPT[name])
    called = torch.compile(objective) if compiled else objective
    optimizer = adamw(model, 0.05)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pixels = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device="cuda")
    seeds = torch.arange(batch, device="cuda")
    bad = torch.zeros((), device="cuda")

    def step() -> None:
        masked = random_masks(seeds, 196, KEPT[name])
        with torch.autocast("cuda", torch.bfloat16):
            loss = called(pixels, masked, seeds)
        loss.backward()
        norm = gradient_norm(parameters)
        flag = torch.maximum(bad, (~torch.isfinite(loss.detach() + norm)).float())
        update(optimizer, parameters, norm, flag)

    return step


def their_step(name: str, batch: int, bf16: bool) -> Callable[[], None]:
    """transformers' ViTMAE as its example trains it: eager in TF32, or bf16 autocast with SDPA."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = PRESETS[name]
    config = ViTMAEConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        norm_pix_loss=True,
        attn_implementation="sdpa" if bf16 else "eager",
    )
    model = ViTMAEForPreTraining(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(batch, 3, 224, 224, device="cuda")

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def largest_batch(make: Callable[[int], Callable[[], None]]) -> int:
    """The largest power of two whose step fits."""
    batch = 4096
    while batch:
        try:
            step = make(batch)
            step()
            step()
            torch.cuda.synchronize()
            return batch
        except torch.OutOfMemoryError:
            batch //= 2
        finally:
            step = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
    return 0


def matrix_rate() -> float:
    """TFLOP/s of bf16 matrix products of 8192³ here and now."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = median_step(lambda: left @ right, 20)
    return 2 * 8192**3 / seconds / 1e12


def steps_on_a_gpu(rounds: int) -> None:
    rate = matrix_rate()
    print(f"\n### Training steps, {torch.cuda.get_device_name()}, bf16 products at {rate:.0f} TFLOP/s\n")
    print("| | batch | ms | images/s | peak GiB | times the peer's TF32 eager | share of the product rate |")
    print("|---|---|---|---|---|---|---|")
    for name in ("vit-b", "vit-l"):
        variants: dict[str, Callable[[int], Callable[[], None]]] = {
            "transformers, TF32 eager": lambda batch, name=name: their_step(name, batch, False),
            "transformers, bf16 SDPA": lambda batch, name=name: their_step(name, batch, True),
            "maehub, bf16": lambda batch, name=name: our_step(name, batch, False),
            "maehub, bf16, compiled": lambda batch, name=name: our_step(name, batch, True),
        }
        network = AutoencoderConfig(PRESETS[name])
        flops = 3 * forward_flops(network, work_of(network, KEPT[name]))
        first = 0.0
        for label, make in variants.items():
            batch = largest_batch(make)
            step = make(batch)
            seconds = median_step(step, rounds)
            torch.cuda.reset_peak_memory_stats()
            step()
            memory = torch.cuda.max_memory_allocated() / 2**30
            del step
            torch.cuda.empty_cache()
            speed = batch / seconds
            first = first or speed
            share = f"{flops * speed / rate / 1e12:.1%}" if label.startswith("maehub") else ""
            print(
                f"| {name}: {label} | {batch} | {1000 * seconds:.1f} | {speed:,.0f} | {memory:.1f} | "
                f"{speed / first:.2f} | {share} |",
                flush=True,
            )


def end_to_end(folder: Path, steps: int) -> None:
    """`maehub pretrain` from JPEGs beside the same run from pictures that are decoded already."""
    print(f"\n### End to end, {os.cpu_count()} cores\n\n| | images/s | decoded before | share |\n|---|---|---|---|")
    for name, size, batch in (("vit-b", (500, 375), 512), ("vit-l", (1024, 768), 256)):
        data = photos(folder / name, size, 2000)
        rates = []
        for cache in ([], ["--cache"]):
            out = folder / f"run-{name}{len(cache)}"
            words = [sys.executable, "-m", "maehub", "pretrain", str(data), "-o", str(out), "--model", name]
            words += ["--steps", str(steps), "--batch-size", str(batch), "--holdout", "0", "--quiet", "--compile"]
            words += ["--validate-every", "100000", "--checkpoint-every", "100000", "--device", "cuda", *cache]
            rates.append(rate_of(words, out, 1))
        print(
            f"| {name}, {size[0]}×{size[1]} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=["processes", "checkpoints"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.device == "cuda":
            steps_on_a_gpu(4 * options.rounds)
            end_to_end(folder, 20 * options.steps)
            return
        if options.only != "processes":
            checkpoints(folder / "checkpoints", options.rounds)
        if options.only != "checkpoints":
            processes(folder, options.rounds, options.steps)


if __name__ == "__main__":
    main()
