"""An encoder as timm's VisionTransformer, and back."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maehub.errors import UsageError, log
from maehub.images import Preprocess
from maehub.interop.agreement import check_same, evaluable, exact_dtype, exact_state, finish, images_for
from maehub.models import LAYER_NORM_EPS, Encoder, EncoderConfig, Origin
from maehub.weights import Hints, LoadOptions, build, infer_config, timm_config, timm_transform, with_class_names

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


def to_timm(encoder: Encoder) -> "VisionTransformer":
    """timm's network with the weights of an encoder: a feature extractor, or a classifier if there is a head.

    It has its own copies of the tensors, on the same device and of the same dtype; it is in the same mode, and what is
    frozen here is frozen there. The transform, the licence and the names of classes go along in ``pretrained_cfg``,
    so that ``timm.data.resolve_model_data_config`` finds the transform. Stochastic depth of a training run and the
    rule by which positions are resized do not: timm's network takes images of the native size.

    Args:
        encoder: of any width, depth, patch, channels, image size and pooling.

    Returns:
        A network that was compared with the encoder on a fixed input.

    Raises:
        UsageError: it is no encoder, or the installed timm computes something else.
    """
    import timm

    if not isinstance(encoder, Encoder):
        hint = "; timm has no decoder: to_timm(autoencoder.encoder)" if hasattr(encoder, "encoder") else ""
        raise UsageError(f"to_timm takes an Encoder, not a {type(encoder).__name__}{hint}")
    config, state = encoder.config, exact_state(encoder)
    described = timm_config(config, encoder.preprocess, encoder.origin, "model.safetensors")
    settings = described["pretrained_cfg"]
    if config.class_names:
        settings["label_names"] = config.class_names
    with torch.random.fork_rng(devices=()):  # fresh weights are drawn, only to be replaced
        theirs: Any = timm.create_model(
            described["architecture"], pretrained_cfg=settings, num_classes=config.classes, **described["model_args"]
        ).to(exact_dtype(encoder))
    theirs.load_state_dict(state)
    _check_same(encoder, theirs, f"timm {timm.__version__}")
    return finish(theirs, encoder)


def from_timm(
    model: "VisionTransformer", *, preprocess: Preprocess | None = None, origin: Origin | None = None
) -> Encoder:
    """The encoder with the weights of a plain ViT of timm.

    It has its own copies of the tensors, on the same device and of the same dtype; it is in the same mode, and what is
    frozen there is frozen here (timm trains positions). Dropout and stochastic depth, which do nothing outside
    training, are left out, with a line in the log.

    Args:
        model: timm's VisionTransformer, as MAE trains it: class token, learned or fixed positions, pre-norm blocks
            with GELU, LayerNorm with eps 1e-6, pooled by the class token after the norm or by the mean before it.
        preprocess: the transform; None means the one of its ``pretrained_cfg``, or the published evaluation where
            there is none for these channels.
        origin: where the weights come from. None says nothing: timm's settings name the published weights of an
            architecture whether or not they were loaded.

    Returns:
        An encoder that was compared with the network on a fixed input.

    Raises:
        UsageError: an `Encoder` would not compute the same, and why; or its transform is none that maehub has.
        IntegrityError: it has other tensors, or NaN or infinity in them.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"from_timm takes timm's VisionTransformer, not a {type(model).__name__}")
    settings: Any = getattr(model, "pretrained_cfg", None) or {}
    architecture = settings.get("architecture") if isinstance(settings, Mapping) else None
    name = f"timm's {architecture or type(model).__name__}"
    if reason := _why_not(model):
        raise UsageError(f"{name}: an Encoder would not compute the same, since {reason}")
    state = exact_state(model)
    network: Any = model  # older torch does not say that its parts are modules
    first = next(iter(network.blocks), None)
    height, width = network.patch_embed.img_size
    hints = Hints(heads=first.attn.num_heads if first else 1, image_size=(int(height), int(width)))
    config = infer_config(state, hints, name)
    assert isinstance(config, EncoderConfig)  # a VisionTransformer has no decoder
    config = with_class_names(config, {"pretrained_cfg": dict(settings)}, name)
    transform = preprocess or timm_transform(settings, config, name)
    options = LoadOptions(dtype=exact_dtype(model))
    encoder = build(Encoder, state, config, transform, options=options, origin=origin, where=name)
    _check_same(encoder, model, name)
    rates = [
        (type(module).__name__, getattr(module, "p", getattr(module, "drop_prob", getattr(module, "prob", 0.0))))
        for module in model.modules()
        if "drop" in type(module).__name__.lower()
    ]
    if idle := sorted({f"{kind} {rate:g}" for kind, rate in rates if rate}):
        log.info("%s: left out what acts in training alone: %s", name, ", ".join(idle))
    return finish(encoder, model)


