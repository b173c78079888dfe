"""A caller's picture and mask to a network's input, and a prediction back to a picture."""

import io
import time
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maehub import models
from maehub.errors import DataError, HubError, UsageError
from maehub.figures.patch_statistics import estimate_statistics
from maehub.hub import bound, host_of
from maehub.images import Preprocess, Size, open_image, plain
from maehub.models import Encoder, MaskedAutoencoder

ImageSource = str | Path | Image.Image | np.ndarray
Statistics = Literal["visible", "true"]
"""Where the mean and variance of a hidden patch come from, for a model trained on normalised pixels: estimated from the
visible patches and the prediction, or the true ones, which leak the answer."""

MAX_BYTES = 64 * 2**20  # of a picture behind an address
_PATIENCE = 10.0, 30.0  # seconds to connect, and between two pieces
_DEADLINE = 300.0  # seconds for all of it


def open_picture(image: ImageSource, preprocess: Preprocess) -> Image.Image | np.ndarray:
    """Something that `Preprocess.pixels` takes; files are decoded in full."""
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        try:
            content = bytearray()
            bound(lambda: _fetch(image, content), host_of(image), received=lambda: len(content))
            return open_image(io.BytesIO(content), channels=preprocess.channels)
        except DataError as error:
            raise DataError(f"{_without_secrets(image)}: {error}") from error
    if isinstance(image, str | Path):
        return open_image(image, channels=preprocess.channels)
    if not isinstance(image, Image.Image | np.ndarray):
        raise UsageError(f"a picture is a path, a URL, a PIL image or an (H, W, C) array, not {type(image).__name__}")
    return plain(image) if isinstance(image, Image.Image) else image


def picture_size(picture: Image.Image | np.ndarray) -> Size:
    """(height, width), pixels."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[0], picture.shape[1]


def check_target(autoencoder: MaskedAutoencoder) -> None:
    """Refuse a model whose prediction cannot be drawn."""
    if autoencoder.config.target == "unknown":
        raise UsageError(
            "what this autoencoder was trained to predict is unknown, so its output cannot be drawn; "
            "say it: load_autoencoder(..., target='pixels') or target='normalised_pixels', or once for all by "
            "`maehub convert MODEL -o FOLDER --target pixels`"
        )
    if not autoencoder.config.has_picture:
        raise UsageError(
            "this autoencoder predicts tokens of a tokenizer that is not part of it, so its output cannot be drawn; "
            "only mean colours (tokenizer='mean-colour') can"
        )


def network_input(model: Encoder | MaskedAutoencoder, preprocess: Preprocess, pixels: np.ndarray) -> Tensor:
    """One picture (H, W, C) uint8 as (1, C, H, W) with the device and dtype of the weights."""
    weight = next(model.parameters())
    return preprocess.normalise(torch.from_numpy(pixels)[None].to(weight.device)).to(weight.dtype)


def painted(
    autoencoder: MaskedAutoencoder,
    preprocess: Preprocess,
    images: Tensor,
    masked: Tensor,
    grid: Size,
    statistics: Statistics,
) -> tuple[np.ndarray, Tensor]:
    """What a model makes of an input (1, C, H, W) under a mask (1, N) on a grid of (rows, columns): picture and errors.

    The picture (H, W, C) uint8 has every patch as the model gives it. The errors (1, N) float32 are squared, in the
    space of the target, the mean over the values of a patch. Coefficients of ``pca`` give the pixels that have them and
    no others; tokens the colour of the most likely one, and since these have no squares, their errors are those of the
    colours in preprocessed pixels.
    """
    config, patch_size = autoencoder.config, autoencoder.config.encoder.patch_size
    output = autoencoder(images, masked.to(images.device)).prediction  # (1, N, outputs)
    prediction, patches = output.float(), models.patchify(images, patch_size)
    if not prediction.isfinite().all():
        raise DataError("the model's prediction holds NaN or infinity; run it in float32, or check its weights")
    if config.target == "tokens":
        colours = models.mean_colour_of(prediction.argmax(dim=2), config.encoder.channels)  # (1, N, C)
        picture = _as_pixels(models.unpatchify(colours.repeat(1, 1, patch_size**2), grid, patch_size))
        shown = preprocess.normalise(torch.from_numpy(picture)[None].to(images.device))
        return picture, models.squared_error(models.patchify(shown, patch_size), patches.float())
    errors = models.squared_error(output, autoencoder.target(patches))
    if config.target == "pca":
        prediction = autoencoder.decoder.centre.float() + prediction @ autoencoder.decoder.components.float()
    if config.target == "normalised_pixels":
        if statistics == "true":
            _, mean, variance = models.normalise_patches(patches.float())  # of hidden patches too: they leak the answer
        else:
            mean, variance = estimate_statistics(patches, prediction, masked, grid, patch_size)
        prediction = models.denormalise_patches(prediction, mean, variance)
    return _as_pixels(preprocess.denormalise(models.unpatchify(prediction, grid, patch_size))), errors


def _as_pixels(picture: Tensor) -> np.ndarray:
    """(1, C, H, W) in [0, 1] to (H, W, C) uint8."""
    return (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()


def model_name(encoder: Encoder) -> str:
    """Where the weights come from, for captions; empty for fresh ones."""
    return encoder.origin.name if encoder.origin else ""


def _fetch(address: str, content: bytearray) -> None:
    import requests  # only addresses need it

    shown, end = _without_secrets(address), time.monotonic() + _DEADLINE
    try:
        with requests.get(address, stream=True, timeout=_PATIENCE) as answer:
            if answer.status_code != 200:
                raise HubError(f"{shown} cannot be fetched: the server answered {answer.status_code} {answer.reason}")
            for piece in answer.iter_content(2**16):
                content += piece
                if len(content) > MAX_BYTES:
                    raise DataError(f"it is larger than {MAX_BYTES >> 20} MiB; download it and give the file")
                if time.monotonic() > end:
                    raise HubError(f"{shown} cannot be fetched: it took more than {_DEADLINE:.0f} s")
    except requests.RequestException as error:
        # The text of the cause may hold the address with its query, so only its kind is told.
        kind = type(error).__name__
        raise HubError(f"{shown} cannot be fetched ({kind}); check the address and the network") from error


def _without_secrets(address: str) -> str:
    """The address for messages: no user, password or query."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
