"""What a run looks at besides its loss: held-out pictures, by numbers that need no labels, and by eye."""

import contextlib
import math
from pathlib import Path

import torch
from torch import Tensor

from maehub.data import Source, find_samples, groups
from maehub.errors import DataError, log
from maehub.figures import grid as figure_grid
from maehub.figures import reconstruct, save_figure
from maehub.models import MaskedAutoencoder
from maehub.train.engine import parts
from maehub.train.evaluation import effective_rank, leave_one_out
from maehub.train.pretraining.baselines import baselines
from maehub.train.pretraining.objective import Objective
from maehub.train.pretraining.views import Batch, View, first_by_id, opened, validation_batch

_CROPS = 2000  # at most, and no more than pictures are held out, unless those are very few
_FEWEST_CROPS = 256
_LABELLED = 5000  # pictures for the nearest neighbours, kept in memory
_SHOWN = 4
_VIEWS_AT_ONCE = 64


class Validation:
    """Fixed crops with fixed masks of pictures that are not trained on; only rank 0 has one.

    Of the pictures that are ``shown`` some are drawn: held-out ones where there are any. Without those nothing is
    measured but, on a ``labelled`` folder if one is given, the accuracy of nearest neighbours.
    """

    def __init__(
        self,
        objective: Objective,
        view: View,
        shown: Source,
        heldout: Source | None,
        *,
        seed: int,
        labelled: str | None = None,
    ) -> None:
        self.view = view
        self.shown = shown
        self.seed = seed
        self.preprocess = objective.preprocess
        self.batch: Batch | None = None
        self._baselines: dict[str, float] = {}
        self._labelled: tuple[Tensor, Tensor] | None = None  # (n, H, W, C) uint8, and (n,) as their folders say
        if heldout is not None:
            count = max(_FEWEST_CROPS, min(len(heldout), _CROPS))
            self.batch = validation_batch(heldout, view, count, seed)
            device = next(objective.model.parameters()).device
            for part, _ in parts(self.batch, _VIEWS_AT_ONCE):
                simple = baselines(objective, part.pixels.to(device), part.masked.to(device))
                for name, value in simple._asdict().items():
                    self._baselines[name] = self._baselines.get(name, 0.0) + value * (len(part.pixels) / count)
        if labelled is not None:
            samples = find_samples(labelled)
            classes = groups(samples, 1)
            if classes.max() < 1:
                raise DataError(f"{labelled} has one class; --knn needs DIR/CLASS/pictures with at least two")
            chosen = sorted(first_by_id(samples, _LABELLED))
            pictures = (opened(samples, index, self.preprocess.channels) for index in chosen)
            pixels = [torch.from_numpy(self.preprocess.pixels(picture)) for picture in pictures]
            self._labelled = torch.stack(pixels), torch.from_numpy(classes[chosen])

    @torch.no_grad()
    def measure(self, objective: Objective, autocast: contextlib.AbstractContextManager[object]) -> dict[str, float]:
        """The loss beside what filling holes without a network would give, and signals of the features' quality.

        ``val_loss``, ``mean_fill``, ``interpolation`` in the target's units and ``effective_rank``; ``knn_top1`` in
        percent where there is a labelled folder.
        """
        model = objective.model
        device = next(model.parameters()).device
        numbers: dict[str, float] = {}

        def features_of(pixels: Tensor) -> Tensor:
            return model.encoder.features(self.preprocess.normalise(pixels), pool="mean").float()

        with contextlib.ExitStack() as after:
            after.callback(model.train, model.training)
            model.eval()
            if self.batch is not None:
                total, features = 0.0, []
                for part, _ in parts(self.batch, _VIEWS_AT_ONCE):
                    pixels, masked, seeds, _ = part.to(device)
                    with autocast:
                        total += objective(pixels, masked, seeds).item() * len(pixels)
                        features.append(features_of(pixels))
                numbers["val_loss"] = total / len(self.batch.pixels)
                numbers |= self._baselines
                numbers["effective_rank"] = effective_rank(torch.cat(features))
            if self._labelled is not None:
                pixels, labels = self._labelled
                with autocast:
                    features = [features_of(part.to(device)) for part in pixels.split(_VIEWS_AT_ONCE)]
                numbers["knn_top1"] = leave_one_out(torch.cat(features), labels.to(device))
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def draw(self, model: MaskedAutoencoder, path: Path) -> None:
        """Reconstructions of a few pictures, always the same."""
        if not model.config.has_picture:
            return  # what a caller's tokens look like is not known
        panels = [
            reconstruct(
                model,
                opened(self.shown, index, model.config.encoder.channels),
                strategy=self.view.strategy,
                mask_ratio=self.view.mask_ratio,
                seed=self.seed,
                preprocess=self.preprocess,
            )
            for index in first_by_id(self.shown, _SHOWN)
        ]
        path.parent.mkdir(exist_ok=True)
        save_figure(figure_grid(panels), path)


def tell_start(numbers: dict[str, float], name: str) -> None:
    """Say what `Validation.measure` gave before the first step; warn where weights do worse than the mean colour.

    Their ``name`` is empty for fresh ones, of which nothing is expected.
    """
    if "val_loss" not in numbers:
        return
    words = {"val_loss": "loss", "mean_fill": "the mean colour's", "interpolation": "interpolation's"}
    told = ", ".join(f"{word} {numbers[key]:.4g}" for key, word in words.items() if key in numbers)
    log.info("on held-out pictures before training: %s", told)
    if name and numbers["val_loss"] > numbers.get("mean_fill", math.inf):
        log.warning(
            "%s predicts hidden patches worse than their mean colour does. Likely causes: weights trained on another "
            "target (--target), other channel statistics or value range, a patch or head count that is not the file's, "
            "or pictures far from what it knows.",
            name,
        )
