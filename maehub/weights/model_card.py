"""The model card: ``README.md`` of a model folder, with the head that the Hub reads."""

from pathlib import Path

from huggingface_hub import ModelCardData

from maehub.files import fill_template, markdown_text
from maehub.images import Preprocess
from maehub.models import AutoencoderConfig, EncoderConfig, Origin
from maehub.weights.config_inference import Config
from maehub.weights.config_json import why_not_transformers

_TARGETS = {
    "pixels": "pixels",
    "normalised_pixels": "pixels normalised per patch",
    "pca": "{outputs} PCA coefficients of each patch's pixels",
    "tokens": "which of {outputs} tokens each patch is",
    "unknown": "an unknown target",
}
_TOKENIZERS = {
    "": "of a tokenizer that is not part of this model",
    "mean-colour": "its mean colour in 3 bits a channel",
}


def model_card(
    name: str, config: Config, preprocess: Preprocess, origin: Origin | None = None, text: str | None = None
) -> str:
    """The card of a model folder, Markdown.

    ``name`` is how the model is called, in the title and the usage. ``text``, Markdown, follows the title: what it was
    trained on, what was measured; None says nothing of either.
    """
    tags = ["mae", "masked-autoencoder", "vision", "timm"]
    kind, has_picture, not_transformers = "encoder", False, ""
    if isinstance(config, AutoencoderConfig):
        kind, has_picture, not_transformers = "autoencoder", config.has_picture, why_not_transformers(config) or ""
        tags += [] if not_transformers else ["transformers"]
    elif config.classes:
        kind = "classifier"
    licence = origin.licence if origin else ""
    head = ModelCardData(
        license=licence.lower() or None,
        library_name="maehub",
        pipeline_tag="image-classification" if kind == "classifier" else "image-feature-extraction",
        tags=tags,
    )
    page = {
        "head": head.to_yaml(),
        "name": name,
        "summary": summary(config),
        "text": (text or "").strip(),
        "kind": kind,
        "has_picture": has_picture,
        "not_transformers": not_transformers,
        "details": details(config, preprocess, origin),
        "licence": licence or "not stated",
    }
    return fill_template(Path(__file__).with_name("model_card.md.jinja"), page)


def summary(config: Config) -> str:
    """What the network is, in a sentence."""
    encoder = config if isinstance(config, EncoderConfig) else config.encoder
    height, width = encoder.size
    network = (
        f"a Vision Transformer of width {encoder.width}, {encoder.depth} blocks and {encoder.heads} heads, for images "
        f"of {height}×{width} pixels and {encoder.channels} channels in square patches of {encoder.patch_size} pixels"
    )
    source = "[Masked Autoencoders Are Scalable Vision Learners](https://arxiv.org/abs/2111.06377) (He et al. 2021)"
    if isinstance(config, AutoencoderConfig):
        blocks = f"{config.decoder_depth} block{'' if config.decoder_depth == 1 else 's'}"
        decoder = f"a decoder of width {config.decoder_width} and {blocks}" if config.decoder_depth else "a linear head"
        target = _TARGETS[config.target].format(outputs=config.outputs)
        if config.target == "tokens":
            target += f", {_TOKENIZERS[config.tokenizer]}"
        return f"A masked autoencoder after {source}: {network}, and {decoder} that predicts {target}."
    if config.classes:
        return f"A classifier of {config.classes} classes whose network is the encoder of {source}: {network}."
    return f"The encoder of a masked autoencoder after {source}: {network}."


def details(config: Config, preprocess: Preprocess, origin: Origin | None, relation: str = "Weights from") -> str:
    """A list: the transform, and ``relation`` of the weights to their origin."""
    height, width = preprocess.size
    transform = f"{preprocess.resize} to {height}×{width}, {preprocess.interpolation}"
    if preprocess.resize == "centre-crop":
        transform += f", crop fraction {preprocess.crop_fraction:g}"
    numbers = [", ".join(f"{value:g}" for value in values) for values in (preprocess.mean, preprocess.std)]
    lines = [f"- Transform: {transform}; channel means {numbers[0]}; deviations {numbers[1]}."]
    if isinstance(config, AutoencoderConfig) and preprocess.resize in ("pad", "native"):
        lines.append(
            f"- The image processor of transformers crops the centre where this transform says {preprocess.resize}."
        )
    if origin:
        parts = {"": origin.name, "revision ": origin.revision, "sha256 ": origin.sha256}
        lines.append(
            f"- {relation}: {', '.join(what + markdown_text(value) for what, value in parts.items() if value)}."
        )
    return "\n".join(lines)
