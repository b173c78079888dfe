"""What is seen of a picture: crops, turns and colours, beside torchvision and Pillow."""

import dataclasses
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

import maehub
from maehub.errors import DataError, UsageError
from maehub.images.augment import Augmentation, colour_factors, crop, crop_box, jitter, rotated, scaled
from maehub.images.decoding import open_image
from maehub.images.preprocess import Preprocess
from maehub.rng import random_uniform
from maehub.train.pretraining.config import PretrainConfig

ASSETS = Path(maehub.__file__).parent / "assets"
RANDOM = Augmentation()
FIXED = Augmentation("fixed-crop")
NONE = Augmentation("none")
STILL = Augmentation(crop_scale=(1.0, 1.0), hflip=False)


def photo(width, height):
    return Image.open(ASSETS / "coffee.jpg").convert("RGB").resize((width, height))


def noise(width, height):
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def boxes(picture, size, augmentation, count=400):
    return np.array([crop_box(picture, size, augmentation, random_uniform(seed, 40)) for seed in range(count)])


# --- which part


def test_the_defaults_are_those_of_the_command():
    config = PretrainConfig("data", Path("out"), steps=1)
    fields = [field.name for field in dataclasses.fields(Augmentation)]
    assert Augmentation(config.augment, *(getattr(config, name) for name in fields[1:])) == RANDOM


@pytest.mark.parametrize(("size", "shape"), [((32, 32), 1.0), ((32, 64), 2.0)])
def test_random_crops_cover_the_area_and_have_the_aspect_that_they_should(size, shape):
    left, top, right, bottom = boxes((480, 640), size, RANDOM).T
    assert (left.min(), top.min()) >= (0, 0)
    assert right.max() <= 640
    assert bottom.max() <= 480
    width, height = right - left, bottom - top
    area, aspect = width * height / (640 * 480), width / height / shape
    assert 0.2 - 0.01 < area.min() < 0.25
    assert (0.9 if shape == 1 else 0.8) < area.max() <= 1
    assert 3 / 4 - 0.02 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 4 / 3 + 0.02
    assert abs(np.log(aspect).mean()) < 0.06
    centre = (left + right) / 2
    assert abs(centre.mean() - 320) < 15
    assert np.ptp(centre) > 200


@pytest.mark.parametrize(("size", "box"), [((10, 1000), (494, 0, 507, 10)), ((1000, 10), (0, 494, 10, 507))])
def test_a_picture_that_no_try_fits_is_cropped_in_its_middle(size, box):
    found = crop_box(size, (32, 32), Augmentation(crop_scale=(0.9, 1.0)), np.full(40, 0.5))
    assert np.abs(np.array(found) - box).max() <= 1


def test_fixed_crops_are_of_one_size_at_every_place():
    left, top, right, bottom = boxes((256, 300), (224, 224), FIXED).T
    assert set((right - left).tolist()) == set((bottom - top).tolist()) == {224}
    assert (left.min(), top.min()) == (0, 0)
    assert (right.max(), bottom.max()) == (300, 256)
    assert abs(left.mean() - 38) < 3
    assert abs(top.mean() - 16) < 2
    left, top, right, bottom = boxes((700, 1024), (96, 192), FIXED).T  # the width is what is covered
    assert set((right - left).tolist()) == {896}
    assert set((bottom - top).tolist()) == {448}


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_none_is_the_evaluation_of_the_whole_picture(size):
    picture = photo(640, 480)
    whole = dataclasses.replace(Preprocess.evaluation(size), crop_fraction=1.0).pixels(picture)
    seen = crop(picture, size, 3, NONE, 5)
    assert np.abs(seen.astype(int) - whole).mean() < 3
    assert np.array_equal(seen, crop(picture, size, 3, dataclasses.replace(NONE, vflip=True, rotate=30), 6))


picture_sides = st.integers(1, 90)
kinds = st.sampled_from(["none", "fixed-crop", "random-crop", "colour-jitter"])


@given(
    seed=st.integers(0, 2**63 - 1),
    width=picture_sides,
    height=picture_sides,
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    channels=st.sampled_from([1, 3]),
    mode=st.sampled_from(["L", "RGB"]),
    kind=kinds,
    rotate=st.sampled_from([0.0, 10.0, 180.0]),
)
@settings(max_examples=80, deadline=None)
def test_a_crop_is_a_pure_function_of_its_seed_at_any_size(seed, width, height, size, channels, mode, kind, rotate):
    picture = noise(width, height).convert(mode)
    augmentation = Augmentation(kind, rotate=rotate, vflip=True)
    first, second = (crop(picture, size, channels, augmentation, seed) for _ in range(2))
    assert first.shape == (*size, channels)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert first.flags.writeable
    assert np.array_equal(first, second)


