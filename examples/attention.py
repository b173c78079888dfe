"""Where an encoder looks: the class token's attention in every block, and one head at a time.

    python examples/attention.py maehub/assets/coffee.jpg figures/

Writes two figures into the folder. Works offline: the model and the photo come with maehub.
"""

import sys
from pathlib import Path

import torch

import maehub
from maehub.figures.drawing import compose, save_figure
from maehub.figures.reconstruction import attention_overlay
from maehub.images.decoding import open_image


def main(photo: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    encoder = maehub.load("vit-nano")
    depth, heads = encoder.config.depth, encoder.config.heads

    blocks = [attention_overlay(encoder, photo, layer=layer) for layer in range(depth)]
    titles = ["Original", *(f"Block {layer}" for layer in range(depth))]
    pictures = [blocks[0].original, *(block.overlay for block in blocks)]
    save_figure(compose([pictures], titles, "mean of the heads, each scaled to its largest"), folder / "blocks.png")

    last = [attention_overlay(encoder, photo, layer=-1, head=head) for head in range(heads)]
    titles = ["Original", *(f"Head {head}" for head in range(heads))]
    pictures = [last[0].original, *(one.overlay for one in last)]
    save_figure(compose([pictures], titles, f"heads of block {depth - 1}"), folder / "heads.png")

    # The same numbers as a tensor: how evenly each block looks around, as entropy divided by that of a uniform look.
    images = encoder.preprocess(open_image(photo))[None]  # (1, C, H, W)
    with torch.inference_mode():
        for layer in range(depth):
            weights = encoder.attention(images, layer=layer)[0, :, 0]  # (heads, N + 1), rows sum to 1
            entropy = -(weights * weights.log()).sum(dim=1) / torch.tensor(weights.shape[1]).log()
            print(f"block {layer}: " + " ".join(f"{value:.2f}" for value in entropy))
    print(f"two figures in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: attention.py PHOTO FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
