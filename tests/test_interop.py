"""Networks of timm and transformers from ours and back, and the feature pyramid."""

import copy
import logging
import re
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import TINY, assert_equal_outputs, images, make_autoencoder, noise_for
from peers import make_encoder as peaked_encoder
from PIL import Image
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from transformers.models.upernet.modeling_upernet import UperNetHead

import maehub
from maehub.errors import IntegrityError, MissingDependencyError, UsageError
from maehub.images.preprocess import Preprocess
from maehub.interop import (
    LEVELS,
    TORCHVISION_LEVELS,
    FeaturePyramid,
    from_timm,
    from_transformers,
    to_timm,
    to_transformers,
)
from maehub.models.autoencoder import AutoencoderConfig
from maehub.models.encoder import Encoder, EncoderConfig, Origin

ROOT = Path(__file__).parent.parent
SMALL = replace(TINY, width=32, depth=2)
MAE = AutoencoderConfig(SMALL, 32, 2, 4, "pixels")

ENCODERS = {
    "plain": SMALL,
    "classifier": replace(SMALL, classes=5),
    "mean": replace(SMALL, pool="mean"),
    "mean classifier": replace(SMALL, pool="mean", classes=3, class_names=("cat", "dog", "newt")),
    "not square": replace(SMALL, image_size=(16, 40)),
    "one channel": replace(SMALL, channels=1),
    "five channels": replace(SMALL, channels=5),
    "patch 16": replace(SMALL, patch_size=16, image_size=48),
    "narrow mlp": replace(SMALL, mlp_ratio=1.5),
    "no blocks": replace(SMALL, depth=0, heads=1),
}


def make_encoder(config):
    return peaked_encoder(config) if config.depth else Encoder(config).eval()


def same_weights(ours, theirs):
    one, other = ours.state_dict(), theirs.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# The same vector added to every key leaves the softmax as it is, so the gradient of their bias is zero; whether
# rounding leaves a trace depends on the processor. Of it a gradient is asked, of every other parameter a change.
BIAS_OF_KEYS = ("k_proj.bias", "key.bias")


def trained_a_step(network, loss):
    """Names of the parameters that a step of gradient descent changes."""
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    loss.backward()
    torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=1.0).step()
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    reached = {name for name, value in network.named_parameters() if value.grad is not None}
    return changed | {name for name in reached if name.endswith(BIAS_OF_KEYS)}


# timm


@pytest.mark.parametrize("kind", ENCODERS)
def test_timm_computes_the_same_and_comes_back(kind):
    ours = make_encoder(ENCODERS[kind])
    theirs = to_timm(ours)
    assert type(theirs) is VisionTransformer
    pictures = images(ours.config)
    with torch.inference_mode():
        assert_equal_outputs(ours(pictures), theirs(pictures))
        if ours.config.pool == "cls":
            assert_equal_outputs(ours.features(pictures, pool="tokens"), theirs.forward_features(pictures)[:, 1:])
    again = from_timm(theirs)
    assert same_weights(again, ours)
    assert again.config == ours.config


@settings(deadline=None, max_examples=8)
@given(
    heads=st.integers(1, 4),
    share=st.integers(1, 3),
    depth=st.integers(1, 3),
    patch=st.integers(1, 6),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 4),
    classes=st.integers(0, 3),
    pool=st.sampled_from(["cls", "mean"]),
)
def test_any_encoder_goes_to_timm_and_back(heads, share, depth, patch, grid, channels, classes, pool):
    size = (grid[0] * patch, grid[1] * patch)
    config = EncoderConfig(size, patch, channels, 4 * heads * share, depth, heads, classes=classes, pool=pool)
    ours = make_encoder(config)
    theirs = to_timm(ours)
    with torch.inference_mode():
        assert_equal_outputs(ours(images(config)), theirs(images(config)))
    again = from_timm(theirs)
    assert same_weights(again, ours)
    assert again.config == config


def test_the_embedded_model_in_timm():
    ours = maehub.load("vit-nano")
    theirs = to_timm(ours)
    pictures = images(ours.config)
    with torch.inference_mode():
        assert_equal_outputs(ours(pictures), theirs(pictures))
    assert from_timm(theirs).preprocess == ours.preprocess
    assert theirs.pretrained_cfg["license"] == ours.origin.licence


