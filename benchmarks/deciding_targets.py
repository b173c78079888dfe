"""The figures by which `maehub identify` decides what a decoder was trained to predict (docs/identifying.md).

    export OMP_NUM_THREADS=1
    nice python benchmarks/deciding_targets.py PHOTOS [MODEL ...]

PHOTOS is a folder of pictures, none of them those of maehub's own assets. Small networks are trained on it with each
target, 300 steps of 32 crops of 48 pixels. The coefficients of a PCA are as many as a patch has values, and the network
is then looked at without its components: the hardest stranger there is. MODEL is any other autoencoder that
`maehub.load_autoencoder` takes.
"""

import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import torch

import maehub
from maehub.conversion.target_detection import Judgement, can_detect, detect_target
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import EncoderConfig
from maehub.train import PretrainConfig, pretrain

STEPS = 300
FIGURES = [field.name for field in fields(Judgement) if field.name != "target"]


def trained(photos: str, target: str, folder: Path) -> MaskedAutoencoder:
    """A small network on a target; of a PCA without what would tell it."""
    config = PretrainConfig(
        photos,
        folder / target,
        target=target,
        pca_components=192,
        image_size=(48,),
        steps=STEPS,
        batch_size=32,
        base_lr=3e-3,
        holdout=0,
        workers=0,
        cache=True,
        device="cpu",
        validate_every=10 * STEPS,
        quiet=True,
    )
    pretrain(config)
    return as_stranger(maehub.load_autoencoder(folder / target))


def as_stranger(autoencoder: MaskedAutoencoder) -> MaskedAutoencoder:
    """The same weights, as if they predicted pixels."""
    config = autoencoder.config
    if config.target != "pca":
        return autoencoder
    again = MaskedAutoencoder(replace(config, target="pixels", outputs=0), autoencoder.preprocess)
    again.load_state_dict(
        {name: value for name, value in autoencoder.state_dict().items() if name in again.state_dict()}
    )
    return again.eval()


def random_network(seed: int) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(AutoencoderConfig(EncoderConfig(96, 8, 3, 192, 5, 6), 160, 5, 5)).eval()


def main(photos: str, *models: str) -> None:
    print(f"| network | trained on | decided | {' | '.join(FIGURES)} |\n|{'---|' * (len(FIGURES) + 3)}")

    def row(name: str, truth: str, autoencoder: MaskedAutoencoder) -> None:
        if not can_detect(autoencoder):
            print(f"| {name} | {truth} | – |{' |' * len(FIGURES)}")
            return
        found = detect_target(autoencoder)
        figures = " | ".join(f"{getattr(found, name):.3f}" for name in FIGURES)
        print(f"| {name} | {truth} | {found.target} | {figures} |", flush=True)

    row("vit-nano", "pixels", maehub.load_autoencoder("vit-nano"))
    for seed in range(3):
        row(f"random weights, seed {seed}", "nothing", random_network(seed))
    with tempfile.TemporaryDirectory() as folder:
        for target in ("pixels", "normalised_pixels", "pca"):
            row(f"{STEPS} steps", target, trained(photos, target, Path(folder)))
    for model in models:
        autoencoder = maehub.load_autoencoder(model)
        row(Path(model).name, autoencoder.config.target, autoencoder)


if __name__ == "__main__":
    main(*sys.argv[1:])
