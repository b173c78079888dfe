"""What a run holds out, measures and warns about, and what it starts from."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

import maehub
from maehub.errors import DataError, UsageError
from maehub.models.encoder import PRESETS, EncoderConfig
from maehub.train import PretrainConfig, pretrain
from maehub.train.evaluation.neighbours import effective_rank, leave_one_out
from maehub.train.pretraining import views as data
from maehub.train.pretraining.holdout import split_data
from maehub.weights.keys import to_official

TINY = EncoderConfig(32, 8, 3, 32, 1, 2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of 4 patients in two wards each, coloured by patient."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(40):
        colour = np.eye(4, 3)[number % 4] * 120 + 60
        pixels = colour + generator.integers(0, 60, (36, 40, 3))
        place = folder / f"patient{number % 4}" / f"ward{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", TINY)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(pictures, out, **changes):
    usual = {"steps": 2, "batch_size": 4, "workers": 0, "device": "cpu", "quiet": True}
    network = {"model": "vit-tiny", "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "target": "pixels"}
    if "from_" in changes:
        network = {}
    return PretrainConfig(data=pictures, out=out, **(usual | network | changes))


def validations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" not in line]


def names(samples):
    return {samples.name(index) for index in range(len(samples))}


# --- held-out pictures ------------------------------------------------------------------------------------------------


def test_one_in_twenty_is_held_out_by_name(pictures, tmp_path):
    split = split_data(str(pictures), None, None)
    assert (len(split.training), len(split.heldout)) == (38, 2)
    assert not names(split.training) & names(split.heldout)
    assert len(names(split.training) | names(split.heldout)) == 40
    more = tmp_path / "more"
    for path in pictures.rglob("*.png"):
        (more / path.relative_to(pictures)).parent.mkdir(parents=True, exist_ok=True)
        (more / path.relative_to(pictures)).write_bytes(path.read_bytes())
    for number in range(20):
        (more / f"{number}.png").write_bytes(path.read_bytes())
    grown = split_data(str(more), None, None)
    moved = names(split.training) & names(grown.heldout)
    assert len(grown.heldout) == 3
    assert len(moved) <= 1  # the share grew by one picture


def test_none_or_some_or_all(pictures):
    assert split_data(str(pictures), 0, None).heldout is None
    assert len(split_data(str(pictures), 7, None).heldout) == 7
    with pytest.raises(DataError, match="--holdout 40 leaves none of 40 pictures"):
        split_data(str(pictures), 40, None)


@pytest.mark.parametrize(("level", "count"), [(1, 10), (2, 3)])
def test_groups_stay_on_one_side(pictures, level, count):
    split = split_data(str(pictures), 3, level)

    def of(samples):
        return {name.rsplit(b"/", 1)[0] if level == 2 else name.split(b"/")[0] for name in names(samples)}

    assert len(of(split.heldout)) == 1
    assert not of(split.training) & of(split.heldout)
    assert len(split.heldout) >= count
    with pytest.raises(UsageError, match=r"--group|level"):
        split_data(str(pictures), 3, 3)


def test_folders_train_and_val_are_used_as_such(pictures, tmp_path):
    for part, patient in (("train", 0), ("val", 1)):
        (tmp_path / part).mkdir()
        for path in (pictures / f"patient{patient}").rglob("*.png"):
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    split = split_data(str(tmp_path), None, None)
    assert (len(split.training), len(split.heldout)) == (10, 10)
    with pytest.raises(UsageError, match="leave --holdout out"):
        split_data(str(tmp_path), 5, None)


def test_held_out_pictures_are_never_trained_on(pictures, tmp_path, monkeypatch):
    read, real = set(), data.crop

    def watching(source, *rest):
        if isinstance(source, bytes):  # a path; those of the validation are opened before
            read.add(source)
        return real(source, *rest)

    monkeypatch.setattr(data, "crop", watching)
    split = split_data(str(pictures), 5, None)
    pretrain(config_of(pictures, tmp_path / "run", steps=20, holdout=5))
    assert len(read) == 35
    assert not {name for name in names(split.heldout) if any(path.endswith(name) for path in read)}


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_neighbours_vote_as_elsewhere():
    """scikit-learn's classifier with the same weights, every sample left out once."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.eye(3, 8)[labels] + 0.9 * torch.randn(90, 8, generator=generator)
    ours = leave_one_out(features, labels, neighbours=7)
    normed = torch.nn.functional.normalize(features, dim=1).numpy().astype(np.float64)
    right = 0
    for index in range(90):
        others = np.delete(np.arange(90), index)
        theirs = KNeighborsClassifier(7, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
        theirs.fit(normed[others], labels.numpy()[others])
        right += int(theirs.predict(normed[index : index + 1])[0] == labels[index])
    assert ours == pytest.approx(100 * right / 90)
    assert 50 < ours < 100


def test_the_effective_rank_counts_directions():
    base = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert effective_rank(base) == pytest.approx(6, abs=1e-4)
    assert effective_rank(base[:, :1] @ torch.ones(1, 6)) == pytest.approx(1, abs=1e-4)
    assert 1 < effective_rank(base * torch.tensor([10.0, 1, 1, 1, 1, 1])) < 6


def test_a_labelled_folder_gives_the_accuracy_of_neighbours(pictures, tmp_path):
    pretrain(config_of(pictures, tmp_path / "run", knn=str(pictures), validate_every=1))
    found = validations(tmp_path / "run")
    assert [line["step"] for line in found] == [0, 1, 2]
    assert all(line["knn_top1"] > 60 for line in found)  # the patients differ in colour
    (tmp_path / "one" / "class").mkdir(parents=True)
    (tmp_path / "one" / "class" / "a.png").write_bytes(next(pictures.rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="one class"):
        pretrain(config_of(pictures, tmp_path / "other", knn=str(tmp_path / "one")))


# --- what a run starts from -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "vit-tiny", TINY)
        pretrain(config_of(pictures, run, steps=60, base_lr=0.02))
    return run / "model"


def test_the_start_is_told_and_good_weights_are_not_warned_about(tmp_path, caplog):
    photos = Path(maehub.__file__).parent / "assets"
    with caplog.at_level(logging.INFO, "maehub"):
        pretrain(config_of(photos, tmp_path / "run", from_="vit-nano", holdout=1, batch_size=1))
    assert "on held-out pictures before training: loss 0." in caplog.text
    assert "worse than their mean colour" not in caplog.text


def test_weights_that_do_worse_than_the_mean_colour_are_warned_about(pictures, trained, tmp_path, caplog):
    model = maehub.load_autoencoder(trained)
    with torch.no_grad():
        model.decoder.pred.weight.mul_(-20)
    maehub.save(model, tmp_path / "bad")
    pretrain(config_of(pictures, tmp_path / "run", from_=str(tmp_path / "bad")))
    assert "predicts hidden patches worse than their mean colour does. Likely causes" in caplog.text
    assert "--target" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"target": "pca", "pca_components": 5}, {"decoder_depth": 2}, {"mask_tokens": "encoder"}], ids=str
)
def test_another_decoder_keeps_the_encoder_and_says_so(pictures, trained, tmp_path, caplog, changes):
    with caplog.at_level(logging.INFO, "maehub"):
        pretrain(config_of(pictures, tmp_path / "run", from_=str(trained), steps=1, base_lr=1e-5, **changes))
    assert "its encoder is kept, the decoder is fresh" in caplog.text
    model, before = maehub.load_autoencoder(tmp_path / "run"), maehub.load_autoencoder(trained)
    for name, value in changes.items():
        assert getattr(model.config, {"pca_components": "outputs"}.get(name, name)) == value
    for name, value in before.encoder.state_dict().items():  # one step changes little
        torch.testing.assert_close(model.encoder.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_an_encoder_alone_gets_a_fresh_decoder(pictures, tmp_path, caplog):
    maehub.save(maehub.load("vit-nano"), tmp_path / "encoder")
    with caplog.at_level(logging.INFO, "maehub"):
        changes = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "image_size": 32, "channels": 1}
        pretrain(config_of(pictures, tmp_path / "run", from_=str(tmp_path / "encoder"), **changes))
    assert "has no decoder: a fresh one is trained" in caplog.text
    model = maehub.load_autoencoder(tmp_path / "run")
    assert model.config.encoder.size == (32, 32)
    assert model.config.encoder.channels == 1
    assert model.encoder.origin.licence == "Apache-2.0"


