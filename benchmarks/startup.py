"""How long ``import maehub`` and the commands that need no torch take, as whole processes.

python benchmarks/startup.py
python benchmarks/startup.py --before ../base      # and another checkout, in turn with this one
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
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
    parser.add_argument("--before", type=Path, help="another checkout, to time beside this one")
    options = parser.parse_args()
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "MAEHUB_CACHE": "/nonexistent"}
    sides = {"": HERE} | ({"before: ": options.before.resolve()} if options.before else {})
    rows = {side + name: (command, folder) for name, command in COMMANDS.items() for side, folder in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(options.rounds + 1):
        for name, (command, folder) in rows.items():
            start = time.perf_counter()
            environment = settings | {"PYTHONPATH": str(folder)}
            subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, check=False)
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
