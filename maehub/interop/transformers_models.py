"""An autoencoder, encoder or classifier as transformers' ViTMAE or ViT, and back."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maehub import weights
from maehub.errors import MissingDependencyError, UsageError
from maehub.images import Preprocess
from maehub.interop.agreement import check_same, evaluable, exact_dtype, exact_state, finish, images_for, names_there
from maehub.models import LAYER_NORM_EPS, Encoder, EncoderConfig, MaskedAutoencoder, Origin

if TYPE_CHECKING:
    from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel

_TAKEN = ("ViTMAEForPreTraining", "ViTModel", "ViTForImageClassification")


def to_transformers(
    model: MaskedAutoencoder | Encoder,
) -> "ViTMAEForPreTraining | ViTModel | ViTForImageClassification":
    """transformers' network with the weights of ours.

    It has its own copies of the tensors under the names of the installed version, positions included (those that
    transformers would make itself are zero in 5.x), on the same device and of the same dtype; it is in the same mode,
    and what is frozen here is frozen there. Its configuration says what is true: LayerNorm with eps 1e-6,
    ``norm_pix_loss`` by the target, ``mask_ratio`` 0.75. Transforms belong to no network of transformers;
    `maehub.save` writes one beside an autoencoder.

    Args:
        model: an autoencoder gives ViTMAEForPreTraining; a classifier ViTForImageClassification; any other encoder
            ViTModel without its pooler, which MAE does not train.

    Returns:
        A network that was compared with ours on a fixed input.

    Raises:
        UsageError: transformers would not compute the same, and why: a model that pools the mean; an autoencoder that
            is not square, whose encoder sees mask tokens, or whose target is not pixels.
        MissingDependencyError: transformers is not installed.
    """
    if not isinstance(model, Encoder | MaskedAutoencoder):
        raise UsageError(f"to_transformers takes an Encoder or a MaskedAutoencoder, not a {type(model).__name__}")
    if isinstance(model, MaskedAutoencoder):
        if reason := weights.why_not_transformers(model.config):
            raise UsageError(
                f"transformers would not compute the same, since {reason}; "
                "to_transformers(autoencoder.encoder) gives the encoder alone"
            )
    elif model.config.pool == "mean":
        raise UsageError("transformers' ViT pools the class token, and this encoder the mean; to_timm takes it")
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"this needs transformers: pip install transformers ({error})") from error
    state, dtype = weights.to_official(exact_state(model)).state, exact_dtype(model)
    described = weights.transformers_config(model.config, dtype)
    (name,) = described.pop("architectures")
    for of_a_file in ("model_type", "dtype"):
        del described[of_a_file]
    kind = getattr(transformers, name)
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    with torch.random.fork_rng(devices=()):  # fresh weights are drawn, only to be replaced
        theirs = kind(kind.config_class(**described), **options).to(dtype)
    theirs.load_state_dict(
        {
            there: piece
            for official, names in names_there(theirs).items()
            for there, piece in zip(names, state[official].chunk(len(names)), strict=True)
        }
    )
    _check_same(model, theirs, f"{name} of transformers {transformers.__version__}")
    return finish(theirs, model)


def from_transformers(
    model: "ViTMAEForPreTraining | ViTModel | ViTForImageClassification",
    *,
    preprocess: Preprocess | None = None,
    origin: Origin | None = None,
) -> MaskedAutoencoder | Encoder:
    """Our network with the weights of transformers'.

    It has its own copies of the tensors, on the same device and of the same dtype; it is in the same mode, and what is
    frozen there is frozen here. A LayerNorm eps of 1e-12, which the published conversions of MAE say, becomes the 1e-6
    that their weights were trained with. Dropout and the pooler of ViTModel are left out.

    Args:
        model: ViTMAEForPreTraining gives a `MaskedAutoencoder`, ViTModel and ViTForImageClassification an `Encoder`.
        preprocess: the transform, which no network of transformers has; None means the published evaluation.
        origin: where the weights come from.

    Returns:
        A network that was compared with theirs on a fixed input, with their eps.

    Raises:
        UsageError: it is none of the three, or ours would not compute the same.
        IntegrityError: it has other tensors, or NaN or infinity in them.
    """
    name = type(model).__name__
    if name not in _TAKEN or not isinstance(model, nn.Module):
        raise UsageError(f"from_transformers takes {', '.join(_TAKEN)}, not a {name}")
    where = f"transformers' {name}"
    settings: dict[str, Any] = {
        key: list(v) if isinstance(v, tuple) else v for key, v in model.config.to_dict().items()
    }
    state = weights.to_official(exact_state(model)).state
    config = weights.infer_config(state, weights.transformers_hints(settings, where), where)
    kind: Any = Encoder if isinstance(config, EncoderConfig) else MaskedAutoencoder
    options = weights.LoadOptions(dtype=exact_dtype(model))
    ours = weights.build(kind, state, config, preprocess, options=options, origin=origin, where=where)
    _set_eps(ours, settings.get("layer_norm_eps", 1e-12))
    _check_same(ours, model, where)
    _set_eps(ours, LAYER_NORM_EPS)
    return finish(ours, model)


def _check_same(ours: MaskedAutoencoder | Encoder, theirs: nn.Module, what: str) -> None:
    def outputs(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        one: Any = evaluable(ours, dtype)
        other = evaluable(theirs, dtype)
        if isinstance(ours, MaskedAutoencoder):
            images, (rows, columns) = images_for(one.config.encoder, dtype), one.config.encoder.grid
            noise = (torch.arange(len(images) * rows * columns) * 0.618033988749895 % 1).reshape(len(images), -1)
            expected = other(images, noise=noise)
            output = one(images, expected.mask.bool())
            yield output.prediction, expected.logits
            if expected.mask.any():
                yield output.loss, expected.loss
            return
        images = images_for(one.config, dtype)
        if one.config.classes:
            yield one(images), other(images).logits
        else:
            yield one.norm(one.encode(one.embed(images))), other(images).last_hidden_state

    check_same(what, outputs)


def _set_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