@given(picture=st.tuples(picture_sides, picture_sides), size=st.tuples(picture_sides, picture_sides), kind=kinds,
       seed=st.integers(0, 2**40))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_every_box_lies_in_its_picture(picture, size, kind, seed):
    box = crop_box(picture, size, Augmentation(kind), random_uniform(seed, 40))
    assert 0 <= box.left < box.right <= picture[1]
    assert 0 <= box.top < box.bottom <= picture[0]


def test_seeds_differ_and_jitter_keeps_the_place():
    picture = noise(64, 48)
    crops = {crop(picture, (32, 32), 3, RANDOM, seed).tobytes() for seed in range(50)}
    assert len(crops) == 50
    jittered = Augmentation("colour-jitter")
    assert crops == {crop(picture, (32, 32), 3, jittered, seed).tobytes() for seed in range(50)}


def test_a_crop_holds_the_pixels_of_its_box():
    picture = noise(64, 48)
    crops = [crop(picture, (48, 64), 3, STILL, seed) for seed in range(20)]
    assert any(np.array_equal(pixels, np.asarray(picture)) for pixels in crops)


@pytest.mark.parametrize("size", [(500, 375), (1024, 768), (2048, 1536)])
def test_crops_of_files_are_within_three_grey_levels_of_those_of_whole_pictures(size, tmp_path):
    path = tmp_path / "photo.jpg"
    photo(*size).save(path, quality=92)
    picture = open_image(path)
    for seed in range(10):
        from_file, from_picture = (crop(source, (224, 224), 3, RANDOM, seed) for source in (path, picture))
        assert np.abs(from_file.astype(int) - from_picture).mean() < 3
    assert np.array_equal(crop(io.BytesIO(path.read_bytes()), (224, 224), 3, RANDOM, 9), from_file)


def test_greyscale_in_and_out():
    colour, grey = photo(200, 150), photo(200, 150).convert("L")
    one = crop(colour, (64, 64), 1, RANDOM, 3)
    assert one.shape == (64, 64, 1)
    assert np.abs(one.astype(int) - crop(grey, (64, 64), 1, RANDOM, 3)).max() <= 2
    three = crop(grey, (64, 64), 3, RANDOM, 3)
    assert (three == crop(grey, (64, 64), 1, RANDOM, 3)).all()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "no.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    with pytest.raises(DataError, match=r"no\.jpg cannot be read"):
        crop(tmp_path / "no.jpg", (8, 8), 3, RANDOM, 0)


# --- resampling


@given(
    picture=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    grey=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_scaling_is_pillows_but_for_rounding_and_clipping(picture, size, grey):
    image = photo(picture[1], picture[0]).convert("L" if grey else "RGB")
    expected = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), int)
    result = scaled(np.asarray(image), size).numpy()
    assert result.shape == expected.shape
    difference = np.abs(result - expected)
    assert difference.mean() <= 0.5
    assert difference.max() <= 12  # where one of the two passes overshoots white or black, and is clipped


def test_a_huge_picture_is_scaled_as_by_pillow():
    image = photo(4000, 3000)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), int)
    assert np.abs(scaled(np.asarray(image), (32, 32)).numpy() - expected).max() <= 2


# --- turns


def ramp(side=64):
    """Bright to the right, and half as much downwards."""
    right, down = np.meshgrid(np.arange(side), np.arange(side))
    return Image.fromarray((right * 2 + down).astype(np.uint8)).convert("RGB")


def slopes(pixels):
    """How much brighter to the right and downwards."""
    grey = pixels[:, :, 0].astype(int)
    return int(grey[:, -8:].mean() - grey[:, :8].mean()), int(grey[-8:].mean() - grey[:8].mean())


def test_half_of_the_crops_are_flipped_and_only_as_asked():
    for hflip in (False, True):
        for vflip in (False, True):
            augmentation = dataclasses.replace(STILL, hflip=hflip, vflip=vflip)
            signs = np.array([slopes(crop(ramp(), (32, 32), 3, augmentation, seed)) for seed in range(400)]) < 0
            right, down = signs.mean(axis=0)
            assert 0.42 < right < 0.58 if hflip else right == 0
            assert 0.42 < down < 0.58 if vflip else down == 0
            if hflip and vflip:
                assert 0.18 < (signs[:, 0] & signs[:, 1]).mean() < 0.32  # independent of each other


def test_quarter_turns_are_all_met_and_need_a_square():
    augmentation = dataclasses.replace(STILL, rot90=True)
    whole = np.asarray(ramp(32))
    counts = dict.fromkeys(range(4), 0)
    for seed in range(200):
        pixels = crop(ramp(32), (32, 32), 3, augmentation, seed)
        counts[next(k for k in counts if np.array_equal(pixels, np.rot90(whole, k)))] += 1
    assert all(30 < count < 70 for count in counts.values())
    with pytest.raises(UsageError, match="rot90 needs square crops, not 32×64"):
        crop(ramp(), (32, 64), 3, augmentation, 0)


