"""Train a small masked autoencoder from scratch on a folder of photos, and draw with it.

    python examples/pretrain.py maehub/assets runs/small 200

Two photos and 200 steps show how it works and no more; a folder of thousands and --steps to match make a model. The
same run as a command: maehub pretrain maehub/assets -o runs/small --target pixels --steps 200
"""

import json
import sys
from pathlib import Path

import maehub
from maehub.train import PretrainConfig, pretrain


def main(data: Path, run: Path, steps: int) -> None:
    config = PretrainConfig(
        data,
        run,
        model="vit-nano",  # the architecture; from_="vit-nano" would go on from the weights
        target="pixels",
        steps=steps,
        base_lr=1.2e-3,  # for 256 images a step; of so few photos a step takes fewer, at a rate in proportion
        cache=True,
        resume=run.exists(),  # a second call goes on where the first was stopped
    )
    result = pretrain(config)

    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    print(f"{result.step} steps, loss {losses[0]:.3f} at first and {losses[-1]:.3f} in the end")

    autoencoder = maehub.load_autoencoder(run)  # the run folder, or its model/, which is what one would publish
    photo = next(path for path in sorted(data.rglob("*")) if path.suffix in (".jpg", ".png"))
    panels = maehub.reconstruct(autoencoder, photo)
    panels.save(run / "reconstruction.png")
    print(f"{run / 'reconstruction.png'}: PSNR {panels.psnr:.1f} dB on hidden pixels of a photo that it was trained on")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: pretrain.py FOLDER RUN STEPS")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