@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.875, 0.8])
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (56, 96)])
def test_the_transform_in_timm_scales_to_the_same_size(size, fraction):
    """timm rounds the size that it scales to down, and ours to the nearest."""
    config = replace(SMALL, image_size=size)
    ours = Encoder(config, replace(Preprocess.evaluation(size, patch_size=8), crop_fraction=fraction))
    theirs = to_timm(ours)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    cover = round(min(size) / fraction)
    assert f"size={cover}," in str(transform.transforms[0]) or f"({cover}" in str(transform.transforms[0])
    back = from_timm(theirs).preprocess
    assert replace(back, crop_fraction=fraction) == ours.preprocess
    assert min(back.decode_size) == cover


@pytest.mark.parametrize("resize", ["centre-crop", "squash"])
def test_the_transform_in_timm_gives_the_same_pixels(resize):
    config = replace(SMALL, image_size=96)
    ours = Encoder(config, replace(Preprocess.evaluation(96, patch_size=8), resize=resize))
    data = timm.data.resolve_model_data_config(to_timm(ours))
    with Image.open(ROOT / "maehub" / "assets" / "cat.jpg") as opened:
        picture = opened.convert("RGB").resize((220, 110))  # whose margins are even at this size
    theirs = timm.data.create_transform(**data)(picture)
    assert ((theirs - ours.preprocess(picture)) * torch.tensor(data["std"])[:, None, None]).abs().max() < 1.5 / 255


def test_transforms_that_cannot_be_read():
    theirs = to_timm(make_encoder(SMALL))
    for change in ({"interpolation": "lanczos"}, {"crop_mode": "border", "crop_pct": 0.9}):
        theirs.pretrained_cfg = theirs.pretrained_cfg | change
        with pytest.raises(UsageError, match="preprocess="):
            from_timm(theirs)
    transform = Preprocess.evaluation(32, patch_size=8)
    assert from_timm(theirs, preprocess=transform).preprocess == transform
    del theirs.pretrained_cfg
    assert from_timm(theirs).preprocess == transform


