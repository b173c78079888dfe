"""Recipes of fine-tuning: the published values by name, and how they are fitted to little data."""

from pathlib import Path

import pytest

from maehub.errors import UsageError
from maehub.train import FinetuneConfig
from maehub.train.engine.optim import peak_rate
from maehub.train.finetuning.recipes import Facts, asked_of, describe, settle

B, L, H = (768, 12), (1024, 24), (1280, 32)
IMAGENET = 1_281_167


def settled(network=B, images=IMAGENET, classes=1000, trained=True, size=224, multi_label=False, **changes):
    config = FinetuneConfig("DATA", Path("RUN"), **changes)
    facts = Facts(*network, trained, size, images, classes, multi_label, config.class_weights != "balanced")
    return settle(config.recipe, facts, asked_of(config), config.model)


@pytest.mark.parametrize(
    ("network", "base_lr", "layer_decay", "epochs", "drop_path"),
    [(B, 5e-4, 0.65, 100, 0.1), (L, 1e-3, 0.75, 50, 0.2), (H, 1e-3, 0.75, 50, 0.3)],
)
def test_the_official_recipe(network, base_lr, layer_decay, epochs, drop_path):
    found = settled(network)
    assert (found.recipe, found.base_lr, found.layer_decay, found.drop_path) == (
        "official",
        base_lr,
        layer_decay,
        drop_path,
    )
    assert found.steps == -(-epochs * IMAGENET // 1024)
    assert (found.batch_size, found.weight_decay, found.betas, found.floor) == (1024, 0.05, (0.9, 0.999), 1e-6)
    assert (found.mixup, found.cutmix, found.smoothing, found.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (found.randaugment, found.pool, found.ema) == ("rand-m9-mstd0.5-inc1", "mean", 0)
    assert found.warmup * found.steps == pytest.approx(5 * IMAGENET / 1024)


@pytest.mark.parametrize(("network", "epochs", "drop_path"), [(B, 100, 0.1), (L, 50, 0.1), (H, 50, 0.2)])
def test_the_papers_table_9(network, epochs, drop_path):
    found = settled(network, recipe="paper")
    assert (found.base_lr, found.layer_decay, found.drop_path, found.erasing) == (1e-3, 0.75, drop_path, 0)
    assert found.epochs == pytest.approx(epochs, rel=1e-4)


@pytest.mark.parametrize(("network", "epochs", "drop_path"), [(B, 300, 0.1), (L, 200, 0.2), (H, 200, 0.2)])
def test_the_papers_table_11_from_scratch(network, epochs, drop_path):
    found = settled(network, trained=False)
    assert (found.recipe, found.base_lr, found.weight_decay, found.betas) == ("scratch", 1e-4, 0.3, (0.9, 0.95))
    assert (found.batch_size, found.ema, found.drop_path, found.layer_decay) == (4096, 0.9999, drop_path, 1)
    assert found.epochs == pytest.approx(epochs, rel=1e-3)


@pytest.mark.parametrize(("network", "epochs"), [(B, 90), (L, 50), (H, 50)])
def test_the_papers_table_10_linear_probing(network, epochs):
    found = settled(network, recipe="linear")
    assert (found.optimizer, found.base_lr, found.batch_size, found.weight_decay) == ("lars", 0.1, 16384, 0)
    assert found.base_lr * found.batch_size / 256 == pytest.approx(6.4)
    assert (found.pool, found.randaugment, found.mixup, found.smoothing) == ("cls", "none", 0, 0)
    assert found.epochs == pytest.approx(epochs, rel=1e-2)


@pytest.mark.parametrize(("images", "changes"), [(100, {}), (5000, {}), (5000, {"batch_size": 32})])
def test_the_linear_probe_of_little_data_has_the_published_peak_rate(images, changes):
    """LARS steps by a share of the weights' size, so a rate that shrinks with the batch would lead nowhere."""
    found = settled(images=images, classes=10, recipe="linear", **changes)
    assert found.batch_size <= 256
    assert peak_rate(found.base_lr, found.batch_size) == pytest.approx(6.4)
    assert settled(images=images, classes=10, recipe="linear", base_lr=0.2, **changes).base_lr == 0.2
    assert settled(images=images, classes=10, recipe="attentive").base_lr == 5e-4


def test_large_pictures_take_the_recipe_for_448():
    found = settled(H, size=448)
    assert (found.recipe, found.drop_path, found.layer_decay) == ("448", 0.3, 0.75)


def test_little_data():
    found = settled(images=2000, classes=10, recipe="official")
    assert found.batch_size == 128
    assert found.warmup == 0.05
    assert found.steps == -(-100 * 2000 // 128)
    assert settled(images=100, classes=2, recipe="official").steps == 1250
    assert settled((192, 5), images=100, classes=2, recipe="official", epochs=3).steps == -(-300 // 8)
    assert settled(images=100, classes=2, recipe="official", steps=7).steps == 7
    assert settled(L, images=30, classes=2, recipe="official").steps == 1000


def test_the_first_blocks_factor_is_that_of_vit_b_on_little_data():
    for network in ((192, 5), B, L, H):
        found = settled(network, images=2000, classes=10, recipe="official")
        assert found.layer_decay ** network[1] == pytest.approx(0.65**12)


@pytest.mark.parametrize(("images", "classes", "mixes"), [(199, 10, False), (200, 10, True), (9999, 1000, False)])
def test_few_pictures_a_class_are_not_mixed(images, classes, mixes):
    found = settled(images=images, classes=classes, recipe="official")
    assert (found.mixup > 0, found.cutmix > 0) == (mixes, mixes)
    assert settled(images=199, classes=10, recipe="official", mixup=0.5).mixup == 0.5


def test_what_is_asked_for_wins():
    found = settled(base_lr=3e-4, layer_decay=0.9, drop_path=0.0, batch_size=64, ema=0.5, pool="cls", warmup=0.2)
    assert (found.base_lr, found.layer_decay, found.drop_path, found.batch_size) == (3e-4, 0.9, 0.0, 64)
    assert (found.ema, found.pool, found.warmup) == (0.5, "cls", 0.2)


def test_several_labels_are_neither_mixed_nor_smoothed():
    found = settled(multi_label=True)
    assert (found.mixup, found.cutmix, found.smoothing) == (0, 0, 0)
    with pytest.raises(UsageError, match="--smoothing"):
        settled(multi_label=True, smoothing=0.1)


def test_an_average_of_weights_covers_a_tenth_of_a_short_run():
    assert settled((192, 5), images=1000, classes=2, trained=False, steps=100).ema == pytest.approx(0.9)


def test_scratch_is_for_fresh_weights():
    with pytest.raises(UsageError, match="vit-nano has its own: use -m untrained/NAME"):
        settled(recipe="scratch")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 5, "epochs": 1}, "not both"),
        ({"blocks": 1.5}, "whole blocks, or 0.5"),
        ({"recipe": "linear", "blocks": 1}, "freezes"),
        ({"layer_decay": 0}, "--layer-decay"),
        ({"recipe": "best"}, "--recipe"),
        ({"val_share": 1}, "--val-share"),
        ({"resume": True, "overwrite": True}, "one of the two"),
        ({"rot90": True, "image_size": (32, 64)}, "square"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(UsageError, match=words):
        FinetuneConfig("DATA", Path("RUN"), **changes)


def test_the_run_says_rate_factors_and_true_batch():
    facts = Facts(*B, True, 224, IMAGENET, 1000)
    text = describe(settled(), facts, "1024 (8 processes of 128)")
    assert "lr 0.002 = 0.0005 for 256, at a batch of 1024 (8 processes of 128)" in text
    assert f"factors {0.65**13:.2g} (stem) to 1 (head)" in text
    assert "mixup 0.8, cutmix 1" in text


def test_the_run_says_why_there_is_no_mixup():
    few, enough = (Facts(*B, True, 224, images, 10) for images in (199, 200))
    assert "no mixup, no cutmix (fewer than 20 pictures a class)" in describe(
        settle("official", few, {}, "vit-b"), few, "8"
    )
    assert "mixup 0.8, cutmix 1" in describe(settle("official", enough, {}, "vit-b"), enough, "16")
