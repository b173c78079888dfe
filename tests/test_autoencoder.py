import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maehub import AutoencoderConfig, EncoderConfig, MaskedAutoencoder
from maehub.errors import DataError, UsageError
from maehub.models.encoder import PRESETS
from maehub.models.masking import make_masks
from maehub.models.patches import patchify


def build(target="normalised_pixels", mask_tokens="decoder", decoder_depth=2, **encoder):
    torch.manual_seed(0)
    network = EncoderConfig(**{"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 4} | encoder)
    return MaskedAutoencoder(AutoencoderConfig(network, 24, decoder_depth, 3, target, mask_tokens))


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [("vit-b", 111_907_840, 254), ("vit-l", 329_541_888, 398), ("vit-h", 657_074_508, 494)],
)
def test_published_sizes(preset, parameters, tensors):
    with torch.device("meta"):
        model = MaskedAutoencoder(AutoencoderConfig(PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_a_fresh_decoder_is_initialised_as_published():
    torch.manual_seed(0)
    model = MaskedAutoencoder(AutoencoderConfig(EncoderConfig(64, 8, 3, 64, 1, 4), 128, 2, 4))
    for part in model.decoder.modules():
        if isinstance(part, nn.Linear):
            bound = (6 / (part.in_features + part.out_features)) ** 0.5
            assert part.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06)
            assert not part.bias.any()
    assert model.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not model.decoder.pos_embed.requires_grad
    assert model.decoder.pos_embed[0, 1:].std() > 0.1


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 5), st.integers(2, 5), st.sampled_from([1, 3, 4]), st.floats(0.3, 0.9),
    st.sampled_from(["decoder", "encoder"]), st.sampled_from(["pixels", "normalised_pixels"]), st.integers(0, 2),
)  # fmt: skip
def test_the_training_path_gives_the_same_loss_and_gradients(
    rows, columns, channels, ratio, mask_tokens, target, depth
):
    if depth == 0:
        mask_tokens = "encoder"
    model = build(target, mask_tokens, depth, channels=channels).double()
    images = torch.randn(3, channels, rows * 8, columns * 8, dtype=torch.float64)
    masked = make_masks("random", torch.arange(3), (rows, columns), ratio)
    if not masked.any():
        return
    gradients = []
    for loss in (model(images, masked).loss, model.loss(images, masked)):
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        gradients[-1]["loss"] = loss.detach()
    for name, reference in gradients[0].items():
        other = gradients[1][name]
        if reference is None or other is None:  # a parameter that the loss does not reach
            assert reference is None or not reference.any()
            assert other is None or not other.any()
            continue
        assert torch.allclose(reference, other, rtol=1e-6, atol=1e-7), name


def test_the_loss_is_the_mean_over_hidden_patches():
    model = build("pixels")
    images = torch.randn(2, 3, 32, 32)
    output = model(images, seeds=[5, 9])
    errors = (output.prediction - patchify(images, 8)).square().mean(-1)
    assert output.prediction.shape == (2, 16, 192)
    assert output.masked.sum(1).tolist() == [12, 12]
    assert torch.allclose(output.loss, errors[output.masked].mean())


def test_normalised_targets_use_the_unbiased_variance():
    model = build("normalised_pixels")
    patches = patchify(torch.rand(2, 3, 32, 32), 8)
    mean = patches.mean(-1, keepdim=True)
    variance = ((patches - mean) ** 2).sum(-1, keepdim=True) / (192 - 1)
    assert torch.allclose(model.target(patches), (patches - mean) / (variance + 1e-6) ** 0.5, atol=1e-5)