def test_a_plain_network_of_timm():
    with torch.random.fork_rng():
        theirs = VisionTransformer(img_size=(16, 24), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    origin = Origin("mine", licence="mit")
    ours = from_timm(theirs, origin=origin)
    assert (ours.config.size, ours.config.heads, ours.config.classes) == ((16, 24), 2, 4)
    assert ours.origin == origin
    assert ours.pos_embed.requires_grad, "timm trains positions"
    assert ours.training == theirs.training == True  # noqa: E712
    theirs.eval()
    pictures = images(ours.config)
    with torch.inference_mode():
        assert_equal_outputs(ours(pictures), theirs(pictures))


def test_tensors_are_copies_and_nothing_is_drawn():
    ours = make_encoder(SMALL)
    before, random = copy.deepcopy(ours.state_dict()), torch.get_rng_state()
    theirs = to_timm(ours)
    again = from_timm(theirs)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(1)
    assert all(
        torch.equal(value, before[name]) for model in (ours, again) for name, value in model.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("there", [to_timm, to_transformers])
def test_other_types_are_exact(there, dtype):
    ours = make_encoder(SMALL).to(dtype)
    if dtype == torch.float64:
        ours.norm.weight.data += 1e-12
    theirs = there(ours)
    assert {value.dtype for value in theirs.parameters()} == {dtype}
    again = (from_timm if there is to_timm else from_transformers)(theirs)
    assert same_weights(again, ours)
    assert {value.dtype for value in again.parameters()} == {dtype}


@pytest.mark.parametrize("there", [to_timm, to_transformers])
def test_mode_and_frozen_parameters_go_along_and_the_rest_trains(there):
    ours = make_encoder(replace(SMALL, classes=3)).train()
    ours.blocks[0].requires_grad_(False)
    theirs = there(ours)
    assert theirs.training
    again = (from_timm if there is to_timm else from_transformers)(theirs)
    assert again.training
    expected = {name for name, value in ours.named_parameters() if value.requires_grad}
    assert {name for name, value in again.named_parameters() if value.requires_grad} == expected
    assert not any(name == "pos_embed" or name.startswith("blocks.0.") for name in expected)
    pictures, labels = images(ours.config), torch.tensor([0, 2])
    output = theirs(pictures)
    loss = F.cross_entropy(output if there is to_timm else output.logits, labels)
    trained = trained_a_step(theirs, loss)
    assert trained == {name for name, value in theirs.named_parameters() if value.requires_grad}
    assert_equal_outputs(loss.detach(), F.cross_entropy(ours(pictures), labels).detach())


def test_gradients_are_the_same():
    ours = make_encoder(SMALL)
    theirs = to_timm(ours)
    for network in (ours, theirs):
        network(images(SMALL)).square().mean().backward()
    for name, value in ours.named_parameters():
        if value.requires_grad:
            assert_equal_outputs(value.grad, dict(theirs.named_parameters())[name].grad, 1e-4)


REFUSED = {
    "no class token": {"class_token": False, "global_pool": "avg"},
    "register tokens": {"reg_tokens": 2},
    r"no position \(no_embed_class\)": {"no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "layer scale": {"init_values": 1e-5},
    "qk_norm": {"qk_norm": True},
    r"no bias \(qkv_bias": {"qkv_bias": False},
    "dynamic_img_size": {"dynamic_img_size": True},
    "dynamic_img_pad": {"dynamic_img_pad": True},
    "by attention": {"global_pool": "map"},
    "global_pool=''": {"global_pool": ""},
    "norm is elsewhere": {"global_pool": "avg", "fc_norm": False},
    "not the exact GELU": {"act_layer": nn.SiLU},
    "has eps 1e-05": {"norm_layer": nn.LayerNorm},
    "norms are": {"norm_layer": timm.layers.RmsNorm},
    "its blocks are ResPostBlock": {"block_fn": timm.models.vision_transformer.ResPostBlock},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_an_encoder_would_not_compute_is_refused_with_its_reason(reason):
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, **REFUSED[reason])
    with pytest.raises(UsageError, match=rf"an Encoder would not compute the same.*{reason}"):
        from_timm(theirs)


def test_parts_that_were_changed_afterwards_are_refused():
    theirs = to_timm(make_encoder(SMALL))
    theirs.pos_embed = None
    with pytest.raises(UsageError, match="no position table"):
        from_timm(theirs)
    theirs = to_timm(make_encoder(SMALL))
    for block in theirs.blocks:
        block.mlp.act = nn.GELU("tanh")
    with pytest.raises(UsageError, match="not the exact GELU"):
        from_timm(theirs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "only the plain VisionTransformer"),
        ("eva02_tiny_patch14_224", "only the plain VisionTransformer"),
        ("deit_tiny_distilled_patch16_224", "has 2 tokens before those of the patches"),
    ],
)
def test_other_networks_of_timm_are_refused(name, reason):
    with pytest.raises(UsageError, match=reason):
        from_timm(timm.create_model(name))
    with pytest.raises(UsageError, match="takes timm's VisionTransformer, not a str"):
        from_timm(name)


class Doubling(VisionTransformer):
    """Nothing about its parts tells that it computes something else."""

    def forward_features(self, x, **options):
        return 2 * super().forward_features(x, **options)


class Skipping(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x[:, 1:], pre_logits)


@pytest.mark.parametrize("kind", [Doubling, Skipping])
def test_what_computes_something_else_is_found_by_its_outputs(kind):
    theirs = kind(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=2)
    theirs.load_state_dict(to_timm(make_encoder(EncoderConfig(16, 8, 3, 32, 1, 2, classes=2))).state_dict())
    with pytest.raises(UsageError, match=r"computes something else.*differ by"):
        from_timm(theirs)


def test_a_subclass_that_computes_the_same_is_taken():
    theirs = type("Theirs", (VisionTransformer,), {})(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    assert from_timm(theirs).config.classes == 1000


def test_dropout_is_left_out_with_a_word(caplog):
    rates = {"drop_path_rate": 0.1, "drop_rate": 0.2, "proj_drop_rate": 0.3}
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, **rates)
    with caplog.at_level(logging.INFO, "maehub"):
        ours = from_timm(theirs)
    assert re.search(r"in training alone: DropPath 0\.1, Dropout 0\.2, Dropout 0\.3", caplog.text)
    assert torch.equal(ours(images(ours.config)), ours(images(ours.config)))
    assert theirs.training


def test_broken_weights_are_refused():
    theirs = to_timm(make_encoder(SMALL))
    theirs.blocks[1].mlp.fc1.bias.data[0] = torch.nan
    with pytest.raises(IntegrityError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        from_timm(theirs)
    with torch.device("meta"):
        empty = Encoder(SMALL)
    for there in (to_timm, to_transformers):
        with pytest.raises(UsageError, match="no weights yet"):
            there(empty)


def test_what_is_no_encoder():
    with pytest.raises(UsageError, match=r"to_timm\(autoencoder\.encoder\)"):
        to_timm(make_autoencoder(MAE))
    with pytest.raises(UsageError, match="takes an Encoder, not a Linear"):
        to_timm(nn.Linear(1, 1))
    with pytest.raises(UsageError, match="not a Linear"):
        to_transformers(nn.Linear(1, 1))
    with pytest.raises(UsageError, match="not a Linear"):
        from_transformers(nn.Linear(1, 1))
    with pytest.raises(UsageError, match="not of a Linear"):
        FeaturePyramid(nn.Linear(1, 1))


# transformers


@pytest.mark.parametrize("kind", [name for name, config in ENCODERS.items() if config.pool == "cls" and config.depth])
def test_transformers_computes_the_same_as_an_encoder(kind):
    ours = make_encoder(ENCODERS[kind])
    theirs = to_transformers(ours)
    pictures = images(ours.config)
    with torch.inference_mode():
        if ours.config.classes:
            assert type(theirs) is transformers.ViTForImageClassification
            assert_equal_outputs(ours(pictures), theirs(pictures).logits)
        else:
            assert type(theirs) is transformers.ViTModel
            tokens = theirs(pictures).last_hidden_state
            assert_equal_outputs(ours.features(pictures, pool="cls"), tokens[:, 0])
            assert_equal_outputs(ours.features(pictures, pool="tokens"), tokens[:, 1:])
    again = from_transformers(theirs)
    assert same_weights(again, ours)
    assert again.config == ours.config
    assert theirs.config.layer_norm_eps == 1e-6


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_transformers_computes_the_same_as_an_autoencoder(target):
    ours = make_autoencoder(replace(MAE, target=target))
    theirs = to_transformers(ours)
    assert type(theirs) is transformers.ViTMAEForPreTraining
    assert theirs.config.norm_pix_loss == (target == "normalised_pixels")
    pictures = images(SMALL)
    with torch.inference_mode():
        output = ours(pictures, seeds=[4, 5])
        expected = theirs(pictures, noise=noise_for(output.masked))
    assert torch.equal(output.masked, expected.mask.bool())
    assert_equal_outputs(output.prediction, expected.logits)
    assert_equal_outputs(output.loss, expected.loss)
    again = from_transformers(theirs)
    assert same_weights(again, ours)
    assert again.config == ours.config


def test_positions_in_transformers_are_not_zero():
    """Those that transformers 5 makes itself are."""
    ours = make_autoencoder(MAE)
    theirs = to_transformers(ours)
    assert torch.equal(theirs.vit.embeddings.position_embeddings, ours.encoder.pos_embed)
    assert torch.equal(theirs.decoder.decoder_pos_embed, ours.decoder.pos_embed)
    assert not theirs.decoder.decoder_pos_embed.requires_grad
    assert ours.decoder.pos_embed.abs().max() > 0.5


def test_a_transformers_autoencoder_trains():
    theirs = to_transformers(make_autoencoder(MAE).train())
    torch.manual_seed(0)
    trained = trained_a_step(theirs, theirs(images(SMALL)).loss)
    frozen = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert trained == {name for name, _ in theirs.named_parameters()} - frozen


def test_what_transformers_saves_is_read_again(tmp_path):
    ours = make_autoencoder(MAE)
    to_transformers(ours).save_pretrained(tmp_path)
    assert same_weights(from_transformers(transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)), ours)
    assert same_weights(maehub.load_autoencoder(tmp_path), ours)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make_autoencoder(replace(MAE, encoder=replace(SMALL, image_size=(16, 32)))), "square images alone"),
        (lambda: make_autoencoder(replace(MAE, mask_tokens="encoder")), "never sees mask tokens"),
        (lambda: make_autoencoder(replace(MAE, target="unknown")), "unknown"),
        (lambda: make_autoencoder(replace(MAE, target="tokens", outputs=8)), "predicts pixels"),
        (lambda: make_autoencoder(replace(MAE, mask_tokens="encoder", decoder_depth=0)), "encoder"),
        (lambda: make_encoder(ENCODERS["mean"]), "pools the class token.*to_timm takes it"),
    ],
)
def test_what_transformers_would_not_compute_is_refused(model, reason):
    with pytest.raises(UsageError, match=reason):
        to_transformers(model())


