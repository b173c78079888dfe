"""What a decoder was trained to predict, decided by its predictions on photos.

Tensors do not say it. A decoder trained on pixels draws bright patches bright and flat patches flat; one trained on
normalised pixels predicts patches of mean 0 whatever the picture. Random weights predict patches of mean 0 and variance
1 too, so that is not enough: the prediction must also explain the picture.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maehub.images import open_image
from maehub.models import MaskedAutoencoder, Target, covering_masks, normalise_patches, patchify

PHOTOS = ("cat.jpg", "coffee.jpg")
"""The embedded photos that are looked at."""

_ASSETS = Path(__file__).parents[1] / "assets"

# Margins between what was measured on trained and on random networks; the figures are in docs/identifying.md.
_LEAST_EXPLAINED = 0.1
_LEAST_MEANS, _LEAST_VARIANCES = 0.4, 0.3
_PIXEL_SCALE, _NORMALISED_SCALE = (0.2, 2.0), 0.1
_NORMALISED_VARIANCE = (0.05, 1.5)

_FLAT = 1e-6  # below this variance a patch counts as flat


@dataclass(frozen=True)
class Judgement:
    """What was measured over the hidden patches of the photos, in preprocessed pixels, and what it means."""

    target: Target  # "pixels", "normalised_pixels" or "unknown"
    means: float  # correlation of the predicted patches' means with the true ones
    variances: float  # of the logarithms of their variances
    scale: float  # spread of the predicted means over that of the true ones
    variance: float  # median variance of a predicted patch
    pixels: float  # share of the pixels' variance that the prediction explains; below 0 it is worse than their mean
    normalised: float  # the same of the normalised pixels

    def describe(self) -> str:
        """The figures in one line."""
        return (
            f"means correlate by {self.means:.2f}, variances by {self.variances:.2f}, spread {self.scale:.3f}, "
            f"explains {self.pixels:.0%} of pixels, {self.normalised:.0%} of normalised ones"
        )


def can_detect(autoencoder: MaskedAutoencoder) -> bool:
    """Whether the photos fit: the head predicts as many values as a patch has, of 1 or 3 channels."""
    config = autoencoder.config
    return config.prediction_width == config.patch_values and config.encoder.channels in (1, 3)


@torch.inference_mode()
def detect_target(autoencoder: MaskedAutoencoder) -> Judgement:
    """Decide between pixels, normalised pixels and neither of them; `can_detect` must hold.

    Every patch of two photos is hidden three times. Deterministic; one picture is computed at a time.
    """
    config = autoencoder.config.encoder
    dtype = next(autoencoder.parameters()).dtype
    predicted, true = [], []
    for name in PHOTOS:
        image = autoencoder.preprocess(open_image(_ASSETS / name, channels=config.channels))
        patches = patchify(image[None], config.patch_size)[0]  # (N, P·P·C)
        for masked in covering_masks(0, len(patches)):
            prediction = autoencoder(image[None].to(dtype), masked[None]).prediction[0]
            predicted.append(prediction[masked].float())
            true.append(patches[masked])
    return _measured(torch.cat(predicted), torch.cat(true))


def _measured(predicted: Tensor, true: Tensor) -> Judgement:
    """The decision from hidden patches: both (M, P·P·C)."""
    normalised = normalise_patches(true[None]).patches[0]
    means, variances = predicted.mean(dim=1), predicted.var(dim=1)
    true_means, true_variances = true.mean(dim=1), true.var(dim=1)
    figures = {
        "means": _correlation(means, true_means),
        "variances": _correlation(*(one.clamp_min(_FLAT).log() for one in (variances, true_variances))),
        "scale": (means.std() / true_means.std()).item(),
        "variance": variances.median().item(),
        "pixels": _explained(predicted, true),
        "normalised": _explained(predicted, normalised),
    }
    follows = figures["means"] >= _LEAST_MEANS and figures["variances"] >= _LEAST_VARIANCES
    level = _NORMALISED_VARIANCE[0] <= figures["variance"] <= _NORMALISED_VARIANCE[1]
    target: Target = "unknown"
    if follows and _PIXEL_SCALE[0] <= figures["scale"] <= _PIXEL_SCALE[1] and figures["pixels"] >= _LEAST_EXPLAINED:
        target = "pixels"
    elif level and figures["scale"] <= _NORMALISED_SCALE and figures["normalised"] >= _LEAST_EXPLAINED:
        target = "normalised_pixels"
    return Judgement(target, **figures)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one of them does not vary."""
    return torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num(0).item()


def _explained(predicted: Tensor, true: Tensor) -> float:
    return 1 - ((predicted - true).square().mean() / true.var(unbiased=False)).item()
