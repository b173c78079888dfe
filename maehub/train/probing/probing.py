"""Probes of frozen features: linear, k nearest neighbours, and both over every pool and layer.

The network runs once over the pictures. Which pool, layer, penalty or number of neighbours is best is decided on
training pictures alone, and the test pictures are looked at once.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maehub.data import LabelledSplit, inner_parts, split_labelled
from maehub.errors import CheckpointError, UsageError
from maehub.features import outputs
from maehub.files import atomic_write, check_free, read_json, whole_folder, write_json
from maehub.models import Encoder, autocast, computed_in, usable_device
from maehub.train.evaluation import (
    AnyScores,
    LinearFit,
    NeighbourTrial,
    best,
    choose_neighbours,
    fit_at,
    score_of,
    sweep,
    vote,
)
from maehub.train.finetuning import FinetuneConfig, look_for_twins, with_head
from maehub.train.networks import Backbone, open_backbone, pair
from maehub.train.probing.config import FrozenConfig, KnnConfig, ProbeConfig
from maehub.train.probing.results import Chosen, Combination, KnnResult, ProbeResult, Seconds, Sweep
from maehub.weights import save

MEMBERS = ("probe.json",)
"""What marks the folder of a probe."""

_NO_VOTE = 1e-6  # of all votes: what a class without one counts as in a logarithm


class Features(NamedTuple):
    """What a network gave for the pictures of a split: (n, layers, parts, D) float32 each."""

    training: Tensor
    testing: Tensor
    layers: tuple[int, ...]
    seconds: float
    precision: str = "fp32"


def probe(config: ProbeConfig) -> ProbeResult:
    """Fit a linear classifier to the features of a frozen network.

    With ``method="fast"`` the features are computed once, the pool (unless it is named) and the strength of the penalty
    are chosen on a part of the training pictures, and the classifier is fitted to all of them. The other methods train
    in the run folder ``config.out``, by `maehub.train.finetune`. With ``config.out`` a fast probe writes
    ``probe.json``, and ``model/``, a classifier that `maehub.load` reads, where one network computes the same.

    Raises:
        UsageError: there is no such model, pool or layer, or the folder is in use.
        DataError: labels or a split that cannot be used, or a picture that cannot be read.
        HubError, IntegrityError: the weights cannot be had.
        CheckpointError: the disk is full; or training was stopped, and can go on.
    """
    if config.sweep:
        raise UsageError("a sweep has several results: call maehub.train.probing.probing.probe_sweep")
    if config.method != "fast":
        return _trained(config)
    if config.out is not None:
        check_free(config.out, config.overwrite, MEMBERS)
    backbone = open_for(config, config.model[0], config.seed)
    split = read_split(config, config.seed)
    features = extract(config, backbone, split, config.layer or (-1,))
    result, fit = fast_probe(config, backbone, split, features, config.seed)
    return result if config.out is None else _write(config, backbone, split, result, fit)


def probe_sweep(config: ProbeConfig) -> Sweep:
    """`probe` of every model of ``config``, over every layer (or those named) and every pool (or the one named).

    Raises:
        UsageError, DataError, HubError, IntegrityError: as in `probe`.
    """
    if config.out is not None:
        check_free(config.out, config.overwrite, MEMBERS)
    split = read_split(config, config.seed)
    for name in config.model:  # a name that is wrong is found before any work
        open_for(config, name, config.seed)
    results = []
    for name in config.model:
        backbone = open_for(config, name, config.seed)
        features = extract(config, backbone, split, config.layer or range(backbone.depth))
        results.append(fast_probe(config, backbone, split, features, config.seed)[0])
    table = Sweep(tuple(results), config.out)
    if config.out is not None:
        with whole_folder(config.out, overwrite=config.overwrite, members=MEMBERS) as staging:
            write_json(staging / "probe.json", table.to_dict())
    return table


def knn(config: KnnConfig) -> KnnResult:
    """Let the nearest training pictures vote for the class of each test picture (Wu et al. 2018).

    Of numbers their mean is taken, weighted as votes are.

    How many vote, and on which pool, is chosen by leaving each training picture out of the others, and its group with
    it, unless they are named. With ``config.out`` the result is also written as JSON.

    Raises:
        UsageError, DataError, HubError, IntegrityError: as in `probe`.
        CheckpointError: the file cannot be written.
    """
    backbone = open_for(config, config.model, config.seed)
    split = read_split(config, config.seed)
    features = extract(config, backbone, split, (config.layer,))
    result = nearest_probe(config, backbone, split, features)
    if config.out is not None:
        result = replace(result, out=config.out)
        with atomic_write(config.out) as temporary:
            text = json.dumps(result.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return result


def read_split(config: FrozenConfig, seed: int) -> LabelledSplit:
    """The pictures to train on and to test on; says how many of the latter are among the former."""
    numeric = config.task == "regression"
    given: Any = {"group": config.group, "label": config.label}
    split = split_labelled(config.data, seed=seed, share=config.val_share, numeric=numeric, **given)
    if not config.skip_twins:
        look_for_twins(split, None, config.workers, progress=not config.quiet)
    return split


def open_for(config: FrozenConfig, name: str, seed: int) -> Backbone:
    """A network as a configuration wants it; one that lacks the pool that was named is refused."""
    backbone = open_backbone(name, image_size=pair(config.image_size), device=config.device, seed=seed)
    if isinstance(config, ProbeConfig | KnnConfig):
        _pools(config, backbone)
        backbone.layers(config.layer if isinstance(config, ProbeConfig) else [config.layer])
    return backbone


def extract(config: FrozenConfig, backbone: Backbone, split: LabelledSplit, layers: Sequence[int]) -> Features:
    """Every part of some layers for all pictures, in one pass."""
    numbers = backbone.layers(layers)
    native = backbone.preprocess.resize == "native"  # every picture has its own size
    start, device = time.monotonic(), usable_device(config.device)

    def compute(images: Tensor) -> Tensor:
        with autocast(config.precision, device):
            return backbone.compute(images, numbers)

    training, testing = (
        outputs(
            compute,
            labelled.samples,
            backbone.preprocess,
            device,
            batch_size=1 if native else config.batch_size,
            workers=config.workers,
            progress=not config.quiet,
            what=what,
        )
        for labelled, what in ((split.training, "training pictures"), (split.testing, "test pictures"))
    )
    return Features(training, testing, tuple(numbers), time.monotonic() - start, computed_in(config.precision))


def fast_probe(
    config: FrozenConfig, backbone: Backbone, split: LabelledSplit, features: Features, seed: int
) -> tuple[ProbeResult, LinearFit]:
    """Choose pool, layer and strength on the training pictures, fit, and measure on the test pictures.

    Each pool and layer is taken at its own best strength, and the most accurate of them is chosen.
    """
    start = time.monotonic()
    training, classes = split.training, len(split.training.classes)
    inner, words = inner_parts(training, seed)
    trials = {
        (layer, pool): sweep(backbone.pooled(features.training[:, position], pool), training.labels, classes, inner)
        for position, layer in enumerate(features.layers)
        for pool in _pools(config, backbone)
    }
    (layer, pool), chosen = max(trials.items(), key=lambda item: (best(item[1]).accuracy, item[0][0]))
    position = features.layers.index(layer)
    known, unseen = (backbone.pooled(side[:, position], pool) for side in (features.training, features.testing))
    fit = fit_at(known, training.labels, classes, best(chosen).strength)
    logits = fit.logits(unseen).numpy()
    rows = tuple(Combination(name, number, *best(tried)[:2]) for (number, name), tried in trials.items())
    result = ProbeResult(
        model=backbone.name,
        data=config.data,
        method="fast",
        pool=pool,
        layer=layer,
        strength=fit.strength,
        scores=score_of(logits, split.testing.labels, training.classes, split.testing.groups),
        n_train=len(training),
        chosen=Chosen(rows, words),
        inner=chosen,
        seconds=Seconds(features.seconds, time.monotonic() - start),
        precision=features.precision,
    )
    return result, fit


def nearest_probe(config: KnnConfig, backbone: Backbone, split: LabelledSplit, features: Features) -> KnnResult:
    """Choose pool and number of neighbours on the training pictures, and measure on the test pictures."""
    start = time.monotonic()
    training, testing = split.training, split.testing
    candidates = [config.neighbours] if config.neighbours else []
    trials: dict[str, tuple[NeighbourTrial, ...]] = {}
    for pool in _pools(config, backbone):
        pooled = backbone.pooled(features.training[:, 0], pool)
        trials[pool] = choose_neighbours(pooled, training.labels, training.groups, config.temperature, candidates)
    pool = max(trials, key=lambda name: _most(trials[name]).accuracy)
    neighbours = min(config.neighbours or _most(trials[pool]).neighbours, len(training))
    known, unseen = (backbone.pooled(side[:, 0], pool) for side in (features.training, features.testing))
    shares = vote(known, training.labels, unseen, neighbours, config.temperature, classes=len(training.classes))
    if training.numeric:
        logits = shares
    else:
        shares = shares.clamp(_NO_VOTE, 1 - _NO_VOTE)
        logits = torch.logit(shares) if training.multi_label else shares.log()
    left_out = "one picture" if training.groups is None else "one group"
    rows = tuple(Combination(name, features.layers[0], *_most(tried)) for name, tried in trials.items())
    return KnnResult(
        model=backbone.name,
        data=config.data,
        pool=pool,
        layer=features.layers[0],
        neighbours=neighbours,
        temperature=config.temperature,
        scores=score_of(logits.numpy(), testing.labels, training.classes, testing.groups),
        n_train=len(training),
        chosen=Chosen(rows, f"leaving {left_out} out of {len(training):,} training pictures"),
        inner=trials[pool],
        seconds=Seconds(features.seconds, time.monotonic() - start),
        precision=features.precision,
    )


def run_config(config: FrozenConfig, model: str, out: Path, seed: int) -> FinetuneConfig:
    """A run of fine-tuning on the same pictures and the same split."""
    # A batch of fine-tuning is not one of features; duplicates are looked for before.
    names = {field.name for field in fields(FrozenConfig)} - {"data", "batch_size", "skip_twins"}
    shared: dict[str, Any] = {name: getattr(config, name) for name in names}
    return FinetuneConfig(config.data, out, model=model, seed=seed, **shared)


def why_no_model(backbone: Backbone, pool: str, layer: int) -> str:
    """Why a probe is no model folder, in words; empty if it is one."""
    if not isinstance(backbone.module, Encoder):
        return f"No model folder is written: {backbone.name} is not one of maehub's own encoders."
    trained = backbone.module.config.pool
    if layer != backbone.depth - 1:
        return f"No model folder is written: a classifier sees the last layer, and the probe sees layer {layer}."
    if pool != trained:
        return (
            f"No model folder is written: this encoder pools {trained} in front of a head, and the probe sees {pool}; "
            f"--pool {trained} gives one, `maehub finetune` any."
        )
    return ""


def _write(
    config: ProbeConfig, backbone: Backbone, split: LabelledSplit, result: ProbeResult, fit: LinearFit
) -> ProbeResult:
    """Write the folder of a probe."""
    assert config.out is not None
    result = replace(result, out=config.out, note=why_no_model(backbone, result.pool, result.layer))
    with whole_folder(config.out, overwrite=config.overwrite, members=(*MEMBERS, "model")) as staging:
        if not result.note:
            training, scores = split.training, result.scores
            kind = "ridge regression" if training.numeric else f"a linear classifier of {len(training.classes)} classes"
            card = (
                f"The encoder {result.model} as it was, with {kind} fitted to its features of {len(training):,} "
                f"pictures (L2 penalty {result.strength:.2g}, chosen on a part of them).\n\n{scores.in_words} on "
                f"{scores.n:,} other pictures."
            )
            assert isinstance(backbone.module, Encoder)
            model = with_head(backbone.module, training, fit.weight, fit.bias)
            save(model, staging / "model", card=card)
        write_json(staging / "probe.json", result.to_dict())
    return result


def _trained(config: ProbeConfig) -> ProbeResult:
    """The probes that are trained: the loop of fine-tuning on a frozen network."""
    from maehub.train.finetuning import finetune

    assert config.out is not None
    if config.pool not in (None, "cls", "mean"):
        raise UsageError(f"--method {config.method} takes --pool cls or mean, not {config.pool}")
    if config.out.exists() and any(config.out.iterdir()) and not config.overwrite:
        raise UsageError(f"{config.out} exists and is not empty; choose another --out, or replace it by --overwrite")
    recipe: Any = "linear" if config.method == "lars" else "attentive"
    pool: Any = config.pool
    run = run_config(config, config.model[0], config.out, config.seed)
    result = finetune(replace(run, recipe=recipe, pool=pool, batch_size=config.batch_size))
    if result.scores is None:
        stopped = CheckpointError(
            f"the probe was stopped at step {result.step}; its checkpoint is kept in {result.run}. Go on by "
            f"`maehub finetune DATA -m MODEL --recipe {recipe} -o {quote(str(result.run))} --resume`, with the --seed, "
            "--batch-size, --pool, --image-size, --val-share, --group and --label that were given"
        )
        stopped.exit_code = result.exit_code
        raise stopped
    settings = read_json(result.run / "config.json").get("settings", {})
    used = config.pool or settings.get("pool") or "patches"
    assert isinstance(result.scores, AnyScores)
    return ProbeResult(
        model=config.model[0],
        data=config.data,
        method=config.method,
        pool=used,
        layer=-1,
        strength=None,
        scores=result.scores,
        out=result.run,
        precision=read_json(result.run / "config.json")["precision"],
    )


def _pools(config: FrozenConfig, backbone: Backbone) -> tuple[str, ...]:
    """The pools to choose among: what a network offers, or the one that was named."""
    named = getattr(config, "pool", None)
    if named is not None and named not in backbone.pools:
        raise UsageError(f"{backbone.name} offers the pools {', '.join(backbone.pools)}, and not --pool {named}")
    return backbone.pools if named is None else (named,)


def _most(trials: Sequence[NeighbourTrial]) -> NeighbourTrial:
    """The most accurate; of equal ones the one with most neighbours."""
    return max(trials, key=lambda trial: (trial.accuracy, trial.neighbours))