def test_a_tokenizer_of_the_callers(pictures, tmp_path):
    class Halves:
        vocabulary = 2

        def __call__(self, images):
            patches = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(3, 4)).flatten(1)
            return (patches > patches.mean(dim=1, keepdim=True)).long()

    config = config_of(pictures, tmp_path / "run", target="tokens", steps=30, base_lr=0.02)
    pretrain(config, tokenizer=Halves())
    model = maehub.load_autoencoder(tmp_path / "run")
    assert (model.config.outputs, model.config.tokenizer) == (2, "")
    found = validations(tmp_path / "run")
    assert found[-1]["val_loss"] < found[0]["val_loss"]
    with pytest.raises(UsageError, match="attribute vocabulary"):
        pretrain(config_of(pictures, tmp_path / "other", target="tokens"), tokenizer=lambda images: images)


def test_a_file_that_does_not_say_its_target_is_trained_on_the_one_that_is_said(pictures, tmp_path):
    network = maehub.AutoencoderConfig(TINY, 512, 1, 16, "pixels")
    model = maehub.MaskedAutoencoder(network)
    save_file(to_official(model.state_dict()).state, tmp_path / "bare.safetensors")  # a shape whose heads are known
    with pytest.raises(UsageError, match="say it by --target"):
        pretrain(config_of(pictures, tmp_path / "none", from_=str(tmp_path / "bare.safetensors")))
    config = config_of(pictures, tmp_path / "run", from_=str(tmp_path / "bare.safetensors"), target="pixels", steps=1)
    pretrain(config)
    assert maehub.load_autoencoder(tmp_path / "run").config.target == "pixels"