@pytest.mark.parametrize("degrees", [-120.0, -30.0, 5.0, 45.0, 90.0, 180.0])
def test_turning_is_pillows_and_leaves_no_black_corner(degrees):
    image = photo(120, 90)
    turned = rotated(torch.from_numpy(np.array(image)), degrees).numpy()
    expected = np.asarray(image.rotate(degrees, Image.Resampling.BILINEAR))
    inside = np.asarray(Image.new("L", image.size, 255).rotate(degrees, Image.Resampling.BILINEAR)) == 255
    assert inside.mean() > 0.3
    assert np.abs(turned[inside].astype(int) - expected[inside]).max() <= 2
    plain = torch.full((50, 80, 3), 200, dtype=torch.uint8)
    assert (rotated(plain, degrees) == 200).all()
    assert (rotated(plain[:, :, 0], degrees) == 200).all()


def test_corners_mirror_what_is_beside_them():
    pixels = torch.zeros(40, 40, dtype=torch.uint8)
    pixels[:, 20:] = 200
    turned = rotated(pixels, 20.0)
    assert turned[0, 0] == 0
    assert turned[-1, 0] == 0
    assert turned[0, -1] == 200
    assert turned[-1, -1] == 200


def test_angles_fill_their_range():
    augmentation = dataclasses.replace(STILL, rotate=25.0)
    angles = []
    for seed in range(200):
        right, down = slopes(crop(ramp(), (64, 64), 3, augmentation, seed)[16:48, 16:48])
        angles.append(math.degrees(math.atan2(right, down) - math.atan2(2, 1)))
    assert -29 < min(angles) < -20
    assert 20 < max(angles) < 29
    assert abs(np.mean(angles)) < 3


# --- colours


def test_factors_fill_their_range_and_follow_from_the_seed():
    factors = colour_factors(range(3000))
    assert factors.shape == (3000, 3)
    assert factors.dtype == torch.float32
    assert 0.6 <= factors.min() < 0.605
    assert 1.395 < factors.max() <= 1.4
    assert torch.allclose(factors.mean(dim=0), torch.ones(3), atol=0.02)
    assert torch.corrcoef(factors.T).fill_diagonal_(0).abs().max() < 0.06
    assert torch.equal(colour_factors([7, 2, 7]), factors[[7, 2, 7]])


def test_jitter_is_torchvisions_brightness_contrast_and_saturation():
    pixels = torch.stack([torch.from_numpy(np.array(photo(60, 40))), torch.from_numpy(np.array(noise(60, 40)))])
    for factors in (colour_factors([1, 2]), colour_factors([3, 4]), torch.tensor([[0.6, 1.4, 0.6], [1.4, 0.6, 1.4]])):
        result = jitter(pixels, factors)
        assert result.shape == pixels.shape
        assert result.dtype == torch.float32
        for row, (brightness, contrast, saturation) in enumerate(factors.tolist()):
            image = pixels[row].permute(2, 0, 1) / 255
            image = functional.adjust_brightness(image, brightness)
            image = functional.adjust_contrast(image, contrast)
            image = functional.adjust_saturation(image, saturation)
            assert (result[row] - image.permute(1, 2, 0) * 255).abs().max() < 0.1


def test_factors_of_one_change_nothing_and_greyscale_has_no_saturation():
    pixels = torch.randint(0, 256, (2, 8, 9, 3), dtype=torch.uint8)
    assert torch.allclose(jitter(pixels, torch.ones(2, 3)), pixels.float(), atol=1e-4)
    grey = pixels[..., :1]
    saturated = jitter(grey, torch.tensor([[0.8, 1.2, 0.6], [1.3, 0.7, 1.4]]))
    assert torch.equal(saturated, jitter(grey, torch.tensor([[0.8, 1.2, 1.0], [1.3, 0.7, 1.0]])))
    as_colour = jitter(grey.expand(-1, -1, -1, 3), torch.tensor([[0.8, 1.2, 0.6], [1.3, 0.7, 1.4]]))
    assert torch.allclose(as_colour, saturated.expand(-1, -1, -1, 3), atol=1e-3)


def test_a_picture_is_jittered_alike_in_every_batch():
    pixels = torch.randint(0, 256, (5, 8, 9, 3), dtype=torch.uint8)
    factors = colour_factors(range(5))
    batch = jitter(pixels, factors)
    assert batch.min() >= 0
    assert batch.max() <= 255
    for row in range(5):
        assert torch.allclose(jitter(pixels[row : row + 1], factors[row : row + 1])[0], batch[row], atol=1e-3)
