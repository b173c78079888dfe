"""Made everything beside it with maehub 0.1.0, run in this folder. Kept for the record, not to be run again."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import maehub
from maehub.cli import main
from maehub.packing import pack

assert maehub.__version__ == "0.1.0"

for kind, shift in (("lines", 3), ("dots", 7)):
    for number in range(5):
        rows, columns = np.mgrid[:32, :32]
        pattern = (rows * shift + columns * (number + 1) + rows * columns * (kind == "dots")) * 9 % 256
        path = Path("drawings", kind, f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([pattern, pattern.T, 255 - pattern], axis=2).astype(np.uint8)).save(path)

torch.manual_seed(0)
encoder = maehub.EncoderConfig(image_size=16, patch_size=8, channels=3, width=16, depth=1, heads=2)
network = maehub.AutoencoderConfig(encoder, decoder_width=16, decoder_depth=1, decoder_heads=2, target="pixels")
autoencoder = maehub.MaskedAutoencoder(network).eval()
maehub.save(autoencoder, "autoencoder")
pack(autoencoder, Path("packed.safetensors"), torch.float16)

usual = "--batch-size 4 --workers 0 --device cpu --quiet --validate-every 4 --keep 1".split()
stop = "--time-limit 0.0001".split()  # after the first step
runs = {
    "pretrained": "pretrain drawings --from autoencoder --steps 4 --checkpoint-every 2",
    "pretraining": "pretrain drawings --from autoencoder --steps 4 --seed 1",
    "finetuned": "finetune drawings -m pretrained --steps 4 --checkpoint-every 2",
    "finetuning": "finetune drawings -m pretrained --steps 4 --seed 1",
}
for out, words in runs.items():
    unfinished = out.endswith("ing")
    code = main([*words.split(), "-o", out, *usual, *(stop if unfinished else [])])
    assert code == (75 if unfinished else 0), (out, code)
    Path(out, "report.html").unlink()  # most of the bytes, and made again from the rest
for ending in ("safetensors", "npz", "parquet", "csv"):
    words = f"features drawings -m pretrained -o features.{ending} --workers 0 --device cpu --quiet"
    assert main(words.split()) == 0
