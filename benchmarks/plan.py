"""Estimates of `maehub plan` beside measured steps on this CPU: time of forward and backward, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/plan.py
    OMP_NUM_THREADS=1 python benchmarks/plan.py --rounds 5 vit-nano:32 vit-s:8

Every measurement is a process of its own, the networks in turn. Times are the processor's, not the wall clock's, and a
burst of matrix products follows each step, since machines are shared and drift: the utilisation is the rate of a step
divided by that of the burst after it. Memory is the peak of the resident set (VmHWM) of a process with twice the batch
minus that with the batch, for each view.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from maehub.models.masking import random_masks
from maehub.train.planning.planning import plan
from maehub.train.pretraining.config import PlanConfig
from maehub.train.pretraining.loop import autoencoder_of, view_of
from maehub.train.pretraining.network import kept_patches

DEFAULT = ("vit-nano:32", "vit-ti:16", "vit-s:8", "vit-b:4")
STEPS = 6  # the first of them is not counted
COLUMNS = (
    "network, batch", "GFLOP a view", "CPU s a step", "planned at 0.8", "planned / measured", "utilisation", "min–max",
    "MiB a view", "planned", "planned / measured",
)  # fmt: skip


def resident_peak() -> int:
    """VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def product_rate(seconds: float = 0.3) -> float:
    """FLOP a processor second of float32 matrix products, as `maehub.train.planning.devices` measures them."""
    matrix = torch.ones(1024, 1024)
    count, start = 0, time.process_time()
    while (passed := time.process_time() - start) < seconds:
        torch.mm(matrix, matrix.T)
        count += 1
    return 2 * 1024**3 * count / passed


def measure(model: str, batch: int, steps: int) -> None:
    """Print what steps of one network take, as JSON: for a process of its own."""
    config = PlanConfig(model=model, epochs=1, images=1)
    network = autoencoder_of(config, None).train()
    kept = kept_patches(view_of(config, network.config))
    patches = network.config.encoder.grid[0] * network.config.encoder.grid[1]
    masked = random_masks(torch.arange(batch), patches, kept)
    pixels = torch.randint(0, 256, (batch, *network.config.encoder.size, 3), dtype=torch.uint8)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    times, rates = [], []
    for _ in range(steps):
        start = time.process_time()
        network.loss(network.preprocess.normalise(pixels), masked, kept=kept).backward()
        times.append(time.process_time() - start)
        if steps > 1:
            rates.append(product_rate())
    print(json.dumps({"times": times[1:], "rates": rates[1:], "peak": resident_peak()}))


def measured(model: str, batch: int, steps: int) -> dict:
    command = [sys.executable, __file__, "--child", f"{model}:{batch}:{steps}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=DEFAULT, metavar="MODEL:BATCH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        model, batch, steps = options.child.split(":")
        measure(model, int(batch), int(steps))
        return
    cases = [(case.split(":")[0], int(case.split(":")[1])) for case in options.networks]
    rounds = [{case: measured(*case, STEPS) for case in cases} for _ in range(options.rounds)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for model, batch in cases:
        found = plan(PlanConfig(model=model, images=10**6, steps=1, batch_size=batch, on="h100", precision="fp32"))
        flops = batch * found.training_flops
        times = [seconds for one in rounds for seconds in one[model, batch]["times"]]
        rates = [rate for one in rounds for rate in one[model, batch]["rates"]]
        shares = [flops / seconds / rate for seconds, rate in zip(times, rates, strict=True)]
        median, planned = statistics.median(times), flops / (0.8 * statistics.median(rates))
        small, large = (measured(model, size, 1)["peak"] for size in (batch, 2 * batch))
        each, view = (large - small) / batch / 2**20, found.view_bytes / 2**20
        print(
            f"| {model}, {batch} | {found.training_flops / 1e9:.2f} | {median:.2f} | {planned:.2f} | "
            f"{planned / median:.2f} | {statistics.median(shares):.2f} | {min(shares):.2f}–{max(shares):.2f} | "
            f"{each:.1f} | {view:.1f} | {view / each:.2f} |"
        )


if __name__ == "__main__":
    main()
