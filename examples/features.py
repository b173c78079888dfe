"""Features of a folder of photos: one vector a photo in a file, and one vector a patch to compare places with.

    python examples/features.py maehub/assets features.safetensors

Works offline: the model and the two photos come with maehub.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import normalize

import maehub


def main(folder: Path, out: Path) -> None:
    encoder = maehub.load("vit-nano")

    # One vector a photo. The file says what made it; the same call again computes nothing, and goes on if interrupted.
    table = maehub.extract_features(encoder, folder, out=out)
    print(f"{out}: {len(table)} photos, {table.features.shape[1]} numbers each, pool {table.provenance['pool']}")
    vectors = normalize(table.features, dim=1)
    for path, row in zip(table.paths, vectors @ vectors.T, strict=True):
        print(f"  {Path(path).name:<12}", " ".join(f"{cosine:+.2f}" for cosine in row))

    # Several blocks at once, in memory: (photos, layers, width).
    both = maehub.extract_features(encoder, folder, pool="cls+mean", layers=[1, -1])
    print(f"class token and mean of blocks 1 and {encoder.config.depth - 1}: {tuple(both.features.shape)}")

    # One vector a patch, where the patches lie: which place of the first photo is most like its centre?
    maps = maehub.extract_features(encoder, table.paths[:1], pool="map").features  # (1, D, rows, columns)
    _, width, rows, columns = maps.shape
    patches = normalize(maps[0].reshape(width, -1), dim=0)  # (D, N)
    centre = (rows // 2) * columns + columns // 2
    cosines = patches.T @ patches[:, centre]
    cosines[centre] = -1
    row, column = divmod(int(torch.argmax(cosines)), columns)
    print(f"{Path(table.paths[0]).name}: most like patch {divmod(centre, columns)} is patch {(row, column)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: features.py FOLDER OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