def test_a_vit_of_transformers_with_its_own_eps():
    """The published conversions say 1e-12; ours has 1e-6, with which the weights were trained."""
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=32, layer_norm_eps=1e-12, mask_ratio=0.0,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for value in theirs.parameters():  # small, so that eps shows
            value.copy_(1e-3 * torch.randn_like(value))
    ours = from_transformers(theirs)
    assert {module.eps for module in ours.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert (ours.config.decoder_heads, ours.config.target) == (2, "pixels")
    theirs.config.layer_norm_eps = 1e-5
    with pytest.raises(UsageError, match="layer_norm_eps"):
        from_transformers(theirs)
    theirs.config.layer_norm_eps = 1e-6  # which is not what its modules have
    with pytest.raises(UsageError, match="computes something else"):
        from_transformers(theirs)


def test_other_networks_of_transformers_are_refused():
    config = to_transformers(make_autoencoder(MAE)).config
    with pytest.raises(UsageError, match=r"takes ViTMAEForPreTraining, .*, not a ViTMAEModel"):
        from_transformers(transformers.ViTMAEModel(config))
    theirs = to_transformers(make_encoder(SMALL))
    theirs.config.hidden_act = "relu"
    with pytest.raises(UsageError, match="hidden_act"):
        from_transformers(theirs)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        to_transformers(make_encoder(SMALL))
    to_timm(make_encoder(SMALL))


# the pyramid


def by_hand(pyramid, number, features):
    """A level computed from its tensors alone."""
    state = pyramid.levels[number].state_dict()

    def norm(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-6).permute(0, 3, 1, 2)

    def doubled(x, name):
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    if number == 0:
        features = F.gelu(norm(doubled(features, "resample.0"), "resample.1"))
        features = doubled(features, "resample.3")
    elif number == 1:
        features = doubled(features, "resample.0")
    elif number == 3:
        features = F.max_pool2d(features, 2)
    features = norm(F.conv2d(features, state["project.0.weight"]), "project.1")
    return norm(F.conv2d(features, state["smooth.0.weight"], padding=1), "smooth.1")


def test_the_pyramid_is_that_of_the_paper():
    encoder = make_encoder(replace(SMALL, patch_size=16, image_size=64))
    pyramid = FeaturePyramid(encoder, 24)
    pictures = images(encoder.config, size=(64, 96))
    with torch.inference_mode():
        levels = pyramid(pictures)
        last = encoder.features(pictures, pool="map", norm=False)
        for number, (name, level) in enumerate(levels.items()):
            assert_equal_outputs(level, by_hand(pyramid, number, last))
            assert level.shape == (2, 24, 64 // pyramid.strides[name], 96 // pyramid.strides[name])
    assert isinstance(levels, OrderedDict)
    assert tuple(levels) == LEVELS
    assert pyramid.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    assert (pyramid.out_channels, pyramid.size_divisibility) == (24, 32)
    shapes = {name: tuple(value.shape) for name, value in pyramid.levels.state_dict().items() if "resample" in name}
    assert shapes["0.resample.0.weight"] == (32, 16, 2, 2)
    assert shapes["0.resample.3.weight"] == (16, 8, 2, 2)


@pytest.mark.parametrize(
    ("patch", "strides", "divisibility"),
    [(8, [4, 8, 16, 32], 32), (14, [3.5, 7, 14, 28], 28), (16, [4, 8, 16, 32], 32), (32, [4, 8, 16, 32], 32)],
)
def test_other_patches_keep_the_strides(patch, strides, divisibility):
    pyramid = FeaturePyramid(make_encoder(replace(SMALL, patch_size=patch, image_size=2 * patch)), 8)
    assert list(pyramid.strides.values()) == strides
    assert pyramid.size_divisibility == divisibility
    height, width = 2 * divisibility, 3 * divisibility
    levels = pyramid(torch.randn(1, 3, height, width))
    assert [level.shape[2:] for level in levels.values()] == [(height / s, width / s) for s in strides]


def test_sizes_that_are_no_multiple():
    pyramid = FeaturePyramid(make_encoder(replace(SMALL, patch_size=16, image_size=64)), 8, names=TORCHVISION_LEVELS)
    levels = pyramid(torch.randn(1, 3, 48, 80))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    assert torch.equal(levels["pool"], levels["3"][:, :, ::2, ::2])
    with pytest.raises(UsageError, match="16"):
        pyramid(torch.randn(1, 3, 50, 80))


def test_names_do_not_change_parameters():
    encoder = make_encoder(SMALL)
    one, other = FeaturePyramid(encoder, 8), FeaturePyramid(encoder, 8, names=TORCHVISION_LEVELS)
    assert one.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ("a", "b")},
        {"names": "aabb"},
        {"width": 0},
        {"width": True},
        {"layers": [0]},
        {"layers": [0, 1, 1, 2]},
    ],
)
def test_wrong_arguments_of_a_pyramid(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        FeaturePyramid(make_encoder(SMALL), **wrong)
    with pytest.raises(UsageError, match="layers"):
        FeaturePyramid(make_encoder(ENCODERS["no blocks"]))


@pytest.mark.parametrize("kind", ["plain", "mean classifier"])
def test_torchvisions_detector_trains_and_finds_boxes(kind):
    encoder = make_encoder(replace(ENCODERS[kind], patch_size=16, image_size=64))
    torch.manual_seed(0)
    detector = FasterRCNN(
        FeaturePyramid(encoder, 16, names=TORCHVISION_LEVELS), num_classes=3, min_size=64, max_size=96,
        rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=50, box_score_thresh=0.0,
    )  # fmt: skip
    pictures = [torch.rand(3, 60, 80), torch.rand(3, 70, 64)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[20.0, 20, 60, 60]]), "labels": torch.tensor([2])},
    ]
    losses = detector.train()(pictures, targets)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    without = [name for name, value in detector.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    assert encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    found = detector.eval()(pictures)
    assert len(found) == 2
    assert all(len(one["boxes"]) == len(one["labels"]) == len(one["scores"]) > 0 for one in found)


def test_levels_from_several_blocks_for_a_segmentation_head():
    encoder = make_encoder(replace(SMALL, depth=4, patch_size=16, image_size=64))
    pyramid = FeaturePyramid(encoder, 24, layers=(0, 1, 2, 2))
    unused = [name for name, value in encoder.named_parameters() if not value.requires_grad]
    assert {name.split(".")[0] for name in unused} == {"pos_embed", "norm", "blocks"}
    assert {name[:8] for name in unused if name.startswith("blocks")} == {"blocks.3"}
    pictures = images(encoder.config)
    with torch.inference_mode():
        levels = pyramid(pictures)
        maps = encoder.features(pictures, pool="map", layers=[0, 1, 2, 2], norm=False)
        for number, level in enumerate(levels.values()):
            assert_equal_outputs(level, by_hand(pyramid, number, maps[:, number]))
    config = transformers.UperNetConfig(
        backbone_config=transformers.ResNetConfig(), hidden_size=16, pool_scales=[1, 2], num_labels=5
    )
    head = UperNetHead(config, [24] * 4)
    output = head(list(pyramid(pictures).values()))
    assert output.shape == (2, 5, 16, 16)
    output.mean().backward()
    assert encoder.blocks[0].mlp.fc1.weight.grad is not None


# the page


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 4
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, code in enumerate(blocks):
        code = re.sub(r'"vit-[a-z-]+"', '"vit-nano"', code)
        exec(compile(code, f"docs/interop.md, block {number}", "exec"), names)


def test_blocks_of_this_timm_are_known():
    """The reasons name parts; a new timm with other ones shows here."""
    parts = {name for name, _ in Block(32, 2).named_children()}
    assert parts == {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
