"""Opening pictures safely, and the transforms, beside those of the libraries that they are named after."""

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import WITH_TESTS
from PIL import Image, ImageOps

from maehub.data.workers import examine
from maehub.errors import DataError, IntegrityError, UsageError
from maehub.images import decoding
from maehub.images.augment import Augmentation, crop
from maehub.images.decoding import MAX_PIXELS, Box, open_image, open_part, printable
from maehub.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, read_pixels


def photo(width, height, seed=0):
    """Smooth structure with some noise, as a photo has."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 3), dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data, **options):
    return np.asarray(open_image(io.BytesIO(data), **options))


SIZES = [(640, 480), (333, 500), (224, 224), (97, 31), (255, 256), (1000, 301)]


# --- transforms beside their namesakes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [96, 224, 448])
def test_official_evaluation_equals_torchvision(size, side):
    from torchvision import transforms

    fraction = 0.875 if side <= 224 else 1.0
    theirs = transforms.Compose(
        [
            transforms.Resize(round(side / fraction), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    image, ours = photo(*size), Preprocess.evaluation(side)
    expected, result = theirs(image), ours(image)
    assert result.dtype == torch.float32
    assert result.shape == (3, side, side)
    grey_levels = (ours.denormalise(expected[None]) - ours.denormalise(result[None])).abs() * 255
    assert grey_levels.max() <= 1.01
    assert (grey_levels > 0.5).float().mean() < 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [224, 448])
def test_timm_transform_equals_timm(size, side):
    from timm.data import create_transform

    theirs = create_transform(
        (3, side, side), crop_pct=0.9, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    ours = Preprocess.named("timm", side)
    image = photo(*size)
    difference = (ours.denormalise(theirs(image)[None]) - ours.denormalise(ours(image)[None])).abs() * 255
    assert difference.max() <= 1.01


@pytest.mark.parametrize("size", SIZES)
def test_transformers_transform_equals_transformers(size):
    from transformers import ViTImageProcessor

    theirs = ViTImageProcessor(
        size={"height": 224, "width": 224}, resample=2, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    ours = Preprocess.named("transformers", 224)
    image = photo(*size)
    expected = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"])
    assert expected.shape == (1, 3, 224, 224)
    assert ((ours.denormalise(expected) - ours.denormalise(ours(image)[None])).abs() * 255).max() <= 1.01


def test_the_three_transforms_differ():
    image = photo(640, 480)
    results = [Preprocess.named(name, 224).pixels(image) for name in ("official", "timm", "transformers")]
    assert all(np.abs(a.astype(int) - b).max() > 5 for a, b in ((results[0], results[1]), (results[1], results[2])))
    with pytest.raises(UsageError, match="official"):
        Preprocess.named("keras", 224)


def test_a_rectangle_is_covered_and_cropped():
    ramp = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (400, 1))  # brightness grows to the right
    pixels = Preprocess.evaluation((448, 224)).pixels(Image.fromarray(ramp))
    assert pixels.shape == (448, 224, 3)
    # 400 becomes 448, and the middle half of it is left: a quarter to three quarters of the ramp.
    assert pixels[:, 0].mean() == pytest.approx(64, abs=2)
    assert pixels[:, -1].mean() == pytest.approx(191, abs=2)
    wide = Preprocess.evaluation((96, 224), patch_size=8)
    assert wide.crop_fraction == 0.875
    assert wide.pixels(photo(50, 300)).shape == (96, 224, 3)


def test_with_size_keeps_the_rule_of_a_named_transform():
    for name in ("official", "timm", "transformers"):
        assert Preprocess.named(name, 224).with_size(448) == Preprocess.named(name, 448)
    assert Preprocess.evaluation(224).with_size(448).crop_fraction == 1.0
    own = replace(Preprocess.evaluation(96), crop_fraction=1.0)
    assert own.with_size(448) == replace(own, size=(448, 448))


def test_pad_keeps_everything_and_fills_with_the_mean():
    pad = replace(Preprocess.evaluation(96, patch_size=16), resize="pad")
    image = Image.new("RGB", (400, 100), (255, 0, 0))
    pixels = pad.pixels(image)
    assert pixels.shape == (96, 96, 3)
    assert (pixels[36:60] == (255, 0, 0)).all()
    assert (pixels[:36] == [round(255 * mean) for mean in IMAGENET_MEAN]).all()
    assert pad(image)[:, 0, 0].abs().max() < 0.01
    assert replace(pad, size=(90, 90)).pixels(image).shape == (96, 96, 3)  # rounded up to whole patches


def test_native_keeps_pixels_that_fit_and_rounds_the_rest():
    native = replace(Preprocess.evaluation(96, patch_size=16), resize="native")
    image = photo(64, 48)
    assert (native.pixels(image) == np.asarray(image)).all()
    assert native.pixels(photo(70, 41)).shape == (48, 64, 3)
    assert native.pixels(photo(3, 3)).shape == (16, 16, 3)
    assert native.decode_size is None


def test_row_45_tiny_and_narrow_pictures_have_a_result():
    for name in ("official", "transformers"):
        transform = Preprocess.named(name, 224)
        assert (transform.pixels(Image.new("RGB", (1, 1), (9, 8, 7))) == (9, 8, 7)).all()
        assert transform.pixels(photo(1, 10_000)).shape == (224, 224, 3)
        assert transform.pixels(photo(10_000, 1)).shape == (224, 224, 3)
    for resize in ("pad", "native"):
        shape = replace(Preprocess.evaluation(32), resize=resize).pixels(photo(10_000, 1)).shape
        assert shape == ((32, 32, 3) if resize == "pad" else (16, 10_000, 3))


# --- arrays, channels, numbers


def test_arrays_equal_pictures():
    image = photo(120, 90)
    transform = Preprocess.evaluation(64)
    assert (transform.pixels(np.asarray(image)) == transform.pixels(image)).all()
    grey = image.convert("L")
    assert (transform.pixels(np.asarray(grey)) == transform.pixels(grey)).all()
    assert (transform.pixels(np.asarray(grey)[:, :, None]) == transform.pixels(grey)).all()
    flipped = np.asarray(image)[:, ::-1]  # not contiguous
    assert (transform.pixels(flipped) == transform.pixels(ImageOps.mirror(image))).all()


def test_five_channels_are_each_treated_alike():
    channels = np.stack([np.asarray(photo(80, 60, seed).convert("L")) for seed in range(5)], axis=2)
    transform = Preprocess.evaluation(48, channels=5)
    assert transform.mean == pytest.approx([sum(IMAGENET_MEAN) / 3] * 5)
    pixels = transform.pixels(channels)
    single = Preprocess.evaluation(48, channels=1)
    assert pixels.shape == (48, 48, 5)
    for channel in range(5):
        assert (pixels[:, :, channel] == single.pixels(channels[:, :, channel])[:, :, 0]).all()
    assert transform(channels).shape == (5, 48, 48)
    assert replace(transform, resize="pad", size=(64, 48)).pixels(channels).shape == (64, 48, 5)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8, 2), np.uint8), "2 channels"),
        (np.zeros((8,), np.uint8), "(H, W, C)"),
        (np.zeros((0, 8, 3), np.uint8), "(H, W, C)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array, why):
    with pytest.raises(DataError) as caught:
        Preprocess.evaluation(32).pixels(array)
    assert why in str(caught.value)


def test_a_model_of_four_channels_takes_arrays_only(tmp_path):
    transform = Preprocess.evaluation(32, channels=4)
    photo(40, 40).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="4"):
        read_pixels(tmp_path / "x.png", transform)
    with pytest.raises(DataError, match="array"):
        transform.pixels(photo(40, 40))
    with pytest.raises(UsageError, match="4"):
        open_image(tmp_path / "x.png", channels=4)


def test_normalise_and_back():
    transform = replace(Preprocess.evaluation(32), value_range=(10.0, 210.0))
    pixels = torch.randint(10, 211, (2, 5, 7, 3), dtype=torch.uint8)
    images = transform.normalise(pixels)
    assert images.shape == (2, 3, 5, 7)
    assert images.is_contiguous()
    expected = ((pixels.double() - 10) / 200 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert torch.allclose(images.double(), expected.permute(0, 3, 1, 2), atol=1e-6)
    assert torch.allclose(transform.denormalise(images), (pixels.permute(0, 3, 1, 2) - 10.0) / 200, atol=1e-6)
    outside = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1).expand(-1, -1, -1, 3)
    assert torch.allclose(transform.denormalise(transform.normalise(outside))[0, 0, 0], torch.tensor([0.0, 1.0]))
    unclipped = replace(transform, clip=False).normalise(outside)[0, 0, 0]
    assert unclipped[0] == pytest.approx((-0.05 - IMAGENET_MEAN[0]) / IMAGENET_STD[0], abs=1e-5)


def test_preprocess_survives_json_and_refuses_the_unknown():
    for transform in (
        Preprocess.evaluation((64, 96), channels=5, patch_size=8),
        replace(Preprocess(), resize="pad", value_range=(0, 1)),
    ):
        assert Preprocess.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    with pytest.raises(IntegrityError, match="trust_remote_code"):
        Preprocess.from_dict({"size": [224, 224], "trust_remote_code": True})
    for wrong in ({"size": [0, 4]}, {"resize": "crop"}, {"mean": "abc"}, {"std": [0, 1, 1]}, {"crop_fraction": 1.5},
                  {"interpolation": "nearest"}, {"patch_size": 0}, {"value_range": [1, 1]}, {"size": 2.5}):  # fmt: skip
        with pytest.raises(IntegrityError):
            Preprocess.from_dict(wrong)
    with pytest.raises(UsageError, match="crop_fraction"):
        Preprocess(crop_fraction=0)


# --- opening


def test_formats_are_known_by_content(tmp_path):
    image = photo(40, 30)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        path = tmp_path / f"{kind}.dat"
        image.save(path, kind)
        for source in (path, str(path), os.fsencode(path), io.BytesIO(path.read_bytes())):
            result = open_image(source)
            assert result.mode == "RGB"
            assert result.size == (40, 30)
        assert np.abs(np.asarray(result, int) - np.asarray(image)).mean() < (20 if kind == "GIF" else 12)
        assert open_image(path, channels=1).mode == "L"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_row_42_eight_orientations_give_one_picture(tmp_path, kind):
    upright = photo(320, 192)
    expected = None
    turns = Image.Transpose
    for orientation, turn in enumerate(
        [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE, turns.ROTATE_90,
         turns.TRANSVERSE, turns.ROTATE_270], start=1
    ):  # fmt: skip
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.img"
        options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
        stored.save(path, kind, exif=exif, **options)
        image = open_image(path)
        assert image.size == (320, 192), orientation
        expected = np.asarray(image, int) if expected is None else expected
        assert np.abs(np.asarray(image, int) - expected).max() <= (6 if kind == "JPEG" else 0), orientation
        assert read_pixels(path, Preprocess.evaluation(64)).shape == (64, 64, 3)
        scaled = open_image(path, scaled_to=(96, 160))
        assert scaled.size == ((160, 96) if kind == "JPEG" else (320, 192)), orientation
        assert np.abs(np.asarray(scaled.resize((20, 12)), int) - np.asarray(image.resize((20, 12)))).max() < 12


def test_a_picture_object_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(80, 40).save(tmp_path / "x.jpg", exif=exif)
    native = replace(Preprocess.evaluation(32, patch_size=8), resize="native")
    with Image.open(tmp_path / "x.jpg") as image:
        assert native.pixels(image).shape == (80, 40, 3)


def test_broken_exif_is_no_reason_to_refuse():
    good = encoded(photo(20, 10), "JPEG")
    junk = b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + b"\xff" * 20
    data = good[:2] + b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk + good[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opened(data).shape == (10, 20, 3)


def test_row_43_modes_become_rgb():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    stacked = np.stack([grey] * 3, axis=2)
    assert (opened(encoded(Image.fromarray(grey))) == stacked).all()
    assert (opened(encoded(Image.fromarray(grey), "TIFF"), channels=1) == grey).all()
    bits = Image.fromarray((grey > 100).astype(np.uint8) * 255).convert("1")
    assert (opened(encoded(bits)) == (stacked > 100) * 255).all()
    # alpha over white: half transparent black is middle grey, wholly transparent is white
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(0, 0, 0, 255), (0, 0, 0, 128), (200, 0, 0, 0)])
    expected = np.array([[[0] * 3, [127] * 3, [255] * 3]])
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert np.abs(opened(encoded(rgba, kind, **options)) - expected).max() <= 1, kind
    la = Image.merge("LA", (Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 128)))
    assert (opened(encoded(la)) == 127).all()
    assert (opened(encoded(la), channels=1) == 127).all()
    palette = photo(16, 16).quantize(8)
    assert (opened(encoded(palette)) == np.asarray(palette.convert("RGB"))).all()
    transparent = Image.new("P", (2, 1))
    transparent.putpalette([10, 20, 30, 40, 50, 60])
    transparent.putdata([0, 1])
    assert opened(encoded(transparent, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert opened(encoded(transparent, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = Image.fromarray(stacked)
    assert (opened(encoded(keyed, transparency=(0, 0, 0)))[0, 0] == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(opened(encoded(cmyk, "TIFF")) - np.array([255, 0, 0])).max() == 0
    assert np.abs(opened(encoded(cmyk, "JPEG", quality=100)) - np.array([255, 0, 0])).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_row_43_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(opened(data) - np.array([255, 0, 0])).max() <= 2


def test_row_44_wide_numbers_are_scaled_never_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.round(ramp / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.abs(opened(encoded(Image.fromarray(ramp), kind), channels=1).astype(int) - expected).max() <= 1
    as_ints = Image.fromarray(ramp.astype(np.int32))
    assert np.abs(opened(encoded(as_ints, "TIFF"), channels=1).astype(int) - expected).max() <= 1
    full = np.linspace(0, 2**31 - 1, 256).astype(np.int32).reshape(16, 16)
    assert opened(encoded(Image.fromarray(full), "TIFF"), channels=1).flatten().tolist() == list(range(256))
    with pytest.raises(DataError, match="-5"):
        opened(encoded(Image.fromarray(full - 5), "TIFF"))
    unsigned = encoded(Image.fromarray(np.linspace(0, 2**32 - 1, 256).astype(np.uint32).view(np.int32).reshape(16, 16)), "TIFF")  # fmt: skip  # noqa: E501
    sample_format = struct.pack("<HHLHH", 339, 3, 1, 2, 0)  # the tag that says signed
    assert unsigned.count(sample_format) == 1
    unsigned = unsigned.replace(sample_format, struct.pack("<HHLHH", 339, 3, 1, 1, 0))
    assert opened(unsigned, channels=1).flatten().tolist() == list(range(256))


def test_row_44_floats_are_scaled_from_0_to_1_or_refused():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert opened(encoded(Image.fromarray(ramp), "TIFF"), channels=1).flatten().tolist() == list(range(256))
    for wrong in (ramp * 255, ramp - 0.5, ramp + np.float32(np.nan)):
        with pytest.raises(DataError, match="0 and 1"):
            opened(encoded(Image.fromarray(wrong), "TIFF"))


def test_row_44_sixteen_bits_of_a_picture_object():
    ramp = Image.fromarray(np.full((40, 40), 32768, np.uint16))
    assert (Preprocess.evaluation(32).pixels(ramp) == 128).all()


# --- bad files


def broken_files():
    jpeg, png = encoded(photo(200, 150), "JPEG"), encoded(photo(60, 50), "PNG")
    crc = bytearray(png)
    crc[-20] ^= 0xFF
    return {
        "empty": (b"", "empty"),
        "text": (b"this is no picture at all", "begins with"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "crc": (bytes(crc), ""),
        "head only": (jpeg[:20], ""),
        "riff": (b"RIFF\x10\0\0\0WAVEfmt ", "begins with"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_row_39_broken_files_are_named(tmp_path, name):
    data, why = broken_files()[name]
    path = tmp_path / f"{name}.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert why in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6
    assert caught.value.__cause__ is not None


JPEG, PNG, TIFF, WEBP, GIF = (encoded(photo(64, 48), kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([JPEG, PNG, TIFF, WEBP, GIF]), st.data())
def test_row_39_cut_or_changed_anywhere_gives_a_picture_or_a_data_error(data, draw):
    place = draw.draw(st.integers(0, len(data) - 1))
    if draw.draw(st.booleans()):
        data = data[:place]
    else:
        data = data[:place] + bytes([draw.draw(st.integers(0, 255))]) + data[place + 1 :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mode = open_image(io.BytesIO(data), max_pixels=10**6).mode
        except DataError:
            mode = "RGB"
    assert mode == "RGB"


FILES = {
    " ".join([kind, *map(str, options.values())]): encoded(
        photo(120, 90).quantize() if kind == "GIF" else photo(120, 90), kind, **options
    )
    for kind, options in [
        *((kind, {}) for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "AVIF", "JPEG2000")),
        *(("TIFF", {"compression": f"tiff_{method}"}) for method in ("lzw", "adobe_deflate")),
        *(("TIFF", {"compression": method}) for method in ("jpeg", "packbits")),
        *(("JPEG", {"progressive": True}), ("WEBP", {"lossless": True}), ("JPEG2000", {"no_jp2": True})),
    ]
}


@pytest.mark.parametrize("kind", FILES)
def test_row_39_what_is_cut_off_is_refused_or_all_there(kind):
    """Never a picture whose rest is grey, or of which a part is another."""
    data = FILES[kind]
    whole, refused = opened(data), 0
    lengths = {*range(0, len(data), len(data) // 40 + 1), *range(len(data) - 5, len(data))}
    for length in sorted(lengths):
        try:
            found = opened(data[:length])
        except DataError:
            refused += 1
        else:
            assert np.array_equal(found, whole), length
    assert refused >= len(lengths) - 6  # of some only the marks of the end are missing


def png_of_zeros(width, height, grey=True):
    """A valid PNG of one colour without holding its pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" * (1 + width * (1 if grey else 3))
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_row_40_a_picture_of_100_megapixels_decodes_in_bounded_memory(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_of_zeros(10_000, 10_000))
    assert path.stat().st_size < 200_000
    code = (
        "import sys; from memory import peak; from maehub.images.preprocess import Preprocess, read_pixels\n"
        "with peak() as grown: print(read_pixels(sys.argv[1], Preprocess.evaluation(224)).shape)\n"
        "print(grown[0])"
    )
    command = [sys.executable, "-W", "error", "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=WITH_TESTS)
    shape, kilobytes = done.stdout.splitlines()
    assert shape == "(224, 224, 3)"
    assert int(kilobytes) < 300_000


def test_row_40_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    data = png_of_zeros(20_000, 10)
    path.write_bytes(data.replace(struct.pack(">II", 20_000, 10), struct.pack(">II", 20_000, 10_000)))
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    box = Box(0, 0, 8, 8)
    for way in (
        lambda: open_image(path),
        lambda: open_part(path, lambda _: box, box.size),
        lambda: read_pixels(path, Preprocess.evaluation(32)),
        lambda: crop(os.fspath(path), (32, 32), 3, Augmentation(), 0),
    ):
        with pytest.raises(DataError, match=r"20000×10000 pixels are 200 MP.*179 MP"):
            way()
    assert "200 MP" in examine(path, statistics=True).reason
    with pytest.raises(DataError, match="over the limit"):
        open_image(io.BytesIO(PNG), max_pixels=64 * 48 - 1)
    assert open_image(io.BytesIO(PNG), max_pixels=64 * 48)


@pytest.mark.parametrize("kind", FILES)
def test_row_40_no_decoder_begins_with_too_many_pixels(kind, monkeypatch):
    """Whatever the format; a picture of just the limit is read."""
    data, box = FILES[kind], Box(0, 0, 8, 8)
    size = opened(data, max_pixels=120 * 90).shape[:2]
    assert size == (90, 120)
    for decoder in decoding._DECODERS:
        if decoder[2] is not None:
            monkeypatch.setattr(decoder[2], "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(decoding, "decode_rows", lambda *_: pytest.fail("decoded"))
    for way in (open_image, lambda source, max_pixels: open_part(source, lambda _: box, box.size, max_pixels)):
        with pytest.raises(DataError, match="over the limit"):
            way(io.BytesIO(data), max_pixels=120 * 90 - 1)
        with pytest.raises(pytest.fail.Exception):
            way(io.BytesIO(data), max_pixels=120 * 90)


def test_row_40_and_89_no_global_setting_is_changed():
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    large = png_of_zeros(9_500, 9_500)  # above the size where Pillow warns, which would be an error here
    assert open_image(io.BytesIO(large), channels=1).size == (9_500, 9_500)
    assert warnings.filters == filters
    assert limit == Image.MAX_IMAGE_PIXELS
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert 2 * limit == MAX_PIXELS or limit * 2 - MAX_PIXELS < 2


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


@pytest.mark.parametrize(
    "data", [EPS, b"%PDF-1.4\n", b"SIMPLE  =                    T", b"<svg/>", b"\xc5\xd0\xd3\xc6" + EPS]
)
def test_row_41_other_formats_never_reach_a_decoder(tmp_path, data):
    path = tmp_path / "innocent.jpg"
    path.write_bytes(data)
    code = (
        "import sys; from maehub.images.decoding import open_image; from maehub.errors import DataError\n"
        "def hook(event, arguments):\n"
        "    if event in ('subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.fork'): print('STARTED', event)\n"
        "sys.addaudithook(hook)\n"
        "try: open_image(sys.argv[1])\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "begins with" in done.stdout
    assert "STARTED" not in done.stdout


def test_row_46_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="regular"):
        open_image(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="No such file"):
        open_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="regular"):
        open_image(tmp_path)


def test_row_46_names_that_are_not_text_are_shown_on_one_line(tmp_path):
    path = os.fsencode(tmp_path) + b"/a\nb\xff\x1b[31m.jpg"
    with open(path, "wb") as file:
        file.write(b"nothing")
    with pytest.raises(DataError) as caught:
        open_image(path)
    assert "a\\nb\\xff\\x1b[31m.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert printable("Ärger 猫.png") == "Ärger 猫.png"


# --- scaled decoding


def test_jpegs_are_decoded_as_small_as_is_enough():
    data = encoded(photo(1024, 768), "JPEG")
    assert opened(data).shape[:2] == (768, 1024)
    assert opened(data, scaled_to=(256, 341)).shape[:2] == (384, 512)
    assert opened(data, scaled_to=(192, 256)).shape[:2] == (192, 256)
    assert opened(data, scaled_to=(96, 96)).shape[:2] == (96, 128)
    assert opened(data, scaled_to=(385, 100)).shape[:2] == (768, 1024)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(8, 200), st.integers(8, 200))
