"""How fast, and in how much memory, ViT-H/14 (2.5 GB) is ready, beside timm and transformers. Prints Markdown.

Every measurement is a fresh process. The clock starts when torch and the library are imported, and the import of the
library is a column of its own; memory is the peak resident set above that after importing torch. Rows run in turn,
round after round, and the median is shown. The weights are random, in a temporary folder that is deleted.

    python benchmarks/load_huge.py [--rounds 5] [--folder WHERE]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# This process imports no torch, so that a child does not begin with its memory.

IMPORTS = {
    "maehub": "import maehub.weights.model_folder as w; from maehub.files import sha256_file",
    "timm": "import timm; from safetensors.torch import load_file",
    "transformers": "from transformers import ViTMAEForPreTraining, ViTModel, logging; logging.set_verbosity_error()",
}

STAMPED = "options=w.LoadOptions(check_finite=False)"  # as for verified bytes that are unchanged
FORWARD = "torch.inference_mode()(model)(torch.zeros(1, 3, 224, 224))"

# row, layout, library, cold cache, statements
ROWS = [
    ("maehub, stamped", "timm", "maehub", False, f"model = w.open_encoder(path, {STAMPED})"),
    ("maehub, verifying (sha256, finite)", "timm", "maehub", False, "sha256_file(path); model = w.open_encoder(path)"),
    ("maehub, stamped, cold cache", "timm", "maehub", True, f"model = w.open_encoder(path, {STAMPED})"),
    ("maehub, stamped, first forward", "timm", "maehub", False, f"model = w.open_encoder(path, {STAMPED}); {FORWARD}"),
    (
        "maehub, stamped, cold cache, first forward",
        "timm",
        "maehub",
        True,
        f"model = w.open_encoder(path, {STAMPED}); {FORWARD}",
    ),
    (
        "timm, create_model and load",
        "timm",
        "timm",
        False,
        "model = timm.create_model('vit_huge_patch14_224.mae'); model.load_state_dict(load_file(path)); model.eval()",
    ),
    (
        "timm, on the meta device, assign=True",
        "timm",
        "timm",
        False,
        'exec(\'with torch.device("meta"): model = timm.create_model("vit_huge_patch14_224.mae")\');'
        "model.load_state_dict(load_file(path), assign=True); model.eval()",
    ),
    (
        "timm, on the meta device, assign=True, first forward",
        "timm",
        "timm",
        False,
        'exec(\'with torch.device("meta"): model = timm.create_model("vit_huge_patch14_224.mae")\');'
        f"model.load_state_dict(load_file(path), assign=True); model.eval(); {FORWARD}",
    ),
    ("maehub, encoder, stamped", "transformers", "maehub", False, f"model = w.open_encoder(path, {STAMPED})"),
    ("maehub, autoencoder, stamped", "transformers", "maehub", False, f"model = w.open_autoencoder(path, {STAMPED})"),
    (
        "maehub, autoencoder, verifying (sha256, finite)",
        "transformers",
        "maehub",
        False,
        "sha256_file(path + '/model.safetensors'); model = w.open_autoencoder(path)",
    ),
    (
        "maehub, autoencoder, stamped, cold cache",
        "transformers",
        "maehub",
        True,
        f"model = w.open_autoencoder(path, {STAMPED})",
    ),
    (
        "maehub, encoder, stamped, first forward",
        "transformers",
        "maehub",
        False,
        f"model = w.open_encoder(path, {STAMPED}); {FORWARD}",
    ),
    (
        "transformers, ViTMAEForPreTraining.from_pretrained (meta device inside)",
        "transformers",
        "transformers",
        False,
        "model = ViTMAEForPreTraining.from_pretrained(path)",
    ),
    (
        "transformers, ViTModel.from_pretrained, first forward",
        "transformers",
        "transformers",
        False,
        f"model = ViTModel.from_pretrained(path, add_pooling_layer=False); {FORWARD}",
    ),
]

CHILD = """
import json, sys, time, torch
path, imports, statements = sys.argv[1:]
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
start = time.perf_counter()
exec(imports)
imported = time.perf_counter()
exec(statements)
print(json.dumps([time.perf_counter() - imported, imported - start, peak() - before]))
"""

MAKE = """
import sys
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS
from maehub.weights.model_folder import save
save(MaskedAutoencoder(AutoencoderConfig(PRESETS["vit-h"])), sys.argv[1])
"""


def make_files(folder: Path) -> dict[str, Path]:
    """One file in timm's layout, and a plain transformers folder without our block."""
    subprocess.run([sys.executable, "-c", MAKE, str(folder / "model")], check=True)
    plain = folder / "plain"
    plain.mkdir()
    config = json.loads((folder / "model" / "config.json").read_text())
    del config["maehub"]
    (plain / "config.json").write_text(json.dumps(config))
    os.link(folder / "model" / "model.safetensors", plain / "model.safetensors")
    return {"timm": folder / "model" / "timm" / "model.safetensors", "transformers": plain}


def file_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def set_cache(path: Path, cold: bool) -> None:
    """Put a file out of the page cache, or read it all into it."""
    with open(file_of(path), "rb", buffering=0) as file:
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            buffer = bytearray(1 << 24)
            while file.readinto(buffer):
                pass


def measure(path: Path, library: str, cold: bool, statements: str) -> tuple[float, float, float]:
    set_cache(path, cold)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(path), IMPORTS[library], statements]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="ViT-H ready in eval mode, beside timm and transformers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where 5.2 GB of files are made and deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = make_files(Path(folder))
        results: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for _ in range(options.rounds):
            for row, layout, library, cold, statements in ROWS:
                results.setdefault((layout, row), []).append(measure(paths[layout], library, cold, statements))
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.rounds} rounds\n")
        for layout, path in paths.items():
            size = file_of(path).stat().st_size
            baseline = "timm, create_model and load" if layout == "timm" else next(r for r, *_ in ROWS if "(meta" in r)
            slowest = statistics.median(seconds for seconds, *_ in results[layout, baseline])
            print(f"**{layout} layout, {size / 1e9:.2f} GB**\n")
            print(
                f"| | seconds | range | times faster than {baseline.split(',')[0]} | peak memory / weights | import |"
            )
            print("|---|---|---|---|---|---|")
            for row, where, *_ in ROWS:
                if where != layout:
                    continue
                seconds, imports, memory = zip(*results[where, row], strict=True)
                middle = statistics.median(seconds)
                print(
                    f"| {row} | {middle:.2f} | {min(seconds):.2f}–{max(seconds):.2f} | {slowest / middle:.1f} "
                    f"| {statistics.median(memory) / size:.2f} | {statistics.median(imports):.2f} |"
                )
            print()


if __name__ == "__main__":
    main()
