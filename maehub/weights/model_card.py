"""The model card: ``README.md`` of a model folder, with the head that the Hub reads."""

from pathlib import Path

from huggingface_hub import ModelCardData

from maehub.files import fill_template
from maehub.images import Preprocess
from maehub.models import AutoencoderConfig, EncoderConfig, Origin
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
    name: str,
    config: EncoderConfig | AutoencoderConfig,
    preprocess: Preprocess,
    origin: Origin | None = None,
    text: str | None = None,
) -> str:
    """The card of a model folder, Markdown.

    Args:
        name: how the model is called, for the title and the usage.
        config: its network.
        preprocess: its transform.
        origin: where its weights come from; names the licence.
        text: Markdown that follows the title: what it was trained on, what was measured. None says nothing of either.
    """
    if isinstance(config, EncoderConfig):
        kind, has_picture, not_transformers = "classifier" if config.classes else "encoder", False, ""
    else:
        kind, has_picture, not_transformers = "autoencoder", config.has_picture, why_not_transformers(config) or ""
    page = {
        "head": _head(config, origin),
        "name": name,
        "summary": summary(config),
        "text": (text or "").strip(),
        "kind": kind,
        "has_picture": has_picture,
        "not_transformers": not_transformers,
        "details": details(config, preprocess, origin),
        "licence": origin.licence if origin and origin.licence else "not stated",
    }
    return fill_template(Path(__file__).with_name("model_card.md.jinja"), page)


def _head(config: EncoderConfig | AutoencoderConfig, origin: Origin | None) -> str:
    tags = ["mae", "masked-autoencoder", "vision"]
    if isinstance(config, EncoderConfig):
        tags.append("timm")
    else:
        tags += ["timm"] if why_not_transformers(config) else ["timm", "transformers"]
    is_classifier = isinstance(config, EncoderConfig) and config.classes
    data = ModelCardData(
        license=origin.licence.lower() if origin and origin.licence else None,
        library_name="maehub",
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        tags=tags,
    )
    return data.to_yaml()


def summary(config: EncoderConfig | AutoencoderConfig) -> str:
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


def details(
    config: EncoderConfig | AutoencoderConfig,
    preprocess: Preprocess,
    origin: Origin | None,
    relation: str = "Weights from",
) -> str:
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
        parts = [
            origin.name,
            origin.revision and f"revision {origin.revision}",
            origin.sha256 and f"sha256 {origin.sha256}",
        ]
        lines.append(f"- {relation}: {', '.join(part for part in parts if part)}.")
    return "\n".join(lines)
