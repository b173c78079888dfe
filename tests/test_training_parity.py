"""The loop against another implementation: transformers' ViTMAE, trained from the same weights, by its own lines."""

import json
import math

import numpy as np
import pytest
import torch
from peers import noise_for, transformers_autoencoder
from PIL import Image

from maehub.data.loader import StepKeys
from maehub.data.sources import find_samples
from maehub.images.augment import crop
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.train import PretrainConfig, pretrain
from maehub.train.pretraining.loop import autoencoder_of, view_of

STEPS, BATCH, RATE, DECAY = 50, 8, 2e-3, 0.05


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 pictures with structure at every scale."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(1)
    for number in range(24):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", EncoderConfig(32, 8, 3, 48, 2, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(pictures, out, seed):
    return PretrainConfig(
        data=pictures,
        out=out,
        model="vit-tiny",
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=2,
        target="normalised_pixels",
        steps=STEPS,
        batch_size=BATCH,
        base_lr=RATE,
        weight_decay=DECAY,
        holdout=0,
        workers=0,
        device="cpu",
        seed=seed,
        quiet=True,
    )


def their_losses(config, *, decay_all=False):
    """Losses of transformers' model: same weights, crops and masks; optimizer and schedule written out again."""
    ours = autoencoder_of(config, None)
    view, preprocess = view_of(config, ours.config), ours.preprocess
    theirs = transformers_autoencoder(ours).train()
    # transformers 5.23 loads the fixed sine-cosine tables as trainable.
    trained = [parameter for name, parameter in theirs.named_parameters() if "pos" not in name]
    assert len(trained) == len(list(theirs.parameters())) - 2
    single = [parameter for parameter in trained if parameter.ndim < 2]
    others = [parameter for parameter in trained if parameter.ndim >= 2]
    groups = [{"params": others, "weight_decay": DECAY}, {"params": single, "weight_decay": DECAY * decay_all}]
    optimizer = torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95), foreach=False, fused=False)
    samples = find_samples(str(config.data))
    rise = 0.05 * STEPS
    losses = []
    for step, keys in enumerate(StepKeys(samples, BATCH, config.seed, 0, STEPS)):
        crops = [crop(samples.source(key.sample), view.size, 3, view.augmentation, key.crop) for key in keys]
        images = preprocess.normalise(torch.from_numpy(np.stack(crops)))
        masked = view.masks([key.mask for key in keys])
        share = step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (STEPS - rise)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * math.sqrt(BATCH / 256) * share
        loss = theirs(images, noise=noise_for(masked)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return np.array(losses)


def our_losses(config):
    pretrain(config)
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_that_of_transformers_step_by_step(pictures, tmp_path, seed):
    config = config_of(pictures, tmp_path / "run", seed)
    ours, theirs = our_losses(config), their_losses(config)
    relative = np.abs(ours - theirs) / theirs
    print(f"largest relative difference: {relative[:10].max():.1e} in 10 steps, {relative.max():.1e} in 50")
    assert relative[:10].max() <= 1e-5
    assert relative.max() <= 1e-4
    assert theirs[-5:].mean() < 0.97 * theirs[:5].mean()  # they learn, so the updates are compared too


def test_the_comparison_notices_that_vectors_are_decayed(pictures, tmp_path):
    config = config_of(pictures, tmp_path / "run", 0)
    ours, theirs = our_losses(config), their_losses(config, decay_all=True)
    relative = np.abs(ours - theirs) / theirs
    assert relative[:10].max() > 1e-5 or relative.max() > 1e-4
