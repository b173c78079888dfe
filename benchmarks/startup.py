"""How long ``import maehub`` and the commands that need no torch take, as whole processes.

python benchmarks/startup.py
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare python": ["-c", "pass"],
    "import maehub": ["-c", "import maehub"],
    "maehub --help": ["-m", "maehub", "--help"],
    "maehub list": ["-m", "maehub", "list"],
    "maehub features --help": ["-m", "maehub", "features", "--help"],
    "maehub pretrain --help": ["-m", "maehub", "pretrain", "--help"],
    "unknown model": ["-m", "maehub", "info", "vit-x"],
    "features, no network, no cache": ["-m", "maehub", "features", "x.jpg", "-m", "vit-h-448", "-o", "x.npz"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "MAEHUB_CACHE": "/nonexistent"}
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(options.rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], env=environment, capture_output=True, check=False)
            if number:  # the first round fills caches
                times[name].append(time.perf_counter() - start)
    bare = statistics.median(times["bare python"])
    print(f"Python {sys.version.split()[0]}, {options.rounds} interleaved rounds\n")
    print("| process | median ms | min–max ms | above bare Python, ms |\n|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        low, high = (1000 * side for side in (min(values), max(values)))
        print(f"| {name} | {1000 * median:.0f} | {low:.0f}–{high:.0f} | {1000 * (median - bare):.0f} |")


if __name__ == "__main__":
    main()
