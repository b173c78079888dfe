"""The fast linear probe: multinomial logistic regression on cached features, over a sweep of regularisation.

Of numbers it is ridge regression, which has a closed form.

The features are standardised by the mean and deviation of the training pictures, which is what the published probe's
BatchNorm without affine parameters does (He et al. 2021, appendix A.1). The loss is convex, so there is one answer and
nothing to tune but the strength of the penalty, and that is chosen on pictures held out of the training ones.

What makes it fast is one eigendecomposition. The Hessian of the loss is at most (X'X / n) ⊗ I / 2 (Böhning 1992), so in
the basis of the eigenvectors of X'X, each direction scaled by its eigenvalue, L-BFGS meets a nearly round bowl at every
strength; and n pictures span at most n directions, so wide features of few pictures become narrow ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maehub.errors import DataError, DivergedError, UsageError, log
from maehub.train.evaluation.numbers import explained
from maehub.train.evaluation.scores import average_precision

STRENGTHS = tuple(10.0 ** (half / 2) for half in range(4, -11, -1))
"""From strong to weak: 100, 32, 10, … 0.00001."""

# Steps of L-BFGS at most, and by how much the last one may still lower the loss, relative to it: in single precision
# enough to choose by, in double for the answer.
_STEPS = {torch.float32: 50, torch.float64: 1000}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
_CONSTANT = 1e-6  # deviation below which a column is constant, relative to its size
_AS_ACCURATE = 0.5  # percentage points that count as a tie
_RANK = 1e-12  # variance below which a direction holds only rounding, relative to the largest


class Trial(NamedTuple):
    """One strength, and how well it did on pictures that it was not fitted to."""

    strength: float
    accuracy: float  # percent; where a picture may have several classes, mean average precision; of numbers R²
    loss: float  # mean negative log-likelihood, nats, summed over several classes; of numbers the mean squared error


class LinearFit(NamedTuple):
    """A linear classifier of features as they come, or linear regression: standardisation is part of its weights.

    ``strength`` is λ in *mean loss + λ/2 · |weights of standardised features|²*; scikit-learn's C is 1 / (n · λ). Of
    numbers the loss is half the squared error; scikit-learn's alpha is n · λ.
    """

    weight: Tensor  # (C, D) float32
    bias: Tensor  # (C,) float32
    strength: float

    def logits(self, features: Tensor) -> Tensor:
        """(n, D) to (n, C), for a softmax; for a sigmoid each where it was fitted to several labels a picture."""
        return F.linear(features.float(), self.weight, self.bias)


def sweep(
    features: Tensor,
    labels: np.ndarray,
    classes: int,
    inner: Sequence[tuple[np.ndarray, np.ndarray]],
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[Trial, ...]:
    """How well each strength does, from strong to weak, on what is held out of the inner splits.

    Deterministic. Features are (n, D) floating; constant, repeated and linearly dependent columns are fine, and so is
    n < D. Labels are (n,) integers below ``classes``; or (n, classes) bool, for one classifier a class; or (n, classes)
    floating, numbers. ``inner`` are indices to fit to and indices to choose by, once or more.
    """
    _check(features, labels, classes)
    ordered = sorted(strengths, reverse=True)
    if not inner or not ordered or ordered[-1] <= 0:
        raise UsageError("a sweep needs an inner split to choose by, and strengths above 0")
    totals, count = np.zeros((len(ordered), 2)), 0
    for fitted, held in inner:
        truth = labels[held]
        for number, fit in enumerate(_path(features[fitted], labels[fitted], classes, ordered, torch.float32)):
            logits = fit.logits(features[held])
            loss = float(_loss(logits.double(), _truth(truth, logits)))
            totals[number] += len(held) * np.array([accuracy(logits, truth), loss])
        count += len(held)
    return tuple(Trial(strength, *map(float, row)) for strength, row in zip(ordered, totals / count, strict=True))


def best(trials: Iterable[Trial]) -> Trial:
    """Of the most accurate, within half a point, the one of least loss; of equal ones the strongest.

    Accuracy is what one wants; where it is flat a few pictures would decide for a strength that fits too closely, and
    loss alone can be lowest where hardly anything is told apart, as with histograms that have rare bins.
    """
    known = list(trials)
    enough = max(trial.accuracy for trial in known) - _AS_ACCURATE
    return min((trial for trial in known if trial.accuracy >= enough), key=lambda trial: (trial.loss, -trial.strength))


def fit_at(features: Tensor, labels: np.ndarray, classes: int, strength: float) -> LinearFit:
    """Fit at one strength; arguments and errors as in `sweep`."""
    _check(features, labels, classes)
    (fit,) = _path(features, labels, classes, [strength], torch.float64)
    return fit


def accuracy(logits: Tensor, labels: np.ndarray) -> float:
    """Top-1 in percent of (n, C) and (n,); of (n, C) bool the mean average precision of the classes that occur, and of
    (n, C) floating R², the mean of the columns.

    In place of logits it also takes (n,), which class is the highest.
    """
    if labels.ndim == 1:
        highest = logits.argmax(dim=1) if logits.ndim == 2 else logits
        return 100 * float((highest.cpu().numpy() == labels).mean())
    values = logits.float().cpu().numpy()
    if labels.dtype.kind == "f":
        return explained(values, labels)
    scores = [average_precision(values[:, column], labels[:, column]) for column in np.flatnonzero(labels.any(axis=0))]
    return 100 * float(np.mean(scores)) if scores else 0.0


def _path(
    features: Tensor, labels: np.ndarray, classes: int, strengths: Sequence[float], precision: torch.dtype
) -> Iterator[LinearFit]:
    """Fits from strong to weak, each starting where the last one ended; in double precision also nearer to the end."""
    mean, deviation = _statistics(features)
    standardised = (features.to(precision) - mean.to(precision)).div_(deviation.to(precision))
    values, vectors = _spectrum(standardised)
    directions = standardised @ vectors  # (n, R), uncorrelated
    truth = _truth(labels, features)
    flat = torch.zeros(classes, len(values) + 1, dtype=precision, device=features.device)
    if labels.dtype.kind == "f":
        middle = truth.mean(dim=0)
        together = directions.T @ (truth - middle).to(precision) / len(truth)  # (R, columns)
    for strength in strengths:
        if labels.dtype.kind == "f":
            rotated = (together / (values[:, None] + strength)).T.double()
            weight = rotated @ vectors.T.double() / deviation
            yield LinearFit(weight.float(), (middle - weight @ mean).float(), strength)
            continue
        # The curvature along each direction, at most; that of the bias last.
        scale = torch.cat([values / 2 + strength, values.new_tensor([0.5])]).rsqrt()
        flat = _minimise(directions, truth, strength, scale, flat)
        weight = flat[:, :-1].double() @ vectors.T.double() / deviation
        bias = flat[:, -1].double() - weight @ mean
        yield LinearFit(weight.float(), bias.float(), strength)


def _minimise(directions: Tensor, truth: Tensor, strength: float, scale: Tensor, start: Tensor) -> Tensor:
    """Weights and bias (C, R + 1) of least penalised loss, from ``start`` on."""
    rounded = (start / scale).requires_grad_()

    def objective() -> Tensor:
        weights = rounded * scale
        logits = F.linear(directions, weights[:, :-1], weights[:, -1])
        # In single precision the loss would be too rough for the line search near its end.
        return _loss(logits.double(), truth) + strength / 2 * weights[:, :-1].double().square().sum()

    def closure() -> Tensor:
        rounded.grad = None
        loss = objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer = torch.optim.LBFGS(
            [rounded],
            max_iter=_STEPS[directions.dtype],
            max_eval=_STEPS[directions.dtype] * 3 // 2,
            tolerance_grad=0,
            tolerance_change=_TOLERANCE[directions.dtype] * float(objective().detach()),
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)
    found, exact = rounded.detach() * scale, directions.dtype == torch.float64
    if not torch.isfinite(found).all():
        raise DivergedError("the probe does not converge: its weights are no longer finite. The features may be broken")
    if exact and optimizer.state[rounded]["n_iter"] >= _STEPS[directions.dtype]:
        log.warning("the probe at a penalty of %.2g has not converged within %d steps", strength, _STEPS[torch.float64])
    return found


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over pictures of the negative log-likelihood, summed over classes where a picture may have several: ()."""
    if truth.ndim == 1:
        return F.cross_entropy(logits, truth)
    return F.binary_cross_entropy_with_logits(logits, truth) * truth.shape[1]


