"""Reconstructions, error maps and attention: pixels, numbers, masks of every kind, figures and refusals."""

import errno
import http.server
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from maehub.errors import CheckpointError, DataError, HubError, UsageError
from maehub.figures import reconstruction as figures
from maehub.figures import rendering as pictures
from maehub.figures.drawing import as_rgb, compose, heat
from maehub.figures.patch_statistics import estimate_statistics, harmonic
from maehub.figures.reconstruction import attention_overlay, error_map, grid, reconstruct
from maehub.images.preprocess import Preprocess
from maehub.models.autoencoder import AutoencoderConfig, MaskedAutoencoder
from maehub.models.colours import mean_colours
from maehub.models.encoder import EncoderConfig, Origin
from maehub.models.masking import covering_masks, make_masks
from maehub.models.patches import denormalise_patches, normalise_patches, patchify, unpatchify
from maehub.train.pretraining.objective import fit_components, store_components


class Perfect(MaskedAutoencoder):
    """Predicts the target itself, and remembers which masks it was given."""

    def _predict(self, patches, masked, kept, grid, wanted=None):
        self.seen = [*getattr(self, "seen", []), masked]
        return self.target(patches)


class Blind(MaskedAutoencoder):
    """Predicts a fixed pattern, whatever it sees."""

    def _predict(self, patches, masked, kept, grid, wanted=None):
        return torch.linspace(-1, 1, patches.shape[1] * patches.shape[2]).reshape(1, *patches.shape[1:])


def model(size=32, *, channels=3, target="pixels", kind=MaskedAutoencoder, name=""):
    torch.manual_seed(0)
    encoder = EncoderConfig(size, 8, channels, 32, 1, 2)
    made = kind(AutoencoderConfig(encoder, 32, 1, 2, target)).eval()
    made.encoder.preprocess = replace(made.preprocess, crop_fraction=1.0)
    made.encoder.origin = Origin(name) if name else None
    return made


@pytest.fixture(scope="module")
def photo():
    return np.asarray(Image.fromarray(data.chelsea()).resize((96, 64)))


def over_pixels(mask, patch=8):
    return np.kron(mask, np.ones((patch, patch), bool))


def has_red_text(figure):
    """Whether red ink of the notice is on a figure."""
    red = np.asarray(figure).astype(int)
    return bool(((red[:, :, 0] > 150) & (red[:, :, 1] < 60) & (red[:, :, 2] < 60))[-40:].any())


# --- other targets ---


def fitted(photo, kind=MaskedAutoencoder, outputs=192):
    """A model that predicts PCA coefficients, of which 192 are all there are."""
    torch.manual_seed(0)
    config = AutoencoderConfig(EncoderConfig(32, 8, 3, 32, 1, 2), 32, 1, 2, "pca", outputs=outputs)
    made = kind(config).eval()
    made.encoder.preprocess = replace(made.preprocess, crop_fraction=1.0)
    sample = torch.tensor(photo)[None].expand(3, -1, -1, -1)
    store_components(made, fit_components(sample, made.preprocess, 8, outputs))
    return made


class RightTokens(MaskedAutoencoder):
    """Is sure of the mean colour of every patch."""

    def _predict(self, patches, masked, kept, grid, wanted=None):
        images = self.preprocess.denormalise(unpatchify(patches, grid, 8))
        return torch.nn.functional.one_hot(mean_colours(images, 8), self.config.outputs).float() * 9


def coloured(channels=3, tokenizer="mean-colour"):
    encoder = EncoderConfig(32, 8, channels, 32, 1, 2)
    outputs = {1: 8, 3: 512}[channels]
    made = RightTokens(AutoencoderConfig(encoder, 32, 1, 2, "tokens", outputs=outputs, tokenizer=tokenizer)).eval()
    made.encoder.preprocess = replace(made.preprocess, crop_fraction=1.0)
    return made


