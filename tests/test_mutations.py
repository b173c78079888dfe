"""Each of these mistakes, made on purpose, must be seen by a comparison with the peers; without it they pass."""

import pytest
import torch
from peers import (
    TINY,
    autoencoder_config,
    compare_autoencoder,
    compare_encoder_with_timm,
    compare_encoder_with_transformers,
    compare_golden_positions,
    compare_positions,
    faint,
    make_autoencoder,
    make_encoder,
)
from torch.nn import functional as F

from maehub.models import autoencoder, encoder, patches, positions

MAE = autoencoder_config("tiny", TINY)


def compare_faint_encoder():
    compare_encoder_with_timm(TINY, ours=faint(make_encoder(TINY)))


def compare_faint_autoencoder():
    compare_autoencoder(MAE, ours=faint(make_autoencoder(MAE)))


def tanh_gelu(monkeypatch):
    monkeypatch.setattr(encoder.Mlp, "forward", lambda self, x: self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


def small_eps(monkeypatch):
    for module in (encoder, autoencoder):
        monkeypatch.setattr(module, "LAYER_NORM_EPS", 1e-12)


def swapped_queries_and_keys(monkeypatch):
    right = encoder.Attention._heads

    def wrong(self, projected, parts):
        heads = right(self, projected, parts)
        return (heads[1], heads[0], heads[2]) if parts == 3 else heads

    monkeypatch.setattr(encoder.Attention, "_heads", wrong)


def swapped_position_halves(monkeypatch):
    right = positions.sincos_table

    def wrong(width, grid):
        table = right(width, grid)
        return torch.cat([table[:, width // 2 :], table[:, : width // 2]], dim=1)

    for module in (positions, encoder, autoencoder):
        monkeypatch.setattr(module, "sincos_table", wrong)


def channels_first_patches(monkeypatch):
    right = patches.patchify

    def wrong(images, size):
        values = right(images, size)
        return values.unflatten(2, (size * size, -1)).transpose(2, 3).flatten(2)

    for module in (patches, encoder, autoencoder):
        monkeypatch.setattr(module, "patchify", wrong)


def biased_variance(monkeypatch):
    def wrong(values, eps=1e-6):
        mean, variance = values.mean(-1, keepdim=True), values.var(-1, keepdim=True, unbiased=False)
        return patches.NormalisedPatches((values - mean) / torch.sqrt(variance + eps), mean, variance)

    monkeypatch.setattr(autoencoder, "normalise_patches", wrong)


COMPARISONS = {
    "encoder with timm": lambda: compare_encoder_with_timm(TINY),
    "encoder with transformers": lambda: compare_encoder_with_transformers(TINY),
    "autoencoder": lambda: compare_autoencoder(MAE),
    "faint encoder": compare_faint_encoder,
    "faint autoencoder": compare_faint_autoencoder,
    "positions": lambda: compare_positions(64, (4, 4)),
    "golden positions": compare_golden_positions,
}

SEEN_BY = [
    (tanh_gelu, "encoder with timm"),
    (tanh_gelu, "encoder with transformers"),
    (tanh_gelu, "autoencoder"),
    (small_eps, "faint encoder"),
    (small_eps, "faint autoencoder"),
    (swapped_queries_and_keys, "encoder with timm"),
    (swapped_queries_and_keys, "encoder with transformers"),
    (swapped_queries_and_keys, "autoencoder"),
    (swapped_position_halves, "positions"),
    (swapped_position_halves, "golden positions"),
    (channels_first_patches, "encoder with timm"),
    (channels_first_patches, "encoder with transformers"),
    (channels_first_patches, "autoencoder"),
    (biased_variance, "autoencoder"),
]


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_without_a_mistake_the_comparison_passes(comparison):
    COMPARISONS[comparison]()


@pytest.mark.parametrize(("mistake", "comparison"), SEEN_BY)
def test_the_mistake_is_seen(monkeypatch, mistake, comparison):
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="of the largest output"):
        COMPARISONS[comparison]()