def test_predictions_do_not_see_hidden_patches():
    model = build().eval()
    images = torch.randn(1, 3, 32, 48)
    masked = make_masks("random", torch.tensor([3]), (4, 6))
    with torch.no_grad():
        before = model(images, masked).prediction
        patch = int(masked[0].nonzero()[0])
        row, column = divmod(patch, 6)
        images[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 7
        assert torch.equal(model(images, masked).prediction, before)
        seen = int((~masked[0]).nonzero()[0])
        row, column = divmod(seen, 6)
        images[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 7
        assert not torch.equal(model(images, masked).prediction, before)


def test_gradients_reach_only_the_targets_of_hidden_patches():
    model = build("pixels")
    masked = make_masks("random", torch.arange(2), (4, 4))
    images = torch.randn(2, 3, 32, 32)
    prediction = model(images, masked).prediction
    target = patchify(images, 8).requires_grad_()
    ((prediction - target).square().mean(-1) * masked).sum().div(masked.sum()).backward()
    reached = target.grad.abs().sum(-1) > 0
    assert torch.equal(reached, masked)
    output = model(images, masked)
    output.prediction.retain_grad()
    output.loss.backward()
    assert torch.equal(output.prediction.grad.abs().sum(-1) > 0, masked)


def test_seeds_make_the_masks_and_the_device_does_not_matter():
    model = build()
    images = torch.randn(3, 3, 32, 32)
    default = model(images).masked
    assert torch.equal(default, model(images, seeds=torch.arange(3)).masked)
    assert not torch.equal(default, model(images, seeds=[7, 8, 9]).masked)
    assert model(images, mask_ratio=0.5).masked.sum(1).tolist() == [8, 8, 8]


def test_the_decoder_knows_true_geometry():
    """On a 2×6 grid the decoder's positions are those of a 2×6 table, not of a stretched 4×4 sequence."""
    model = build(decoder_depth=1)
    tokens = torch.zeros(1, 13, 24)
    seen = []
    model.decoder.blocks[0].register_forward_hook(lambda *call: seen.append(call[1][0]))
    model.decoder(tokens, (2, 6))
    table = seen[0][0, 1:].reshape(2, 6, 24)
    assert (table[:, :, :12] - table[:1, :, :12]).abs().max() < 0.2, "the first half is the column alone"
    assert (table[:, :, 12:] - table[:, :1, 12:]).abs().max() < 0.2, "the second half is the row alone"


def test_an_unknown_target_predicts_but_has_no_loss():
    model = build("unknown")
    images = torch.randn(1, 3, 32, 32)
    output = model(images)
    assert output.loss.isnan()
    assert output.prediction.isfinite().all()
    with pytest.raises(UsageError, match="target="):
        model.loss(images, output.masked)


@pytest.mark.parametrize("target", ["pca", "tokens"])
def test_the_loss_of_other_targets_is_a_matter_of_training(target):
    model = MaskedAutoencoder(AutoencoderConfig(EncoderConfig(32, 8, 3, 32, 1, 4), 24, 1, 3, target, outputs=9))
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    assert output.loss.isnan()
    assert output.prediction.shape == (2, 16, 9)
    with pytest.raises(UsageError, match=r"maehub\.train"):
        model.loss(images, output.masked)
    if target == "tokens":
        with pytest.raises(UsageError, match="tokens"):
            model.target(patchify(images, 8))


def test_outputs_of_pixels_are_all_values_of_a_patch():
    config = AutoencoderConfig(outputs=768)
    assert config == AutoencoderConfig()
    assert config.prediction_width == 768
    assert not AutoencoderConfig(target="tokens", outputs=8192).has_picture


def test_a_linear_head_is_all_that_is_left_of_a_decoder_of_depth_0():
    model = build("pixels", "encoder", 0).eval()
    assert {name for name in model.state_dict() if not name.startswith("encoder.")} == {
        "mask_token", "decoder.pred.weight", "decoder.pred.bias",
    }  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    nothing_hidden = torch.zeros(2, 16, dtype=torch.bool)
    features = model.encoder.features(images, pool="tokens")
    assert torch.allclose(model.predict(images, nothing_hidden), model.decoder.pred(features), atol=1e-6)


def test_bad_wishes_are_refused():
    model = build()
    images = torch.zeros(2, 3, 32, 32)
    masked = make_masks("random", torch.arange(2), (4, 4))
    hidden = masked.nonzero()[:, 1].reshape(2, 12)
    for wanted in (hidden.int(), hidden[:1], hidden[0]):
        with pytest.raises(UsageError, match="wanted must be int64"):
            model.predict(images, masked, wanted=wanted)
    with pytest.raises(UsageError, match="needs wanted"):
        model.predict(images, masked, leave_out=True)
    with pytest.raises(UsageError, match="visible"):
        model.predict(images, ~masked, wanted=hidden, leave_out=True)
    with pytest.raises(UsageError, match=r"\(2, 16\)"):
        model.predict(images, masked[:, 1:])
    ragged = masked.clone()
    ragged[0] = False
    with pytest.raises(DataError, match="one number"):
        model.predict(images, ragged)


def test_bad_masks_are_refused():
    model = build()
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(UsageError, match=r"\(2, 16\)"):
        model(images, torch.zeros(2, 15, dtype=torch.bool))
    with pytest.raises(UsageError, match="bool"):
        model(images, torch.zeros(2, 16))
    ragged = torch.zeros(2, 16, dtype=torch.bool)
    ragged[0, 0] = True
    with pytest.raises(DataError, match="one number"):
        model(images, ragged)
    with pytest.raises(UsageError, match="one an image"):
        model(images, seeds=[1])


@pytest.mark.parametrize(
    "changes",
    [{"decoder_heads": 5}, {"decoder_width": 0}, {"decoder_depth": -1}, {"target": "edges"}, {"mask_tokens": "both"},
     {"encoder": EncoderConfig(classes=3)}, {"encoder": EncoderConfig(pool="mean")}, {"decoder_depth": 0},
     {"outputs": 5}, {"outputs": -1}, {"outputs": True}, {"outputs": "5"}, {"target": "pca"}, {"target": "tokens"},
     {"target": "pca", "outputs": 769}, {"target": "pca", "outputs": 5, "tokenizer": "mean-colour"},
     {"target": "tokens", "outputs": 511, "tokenizer": "mean-colour"}, {"tokenizer": "mean-colour"},
     {"target": "tokens", "outputs": 5, "tokenizer": "mine"},
     {"target": "tokens", "outputs": 64, "tokenizer": "mean-colour", "encoder": EncoderConfig(channels=2)}],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(changes):
    with pytest.raises(UsageError):
        AutoencoderConfig(**changes)


def test_it_survives_copy_pickle_and_export():
    model = build().eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(other(images).prediction, expected.prediction)
        assert other.config == model.config
        assert other.preprocess == model.preprocess
    exported = torch.export.export(model, (images,)).module()(images)
    assert torch.allclose(exported.prediction, expected.prediction, atol=1e-5)
    assert torch.equal(exported.masked, expected.masked)


@pytest.mark.slow
def test_both_paths_compile_without_graph_breaks():
    model = build()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    assert torch.allclose(compiled.loss, expected.loss)
    assert torch.equal(compiled.masked, expected.masked)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(images, expected.masked, kept=4)
    assert torch.allclose(loss, expected.loss)
    wanted = torch.tensor([[3, 5], [3, 5]])
    predict = torch.compile(model.predict, fullgraph=True, backend="aot_eager")
    options = {"kept": 4, "wanted": wanted, "leave_out": True}
    masked = torch.arange(16).repeat(2, 1) < 12
    assert torch.allclose(predict(images, masked, **options), model.predict(images, masked, **options), atol=1e-5)