def test_coefficients_are_drawn_as_the_pixels_that_have_them(photo):
    panels = reconstruct(fitted(photo, Perfect), photo)
    np.testing.assert_allclose(panels.reconstruction.astype(int), panels.original.astype(int), atol=1)
    assert panels.mse == 0
    assert "coefficients" in panels.caption
    autoencoder = fitted(photo, Perfect, 3)
    few = reconstruct(autoencoder, photo)
    patches = patchify(autoencoder.preprocess(photo)[None], 8)[0].numpy()
    centre, components = autoencoder.decoder.centre.numpy(), autoencoder.decoder.components.numpy()
    back = torch.from_numpy(centre + (patches - centre) @ components.T @ components)[None]
    expected = autoencoder.preprocess.denormalise(unpatchify(back, (4, 4), 8))[0].permute(1, 2, 0) * 255
    np.testing.assert_allclose(few.reconstruction, expected, atol=0.51)
    assert few.mse == 0
    assert 15 < few.psnr < panels.psnr


def test_mse_of_coefficients_is_that_of_the_prediction(photo):
    autoencoder = fitted(photo, outputs=5)
    panels = reconstruct(autoencoder, photo, seed=4)
    images = autoencoder.preprocess(photo)[None]
    with torch.no_grad():
        prediction = autoencoder(images, torch.from_numpy(panels.mask).reshape(1, -1)).prediction
    wanted = autoencoder.target(patchify(images, 8))
    hidden = torch.from_numpy(panels.mask).flatten()
    assert panels.mse == pytest.approx((prediction - wanted)[0, hidden].square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_are_drawn_as_their_colours(photo, channels):
    panels = reconstruct(coloured(channels), photo)
    patches = panels.reconstruction.reshape(4, 8, 4, 8, channels)
    assert (patches == patches[:, :1, :, :1]).all()
    means = panels.original.reshape(4, 8, 4, 8, channels).mean((1, 3))
    assert np.abs(patches[:, 0, :, 0] - means).max() <= 17, "half a level of eight is 16"
    error = np.square((panels.original.astype(float) - panels.reconstruction)[over_pixels(panels.mask)] / 255)
    spread = np.square(coloured(channels).preprocess.std)
    assert panels.mse == pytest.approx((error.reshape(-1, channels) / spread).mean(), rel=1e-4)
    assert "(mean colours)" in panels.caption


def test_tokens_of_somebody_elses_tokenizer_are_not_drawn(photo):
    for function in (reconstruct, error_map):
        with pytest.raises(UsageError, match="tokenizer that is not part of it"):
            function(coloured(tokenizer=""), photo)


def test_error_maps_of_other_targets(photo):
    found = error_map(fitted(photo, outputs=5), photo)
    assert found.score > 0
    assert "(coefficients)" in found.caption
    assert error_map(fitted(photo, Perfect, 5), photo).score == 0
    right = error_map(coloured(), photo)
    normalised = [
        coloured().preprocess.normalise(torch.tensor(p)[None]) for p in (right.original, right.reconstruction)
    ]
    assert right.score == pytest.approx((normalised[0] - normalised[1]).square().mean().item(), rel=1e-5)
    assert "(mean colours)" in right.caption


# --- the four pictures and the numbers ---


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_panels_agree_pixel_by_pixel(photo, target, size):
    autoencoder = model(size, target=target)
    panels = reconstruct(autoencoder, photo, seed=3)
    hidden = over_pixels(panels.mask)
    assert (
        panels.original.dtype == panels.pasted.dtype == panels.masked.dtype == panels.reconstruction.dtype == np.uint8
    )
    np.testing.assert_array_equal(panels.original, autoencoder.preprocess.pixels(photo))
    np.testing.assert_array_equal(panels.pasted[~hidden], panels.original[~hidden])
    np.testing.assert_array_equal(panels.pasted[hidden], panels.reconstruction[hidden])
    np.testing.assert_array_equal(panels.masked[~hidden], panels.original[~hidden])
    assert (panels.masked[hidden] == 128).all()
    shape = (size, size) if isinstance(size, int) else size
    assert panels.original.shape == (*shape, 3)
    assert panels.mask.shape == (shape[0] // 8, shape[1] // 8)


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_reconstruction_is_the_models_own_prediction_everywhere(photo, target):
    autoencoder = model(target=target)
    panels = reconstruct(autoencoder, photo, seed=1, statistics="true")
    images = autoencoder.preprocess(photo)[None]
    with torch.no_grad():
        output = autoencoder(images, torch.from_numpy(panels.mask).reshape(1, -1))
    prediction = output.prediction
    if target == "normalised_pixels":
        known = normalise_patches(patchify(images, 8))
        prediction = denormalise_patches(prediction, known.mean, known.variance)
    picture = autoencoder.preprocess.denormalise(unpatchify(prediction, (4, 4), 8))[0].permute(1, 2, 0)
    np.testing.assert_array_equal(panels.reconstruction, (picture * 255).round().to(torch.uint8).numpy())
    assert panels.mse == pytest.approx(float(output.loss), rel=1e-6)


def test_psnr_is_over_hidden_pixels(photo):
    panels = reconstruct(model(), photo)
    hidden = over_pixels(panels.mask)
    error = (panels.reconstruction[hidden].astype(float) - panels.original[hidden]) ** 2
    assert panels.psnr == pytest.approx(10 * np.log10(255**2 / error.mean()))


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_a_perfect_model_has_no_error(photo, target):
    panels = reconstruct(model(target=target, kind=Perfect), photo, statistics="true")
    assert panels.mse == 0
    assert panels.psnr == np.inf
    np.testing.assert_array_equal(panels.reconstruction, panels.original)


def test_mask_is_that_of_the_seed_the_strategy_and_the_ratio(photo):
    autoencoder = model(64)
    for strategy, ratio in (("random", 0.6), ("block", 0.6), ("grid", 0.75)):
        panels = reconstruct(autoencoder, photo, strategy=strategy, mask_ratio=ratio, seed=5)
        expected = make_masks(strategy, torch.tensor([5]), (8, 8), ratio)[0].reshape(8, 8).numpy()
        np.testing.assert_array_equal(panels.mask, expected)
        assert panels.mask_ratio == expected.mean()
        assert (panels.strategy, panels.seed) == (strategy, 5)


def test_the_same_seed_gives_the_same_picture_and_the_model_is_left_alone(photo):
    autoencoder = model(target="normalised_pixels").train()
    first, second = reconstruct(autoencoder, photo, seed=2), reconstruct(autoencoder, photo, seed=2)
    np.testing.assert_array_equal(first.figure(), second.figure())
    assert not np.array_equal(first.mask, reconstruct(autoencoder, photo, seed=3).mask)
    assert autoencoder.training
    assert all(parameter.grad is None for parameter in autoencoder.parameters())


def test_half_precision_models_and_one_channel_and_native_size(photo):
    assert reconstruct(model().bfloat16(), photo).mse > 0
    grey = reconstruct(model(channels=1), photo)
    assert grey.original.shape == (32, 32, 1)
    assert grey.figure().mode == "RGB"
    autoencoder = model()
    native = reconstruct(autoencoder, photo, preprocess=replace(autoencoder.preprocess, resize="native"))
    assert native.original.shape == (64, 96, 3)
    assert native.mask.shape == (8, 12)
    four = reconstruct(model(channels=4), np.repeat(photo[:32, :32, :1], 4, axis=2))
    assert four.original.shape == (32, 32, 4)
    assert four.figure().mode == "RGB"


# --- statistics of hidden patches ---


def test_estimated_statistics_do_not_see_what_is_hidden(photo):
    autoencoder = model(64, target="normalised_pixels")
    panels = reconstruct(autoencoder, photo, seed=4)
    hidden = over_pixels(panels.mask)[:, :, None]
    other = np.where(hidden, 255 - panels.original, panels.original)
    again = reconstruct(autoencoder, other, seed=4)
    np.testing.assert_array_equal(again.original, other)
    np.testing.assert_array_equal(again.reconstruction, panels.reconstruction)
    leaking = reconstruct(autoencoder, other, seed=4, statistics="true")
    assert not np.array_equal(leaking.reconstruction, panels.reconstruction)


def test_leak_notice_only_where_something_leaks(photo):
    for target, statistics, leaks in (
        ("normalised_pixels", "true", True),
        ("normalised_pixels", "visible", False),
        ("pixels", "true", False),
        ("pixels", "visible", False),
    ):
        panels = reconstruct(model(target=target), photo, statistics=statistics)
        assert ("leaks hidden statistics" in panels.notice) is leaks
        assert has_red_text(panels.figure()) is leaks
        assert has_red_text(grid([panels, panels])) is leaks
        assert panels.statistics == statistics
        assert ("normalised" in panels.caption) is (target == "normalised_pixels")


def test_visible_patches_keep_their_statistics_and_a_smooth_picture_is_found_exactly():
    down, right = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    picture = torch.stack([torch.sin(4 * down + 2 * right), torch.cos(3 * right), down * right])[None]
    patches = patchify(picture, 8)
    masked = make_masks("random", torch.tensor([0]), (8, 8))
    known = normalise_patches(patches)
    found = estimate_statistics(patches, normalise_patches(patches).patches, masked, (8, 8), 8)
    torch.testing.assert_close(found.mean[~masked], known.mean[~masked], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.variance[~masked], known.variance[~masked], atol=1e-5, rtol=1e-4)
    spread = (found.variance.sqrt() - known.variance.sqrt())[masked]
    level = (found.mean - known.mean)[masked]
    flat = harmonic(known.mean.double().reshape(1, 1, 8, 8), masked.reshape(1, 1, 8, 8)).reshape(1, 64, 1) - known.mean
    assert level.square().mean() < 0.3 * flat[masked].square().mean()
    assert spread.square().mean() < 0.01


def test_continuous_borders_beat_interpolation_over_the_grid_on_photos():
    better = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        patches = patchify(Preprocess.evaluation(96, 3, 8)(getattr(data, name)())[None], 8)
        masked = make_masks("random", torch.tensor([7]), (12, 12))
        exact, mean, variance = normalise_patches(patches)
        found = estimate_statistics(patches, exact, masked, (12, 12), 8)
        values = torch.cat([mean, variance.sqrt()], dim=2).double().transpose(1, 2).reshape(1, 2, 12, 12)
        filled = harmonic(values, masked.reshape(1, 1, 12, 12)).flatten(2).transpose(1, 2).float()
        ours = denormalise_patches(exact, found.mean, found.variance)
        theirs = denormalise_patches(exact, filled[..., :1], filled[..., 1:].square())
        better.append(float((ours - patches)[masked].square().mean() / (theirs - patches)[masked].square().mean()))
    assert max(better) < 0.6, better


def test_harmonic_is_the_mean_of_the_neighbours():
    values = torch.rand(2, 3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = make_masks("random", torch.tensor([1, 2]), (7, 5)).reshape(2, 1, 7, 5)
    filled = harmonic(values, hidden)
    keep = (~hidden).expand_as(values)
    torch.testing.assert_close(filled[keep], values[keep])
    padded = torch.nn.functional.pad(filled, (1, 1, 1, 1))
    ones = torch.nn.functional.pad(torch.ones_like(filled), (1, 1, 1, 1))
    moves = [(slice(0, -2), slice(1, -1)), (slice(2, None), slice(1, -1)), (slice(1, -1), slice(0, -2))]
    moves.append((slice(1, -1), slice(2, None)))
    around = sum(padded[:, :, a, b] for a, b in moves) / sum(ones[:, :, a, b] for a, b in moves)
    torch.testing.assert_close(filled[~keep], around[~keep], atol=1e-5, rtol=0)


def test_statistics_of_one_picture_do_not_depend_on_the_batch():
    patches = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(0))
    masked = make_masks("random", torch.tensor([0, 1]), (3, 4))
    both = estimate_statistics(patches, -patches, masked, (3, 4), 4)
    for number in range(2):
        part = slice(number, number + 1)
        alone = estimate_statistics(patches[part], -patches[part], masked[part], (3, 4), 4)
        torch.testing.assert_close(alone.mean[0], both.mean[number])
        torch.testing.assert_close(alone.variance[0], both.variance[number])


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 2)])
def test_statistics_on_grids_of_one_row_or_column(shape):
    count = shape[0] * shape[1]
    patches = torch.randn(1, count, 12, generator=torch.Generator().manual_seed(0))
    masked = torch.arange(count)[None] > 0
    found = estimate_statistics(patches, patches, masked, shape, 2)
    assert found.mean.isfinite().all()
    assert (found.variance >= 0).all()