def test_scaled_decoding_is_never_smaller_than_needed(width, height, rows, columns):
    data = encoded(Image.new("RGB", (width, height), (10, 200, 30)), "JPEG")
    image = open_image(io.BytesIO(data), scaled_to=(rows, columns))
    assert image.height >= min(rows, height)
    assert image.width >= min(columns, width)
    transform = Preprocess.evaluation((rows, columns))
    assert np.abs(transform.pixels(image).astype(int) - (10, 200, 30)).max() <= 4


@pytest.mark.parametrize("size", [(1024, 768), (1023, 767), (500, 375), (801, 1203)])
@pytest.mark.parametrize("resize", ["centre-crop", "squash", "pad"])
@pytest.mark.parametrize("side", [96, 224])
def test_scaled_decoding_changes_little(tmp_path, size, resize, side):
    photo(*size).save(tmp_path / "x.jpg", quality=90)
    transform = replace(Preprocess.evaluation(side), resize=resize)
    exact = read_pixels(tmp_path / "x.jpg", transform, exact_decode=True)
    scaled = read_pixels(tmp_path / "x.jpg", transform)
    assert exact.shape == scaled.shape
    assert np.abs(exact.astype(int) - scaled).mean() < 2
    assert (transform.pixels(open_image(tmp_path / "x.jpg")) == exact).all()


def test_importing_images_imports_no_torch():
    code = "import sys, maehub.images.preprocess, maehub.data.workers\n"
    code += "print('torch' in sys.modules, 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("size", SIZES)
def test_computing_only_the_crop_moves_pixels_by_two_grey_levels_at_most(tmp_path, size):
    photo(*size).save(tmp_path / "x.png")
    transform = Preprocess.evaluation(224)
    exact = read_pixels(tmp_path / "x.png", transform, exact_decode=True).astype(int)
    quick = read_pixels(tmp_path / "x.png", transform)
    assert np.abs(exact - quick).max() <= 2
    assert np.abs(exact - quick).mean() < 0.5
    assert abs((exact - quick).mean()) < 0.01
