"""timm's and transformers' own networks with our weights, and how two outputs are compared."""

import math
from dataclasses import replace

import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from maehub.models import positions
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.encoder import PRESETS, Attention, Encoder, EncoderConfig
from maehub.weights.keys import from_official, to_official

TOLERANCE = 1e-5

TINY = EncoderConfig(32, 8, 3, 64, 3, 4)
SHAPES = {"tiny": TINY} | {name: replace(PRESETS[name], depth=2) for name in ("vit-b", "vit-l", "vit-h")}
FULL_SHAPES = {name: PRESETS[name] for name in ("vit-b", "vit-l", "vit-h")}


def autoencoder_config(name: str, encoder: EncoderConfig, target: str = "normalised_pixels") -> AutoencoderConfig:
    if name == "tiny":
        return AutoencoderConfig(encoder, 32, 2, 4, target)
    return AutoencoderConfig(encoder, 512, 2 if encoder.depth == 2 else 8, 16, target)


def peaked(model, seed: int = 0):
    """Random weights under which attention is peaked and every tensor matters; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    depth = sum(isinstance(module, Attention) for module in model.modules())
    # Small, or deep tokens become alike and attention flat; smaller where deep, or float32's own rounding passes 1e-5.
    residual = 0.3 * min(1, math.sqrt(8 / depth))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("pos_embed"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if ".attn.qkv.weight" in name:
                value.copy_(noise * 2.5 / math.sqrt(value.shape[1]))
            elif ".attn.proj.weight" in name or ".mlp.fc2.weight" in name:
                value.copy_(noise * residual / math.sqrt(value.shape[1]))
            elif value.ndim >= 2 and "token" not in name:
                value.copy_(noise / math.sqrt(value[0].numel()))
            elif "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            else:
                value.copy_(0.2 * noise)
    return model.eval()


def make_encoder(config: EncoderConfig, seed: int = 0) -> Encoder:
    return peaked(Encoder(config), seed)


def make_autoencoder(config: AutoencoderConfig, seed: int = 0) -> MaskedAutoencoder:
    return peaked(MaskedAutoencoder(config), seed)


def faint(model, scale: float = 1e-3):
    """The same with activations of small variance before the first LayerNorms, so that their eps shows."""
    stems = ("patch_embed.proj.", "cls_token", "pos_embed", "mask_token", "decoder.embed.")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(stem in name for stem in stems):
                value.mul_(scale)
    return model


def images(config: EncoderConfig, count: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.channels, *(size or config.size), generator=generator)


def official(model) -> dict[str, Tensor]:
    return to_official(model.state_dict()).state


def transformers_fields(config: EncoderConfig, eps: float = 1e-6) -> dict:
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "image_size": config.size[0],
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "layer_norm_eps": eps,
    }


def timm_encoder(ours: Encoder, size: tuple[int, int] | None = None):
    """timm's VisionTransformer with our weights; for another size with our resized table put into it."""
    config = ours.config
    theirs = timm_vit.VisionTransformer(
        img_size=size or config.size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=config.classes,
        global_pool="avg" if config.pool == "mean" else "token",
    )
    state = from_official(official(ours if size is None else ours.resized(size)), "timm")
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def _load(kind, config, state):
    theirs, report = kind.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    return theirs.eval()


def transformers_encoder(ours: Encoder) -> ViTModel:
    state = from_official(official(ours), "transformers-4")
    state |= {"pooler.dense.weight": torch.zeros(ours.config.width, ours.config.width)}
    state |= {"pooler.dense.bias": torch.zeros(ours.config.width)}
    return _load(ViTModel, ViTConfig(**transformers_fields(ours.config)), state)


def transformers_mae_config(config: AutoencoderConfig, mask_ratio: float = 0.75) -> ViTMAEConfig:
    return ViTMAEConfig(
        **transformers_fields(config.encoder),
        decoder_hidden_size=config.decoder_width,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_heads,
        decoder_intermediate_size=int(config.decoder_width * config.encoder.mlp_ratio),
        norm_pix_loss=config.target == "normalised_pixels",
        mask_ratio=mask_ratio,
    )