# --- masks and pictures of every kind ---


def test_masks_of_every_kind_say_the_same(photo):
    autoencoder = model((32, 48))
    wanted = np.zeros((4, 6), bool)
    wanted[1:3, 2:5] = True
    painted = Image.fromarray(over_pixels(wanted).astype(np.uint8) * 255)
    for mask in (
        wanted,
        torch.from_numpy(wanted),
        painted,
        painted.resize((12, 8)),
        painted.convert("RGB"),
        [(16, 8, 40, 24)],
        [(17, 9, 30, 16), (31.5, 15, 39, 23), (16, 8, 40, 24)],
    ):
        panels = reconstruct(autoencoder, photo, mask=mask)
        np.testing.assert_array_equal(panels.mask, wanted)
        assert panels.strategy == "given"
        assert panels.mask_ratio == wanted.mean()
        assert "given mask" in panels.caption
        assert "seed" not in panels.caption


def test_a_mask_painted_over_the_picture_is_cropped_with_it(photo):
    mask = np.zeros(photo.shape[:2], np.uint8)
    mask[:, 80:] = 255  # outside of the central 64 columns
    mask[:16, 16:32] = 255  # the corner of the crop
    panels = reconstruct(model(), photo, mask=Image.fromarray(mask))
    expected = np.zeros((4, 4), bool)
    expected[0, 0] = True
    np.testing.assert_array_equal(panels.mask, expected)
    clear = np.dstack([np.full_like(mask, 255)] * 3 + [mask])  # white everywhere, opaque only where it hides
    np.testing.assert_array_equal(reconstruct(model(), photo, mask=Image.fromarray(clear)).mask, expected)


