"""Estimates of `maehub plan` beside measured steps on this CPU: time of forward and backward, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/plan.py
    OMP_NUM_THREADS=1 python benchmarks/plan.py --rounds 5 vit-nano:32 vit-s:8

Every measurement is a fresh process, the networks in turn. Time is the median of steps after two that are not counted,
and the rate of matrix products is measured in the same process, since machines are shared and drift. Memory is the
peak of the resident set (VmHWM) of a process with twice the batch minus that with the batch, for each view.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from maehub.masking import random_masks
from maehub.train.config import PlanConfig
from maehub.train.devices import measured_cpu
from maehub.train.networks import build_network, kept_patches, view_of
from maehub.train.planning import plan

DEFAULT = ("vit-nano:32", "vit-ti:16", "vit-s:8", "vit-b:4")
STEPS = 5


def resident_peak() -> int:
    """VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(model: str, batch: int, steps: int) -> None:
    """Print what steps of one network take, as JSON: for a process of its own."""
    config = PlanConfig(model=model, epochs=1, images=1)
    network = build_network(config, None).train()
    kept = kept_patches(view_of(config, network.config))
    patches = network.config.encoder.grid[0] * network.config.encoder.grid[1]
    masked = random_masks(torch.arange(batch), patches, kept)
    pixels = torch.randint(0, 256, (batch, *network.config.encoder.size, 3), dtype=torch.uint8)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        network.loss(network.preprocess.normalise(pixels), masked, kept=kept).backward()
        times.append(time.perf_counter() - start)
        network.zero_grad(set_to_none=False)
    peak = resident_peak()
    seconds = statistics.median(times[2:]) if steps > 2 else 0.0
    print(json.dumps({"seconds": seconds, "peak": peak, "rate": measured_cpu().fp32}))


def measured(model: str, batch: int, steps: int) -> dict[str, float]:
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
    print("| network, batch | GFLOP a view | matrix rate, GFLOP/s | measured s | utilisation | range | planned s at 0.8 |"
          " planned / measured | measured MiB a view | planned | planned / measured |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        model, batch = case
        found = plan(PlanConfig(model=model, images=10**6, steps=1, batch_size=batch, on="cpu"))
        seconds = [one[case]["seconds"] for one in rounds]
        shares = [batch * found.training_flops / one[case]["seconds"] / one[case]["rate"] / 1e12 for one in rounds]
        rate = statistics.median(one[case]["rate"] for one in rounds) * 1e12
        planned = batch * found.training_flops / (rate * 0.8)
        median = statistics.median(seconds)
        peaks = [measured(model, size, 1)["peak"] for size in (batch, 2 * batch)]
        each = (peaks[1] - peaks[0]) / batch / 2**20
        view = found.view_bytes / 2**20
        print(
            f"| {model}, {batch} | {found.training_flops / 1e9:.2f} | {rate / 1e9:.0f} | {median:.3f} | "
            f"{statistics.median(shares):.2f} | {min(shares):.2f}–{max(shares):.2f} | {planned:.3f} | "
            f"{planned / median:.2f} | {each:.1f} | {view:.1f} | {view / each:.2f} |"
        )


if __name__ == "__main__":
    main()
