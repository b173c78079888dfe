"""The same numbers as timm and transformers, with the same weights, in float32 on the CPU."""

from dataclasses import replace

import pytest
import torch
from peers import (
    FULL_SHAPES,
    SHAPES,
    TINY,
    assert_equal_outputs,
    attention_entropies,
    autoencoder_config,
    compare_autoencoder,
    compare_encoder_with_timm,
    compare_encoder_with_transformers,
    compare_golden_positions,
    compare_positions,
    images,
    make_autoencoder,
    make_encoder,
    noise_for,
    timm_encoder,
    transformers_autoencoder,
    transformers_encoder,
    transformers_mae_config,
)
from transformers import ViTMAEForPreTraining

from maehub.models.autoencoder import MaskedAutoencoder
from maehub.models.encoder import Encoder
from maehub.weights.building import build
from maehub.weights.config_inference import Hints, infer_config
from maehub.weights.keys import to_official


@pytest.mark.parametrize("name", SHAPES)
def test_attention_of_the_compared_networks_is_peaked(name):
    config = autoencoder_config(name, SHAPES[name])
    entropies = attention_entropies(make_encoder(config.encoder), images(config.encoder, 1))
    assert len(entropies) == config.encoder.depth
    entropies |= attention_entropies(make_autoencoder(config), images(config.encoder, 1))
    assert len(entropies) == 2 * config.encoder.depth + config.decoder_depth
    assert max(entropies.values()) < 0.5, entropies


@pytest.mark.parametrize("name", SHAPES)
def test_encoder_equals_timm(name):
    compare_encoder_with_timm(SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_encoder_equals_transformers(name):
    compare_encoder_with_transformers(SHAPES[name])


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
@pytest.mark.parametrize("name", SHAPES)
def test_autoencoder_equals_transformers(name, target):
    compare_autoencoder(autoencoder_config(name, SHAPES[name], target))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FULL_SHAPES)
def test_full_depth_equals_the_peers(name):
    ours = make_encoder(FULL_SHAPES[name])
    assert max(attention_entropies(ours, images(ours.config, 1)).values()) < 0.5
    compare_encoder_with_timm(FULL_SHAPES[name])
    compare_encoder_with_transformers(FULL_SHAPES[name])
    compare_autoencoder(autoencoder_config(name, FULL_SHAPES[name]))


@pytest.mark.parametrize("classes", [0, 5])
def test_mean_pooled_classifier_equals_timm(classes):
    compare_encoder_with_timm(replace(TINY, pool="mean", classes=classes))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_equal_the_peers(channels):
    config = replace(TINY, channels=channels)
    compare_encoder_with_timm(config)
    compare_encoder_with_transformers(config)
    compare_autoencoder(autoencoder_config("tiny", config))


@pytest.mark.parametrize("size", [(48, 64), (16, 16), (64, 64)])
def test_other_sizes_equal_the_peers(size):
    compare_encoder_with_transformers(TINY, size)
    compare_encoder_with_timm(TINY, size)


def test_their_autoencoder_becomes_ours():
    torch.manual_seed(3)
    config = autoencoder_config("tiny", TINY, "pixels")
    theirs = ViTMAEForPreTraining(transformers_mae_config(config)).eval()
    with torch.no_grad():
        for value in theirs.parameters():  # a fresh one has zero tables
            value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    state = to_official(theirs.state_dict())
    assert state.dialect == "transformers-5"
    assert infer_config(state.state, Hints(heads=4, decoder_heads=4, target="pixels")) == config
    compare_autoencoder(config, theirs=theirs, ours=build(MaskedAutoencoder, state.state, config))


@pytest.mark.parametrize("peer", [timm_encoder, transformers_encoder])
def test_their_encoder_becomes_ours(peer):
    theirs = peer(make_encoder(TINY, seed=5))
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "pooler" not in name:
                value.add_(torch.randn_like(value) / value.shape[-1])
    ours = build(Encoder, to_official(theirs.state_dict()).state, TINY)
    pictures = images(TINY)
    with torch.inference_mode():
        output = theirs(pictures)
        expected = output if isinstance(output, torch.Tensor) else output.last_hidden_state[:, 0]
        assert_equal_outputs(ours(pictures), expected)


def test_shuffled_noise_gives_the_same_loss():
    """transformers feeds the visible patches in the order of the noise; ours are ascending."""
    config = autoencoder_config("tiny", TINY)
    ours = make_autoencoder(config)
    pictures, noise = images(TINY), torch.rand(2, 16)
    masked = torch.ones(2, 16, dtype=torch.bool).scatter(1, noise.argsort(dim=1)[:, :4], False)
    with torch.inference_mode():
        output, expected = ours(pictures, masked), transformers_autoencoder(ours)(pictures, noise=noise)
    assert torch.equal(masked, expected.mask.bool())
    assert torch.equal(masked, noise_for(masked).argsort(dim=1).argsort(dim=1) >= 4)
    assert_equal_outputs(output.prediction, expected.logits)


@pytest.mark.parametrize(("width", "grid"), [(64, (4, 4)), (512, (14, 14)), (1280, (16, 16)), (32, (3, 7))])
def test_positions_equal_transformers(width, grid):
    compare_positions(width, grid)


def test_golden_position_row():
    compare_golden_positions()
