"""Hide three quarters of a photo and look at what the model makes of it.

    python examples/reconstruct.py maehub/assets/cat.jpg figures/

Writes five figures into the folder: one reconstruction, three ratios below each other, a hole of your own choice, the
error map, and where the encoder looks. Works offline: the model comes with maehub.
"""

import sys
from pathlib import Path

import numpy as np

import maehub
from maehub.figures.drawing import save_figure
from maehub.figures.reconstruction import attention_overlay, error_map, grid


def main(photo: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    autoencoder = maehub.load_autoencoder("vit-nano")

    panels = maehub.reconstruct(autoencoder, photo, mask_ratio=0.75, seed=0)
    panels.save(folder / "reconstruction.png")
    print(f"{panels.mask.sum()} of {panels.mask.size} patches hidden, PSNR there {panels.psnr:.1f} dB")

    ratios = [maehub.reconstruct(autoencoder, photo, mask_ratio=ratio) for ratio in (0.5, 0.75, 0.9)]
    save_figure(grid(ratios), folder / "ratios.png")

    hole = np.zeros_like(panels.mask)  # (rows, columns) of patches, True is hidden
    rows, columns = hole.shape
    hole[rows // 3 : 2 * rows // 3, columns // 3 : 2 * columns // 3] = True
    maehub.reconstruct(autoencoder, photo, mask=hole).save(folder / "hole.png")

    errors = error_map(autoencoder, photo)
    errors.save(folder / "errors.png")
    row, column = np.unravel_index(errors.error.argmax(), errors.error.shape)
    print(f"the patch hardest to guess is in row {row}, column {column}")

    attention_overlay(autoencoder.encoder, photo).save(folder / "attention.png")
    print(f"five figures in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: reconstruct.py PHOTO FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