def test_paths_and_pictures_and_arrays_are_the_same_picture(photo, tmp_path):
    path = tmp_path / "bücher 写真.png"
    Image.fromarray(photo).save(path)
    expected = reconstruct(model(), photo)
    for image in (path, str(path), Image.fromarray(photo)):
        np.testing.assert_array_equal(reconstruct(model(), image).figure(), expected.figure())


def test_orientation_is_applied_once(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(photo).save(path, exif=exif)
    with Image.open(path) as opened:
        for image in (path, opened):
            panels = reconstruct(model((48, 32)), image)
            np.testing.assert_array_equal(
                panels.original, model((48, 32)).preprocess.pixels(np.rot90(photo, -1).copy())
            )


_STATUS = {"missing": 404, "hints": 103}


class _Server(http.server.BaseHTTPRequestHandler):
    body = b""

    def do_GET(self):
        self.send_response(next((status for word, status in _STATUS.items() if word in self.path), 200))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def address(photo, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG")
    monkeypatch.setattr(_Server, "body", file.getvalue())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_address_is_fetched(address, photo, monkeypatch):
    expected = reconstruct(model(), photo)
    np.testing.assert_array_equal(reconstruct(model(), f"{address}/cat.png").original, expected.original)
    with pytest.raises(HubError, match=r"/missing.png cannot be fetched: the server answered 404") as caught:
        reconstruct(model(), f"{address}/missing.png?token=secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(HubError, match=r"/hints.png cannot be fetched: the server answered 103"):
        reconstruct(model(), f"{address}/hints.png")
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"cat.png.*larger than"):
        reconstruct(model(), f"{address}/cat.png")
    monkeypatch.undo()
    monkeypatch.setattr(_Server, "body", b"<html>sign in</html>")
    with pytest.raises(DataError, match=r"page.png"):
        reconstruct(model(), f"{address}/page.png")


def test_an_address_without_a_server_is_a_hub_error(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9/cat.png cannot be fetched") as caught:
        reconstruct(model(), "http://me:secret@127.0.0.1:9/cat.png")
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is not None


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"statistics": "best"}, UsageError, "visible, true"),
        ({"strategy": "stripes"}, UsageError, "random, block, grid"),
        ({"mask_ratio": 1.0}, UsageError, "below 1"),
        ({"mask_ratio": 0.0}, UsageError, "hides no patch"),
        ({"mask": np.zeros((4, 4), bool)}, UsageError, "hides no patch"),
        ({"mask": np.ones((4, 4), bool)}, DataError, "at least one visible"),
        ({"mask": np.ones((4, 5), bool)}, UsageError, r"shape \(4, 4\)"),
        ({"mask": np.ones((4, 4))}, UsageError, "must be bool"),
        ({"mask": "mask.png"}, UsageError, "not str"),
        ({"mask": [(1, 2, 3)]}, UsageError, "a box is"),
        ({"mask": [(5, 0, 5, 8)]}, UsageError, "a box is"),
        ({"mask": [1, 2, 3, 4]}, UsageError, "list of boxes"),
    ],
)
def test_wrong_arguments_are_refused(photo, arguments, kind, text):
    with pytest.raises(kind, match=text):
        reconstruct(model(), photo, **arguments)