def _truth(labels: np.ndarray, like: Tensor) -> Tensor:
    """Labels as losses take them: (n,) int64 or (n, C) float64, where ``like`` is."""
    truth = torch.as_tensor(labels, device=like.device)
    return truth.double() if truth.ndim == 2 else truth.long()


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) float64 of the columns; a constant column counts as having an infinite one."""
    exact = features.double()
    mean, deviation = exact.mean(dim=0), exact.std(dim=0, correction=0)
    constant = deviation <= _CONSTANT * exact.abs().amax(dim=0)
    return mean, torch.where(constant, torch.inf, deviation)


def _spectrum(standardised: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (R,) and directions (D, R) of features that are centred; R is their rank."""
    # Columns of zeros are left out: with hundreds of equal eigenvalues LAPACK may not converge.
    varies = standardised.any(dim=0)
    exact = standardised[:, varies].double()
    count, width = exact.shape
    if not width:
        return standardised.new_zeros(0), standardised.new_zeros(len(varies), 0)
    small = exact.T @ exact if width <= count else exact @ exact.T
    try:
        values, vectors = torch.linalg.eigh(small / count)
    except RuntimeError:  # LinAlgError: slower, and converges where that does not
        vectors, values, _ = torch.linalg.svd(small / count)
        values, vectors = values.flip(0), vectors.flip(1)
    kept = values > _RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    if width > count:
        vectors = exact.T @ vectors / (values * count).sqrt()
    directions = standardised.new_zeros(len(varies), len(values))
    directions[varies] = vectors.to(standardised.dtype)
    return values.to(standardised.dtype), directions


def _check(features: Tensor, labels: np.ndarray, classes: int) -> None:
    count = len(features)
    if features.ndim != 2 or labels.shape not in ((count,), (count, classes)) or not count:
        raise UsageError(
            f"features must be (n, D) and labels (n,) or (n, {classes}), not {tuple(features.shape)} and {labels.shape}"
        )
    if (labels.ndim == 2) != (labels.dtype.kind in "bf"):
        what = f"(n,) integers or (n, {classes}) bool or floating"
        raise UsageError(f"labels must be {what}, not {labels.shape} {labels.dtype}")
    if labels.ndim == 1 and not (labels.min() >= 0 and labels.max() < classes):
        raise UsageError(f"labels must be below {classes}, not {labels.min()} to {labels.max()}")
    if classes < 2 and labels.ndim == 1:
        raise DataError("there is one class, so there is nothing to tell apart")
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        raise DivergedError(f"the features of {bad:,} of {count:,} pictures hold NaN or infinity: the model is broken")
