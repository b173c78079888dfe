"""The model card of a published repository: all that its reader should know, and nothing of the author's data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from maehub.files import fill_template
from maehub.images import Preprocess
from maehub.models import AutoencoderConfig, EncoderConfig, Origin
from maehub.publishing.licences import Licence
from maehub.publishing.provenance import Provenance, in_words
from maehub.weights import details, summary

_MOST_CLASSES = 30  # rows of the table of classes
_NAMES = {"timm": "timm", "transformers": "transformers"}

_MEASURES = {"top5": "top-5", "balanced_accuracy": "balanced accuracy", "mean_average_precision": "mean AP"}
_SPLITS = {"made by seed": "a stratified split by seed", "as given": "a split that was given"}


@dataclass(frozen=True)
class Page:
    """What a card is made of."""

    repo_id: str
    config: EncoderConfig | AutoencoderConfig
    preprocess: Preprocess
    origin: Origin | None  # what the weights were trained from
    licence: Licence
    provenance: Provenance
    verified: Mapping[str, str]  # library to version; see `maehub.publishing.gate.Verdict`
    missing: Mapping[str, str]
    base_model: str = ""  # its Hub id, where it has one
    about: str = ""  # Markdown by the author: what the data are, what the model is for
    dataset: str = ""  # what the author calls the data
    figures: Mapping[str, str] = field(default_factory=dict)  # "reconstruction", "curve", "accuracy" to file name
    pictures: tuple[str, ...] = ()  # files that the author publishes beside it


def published_card(page: Page) -> str:
    """The card, Markdown with the head that the Hub reads."""
    name, told, config = page.repo_id.rpartition("/")[2], page.provenance, page.config
    classes = told.scores.get("per_class") or []
    values = {
        "page": page,
        "head": _head(page, name),
        "name": name,
        "summary": summary(config),
        "is_classifier": _is_classifier(page),
        "has_picture": isinstance(config, AutoencoderConfig) and config.has_picture,
        "told": told,
        "facts": _facts(told),
        "held_out_loss": _held_out_loss(told),
        "scores": told.scores,
        "splits": _SPLITS,
        "measures": _MEASURES,
        "classes": classes if 1 < len(classes) <= _MOST_CLASSES else [],
        "details": details(config, page.preprocess, page.origin, "Started from" if told.kind else "Weights from"),
    }
    return fill_template(Path(__file__).with_name("published_card.md.jinja"), values)


def _is_classifier(page: Page) -> bool:
    return isinstance(page.config, EncoderConfig) and page.config.classes > 0


def _head(page: Page, name: str) -> str:
    task = "image-classification" if _is_classifier(page) else "image-feature-extraction"
    results = _evaluations(page, task)
    data = ModelCardData(
        license=page.licence.identifier,
        library_name="maehub",
        pipeline_tag=task,
        tags=["mae", "masked-autoencoder", "vision", *(library for library in _NAMES if library in page.verified)],
        base_model=page.base_model or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _evaluations(page: Page, task: str) -> list[EvalResult]:
    """``model-index``: what was measured on pictures that were held out."""
    scores = page.provenance.scores
    named = {"top1": ("accuracy", "top-1 accuracy"), "top5": ("accuracy", "top-5 accuracy")}
    named |= {"mean_average_precision": ("mAP", "mean average precision"), "macro_f1": ("f1", "macro F1")}
    return [
        EvalResult(
            task_type=task,
            dataset_type="imagefolder",
            dataset_name=page.dataset or "held-out pictures of the training data",
            dataset_split="validation",
            metric_type=kind,
            metric_name=words,
            metric_value=round(float(scores[key]) / 100, 4),
            metric_args={"n": scores["n"]},
        )
        for key, (kind, words) in named.items()
        if scores.get(key) is not None
    ]


def _facts(told: Provenance) -> list[str]:
    """On how much and by what it was trained."""
    facts = []
    if told.pictures:
        facts.append(f"{told.pictures:,} training pictures")
    if told.steps:
        facts.append(f"{told.steps:,} steps")
    if told.device:
        count = f"{told.processes} processes on " if told.processes > 1 else ""
        facts.append(count + told.device)
    if told.seconds:
        facts.append(f"{in_words(told.seconds)} of training")
    return facts + [f"{library} {version}" for library, version in told.versions.items()]


def _held_out_loss(told: Provenance) -> str:
    """The last loss on held-out pictures, beside what needs no network."""
    last = next((line for line in reversed(told.curve) if "val_loss" in line), None)
    if last is None or told.kind != "pretrain":
        return ""
    words = {"mean_fill": "the mean colour of a patch", "interpolation": "interpolation from the visible patches"}
    others = ", ".join(f"{last[key]:.4g} for {what}" for key, what in words.items() if key in last)
    return f"Loss on held-out pictures at the last step: {last['val_loss']:.4g}{f' ({others})' if others else ''}."