def test_an_unknown_target_is_refused_naming_target(photo):
    for draw in (reconstruct, error_map):
        with pytest.raises(UsageError, match="target='pixels'"):
            draw(model(target="unknown"), photo)


def test_pictures_that_cannot_be_are_refused(photo, tmp_path):
    with pytest.raises(UsageError, match="a path, a URL"):
        reconstruct(model(), 3)
    with pytest.raises(DataError, match=r"nothing.png"):
        reconstruct(model(), tmp_path / "nothing.png")
    with pytest.raises(DataError, match="uint8"):
        reconstruct(model(), photo.astype(float))
    with pytest.raises(UsageError, match="not divisible by the patch"):
        reconstruct(model(), photo, preprocess=Preprocess.evaluation(36))


def test_a_prediction_that_is_not_finite_is_an_error(photo):
    autoencoder = model()
    with torch.no_grad():
        autoencoder.decoder.pred.bias.fill_(torch.nan)
    with pytest.raises(DataError, match="NaN or infinity"):
        reconstruct(autoencoder, photo)


# --- figures and files ---


def test_a_figure_shows_the_pictures_enlarged_by_whole_pixels(photo):
    panels = reconstruct(model((32, 48), name="vit-tiny"), photo)
    figure = np.asarray(panels.figure())
    scale = round(256 / 48)
    assert figure.shape[1] > 4 * 48 * scale
    for picture in panels.row():
        big = picture.repeat(scale, axis=0).repeat(scale, axis=1)
        corners = np.lib.stride_tricks.sliding_window_view(figure, (1, big.shape[1], 3))[:, :, 0]
        assert (corners[:, :, 0] == big[0]).all(axis=(2, 3)).any()
    assert (figure[0] == 255).all()
    assert (figure[:, 0] == 255).all()
    large = np.zeros((300, 300, 3), np.uint8)
    assert compose([[large]], ["A"], "").width < 400
    for part in ("vit-tiny", "random mask", "75 % hidden", "seed 0", "MSE", "PSNR", "dB"):
        assert part in panels.caption


