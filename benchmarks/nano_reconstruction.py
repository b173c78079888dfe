"""How well an autoencoder fills in hidden patches of scenes that it never saw, beside interpolation.

    scripts/nano-data DATA
    python benchmarks/nano_reconstruction.py DATA/test

Of every picture the same random crops (area 0.2 to 1 of the picture, scaled to the model's size) with the same random
masks. Reported: mean squared error on the hidden pixels in 0..1, divided by the variance of ImageNet's channels, which
is the error in the model's normalised space; linear interpolation from the visible pixels (scipy, nearest outside
their hull); the mean colour of the visible pixels; biharmonic inpainting (scikit-image) on a few crops, being slow.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import griddata
from skimage.restoration import inpaint_biharmonic

from maehub import load_autoencoder
from maehub.data.sources import find_images
from maehub.images.augment import Augmentation, crop
from maehub.images.decoding import open_image
from maehub.models.autoencoder import MaskedAutoencoder
from maehub.models.masking import make_masks
from maehub.models.patches import unpatchify
from maehub.rng import sample_id, sample_seed


def linear(pixels: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Linear interpolation over the visible pixels; nearest where no triangle of them reaches."""
    visible = np.argwhere(~hidden)
    wanted = np.argwhere(hidden)
    values = griddata(visible, pixels[~hidden], wanted, method="linear")
    outside = np.isnan(values[:, 0])
    values[outside] = griddata(visible, pixels[~hidden], wanted[outside], method="nearest")
    return values


def predict(model: MaskedAutoencoder, crops: np.ndarray, masked: torch.Tensor) -> np.ndarray:
    """The model's pixels, in 0..1 without clipping: (B, H, W, C)."""
    images = model.preprocess.normalise(torch.from_numpy(crops))
    with torch.inference_mode():
        prediction = model(images, masked).prediction
    grid = model.config.encoder.grid
    picture = unpatchify(prediction, grid, model.config.encoder.patch_size).permute(0, 2, 3, 1).numpy()
    return picture * np.array(model.preprocess.std) + np.array(model.preprocess.mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="vit-nano")
    parser.add_argument("--crops", type=int, default=32, help="crops of each picture")
    parser.add_argument("--biharmonic", type=int, default=20, help="crops for the biharmonic column, over all pictures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model = load_autoencoder(options.model)
    network = model.config.encoder
    augmentation = Augmentation()  # area 0.2 to 1, as in training
    samples = find_images(options.folder)
    variance = np.array(model.preprocess.std) ** 2
    rows: dict[str, dict[str, float]] = {}
    biharmonic: list[tuple[float, float]] = []
    per_scene = -(-options.biharmonic // len(samples))
    start = time.perf_counter()
    for index in range(len(samples)):
        path = samples.path(index)
        name = Path(path.decode() if isinstance(path, bytes) else path).stem
        picture = open_image(path)
        seeds = [sample_seed(0, crop, sample_id(name.encode())) for crop in range(options.crops)]
        crops = np.stack([crop(picture, network.size, 3, augmentation, seed) for seed in seeds])
        masked = make_masks("random", torch.tensor(seeds), network.grid, 0.75)
        drawn = predict(model, crops, masked)
        errors: dict[str, list[float]] = {"model": [], "linear": [], "mean": []}
        for number, taken in enumerate(crops):
            pixels = taken / 255.0
            patch = network.patch_size
            hidden = np.kron(masked[number].reshape(network.grid).numpy(), np.ones((patch, patch), dtype=bool))

            def score(values: np.ndarray, pixels: np.ndarray = pixels, hidden: np.ndarray = hidden) -> float:
                return float(((values - pixels[hidden]) ** 2 / variance).mean())

            errors["model"].append(score(drawn[number][hidden]))
            errors["linear"].append(score(linear(pixels, hidden)))
            errors["mean"].append(score(pixels[~hidden].mean(axis=0, keepdims=True)))
            if number < per_scene and len(biharmonic) < options.biharmonic:
                filled = inpaint_biharmonic(pixels, hidden, channel_axis=-1)
                biharmonic.append((score(filled[hidden]), errors["model"][-1]))
        rows[name] = {method: float(np.mean(values)) for method, values in errors.items()}

    mean = {method: float(np.mean([row[method] for row in rows.values()])) for method in ("model", "linear", "mean")}
    summary = {
        "scenes": rows,
        "mean": mean,
        "to_linear": mean["model"] / mean["linear"],
        "to_mean_colour": mean["model"] / mean["mean"],
        "scenes_below_linear": sum(row["model"] < row["linear"] for row in rows.values()),
        "biharmonic": float(np.mean([b for b, _ in biharmonic])),
        "model_on_those": float(np.mean([m for _, m in biharmonic])),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if options.json:
        print(json.dumps(summary))
        return
    print(f"{options.model}, {options.crops} crops of each scene, 75 % random masks, MSE / ImageNet variance\n")
    print("| scene | model | linear | mean colour | model / linear |\n|---|---|---|---|---|")
    for name, row in [*rows.items(), ("**mean**", mean)]:
        ratio = row["model"] / row["linear"]
        print(f"| {name} | {row['model']:.4f} | {row['linear']:.4f} | {row['mean']:.4f} | {ratio:.3f} |")
    print(f"\nmodel / mean colour {summary['to_mean_colour']:.3f}; below linear on", end=" ")
    print(f"{summary['scenes_below_linear']} of {len(rows)} scenes; biharmonic {summary['biharmonic']:.4f} against")
    print(f"{summary['model_on_those']:.4f} of the model on the same {len(biharmonic)} crops")


if __name__ == "__main__":
    main()
