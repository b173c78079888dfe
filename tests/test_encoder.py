import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maehub import Encoder, EncoderConfig
from maehub.errors import UsageError
from maehub.models.encoder import PRESETS, PatchEmbed
from maehub.models.patches import patchify
from maehub.models.positions import sincos_table

SMALL = EncoderConfig(image_size=32, patch_size=8, width=32, depth=3, heads=4)


def build(**changes):
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**{**SMALL.__dict__, **changes})).eval()


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("vit-b", 85_798_656), ("vit-l", 303_301_632), ("vit-h", 630_764_800)],
)
def test_published_sizes(preset, parameters):
    with torch.device("meta"):
        encoder = Encoder(PRESETS[preset])
        classifier = Encoder(EncoderConfig(**{**PRESETS[preset].__dict__, "classes": 1000, "pool": "mean"}))
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert len(encoder.state_dict()) == {"vit-b": 150, "vit-l": 294, "vit-h": 390}[preset]
    names = set(classifier.state_dict())
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= names
    assert not any(name.startswith("norm.") for name in names)
    published = {"vit-b": 86_567_656, "vit-l": 304_326_632, "vit-h": 632_045_800}[preset]
    assert sum(p.numel() for p in classifier.parameters()) == published


def test_a_fresh_model_is_initialised_as_published():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(image_size=64, patch_size=8, width=256, depth=2, heads=4))
    for part in encoder.modules():
        if isinstance(part, nn.Linear):
            bound = (6 / (part.in_features + part.out_features)) ** 0.5
            assert part.weight.abs().max() <= bound
            assert part.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert not part.bias.any()
        elif isinstance(part, nn.LayerNorm):
            assert part.eps == 1e-6
            assert (part.weight == 1).all()
            assert not part.bias.any()
        elif isinstance(part, PatchEmbed):
            fan_in = 3 * 8 * 8
            bound = (6 / (fan_in + 256)) ** 0.5
            assert part.proj.weight.abs().max() <= bound
            assert part.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert 0 < part.proj.bias.abs().max() <= fan_in**-0.5  # torch's default for a convolution
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(encoder.pos_embed[0, 1:], sincos_table(256, (8, 8)))
    assert not encoder.pos_embed[0, 0].any()
    assert not encoder.pos_embed.requires_grad


def test_the_patch_embedding_is_the_stored_convolution():
    encoder = build()
    images = torch.randn(2, 3, 32, 40)
    convolved = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder.patch_embed(patchify(images, 8)), convolved, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0, 7]), st.sampled_from(["cls", "mean"])
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the class token")
def test_any_size_and_any_channels(rows, columns, channels, classes, pool):
    encoder = build(channels=channels, classes=classes, pool=pool)
    images = torch.randn(2, channels, rows * 8, columns * 8)
    with torch.inference_mode():
        assert encoder(images).shape == (2, classes or 32)
        for name, shape in {
            "cls": (2, 32),
            "mean": (2, 32),
            "cls+mean": (2, 64),
            "tokens": (2, rows * columns, 32),
            "map": (2, 32, rows, columns),
        }.items():
            assert encoder.features(images, pool=name).shape == shape
            assert encoder.features(images, pool=name, layers=[0, -1]).shape == (2, 2, *shape[1:])


def test_features_of_the_pools_agree_with_each_other():
    encoder = build()
    images = torch.randn(2, 3, 32, 48)
    tokens = encoder.features(images, pool="tokens")
    grid = encoder.features(images, pool="map")
    assert torch.equal(grid.flatten(2).transpose(1, 2), tokens)
    assert torch.allclose(encoder.features(images, pool="mean"), tokens.mean(1), atol=1e-6)
    both = encoder.features(images, pool="cls+mean")
    assert torch.equal(both[:, :32], encoder.features(images, pool="cls"))
    assert torch.equal(encoder(images), encoder.features(images)), "no head: the forward is the feature"
    assert torch.equal(encoder.features(images), encoder.features(images, pool="cls")), "trained on the class token"


def test_a_mean_trained_model_pools_before_its_norm():
    encoder = build(pool="mean", classes=5)
    images = torch.randn(2, 3, 32, 32)
    raw = encoder.features(images, pool="mean", norm=False)
    assert torch.allclose(encoder.features(images), encoder.fc_norm(raw), atol=1e-6)
    assert torch.allclose(encoder(images), encoder.head(encoder.fc_norm(raw)), atol=1e-6)