def transformers_autoencoder(ours: MaskedAutoencoder) -> ViTMAEForPreTraining:
    state = from_official(official(ours), "transformers-4")
    return _load(ViTMAEForPreTraining, transformers_mae_config(ours.config), state)


def noise_for(masked: Tensor) -> Tensor:
    """The noise that makes transformers hide just this: visible patches first, each in ascending order."""
    return masked.double() + torch.arange(masked.shape[1]) * 1e-6


def assert_equal_outputs(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """max|a − b| / max|b| within the tolerance."""
    assert ours.shape == theirs.shape
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference <= tolerance, f"differs by {difference:.1e} of the largest output"


@torch.inference_mode()
def attention_entropies(model, pictures: Tensor) -> dict[str, float]:
    """Mean entropy of attention in every block of a forward, as a share of the uniform one's."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, Attention):

            def look(module, inputs, name=name):
                weights = module.weights(inputs[0])
                entropy = torch.special.entr(weights).sum(dim=-1).mean().item()
                found[name] = entropy / math.log(weights.shape[-1])

            hooks.append(module.register_forward_pre_hook(look))
    model(pictures)
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def compare_encoder_with_timm(config: EncoderConfig, size: tuple[int, int] | None = None, ours=None) -> None:
    ours = ours or make_encoder(config)
    pictures = images(config, 1 if config.width > 1000 else 2, size)
    theirs = timm_encoder(ours, size)
    tokens = theirs.forward_features(pictures)
    if config.pool == "cls":
        assert_equal_outputs(ours.features(pictures, pool="cls"), tokens[:, 0])
        assert_equal_outputs(ours.features(pictures, pool="tokens"), tokens[:, 1:])
    assert_equal_outputs(ours(pictures), theirs(pictures))


@torch.inference_mode()
def compare_encoder_with_transformers(config: EncoderConfig, size: tuple[int, int] | None = None) -> None:
    ours = make_encoder(config)
    pictures = images(config, 1 if config.width > 1000 else 2, size)
    tokens = transformers_encoder(ours)(pictures, interpolate_pos_encoding=size is not None).last_hidden_state
    assert_equal_outputs(ours.features(pictures, pool="cls"), tokens[:, 0])
    assert_equal_outputs(ours.features(pictures, pool="tokens"), tokens[:, 1:])


@torch.inference_mode()
def compare_autoencoder(config: AutoencoderConfig, seed: int = 0, theirs=None, ours=None) -> None:
    """Loss, prediction of every patch and mask, ours against transformers'."""
    ours = ours or make_autoencoder(config, seed)
    theirs = theirs or transformers_autoencoder(ours)
    pictures = images(config.encoder, 1 if config.encoder.width > 1000 else 2)
    output = ours(pictures, seeds=list(range(7, 7 + len(pictures))))
    expected = theirs(pictures, noise=noise_for(output.masked))
    assert torch.equal(output.masked, expected.mask.bool())
    assert_equal_outputs(output.prediction, expected.logits)
    assert_equal_outputs(output.loss, expected.loss)


def compare_positions(width: int, grid: tuple[int, int]) -> None:
    rows_first = build_2d_sinusoidal_position_embedding(*grid, width)
    columns_first = torch.cat([rows_first[:, width // 2 :], rows_first[:, : width // 2]], dim=1)  # as published
    assert_equal_outputs(positions.sincos_table(width, grid), columns_first, 1e-6)


def compare_golden_positions() -> None:
    """D = 8, row 0, column 1, by hand: the half of the column comes first."""
    golden = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1]
    assert_equal_outputs(positions.sincos_table(8, (3, 3))[1], torch.tensor(golden), 1e-6)
