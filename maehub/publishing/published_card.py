"""The model card of a published repository: all that its reader should know, and nothing of the author's data."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from maehub.dense import Detector, Segmenter
from maehub.errors import visible
from maehub.files import fill_template, markdown_text
from maehub.models import Encoder, MaskedAutoencoder
from maehub.publishing.gate import Verdict
from maehub.publishing.licences import Licence
from maehub.publishing.provenance import Provenance, base_model_of
from maehub.train.evaluation import duration_text
from maehub.weights import details, summary

_MOST_CLASSES = 30  # rows of the table of classes
_NUMBERS = {  # keys of scores of numbers: type and name of a metric
    **{"r2": ("r_squared", "R²"), "mae": ("mae", "MAE"), "rmse": ("rmse", "RMSE")},
    **{"spearman": ("spearmanr", "Spearman"), "quadratic_kappa": ("quadratic_kappa", "quadratic kappa")},
}
_DENSE = {  # the same of pixels and objects
    **{"miou": ("mean_iou", "mIoU"), "pixel_accuracy": ("pixel_accuracy", "pixel accuracy")},
    **{"ap": ("mAP", "AP"), "ap50": ("mAP50", "AP50"), "ap75": ("mAP75", "AP75"), "mask_ap": ("mask_mAP", "mask AP")},
}
_COLUMNS = {  # of the table of classes: keys, and words
    "": {"n": "pictures", "recall": "recall", "precision": "precision"},
    "segment": {"pictures": "pictures", "iou": "IoU", "accuracy": "found", "precision": "precision"},
    "detect": {"pictures": "pictures", "objects": "objects", "ap": "AP", "ap50": "AP50"},
}


def published_card(
    repo_id: str,
    model: Encoder | MaskedAutoencoder,
    licence: Licence,
    told: Provenance,
    verdict: Verdict,
    about: str,
    dataset: str,
    figures: Mapping[str, str],
    pictures: Sequence[str],
    dense: Segmenter | Detector | None = None,
) -> str:
    """The card, Markdown with the head that the Hub reads; ``about``, Markdown too, and ``dataset`` are the author's.

    ``figures`` has the file names of "reconstruction", "curve" and "accuracy", ``pictures`` those of the author's.
    """
    name, config = repo_id.rpartition("/")[2], model.config
    is_classifier = isinstance(model, Encoder) and model.config.classes > 0
    task = "image-classification" if is_classifier else "image-feature-extraction"
    if dense is not None:
        task = "image-segmentation" if isinstance(dense, Segmenter) else "object-detection"
    origin = model.origin if isinstance(model, Encoder) else model.encoder.origin
    results = _evaluations(told.scores, dataset, task)
    libraries = [library for library in ("timm", "transformers") if library in verdict.verified]
    head = ModelCardData(
        license=licence.identifier,
        library_name="maehub",
        pipeline_tag=task,
        tags=["mae", "masked-autoencoder", "vision", *libraries],
        base_model=base_model_of(origin) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    classes = told.scores.get("per_class") or []
    columns = _COLUMNS["segment" if isinstance(dense, Segmenter) else "detect" if dense else ""]
    what = summary(config)
    if dense is not None:
        names = dense.config.classes.names
        shown = ", ".join(map(markdown_text, names[:_MOST_CLASSES])) + ", …" * (len(names) > _MOST_CLASSES)
        what = f"A {type(dense).__name__.lower()} of {len(names)} classes, on top of an encoder: {shown}. {what}"
    values = {
        "repo_id": repo_id,
        "head": str(head.to_yaml()),
        "name": name,
        "summary": what,
        "dense": type(dense).__name__.lower() if dense is not None else "",
        "measured": {words: told.scores.get(key) for key, (_, words) in _DENSE.items()} if dense is not None else {},
        "columns": columns,
        "is_classifier": is_classifier,
        "numbers": {
            words: told.scores[key] for key, (_, words) in _NUMBERS.items() if told.scores.get(key) is not None
        },
        "predicts": model.config.class_names if isinstance(model, Encoder) and model.config.numeric else (),
        "has_picture": isinstance(model, MaskedAutoencoder) and model.config.has_picture,
        "licence": licence,
        "origin": origin,
        "verdict": verdict,
        "about": about,
        "dataset": dataset,
        "figures": figures,
        "pictures": pictures,
        "told": told,
        "command": visible(told.command),
        "facts": _facts(told),
        "held_out_loss": _held_out_loss(told),
        "scores": told.scores,
        "classes": classes if 1 < len(classes) <= _MOST_CLASSES else [],
        "details": details(config, model.preprocess, origin, "Started from" if told.kind else "Weights from"),
    }
    return fill_template(Path(__file__).with_name("published_card.md.jinja"), values)


def _evaluations(scores: Mapping[str, float], dataset: str, task: str) -> list[EvalResult]:
    """``model-index``: what was measured on pictures that were held out."""
    named = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("accuracy", "top-5 accuracy")}
    named |= {"mean_average_precision": ("mAP", "mean average precision"), "macro_f1": ("f1", "macro F1")}
    named |= {name: (kind, words) for name, (kind, words) in _NUMBERS.items() if "r2" in scores} | _DENSE
    return [
        EvalResult(
            task_type=task,
            dataset_type="imagefolder",
            dataset_name=visible(dataset) or "held-out pictures of the training data",
            dataset_split="validation",
            metric_type=kind,
            metric_name=words,
            metric_value=round(float(scores[key]) / (1 if key in _NUMBERS else 100), 4),
            metric_args={"n": scores["n"]},
        )
        for key, (kind, words) in named.items()
        if scores.get(key) is not None
    ]


def _facts(told: Provenance) -> list[str]:
    """On how much and by what it was trained."""
    count = f"{told.processes} processes on " if told.processes > 1 else ""
    facts = {
        f"{told.pictures:,} training pictures": told.pictures,
        f"{told.steps:,} steps": told.steps,
        f"{count}{told.device}": told.device,
        f"{duration_text(told.seconds)} of training": told.seconds,
    }
    known = [words for words, value in facts.items() if value]
    return known + [f"{library} {version}" for library, version in told.versions.items()]


def _held_out_loss(told: Provenance) -> str:
    """The last loss on held-out pictures, beside what needs no network."""
    last = next((line for line in reversed(told.curve) if "val_loss" in line), None)
    if last is None or told.kind != "pretrain":
        return ""
    words = {"mean_fill": "the mean colour of a patch", "interpolation": "interpolation from the visible patches"}
    others = ", ".join(f"{last[key]:.4g} for {what}" for key, what in words.items() if key in last)
    return f"Loss on held-out pictures at the last step: {last['val_loss']:.4g}{f' ({others})' if others else ''}."
