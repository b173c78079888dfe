"""Targets, corruption, shares and baselines: what a training step computes, in numbers."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.interpolate import griddata
from scipy.special import log_softmax
from skimage import data
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maehub.errors import UsageError
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.colours import mean_colour_of, mean_colours
from maehub.models.encoder import EncoderConfig
from maehub.models.masking import make_masks, split_index
from maehub.models.patches import patchify
from maehub.train.pretraining.baselines import baselines, interpolated
from maehub.train.pretraining.objective import Objective, chosen, corrupted, fit_components, store_components

SMALL = EncoderConfig(32, 8, 3, 32, 2, 4)
HEADS = {
    "pixels": {},
    "normalised_pixels": {},
    "pca": {"outputs": 7},
    "tokens": {"outputs": 11},
    "mean colours": {"target": "tokens", "outputs": 512, "tokenizer": "mean-colour"},
}


def build(target="pixels", mask_tokens="decoder", depth=2, encoder=SMALL):
    torch.manual_seed(0)
    fields = {"target": target} | HEADS[target]
    if depth == 0:
        mask_tokens = "encoder"
    if encoder.channels == 1 and target == "mean colours":
        fields["outputs"] = 8
    model = MaskedAutoencoder(AutoencoderConfig(encoder, 24, depth, 3, mask_tokens=mask_tokens, **fields))
    if target == "pca":
        store_components(model, fit_components(pictures(8, encoder), model.preprocess, encoder.patch_size, 7))
    return model


def pictures(count=3, encoder=SMALL, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *encoder.size, encoder.channels), dtype=torch.uint8, generator=generator)


def by_brightness(images):
    """A tokenizer of eleven tokens."""
    return (patchify(images, 8).mean(dim=2) * 11).long().clamp(0, 10)


def objective(model, kept=4, **options):
    if model.config.target == "tokens" and not model.config.tokenizer:
        options.setdefault("tokenizer", by_brightness)
    return Objective(model, model.preprocess, kept=kept, **options)


def masks(count=3, kept=4, patches=16):
    return make_masks("random", torch.arange(count), (4, patches // 4), 1 - kept / patches)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


# the loss


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["pixels", "normalised_pixels"]), st.sampled_from(["decoder", "encoder"]), st.integers(0, 2),
    st.integers(1, 4), st.integers(2, 5), st.sampled_from([1, 3, 4]), st.floats(0.3, 0.9),
)  # fmt: skip
def test_of_pixels_it_is_the_loss_of_the_model_bit_for_bit(target, mask_tokens, depth, rows, columns, channels, ratio):
    encoder = replace(SMALL, image_size=(rows * 8, columns * 8), channels=channels)
    model = build(target, mask_tokens, depth, encoder)
    pixels, masked = pictures(2, encoder), make_masks("random", torch.arange(2), (rows, columns), ratio)
    if not masked.any():
        return
    kept = int((~masked[0]).sum())
    ours = objective(model, kept)(pixels, masked, torch.tensor([5, 6]))
    expected = model.loss(model.preprocess.normalise(pixels), masked)
    assert torch.equal(ours, expected)
    found, known = gradients(ours, model), gradients(expected, model)
    assert found.keys() == known.keys()
    assert all(torch.equal(found[name], known[name]) for name in known)


@pytest.mark.parametrize("target", HEADS)
@pytest.mark.parametrize("mask_tokens", ["decoder", "encoder"])
@pytest.mark.parametrize("loss_on", ["hidden", "all"])
def test_every_loss_is_the_mean_over_its_patches(target, mask_tokens, loss_on):
    model = build(target, mask_tokens)
    pixels, masked = pictures(), masks()
    made = objective(model, loss_on=loss_on)
    with torch.no_grad():
        loss = made(pixels, masked, torch.arange(3))
        images = model.preprocess.normalise(pixels)
        prediction = model(images, masked).prediction.numpy().astype(np.float64)
        patches = patchify(images, 8)
    where = masked.numpy() if loss_on == "hidden" else np.ones((3, 16), bool)
    if target in ("tokens", "mean colours"):
        shown = pixels.permute(0, 3, 1, 2).float() / 255
        tokens = by_brightness(shown) if target == "tokens" else mean_colours(shown, 8)
        chances = np.take_along_axis(log_softmax(prediction, axis=2), tokens.numpy()[:, :, None], axis=2)[:, :, 0]
        expected = -chances[where].mean()
    else:
        wanted = patches.numpy().astype(np.float64)
        if target == "normalised_pixels":
            wanted = (wanted - wanted.mean(2, keepdims=True)) / np.sqrt(wanted.var(2, ddof=1, keepdims=True) + 1e-6)
        if target == "pca":
            centre, components = model.decoder.centre.numpy(), model.decoder.components.numpy()
            wanted = (wanted - centre) @ components.T
        expected = ((prediction - wanted) ** 2).mean(2)[where].mean()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(HEADS)), st.sampled_from(["decoder", "encoder"]), st.integers(0, 2),
    st.floats(0.01, 1), st.sampled_from([(1.0, 0.0, 0.0), (0.8, 0.1, 0.1), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]),
    st.integers(1, 14), st.sampled_from([1, 3]),
)  # fmt: skip
def test_every_option_trains(target, mask_tokens, depth, share, corruption, kept, channels):
    model = build(target, mask_tokens, depth, replace(SMALL, channels=channels))
    if corruption[0] < 1 and model.config.mask_tokens == "decoder":
        return
    made = objective(model, kept, predict_share=share, corruption=corruption)
    loss = made(pictures(2, model.config.encoder), masks(2, kept), torch.tensor([2**63 - 1, 0]))
    assert loss.isfinite()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert gradients(loss, model).keys() == trained, "DDP waits for the gradient of every parameter"


def test_views_weigh_the_same_in_any_batch():
    """The mean over micro-batches of one size is the loss of the whole."""
    model = build("normalised_pixels", "encoder")
    made = objective(model, predict_share=0.4, corruption=(0.8, 0.1, 0.1))
    pixels, masked, seeds = pictures(4), masks(4), torch.arange(4) + 7
    whole = made(pixels, masked, seeds)
    parts = [made(*(part[i : i + 1] for part in (pixels, masked, seeds))) for i in range(4)]
    assert torch.allclose(whole, torch.stack(parts).mean(), rtol=1e-5)  # batches of another size round another way


def test_float_pixels_are_those_of_bytes_and_are_clipped():
    made = objective(build("mean colours"))
    masked, seeds = masks(), torch.arange(3)
    assert torch.equal(made(pictures(), masked, seeds), made(pictures().float(), masked, seeds))
    far = made(pictures().float() + 1000, masked, seeds)
    assert torch.equal(far, made(torch.full_like(pictures(), 255), masked, seeds))


@pytest.mark.parametrize("value_range", [(0.0, 255.0), (20.0, 200.0)])
@pytest.mark.parametrize("clip", [True, False])
def test_normalising_is_that_of_the_transform(value_range, clip):
    model = build()
    preprocess = replace(model.preprocess, value_range=value_range, clip=clip)
    made = Objective(model, preprocess, kept=4)
    for pixels in (pictures(), pictures().float() * 1.2 - 20):
        assert torch.equal(made.normalise(pixels), preprocess.normalise(pixels))


@pytest.mark.parametrize("target", ["normalised_pixels", "pca", "mean colours"])
def test_under_autocast_the_loss_and_the_coefficients_are_float32(target):
    made = objective(build(target))
    arguments = pictures(), masks(), torch.arange(3)
    exact = made(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(*arguments)
        patches = torch.randn(2, 16, 192)
        if target == "pca":
            known = (patches.double() - made.model.decoder.centre) @ made.model.decoder.components.double().T
            assert torch.allclose(made.model.target(patches).double(), known, atol=1e-5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()


@pytest.mark.parametrize(
    ("target", "mask_tokens", "options"),
    [
        ("pixels", "decoder", {}),
        ("normalised_pixels", "decoder", {"predict_share": 0.5}),
        ("pca", "decoder", {"loss_on": "all"}),
        ("mean colours", "encoder", {"corruption": (0.8, 0.1, 0.1)}),
        ("pixels", "encoder", {"corruption": (0.5, 0.5, 0.0), "predict_share": 0.5}),
    ],
)
def test_it_compiles_without_graph_breaks(target, mask_tokens, options):
    torch.compiler.reset()  # or the whole file counts as one function that is compiled again and again
    made = objective(build(target, mask_tokens), **options)
    arguments = pictures(), masks(), torch.arange(3)
    expected = made(*arguments)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.allclose(compiled, expected, rtol=1e-5)


def test_a_callers_tokenizer_compiles_around_it():
    torch.compiler.reset()
    made = objective(build("tokens"))
    arguments = pictures(), masks(), torch.arange(3)
    assert torch.allclose(torch.compile(made, backend="aot_eager")(*arguments), made(*arguments), rtol=1e-5)


def test_its_parameters_and_its_state_are_the_models():
    class Tokenizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(11.0))

        def forward(self, images):
            return (patchify(images, 8).mean(dim=2) * self.scale).long().clamp(0, 10)

    tokenizer = Tokenizer()
    made = objective(build("tokens"), tokenizer=tokenizer)
    assert set(made.state_dict()) == {f"model.{name}" for name in made.model.state_dict()}
    assert {id(value) for value in made.parameters()} == {id(value) for value in made.model.parameters()}
    made(pictures(), masks(), torch.arange(3)).backward()
    assert tokenizer.scale.grad is None
    assert torch.equal(
        copy.deepcopy(made)(pictures(), masks(), torch.arange(3)), made(pictures(), masks(), torch.arange(3))
    )


# which patches


@given(st.integers(1, 40), st.floats(0.001, 1))
def test_a_share_of_the_hidden_patches_is_drawn_from_the_seeds(hidden, share):
    index = torch.arange(hidden).repeat(3, 1) * 2 + 1
    found = chosen(index, share, torch.tensor([1, 2, 1]))
    assert found.shape == (3, max(1, round(share * hidden)))
    assert set(found.flatten().tolist()) <= set(index[0].tolist())
    assert (found.diff(dim=1) > 0).all()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], chosen(index[1:2], share, torch.tensor([2]))[0])


def test_every_hidden_patch_is_drawn_equally_often():
    """10,000 draws of 3 of 12: 2,500 each, with a standard deviation of 43."""
    found = chosen(torch.arange(12).repeat(10_000, 1), 0.25, torch.arange(10_000))
    counts = torch.bincount(found.flatten())
    assert (counts - 2500).abs().max() < 5 * 43


@given(st.integers(1, 40), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**62))
def test_shares_of_corruption_are_exact(count, a, b, c, seed):
    if a + b + c == 0:
        return
    shares = (a / (a + b + c), b / (a + b + c), c / (a + b + c))
    total = count + 3
    patches = torch.arange(total).repeat(2, 1)[:, :, None].float()
    masked = make_masks("random", torch.tensor([3, 4]), (1, total), count / total)
    _, hidden = split_index(masked, total - int(masked[0].sum()))
    shown = corrupted(patches, hidden, shares, torch.tensor([seed, seed + 1]), torch.tensor([seed + 2, seed + 3]))
    count = hidden.shape[1]
    changed = (shown.patches != patches)[:, :, 0]
    assert (shown.masked.sum(1) == round(shares[0] * count)).all()
    assert (changed.sum(1) == round((shares[0] + shares[1]) * count) - round(shares[0] * count)).all()
    assert not (changed & shown.masked).any()
    assert not ((changed | shown.masked) & ~masked).any()
    assert ((shown.patches >= 0) & (shown.patches < total)).all(), "a replacement is a patch of the same picture"


def test_bert_shares_at_the_paper_of_vit():
    hidden = torch.arange(98).repeat(2, 1)
    shown = corrupted(torch.randn(2, 196, 4), hidden, (0.8, 0.1, 0.1), torch.arange(2), torch.arange(2) + 9)
    assert shown.masked.sum(1).tolist() == [78, 78]


def test_replacements_are_any_other_patch():
    """One hidden patch, replaced in 20,000 pictures of 5 patches: 5,000 of each other, standard deviation 61."""
    patches = torch.arange(5.0).repeat(20_000, 1)[:, :, None]
    hidden = torch.full((20_000, 1), 2)
    seeds = torch.arange(20_000)
    found = corrupted(patches, hidden, (0.0, 1.0, 0.0), seeds, seeds).patches[:, 2, 0].long()
    counts = torch.bincount(found, minlength=5)
    assert counts[2] == 0
    assert (counts[[0, 1, 3, 4]] - 5000).abs().max() < 5 * 61


def test_what_is_drawn_does_not_depend_on_the_mask_or_the_batch():
    """The mask of a sample is drawn from the same seed: the share of hidden patches must not follow from it."""
    seeds = torch.arange(400)
    masked = make_masks("random", seeds, (4, 4))
    model = build()
    made = objective(model, predict_share=0.25)
    wanted = []
    model.predict = lambda images, masked, **options: wanted.append(options["wanted"]) or torch.zeros(400, 3, 192)
    made(pictures(1).expand(400, -1, -1, -1), masked, seeds)
    counts = torch.bincount(wanted[0].flatten(), minlength=16)
    assert (counts - 75).abs().max() < 5 * 8.4
    from maehub.rng import random_bits

    ranks = random_bits(seeds, 16).argsort(dim=1).argsort(dim=1).gather(1, wanted[0])  # from 4 to 15 where hidden
    assert abs(ranks.float().mean().item() - 9.5) < 5 * 3.5 / math.sqrt(1200)


# what does not matter


def perturbed(images, patch):
    row, column = divmod(patch, 4)
    images = images.clone()
    images[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 3
    return images


@pytest.mark.parametrize("mask_tokens", ["decoder", "encoder"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_patches_that_are_left_out_have_no_influence(mask_tokens, depth):
    model = build("pixels", mask_tokens, depth).eval()
    images, masked = torch.randn(1, 3, 32, 32), masks(1)
    _, hidden = split_index(masked, 4)
    wanted = hidden[:, [2, 5, 9]]
    with torch.no_grad():
        before = model.predict(images, masked, wanted=wanted, leave_out=True)
        assert before.shape == (1, 3, 192)
        for patch in hidden[0].tolist():
            assert torch.equal(model.predict(perturbed(images, patch), masked, wanted=wanted, leave_out=True), before)
        seen = int((~masked[0]).nonzero()[0])
        assert not torch.equal(model.predict(perturbed(images, seen), masked, wanted=wanted, leave_out=True), before)
        if depth:  # nor do their places: the same prediction as with no token of theirs
            moved = model.decoder.pos_embed.clone()
            out = [p for p in hidden[0].tolist() if p not in wanted[0].tolist()]
            model.decoder.pos_embed[0, torch.tensor(out) + 1] += 100
            assert torch.equal(model.predict(images, masked, wanted=wanted, leave_out=True), before)
            assert not torch.equal(model.predict(images, masked, wanted=wanted), before)
            model.decoder.pos_embed.copy_(moved)


def test_a_smaller_share_is_less_work():
    """A quarter of 12 hidden patches: 8 instead of 17 tokens in the first decoder block, 3 instead of 12 leave it."""

    def flops(share):
        with FlopCounterMode(display=False) as counter:
            objective(build(depth=3), predict_share=share)(pictures(), masks(), torch.arange(3))
        counts = counter.get_flop_counts()
        return sum(next(count for name, count in counts.items() if name.endswith("decoder.blocks.0")).values())

    assert flops(0.25) / flops(1.0) == pytest.approx(8 / 17, rel=0.02)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["decoder", "encoder"]), st.integers(0, 2), st.integers(1, 12), st.booleans())
def test_wanted_predictions_are_those_of_all(mask_tokens, depth, count, leave_out):
    model = build("pixels", mask_tokens, depth).double()
    images, masked = torch.randn(2, 3, 32, 32, dtype=torch.float64), masks(2)
    _, hidden = split_index(masked, 4)
    wanted = hidden[:, torch.randperm(12)[:count]]
    everything = model(images, masked).prediction
    some = model.predict(images, masked, wanted=wanted)
    index = wanted[:, :, None].expand(-1, -1, 192)
    assert torch.allclose(some, everything.gather(1, index), atol=1e-10)
    assert torch.allclose(model.predict(images, masked), everything, atol=1e-12)
    if count == 12 or depth == 0:  # nothing that matters is left out
        assert torch.allclose(model.predict(images, masked, wanted=wanted, leave_out=leave_out), some, atol=1e-10)
    assert torch.equal(
        model.predict(images, masked, wanted=wanted, leave_out=leave_out),
        model.predict(images, masked, wanted=wanted, leave_out=leave_out, kept=4),
    )


def test_rows_of_corrupted_masks_may_differ():
    model = build("pixels", "encoder").eval()
    images = torch.randn(2, 3, 32, 32)
    masked = masks(2)
    masked[0, :9] = True
    together = model.predict(images, masked)
    apart = torch.cat([model.predict(images[i : i + 1], masked[i : i + 1]) for i in range(2)])
    assert torch.allclose(together, apart, atol=1e-6)


# components


def test_components_are_those_of_an_independent_svd():
    encoder = replace(SMALL, channels=1)
    smooth = pictures(6, encoder).float().cumsum(dim=1).remainder(256).to(torch.uint8)
    model = build("pixels", encoder=encoder)
    found = fit_components(smooth, model.preprocess, 8, 5)
    patches = patchify(model.preprocess.normalise(smooth), 8).flatten(0, 1).numpy().astype(np.float64)
    centre = patches.mean(0)
    _, strengths, rows = np.linalg.svd(patches - centre, full_matrices=False)
    np.testing.assert_allclose(found.centre, centre, atol=1e-6)
    signs = np.sign((found.components.numpy() * rows[:5]).sum(1, keepdims=True))
    np.testing.assert_allclose(found.components, signs * rows[:5], atol=1e-5)
    largest = found.components.gather(1, found.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    # what is lost by going there and back is the variance that was discarded
    x = torch.from_numpy(patches)
    back = ((x - found.centre) @ found.components.double().T) @ found.components.double() + found.centre
    assert (x - back).square().sum().item() == pytest.approx((strengths[5:] ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize(("count", "many"), [(17, 1), (193, 40), (0, 1)])
def test_components_need_enough_patches_and_values(count, many):
    with pytest.raises(UsageError, match="at most"):
        fit_components(pictures(many), build().preprocess, 8, count)


def test_components_of_another_model_are_refused():
    found = fit_components(pictures(8), build().preprocess, 8, 6)
    for target in ("pca", "pixels"):
        with pytest.raises(UsageError, match="do not fit"):
            store_components(build(target), found)


# tokens


@given(st.integers(0, 511))
def test_colours_come_back(token):
    image = mean_colour_of(torch.tensor([[token]]))[0, 0][None, :, None, None].expand(1, 3, 8, 8)
    assert mean_colours(image, 8).tolist() == [[token]]
    grey = mean_colour_of(torch.tensor([token % 8]), channels=1)
    assert mean_colours(grey[:, :, None, None].expand(1, 1, 8, 8), 8).tolist() == [[token % 8]]


def test_colours_are_three_bits_of_the_mean():
    image = torch.zeros(1, 3, 8, 16)
    image[:, 0, :, 8:], image[:, 2, :4, 8:] = 1.0, 0.5  # red, a quarter of blue
    assert mean_colours(image, 8).tolist() == [[0, 7 * 64 + 0 * 8 + 2]]
    assert mean_colours(torch.ones(1, 3, 8, 8), 8).tolist() == [[511]]
    with pytest.raises(UsageError, match="1 or 3 channels"):
        mean_colours(torch.ones(1, 2, 8, 8), 8)
    with pytest.raises(UsageError, match="floating"):
        mean_colours(torch.ones(1, 3, 8, 8, dtype=torch.uint8), 8)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda images: [1], "a tensor"),
        (lambda images: by_brightness(images).float(), "integers"),
        (lambda images: by_brightness(images) > 3, "integers"),
        (lambda images: by_brightness(images)[:, 1:], r"\(3, 16\)"),
        (lambda images: by_brightness(images).reshape(3, 4, 4), r"\(3, 16\)"),
        (lambda images: by_brightness(images) + 1000, "from 0 to 10"),
        (lambda images: by_brightness(images) - 11, "from 0 to 10"),
    ],
)
def test_a_tokenizer_that_gives_something_else_is_refused(tokenizer, words):
    made = objective(build("tokens"), tokenizer=tokenizer)
    with pytest.raises(UsageError, match=words):
        made(pictures(), masks(), torch.arange(3))


def test_a_tokenizer_sees_pictures_from_0_to_1_without_corruption():
    seen = []

    def tokenizer(images):
        seen.append(images)
        return by_brightness(images).to(torch.uint8)

    made = objective(build("tokens", "encoder"), tokenizer=tokenizer, corruption=(0.5, 0.5, 0.0))
    made(pictures(), masks(), torch.arange(3))
    assert torch.equal(seen[0], pictures().permute(0, 3, 1, 2).float() / 255)


# settings


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("pixels", {"loss_on": "some"}, "loss_on"),
        ("pixels", {"predict_share": 0.0}, "predict_share"),
        ("pixels", {"predict_share": 0.5, "loss_on": "all"}, "loss_on='all'"),
        ("pixels", {"corruption": (0.8, 0.1, 0.1)}, "mask_tokens='encoder'"),
        ("pixels", {"corruption": (0.8, 0.1, 0.2)}, "sum to 1"),
        ("pixels", {"tokenizer": by_brightness}, "left out"),
        ("mean colours", {"tokenizer": by_brightness}, "left out"),
        ("tokens", {"tokenizer": None}, "tokenizer="),
        ("pixels", {"kept": 0}, "kept"),
    ],
)
def test_settings_that_cannot_be_are_refused(target, options, words):
    with pytest.raises(UsageError, match=words):
        objective(build(target), **options)


def test_a_model_of_unknown_target_has_no_objective():
    model = MaskedAutoencoder(AutoencoderConfig(SMALL, 24, 1, 3, "unknown"))
    with pytest.raises(UsageError, match="target="):
        Objective(model, model.preprocess, kept=4)


def test_batches_that_do_not_fit_are_refused():
    made = objective(build())
    pixels, masked, seeds = pictures(), masks(), torch.arange(3)
    for arguments in ((pixels, masked[:, 1:], seeds), (pixels, masked.float(), seeds), (pixels, masked, seeds[:2]),
                      (pixels, masked, seeds.float())):  # fmt: skip
        with pytest.raises(UsageError, match="of shape"):
            made(*arguments)
    with pytest.raises(UsageError, match="nothing is hidden"):
        objective(build(), kept=16)(pixels, masked, seeds)


# baselines


def test_interpolation_restores_an_even_slope_and_the_visible_patches():
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(56.0), indexing="ij")
    slope = torch.stack([rows + 2 * columns, 5 - rows, 3 * columns])[None]
    patches = patchify(slope, 8)  # 5 × 7
    masked = torch.ones(5, 7, dtype=torch.bool)
    masked[0], masked[-1], masked[:, 0], masked[:, -1] = False, False, False, False
    masked = masked.flatten()[None]
    damaged = torch.where(masked[:, :, None], torch.nan, patches)
    found = interpolated(damaged, masked, (5, 7), 8)
    assert torch.allclose(found, patches, atol=1e-4)
    noise = torch.randn(1, 35, 192)
    assert torch.equal(interpolated(noise, masked, (5, 7), 8)[~masked], noise[~masked])


def test_interpolation_along_one_row_is_that_of_scipy():
    patches = torch.rand(1, 5, 4)
    masked = torch.tensor([[False, True, True, True, False]])
    found = interpolated(patches, masked, (1, 5), 2).reshape(5, 2, 2).permute(1, 0, 2).reshape(2, 10)
    known = patches.reshape(5, 2, 2).permute(1, 0, 2).reshape(2, 10).numpy()
    for row, line in zip(found.numpy(), known, strict=True):
        expected = griddata(np.array([1, 8]), line[[1, 8]], np.arange(2, 8))
        np.testing.assert_allclose(row[2:8], expected, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6), st.integers(1, 6), st.floats(0, 0.97), st.sampled_from(["random", "block"]), st.integers(0, 9)
)
def test_interpolation_fills_everything_within_the_range_of_the_visible(rows, columns, ratio, strategy, seed):
    masked = make_masks(strategy, torch.tensor([seed]), (rows, columns), ratio)
    patches = torch.rand(1, rows * columns, 12)
    found = interpolated(torch.where(masked[:, :, None], torch.nan, patches), masked, (rows, columns), 2)
    assert found.isfinite().all()
    shown = patches[~masked].reshape(-1, 4, 3)
    for channel in range(3):
        values = found.reshape(-1, 3)[:, channel]
        assert values.min() >= shown[:, :, channel].min() - 1e-6
        assert values.max() <= shown[:, :, channel].max() + 1e-6


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels", "pca"])
@pytest.mark.parametrize("loss_on", ["hidden", "all"])
def test_baselines_are_the_loss_of_a_model_that_predicts_them(target, loss_on):
    model = build(target)
    made = objective(model, loss_on=loss_on)
    pixels, masked = pictures(20), masks(20)
    found = baselines(made, pixels, masked)
    patches = patchify(model.preprocess.normalise(pixels), 8)
    mean = torch.stack(
        [p[~m].reshape(-1, 3).mean(0).repeat(64).expand(16, -1) for p, m in zip(patches, masked, strict=True)]
    )
    guesses = {
        "mean_fill": torch.zeros_like(patches) if target == "normalised_pixels" else model.target(mean),
        "interpolation": model.target(interpolated(patches, masked, (4, 4), 8)),
    }
    for name, guess in guesses.items():
        guess = torch.where(masked[:, :, None], guess, model.target(patches))
        model.predict = lambda *_, wanted=None, guess=guess, **__: (
            guess if wanted is None else guess.gather(1, wanted[:, :, None].expand(-1, -1, guess.shape[2]))
        )
        expected = made(pixels, masked, torch.arange(20))
        assert getattr(found, name) == pytest.approx(expected.item(), rel=1e-5)


def test_interpolation_beats_mean_fill_on_a_photo():
    photo = torch.from_numpy(np.array(Image.fromarray(data.astronaut()).resize((128, 128))))[None]
    masked = make_masks("random", torch.arange(1), (16, 16))
    for target in ("pixels", "normalised_pixels"):
        found = baselines(objective(build(target), 64), photo, masked)
        assert found.interpolation < found.mean_fill


def test_baseline_of_tokens_is_the_cross_entropy_of_visible_frequencies():
    made = objective(build("tokens"))
    pixels, masked = pictures(2), masks(2)
    found = baselines(made, pixels, masked)
    tokens = by_brightness(pixels.permute(0, 3, 1, 2).float() / 255).numpy()
    hidden = masked.numpy()
    everywhere = np.array([1 + (tokens[~hidden] == token).sum() for token in range(11)]) / (8 + 11)
    costs = []
    for row, mask in zip(tokens, hidden, strict=True):
        shares = [((row[~mask] == token).sum() + 2 * everywhere[token]) / (4 + 2) for token in range(11)]
        costs += [-math.log(shares[token]) for token in row[mask]]
    assert found.mean_fill == pytest.approx(np.mean(costs), rel=1e-6)
    assert math.isnan(found.interpolation)


def test_components_that_were_never_fitted_are_noticed():
    model = MaskedAutoencoder(AutoencoderConfig(SMALL, 24, 1, 3, "pca", outputs=4))
    made = objective(model)
    assert made(pictures(), masks(), torch.arange(3)).isnan()
    with pytest.raises(UsageError, match="never fitted"):
        baselines(made, pictures(), masks())