def test_figures_are_saved_whole_or_not_at_all(photo, tmp_path, monkeypatch):
    panels = reconstruct(model(), photo)
    for name in ("a.png", "a.jpg", "a.webp", "A.PDF"):
        panels.save(tmp_path / name)
    with Image.open(tmp_path / "a.png") as saved:
        np.testing.assert_array_equal(saved, panels.figure())
    for path in (tmp_path / "none" / "a.png", tmp_path / "a.xyz", tmp_path / "a"):
        with pytest.raises(UsageError, match=r"cannot be written|does not exist"):
            panels.save(path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        panels.save(tmp_path / "folder.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(self, path, kind):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        panels.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.PDF", "a.jpg", "a.png", "a.webp", "folder.png"]


def test_a_grid_has_a_row_each(photo):
    autoencoder = model(name="vit-tiny")
    panels = [reconstruct(autoencoder, photo, mask_ratio=ratio) for ratio in (0.5, 0.75, 0.9)]
    one, three = grid(panels[:1]), grid(panels, ["half", "the usual", "nearly\nall"])
    assert three.height > 2.5 * one.height
    assert grid(panels).height == three.height
    maps = [error_map(autoencoder, photo), error_map(autoencoder, photo[::-1].copy())]
    assert grid(maps).height > 1.5 * grid(maps[:1]).height
    for wrong in ([], [panels[0], maps[0]]):
        with pytest.raises(UsageError, match="a grid needs"):
            grid(wrong)
    with pytest.raises(UsageError, match="2 labels do not fit 3 rows"):
        grid(panels, ["a", "b"])


def test_heat_runs_from_black_to_pale():
    colours = heat(np.linspace(0, 1, 50)[None])
    lightness = np.asarray(as_rgb(colours).convert("L"))[0].astype(int)
    assert lightness[0] < 5
    assert lightness[-1] > 240
    assert (np.diff(lightness) >= 0).all()


# --- error maps ---


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_error_map_hides_every_patch_and_counts_only_hidden(photo, target):
    autoencoder = model((32, 48), target=target, kind=Perfect)
    found = error_map(autoencoder, photo, seed=3)
    seen = torch.cat(autoencoder.seen)
    assert seen.any(dim=0).all()
    assert torch.equal(seen, covering_masks(3, 24))
    assert (found.error.shape, found.error.dtype) == ((4, 6), np.float32)
    assert found.error.max() == found.score == 0
    if target == "pixels":
        np.testing.assert_array_equal(found.reconstruction, found.original)
    assert found.masks == 4
    assert ("normalised patches" in found.caption) is (target == "normalised_pixels")


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_error_map_is_the_mean_over_the_masks_that_hid_a_patch(photo, ratio):
    autoencoder = model()
    found = error_map(autoencoder, photo, mask_ratio=ratio, seed=1)
    images = autoencoder.preprocess(photo)[None]
    masks = covering_masks(1, 16, ratio)
    with torch.no_grad():
        predictions = autoencoder(images.expand(len(masks), -1, -1, -1), masks).prediction
    squared = (predictions - patchify(images, 8)).square().mean(dim=2)
    expected = (squared * masks).sum(dim=0) / masks.sum(dim=0)
    np.testing.assert_allclose(found.error, expected.reshape(4, 4), rtol=1e-4)
    assert found.score == pytest.approx(float(expected.mean()), rel=1e-4)


def test_error_map_finds_what_does_not_belong(photo):
    autoencoder = model(kind=Blind)
    found = error_map(autoencoder, photo)
    assert found.score > 0
    odd = autoencoder.preprocess.pixels(photo).copy()
    odd[8:16, 16:24] = np.where(odd[8:16, 16:24] > 127, 0, 255)
    other = error_map(autoencoder, odd)
    changed = ~np.isclose(other.error, found.error)
    assert changed[1, 2]
    assert changed.sum() == 1


def test_error_map_figure_and_refusals(photo, tmp_path):
    error_map(model(), photo).save(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="hides none"):
        error_map(model(), photo, mask_ratio=0.0)
    with pytest.raises(UsageError, match="cannot be written"):
        error_map(model(), photo).save(tmp_path / "map")


# --- attention ---


def test_attention_overlay_is_the_class_token_row(photo, tmp_path):
    encoder = model((32, 48), name="vit-tiny").encoder
    with torch.no_grad():
        weights = encoder.attention(encoder.preprocess(photo)[None])[0, :, 0, 1:].reshape(-1, 4, 6).numpy()
    mean, second = attention_overlay(encoder, photo), attention_overlay(encoder, photo, layer=0, head=1)
    np.testing.assert_allclose(mean.attention, weights.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(second.attention, weights[1], rtol=1e-5)
    assert mean.overlay.shape == (32, 48, 3)
    assert mean.layer == 0
    mean.save(tmp_path / "attention.png")
    with pytest.raises(UsageError, match="head=2"):
        attention_overlay(encoder, photo, head=2)
    with pytest.raises(UsageError, match="layer=1"):
        attention_overlay(encoder, photo, layer=1)


def test_signature_is_the_documented_one():
    import inspect

    names = list(inspect.signature(figures.reconstruct).parameters)
    assert names == ["autoencoder", "image", "mask", "strategy", "mask_ratio", "seed", "statistics", "preprocess"]