def _check_same(encoder: Encoder, theirs: "VisionTransformer", what: str) -> None:
    def outputs(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Every token before pooling, and what a forward gives."""
        one, other = evaluable(encoder, dtype), evaluable(theirs, dtype)
        images = images_for(encoder.config, dtype)
        tokens = one.encode(one.embed(images))
        yield one.norm(tokens) if encoder.config.pool == "cls" else tokens, other.forward_features(images)
        yield one(images), other(images)

    check_same(what, outputs)


def _why_not(model: nn.Module) -> str | None:
    """Why an `Encoder` would not compute the same, as far as the parts of the network tell."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer):
        return "of timm's networks only the plain VisionTransformer is one"
    stem = model.patch_embed
    if type(stem) is not PatchEmbed:
        return f"its stem is a {type(stem).__name__}"
    kernel = stem.proj
    pools = {"token": (True, False), "avg": (False, True)}  # whether norm is there, and fc_norm
    norms = tuple(not isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm))
    reasons = {
        "it has no class token": model.cls_token is None,
        "it has register tokens": getattr(model, "reg_token", None) is not None,
        f"it has {model.num_prefix_tokens} tokens before those of the patches": model.num_prefix_tokens != 1,
        "it has no position table": model.pos_embed is None,
        "its class token has no position (no_embed_class)": model.no_embed_class,
        "it resizes its positions by another rule (dynamic_img_size)": model.dynamic_img_size,
        "it pads images (dynamic_img_pad)": getattr(stem, "dynamic_img_pad", False),
        "it has a norm before the blocks (pre_norm)": not isinstance(model.norm_pre, nn.Identity),
        "its patches are not square": kernel.kernel_size[0] != kernel.kernel_size[1],
        "its patches overlap or leave gaps": kernel.stride != kernel.kernel_size,
        "its patch embedding has no bias": kernel.bias is None,
        "it has a norm in the patch embedding": not isinstance(stem.norm, nn.Identity),
        "it pools by attention": getattr(model, "attn_pool", None) is not None,
        f"it pools by global_pool={model.global_pool!r}": model.global_pool not in pools,
        "its mean has the class token in it (pool_include_prefix)": getattr(model, "pool_include_prefix", False),
        "its norm is elsewhere than an Encoder's (final_norm, fc_norm)": norms != pools.get(model.global_pool),
        "its head is more than one linear map": type(model.head) not in (nn.Linear, nn.Identity),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        return reason
    for block in model.blocks:
        if type(block) is not Block:
            return f"its blocks are {type(block).__name__}"
        if why := _why_not_block(block):
            return why
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and not isinstance(module, nn.LayerNorm):
            return f"its norms are {type(module).__name__}"
        if isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS:
            return f"its LayerNorm has eps {module.eps:g} and not {LAYER_NORM_EPS:g}"
    return None


def _why_not_block(block: nn.Module) -> str | None:
    from timm.layers.mlp import Mlp

    def there(owner: nn.Module, *names: str) -> bool:
        return any(not isinstance(getattr(owner, name, None), nn.Identity | None) for name in names)

    attention: Any = block.attn
    mlp: Any = block.mlp
    if there(block, "ls1", "ls2"):
        return "its blocks have a layer scale (init_values)"
    if type(attention).__name__ != "Attention":
        return f"its attention is {type(attention).__name__}"
    if there(attention, "q_norm", "k_norm"):
        return "it normalises queries and keys (qk_norm)"
    if there(attention, "norm", "gate"):
        return "its attention is normalised or gated"
    if attention.qkv.bias is None or attention.proj.bias is None:
        return "its attention has no bias (qkv_bias, proj_bias)"
    if type(mlp) is not Mlp or there(mlp, "norm") or mlp.fc1.bias is None:
        return "its MLP is not two linear maps with biases"
    points = torch.linspace(-6, 6, 601)
    with torch.inference_mode():  # by what it computes: several classes are one
        differs = list(mlp.act.parameters()) or (mlp.act(points.clone()) - F.gelu(points)).abs().max() > 1e-6
    return f"its activation is {type(mlp.act).__name__}, not the exact GELU" if differs else None
