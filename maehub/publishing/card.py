"""The model card of a published repository: all that its reader should know, and nothing of the author's data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from maehub.images import Preprocess
from maehub.models import AutoencoderConfig, EncoderConfig, Origin
from maehub.publishing.licences import Licence
from maehub.publishing.provenance import Provenance, in_words
from maehub.weights import details, summary

_MOST_CLASSES = 30  # rows of the table of classes
_NAMES = {"timm": "timm", "transformers": "transformers"}

_CITATION = """```bibtex
@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}
```"""


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
    name = page.repo_id.rpartition("/")[2]
    parts = [f"# {name}", summary(page.config), *_figure(page), "## Use", _usage(page), "## Training", _training(page)]
    if page.provenance.scores:
        parts += ["## Results", *_results(page)]
    if page.pictures:
        parts += ["## Pictures", *(f"![{file}]({file})" for file in page.pictures)]
    parts += ["## Intended use and limits", _limits(page)]
    relation = "Started from" if page.provenance.kind else "Weights from"
    parts += ["## Details", details(page.config, page.preprocess, page.origin, relation)]
    parts += ["## Licence", _licence(page), "## Citation", _CITATION]
    return f"---\n{_head(page, name)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _head(page: Page, name: str) -> str:
    is_classifier = isinstance(page.config, EncoderConfig) and page.config.classes
    task = "image-classification" if is_classifier else "image-feature-extraction"
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


def _figure(page: Page) -> list[str]:
    if "reconstruction" not in page.figures:
        return []
    words = "What it makes of the two photos that come with maehub, three quarters of their patches hidden."
    return [f"![Original, masked, reconstruction, pasted]({page.figures['reconstruction']})", words]


def _usage(page: Page) -> str:
    repo, config = page.repo_id, page.config
    lines = ["```python", "import maehub", ""]
    if isinstance(config, EncoderConfig) and config.classes:
        lines += [f'classifier = maehub.load("{repo}")', 'maehub.train.predict(classifier, "photos/").top(1)']
    else:
        lines += [f'encoder = maehub.load("{repo}")', 'table = maehub.extract_features(encoder, "photos/")']
    if isinstance(config, AutoencoderConfig) and config.has_picture:
        lines += ["", f'autoencoder = maehub.load_autoencoder("{repo}")']
        lines.append('maehub.reconstruct(autoencoder, "photo.jpg").save("reconstruction.png")')
    blocks = ["\n".join([*lines, "```"])]
    if "timm" in page.verified:
        what = "classifier" if isinstance(config, EncoderConfig) and config.classes else "encoder"
        blocks.append(
            f"With timm, the {what}:\n\n```python\nimport timm\n\n"
            f'{what} = timm.create_model("hf-hub:{repo}", pretrained=True)\n```'
        )
    if "transformers" in page.verified:
        blocks.append(
            "With transformers, the whole autoencoder; it hides patches at inference too, unless `mask_ratio=0.0`:\n\n"
            "```python\nfrom transformers import AutoImageProcessor, ViTMAEForPreTraining\n\n"
            f'processor = AutoImageProcessor.from_pretrained("{repo}")\n'
            f'autoencoder = ViTMAEForPreTraining.from_pretrained("{repo}")\n```'
        )
    checked = ", ".join(f"{library} {version}" for library, version in page.verified.items())
    blocks.append(f"Checked before publishing, with the same outputs: {checked}.{_why_missing(page)}")
    return "\n\n".join(blocks)


def _why_missing(page: Page) -> str:
    return "".join(f" {library} is not among them, since {reason}." for library, reason in page.missing.items())


def _training(page: Page) -> str:
    told = page.provenance
    parts = [page.about.strip() or "The author has not described the data."]
    start = f"It started from {page.origin.name}." if page.origin else "It started from fresh weights."
    parts.append(start if told.kind else f"{start} How it was trained is not recorded.")
    if told.command:
        parts.append(f"```sh\n{told.command}\n```")
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
    facts += [f"{library} {version}" for library, version in told.versions.items()]
    if facts:
        parts.append(f"{'; '.join(facts)}. All settings: [`recipe.json`](recipe.json).")
    if held_out := _held_out_loss(told):
        parts.append(held_out)
    if "curve" in page.figures:
        parts.append(f"![Loss against steps]({page.figures['curve']})")
    return "\n\n".join(parts)


def _held_out_loss(told: Provenance) -> str:
    """The last loss on held-out pictures, beside what needs no network."""
    last = next((line for line in reversed(told.curve) if "val_loss" in line), None)
    if last is None or told.kind != "pretrain":
        return ""
    words = {"mean_fill": "the mean colour of a patch", "interpolation": "interpolation from the visible patches"}
    others = ", ".join(f"{last[key]:.4g} for {what}" for key, what in words.items() if key in last)
    return f"Loss on held-out pictures at the last step: {last['val_loss']:.4g}{f' ({others})' if others else ''}."


def _results(page: Page) -> list[str]:
    scores, told = page.provenance.scores, page.provenance
    split = {"made by seed": "a stratified split by seed", "as given": "a split that was given"}.get(told.split, "")
    data = f" of {page.dataset}" if page.dataset else ""
    measured = f"Measured on {scores['n']:,} held-out pictures{data}{f', {split}' if split else ''}."
    if told.twins:
        measured += f" {told.twins:,} of them look nearly like a training picture, so these numbers may be too high."
    rows = [("top-1", f"{scores['top1']:.1f} %", f"{scores['low']:.1f} to {scores['high']:.1f}")]
    more = (("top5", "top-5"), ("balanced_accuracy", "balanced accuracy"), ("mean_average_precision", "mean AP"))
    rows += [(words, f"{scores[key]:.1f} %", "") for key, words in more if scores.get(key) is not None]
    table = ["| | | 95 % interval |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    parts = [measured, "\n".join(table)]
    if "accuracy" in page.figures:
        parts.append(f"![Accuracy against steps]({page.figures['accuracy']})")
    classes = scores.get("per_class") or []
    if 1 < len(classes) <= _MOST_CLASSES:
        lines = ["| class | pictures | recall | precision |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(row['name'])} | {row['n']} | {_percent(row.get('recall'))} | {_percent(row.get('precision'))} |"
            for row in classes
        ]
        parts.append("\n".join(lines))
    return parts


def _limits(page: Page) -> str:
    if isinstance(page.config, EncoderConfig) and page.config.classes:
        return (
            "For telling these classes apart in pictures like those that it was trained on. It always names one of its "
            "classes, also where a picture shows none of them, and its confidence means little on other kinds of "
            "pictures: measure it on your own before relying on it. Not for decisions about people."
        )
    return (
        "For features (retrieval, linear probes, nearest neighbours), for fine-tuning, and for looking at what a "
        "masked autoencoder has learned. What it paints into hidden patches is a guess, not a restoration of what was "
        "there. It knows pictures like those that it was trained on: measure it on your own before relying on it."
    )


def _licence(page: Page) -> str:
    base = ""
    if page.origin and page.origin.licence:
        base = f" The weights that it was trained from, {page.origin.name}, are under {page.origin.licence}."
    return f"{page.licence.identifier} ({page.licence.reason}).{base}"


def _percent(value: Any) -> str:
    return "" if value is None else f"{float(value):.1f} %"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