def test_the_class_token_of_a_mean_trained_classifier_warns():
    encoder = build(pool="mean", classes=5)
    with pytest.warns(UserWarning, match="class token"):
        encoder.features(torch.randn(1, 3, 32, 32), pool="cls")


def test_layers_are_the_blocks_outputs():
    encoder = build()
    images = torch.randn(2, 3, 32, 32)
    kept = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda *call: kept.append(call[2]))
    stacked = encoder.features(images, layers=[2, 0, 0, -2], pool="tokens", norm=False)
    expected = torch.stack([kept[i][:, 1:] for i in (2, 0, 0, 1)], dim=1)
    assert torch.equal(stacked, expected)
    last = encoder.features(images, layers=[-1])[:, 0]
    assert torch.equal(last, encoder.features(images))


def test_patches_are_in_spatial_order_and_deterministic():
    encoder = build(depth=0)
    images = torch.zeros(1, 3, 32, 32)
    images[0, :, 8:16, 24:32] = 3.0  # row 1, column 3 of 4×4
    base = encoder.features(torch.zeros(1, 3, 32, 32), pool="tokens", norm=False)
    changed = (encoder.features(images, pool="tokens", norm=False) - base).abs().sum(-1)[0] > 1e-3
    assert changed.nonzero().flatten().tolist() == [7]
    deep = build()
    assert torch.equal(deep(images), deep(images))


def test_attention_rows_sum_to_one_and_are_what_the_block_uses():
    encoder = build()
    images = torch.randn(2, 3, 32, 32)
    for layer in (0, -1):
        weights = encoder.attention(images, layer=layer)
        assert weights.shape == (2, 4, 17, 17)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 17), atol=1e-5)
    block = encoder.blocks[0]
    normed = block.norm1(encoder.embed(images))
    _, _, values = block.attn._heads(block.attn.qkv(normed), 3)
    mixed = (encoder.attention(images, layer=0) @ values).transpose(1, 2).flatten(2)
    assert torch.allclose(block.attn.proj(mixed), block.attn(normed), atol=1e-5)


def test_a_resized_encoder_gives_the_same_features():
    encoder = build()
    images = torch.randn(1, 3, 48, 64)
    other = encoder.resized((48, 64))
    assert other.config.grid == (6, 8)
    assert other.preprocess.size == (48, 64)
    assert torch.allclose(other(images), encoder(images), atol=1e-6)
    assert other.blocks[0].attn.qkv.weight.data_ptr() == encoder.blocks[0].attn.qkv.weight.data_ptr()


@pytest.mark.parametrize(
    "changes",
    [{"width": 30, "heads": 4}, {"heads": 0}, {"depth": -1}, {"pool": "max"}, {"positions": "linear"},
     {"image_size": 33}, {"image_size": 0}, {"classes": -1}, {"mlp_ratio": 0}, {"width": 33, "heads": 3},
     {"channels": 2.5}],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(changes):
    with pytest.raises(UsageError):
        EncoderConfig(**{**SMALL.__dict__, **changes})


def test_bad_input_is_refused_with_what_would_fit():
    encoder = build()
    with pytest.raises(UsageError, match="divisible by the patch of 8"):
        encoder(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UsageError, match="channels="):
        encoder(torch.zeros(1, 4, 32, 32))
    with pytest.raises(UsageError, match="must name blocks"):
        encoder.features(torch.zeros(1, 3, 32, 32), layers=[3])
    with pytest.raises(UsageError, match="is not one of"):
        encoder.features(torch.zeros(1, 3, 32, 32), pool="max")
    with pytest.raises(UsageError, match="must name a block"):
        encoder.attention(torch.zeros(1, 3, 32, 32), layer=9)


def test_it_survives_copy_pickle_export_compile_and_threads():
    encoder = build()
    images = torch.randn(2, 3, 32, 32)
    expected = encoder(images)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert torch.equal(other(images), expected)
        assert other.config == encoder.config
        assert other.preprocess == encoder.preprocess
    exported = torch.export.export(encoder, (images,)).module()
    assert torch.allclose(exported(images), expected, atol=1e-6)
    assert encoder.to(torch.float64)(images.double()).dtype == torch.float64
    encoder = encoder.float()
    results = [None, None]

    def call(place):
        results[place] = encoder(images)

    threads = [threading.Thread(target=call, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


def test_it_compiles_without_graph_breaks():
    encoder = build(depth=1)
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), encoder(images), atol=1e-6)
