"""Detectors: their heads, their losses, windows, crops with boxes and masks, and folders."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import maehub
from maehub.data import Key, Labelled, ObjectClasses, ObjectLabels, Objects, find_images, masks_of
from maehub.dense import AttentionConfig, Detector, DetectorConfig, Target, save_detector, save_segmenter
from maehub.dense.detector import _own, pasted
from maehub.dense.regions import _Pool, _Sampler
from maehub.dense.windows import window_starts
from maehub.errors import DataError, IntegrityError, UsageError
from maehub.images import Preprocess
from maehub.models import Encoder, EncoderConfig
from maehub.train.finetuning.dense.recipes import DenseFacts, anchor_of, settle_objects
from maehub.train.finetuning.dense.views import DenseTransform, ObjectCrops, Targets, object_crop

CLASSES = ObjectClasses(("red", "blue"), (3, 8))


def made(size=64, **changes):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(image_size=(size, size), patch_size=8, width=24, depth=2, heads=2))
    small = {"masks": True, "width": 16, "convolutions": 1, "hidden": 32, "anchor": 4.0}
    return Detector(encoder, DetectorConfig(CLASSES, **small | changes))


def target(seed, *boxes, size=64):
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    places = torch.arange(len(boxes)) % 2
    return Target(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), places, masks, seed)


# -- heads and losses


def bilinear(level, y, x):
    """A level (C, h, w) at a place, whose middles of pixels are whole; beyond half a pixel from the edge nothing."""
    height, width = level.shape[1:]
    if y < -1 or x < -1 or y > height or x > width:
        return np.zeros(len(level))
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return (
        level[:, top, left] * (1 - down) * (1 - across) + level[:, top, right] * (1 - down) * across
        + level[:, bottom, left] * down * (1 - across) + level[:, bottom, right] * down * across
    )  # fmt: skip


def test_regions_are_pooled_where_they_are():
    """Written out: the level by the size of the region, its edges half a pixel off the middles, n samples each."""
    draw = np.random.default_rng(0)
    strides = {"a": 4.0, "b": 8.0, "c": 14.0, "d": 28.0}
    levels = {name: torch.from_numpy(draw.normal(size=(2, 3, 60, 60)).astype(np.float32)) for name in strides}
    boxes = np.array([[3.3, 5.1, 40.7, 30.2], [10, 10, 150.5, 140.2], [0, 0, 200, 226], [5, 8, 236, 221]], np.float32)
    found = _Pool(strides, 112.0, 7)(levels, [torch.from_numpy(boxes[:2]), torch.from_numpy(boxes[2:])], None)
    for number, (left, top, right, bottom) in enumerate(boxes):
        size = np.sqrt((right - left) * (bottom - top))
        name = list(strides)[int(np.clip(np.floor(2 + np.log2(size / 112)), 0, 3))]
        level, stride = levels[name][number // 2].numpy(), strides[name]
        y0, x0 = top / stride - 0.5, left / stride - 0.5
        bins = (bottom - top) / stride / 7, (right - left) / stride / 7
        counts = [int(np.ceil(one)) for one in bins]
        for row, column in ((0, 0), (3, 5), (6, 6)):
            samples = [
                bilinear(level, y0 + (row + (i + 0.5) / counts[0]) * bins[0],
                         x0 + (column + (j + 0.5) / counts[1]) * bins[1])
                for i in range(counts[0]) for j in range(counts[1])
            ]  # fmt: skip
            np.testing.assert_allclose(found[number, :, row, column].numpy(), np.mean(samples, axis=0), atol=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_pictures():
    """Whatever it is cut into, by processes or to save memory; a picture without objects counts."""
    model = made().train()
    images = torch.randn(3, 3, 64, 64)
    targets = [target(5, (4, 4, 40, 30), (30, 30, 60, 62)), target(6), target(7, (0, 0, 64, 64))]
    whole = model.losses(images, targets)
    each = [model.losses(images[place : place + 1], targets[place : place + 1]) for place in range(3)]
    torch.testing.assert_close(whole, sum(each) / 3)
    whole.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    model.losses(images[1:2], targets[1:2]).backward()  # of a picture of nothing every parameter has a gradient too
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_losses_are_those_of_what_was_drawn():
    """Of objectness and boxes of anchors, written out with what torchvision assigns."""
    model = made(masks=False).train()
    images, truth = torch.randn(1, 3, 64, 64), target(5, (4, 4, 40, 30))
    kept = {}
    network = model.regions.proposals
    compute = network.compute_loss

    def spy(objectness, deltas, labels, wanted):
        kept.update(objectness=objectness, deltas=deltas, labels=labels[0], wanted=wanted[0])
        kept["found"] = compute(objectness, deltas, labels, wanted)
        return kept["found"]

    network.compute_loss = spy
    model.losses(images, [truth])
    network.fg_bg_sampler.seeds = [5]
    objects, nothing = (part[0].bool() for part in network.fg_bg_sampler([kept["labels"]]))
    assert objects.sum() + nothing.sum() == 256
    share = torch.sigmoid(kept["objectness"].flatten().double())
    crossed = -(torch.log(share[objects]).sum() + torch.log(1 - share[nothing]).sum()) / 256
    off = (kept["deltas"][objects] - kept["wanted"][objects]).abs().sum() / 256
    torch.testing.assert_close(kept["found"][0].double(), crossed)
    torch.testing.assert_close(kept["found"][1], off)


@given(st.integers(0, 2**62), st.integers(0, 40), st.integers(0, 40), st.integers(1, 30))
def test_what_is_drawn_is_a_function_of_the_seed(seed, objects, nothing, count):
    labels = torch.cat([torch.ones(objects), torch.zeros(nothing), -torch.ones(5)])
    sampler = _Sampler(count, 0.25, 15)
    sampler.seeds = [seed, seed]
    some, none = sampler([labels, labels])
    assert torch.equal(some[0], some[1])
    assert torch.equal(none[0], none[1])
    assert some[0].sum() == min(objects, count // 4)
    assert none[0].sum() == min(nothing, count - int(some[0].sum()))
    assert not some[0][labels < 1].any()
    assert not none[0][labels != 0].any()


def test_anchors_are_as_small_as_the_objects():
    assert anchor_of(np.full(10, 32.0), 4.0) == 8
    assert anchor_of(np.full(10, 200.0), 4.0) == 8
    assert anchor_of(np.full(10, 16.0), 4.0) == 4
    assert anchor_of(np.full(10, 1.0), 4.0) == 2


# -- pictures of any size


@given(st.integers(1, 400), st.integers(16, 64))
def test_every_place_is_asked_of_one_window(side, window):
    starts = window_starts(side, window)
    parts = [_own(starts, window, start) for start in starts]
    for place in np.arange(0, side, 0.5):
        owners = [start for start, (low, high) in zip(starts, parts, strict=True) if low <= place < high]
        assert len(owners) == 1
        assert owners[0] <= place < owners[0] + window


def test_an_object_is_found_once_whatever_windows_see_it(monkeypatch):
    """A network that finds what is white: of a large picture the same boxes, in its own pixels."""
    model = made(32, masks=False, fitted=False)
    pixels = np.zeros((100, 130, 3), np.uint8)
    truth = [(5, 6, 15, 14), (60, 40, 70, 52), (118, 88, 130, 100), (26, 60, 36, 70)]
    for left, top, right, bottom in truth:
        pixels[top:bottom, left:right] = 255

    def find(images):
        found = []
        for image in images:
            white = (image[0] > 1).numpy()
            rows, columns = white.any(axis=1).nonzero()[0], white.any(axis=0).nonzero()[0]
            if not len(rows):
                found.append((torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)))
                continue
            box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            found.append((torch.tensor([box], dtype=torch.float32), torch.ones(1), torch.zeros(1, dtype=torch.long)))
        return found

    monkeypatch.setattr(model, "forward", find)
    found = model.predict(pixels)
    assert sorted(map(tuple, found.boxes.astype(int).tolist())) == sorted(truth)
    fitted = made(32, masks=False)
    monkeypatch.setattr(fitted, "forward", find)
    small = np.zeros((64, 40, 3), np.uint8)
    small[16:32, 8:24] = 255
    np.testing.assert_allclose(fitted.predict(small).boxes, [[8, 16, 24, 32]], atol=2.5)
    assert fitted.config.inner_size((64, 40), (32, 32)) == (32, 20)


def test_masks_lie_in_their_boxes():
    mask = torch.zeros(28, 28)
    mask[:, :14] = 1
    drawn = pasted(mask, torch.tensor([10.0, 20.0, 30.0, 26.0]), (40, 50))
    assert drawn[20:26, 10:20].all()
    assert drawn.sum() == 60
    assert pasted(torch.ones(28, 28), torch.tensor([-5.0, -5.0, 3.0, 2.0]), (40, 50)).sum() == 6


def test_a_detector_predicts_and_is_what_was_saved(tmp_path):
    for name, changes in {
        "plain": {},
        "windowed": {
            "attention": AttentionConfig(window=3, whole=(1,), relative="decomposed", cls=False), "fitted": False,
        },
        "boxes": {"masks": False, "short_side": 70, "fitted": False},
    }.items():  # fmt: skip
        model = made(**changes).eval()
        for layer in (model.regions.heads.box_predictor.cls_score,):
            torch.nn.init.normal_(layer.weight, std=1)
        save_detector(model, tmp_path / name)
        again = maehub.load_detector(tmp_path / name)
        pixels = np.random.default_rng(0).integers(0, 256, (90, 75, 3)).astype(np.uint8)
        one, other = model.predict(pixels), again.predict(pixels)
        assert len(one) > 0
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.boxes[:, 2:] <= [75, 90]).all()
        assert (np.diff(one.scores) <= 0).all()
        assert (one.masks is None) == (name == "boxes")
        if one.masks:
            assert masks_of(one.masks).shape == (len(one), 90, 75)
        assert maehub.load(tmp_path / name).config.depth == 2
        assert again.config == model.config


def test_folders_that_are_no_detector_are_refused(tmp_path):
    save_detector(made(), tmp_path / "m")
    with pytest.raises(UsageError, match="no segmenter"):
        maehub.load_segmenter(tmp_path / "m")
    with pytest.raises(UsageError, match="a Segmenter can be saved here, not a Detector"):
        save_segmenter(made(), tmp_path / "n")
    path = tmp_path / "m" / "detector.json"
    said = json.loads(path.read_text())
    for wrong in ({"width": 0}, {"anchor": "x"}, {"classes": {"names": ["a", "a"], "ids": [1, 2]}}, {"more": 1},
                  {"task": "segment"}, {"fitted": 3}, {"width": 24}, {"attention": {"window": -1}}):  # fmt: skip
        path.write_text(json.dumps(said | wrong))
        with pytest.raises(IntegrityError):
            maehub.load_detector(tmp_path / "m")
    path.write_text(json.dumps(said))
    (tmp_path / "m" / "detector.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"no detector\.safetensors"):
        maehub.load_detector(tmp_path / "m")


def test_arrays_of_other_channels_are_refused():
    with pytest.raises(DataError, match="uint8"):
        made().predict(np.zeros((8, 8, 1), np.uint8))


# -- crops


@pytest.fixture
def drawn(tmp_path):
    """A picture whose blocks of colour are its objects, by outlines and by codes."""
    pixels = np.zeros((60, 90, 3), np.uint8)
    boxes = np.array([[10, 5, 40, 25], [50, 30, 88, 58], [2, 40, 20, 59]], np.float32)
    for place, (left, top, right, bottom) in enumerate(boxes.astype(int)):
        pixels[top:bottom, left:right, place] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shapes = tuple((np.array([[a, b], [c, b], [c, d], [a, d]], np.float64),) for a, b, c, d in boxes)
    return tmp_path / "a.png", Objects((60, 90), boxes, np.array([0, 1, 0]), np.array([False] * 3), shapes)


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_and_masks_are_moved_as_the_picture_is(drawn, masks):
    path, objects = drawn
    transform = DenseTransform(Preprocess((48, 48), 8), None, (0.6, 1.4), vflip=True, rot90=True, colours=False)
    seen = 0
    for seed in range(60):
        pixels, shown = object_crop(transform, path, objects, seed, masks=masks)
        for number, box in enumerate(shown.boxes.numpy()):
            left, top, right, bottom = np.round(box).astype(int)
            colour = shown.masks[number].numpy() if masks else None
            inside = pixels[top + 1 : bottom - 1, left + 1 : right - 1]
            if inside.size:
                assert (inside.max(axis=2) > 120).mean() > 0.9, seed
                seen += 1
            if masks:
                assert colour.sum() > 0
                assert not colour[:top].any()
                assert not colour[:, right:].any()
        if not masks:
            continue
        strong = pixels.max(axis=2) > 200
        covered = shown.masks.numpy().any(axis=0)
        assert (strong & ~covered).sum() <= 0.03 * strong.size
    assert seen > 60


def test_codes_are_drawn_as_outlines_are(drawn):
    path, objects = drawn
    coded = Objects(objects.size, objects.boxes, objects.labels, objects.ignored, tuple(objects.codes()))
    transform = DenseTransform(Preprocess((48, 48), 8), None, (1.0, 1.0), rot90=True)
    for seed in range(10):
        one, other = (object_crop(transform, path, which, seed, masks=True)[1] for which in (objects, coded))
        torch.testing.assert_close(one.boxes, other.boxes)
        assert torch.equal(one.masks, other.masks)


def test_what_is_ignored_or_cut_away_is_not_trained_on(drawn):
    path, objects = drawn
    transform = DenseTransform(Preprocess((96, 96), 8), None, (1.0, 1.0), hflip=False)
    assert len(object_crop(transform, path, objects, 0, masks=True)[1].labels) == 3
    some = Objects(objects.size, objects.boxes, objects.labels, np.array([True, False, False]), objects.shapes)
    assert object_crop(transform, path, some, 0, masks=True)[1].labels.tolist() == [1, 0]
    near = DenseTransform(Preprocess((8, 8), 8), None, (1.0, 1.0))
    counts = {len(object_crop(near, path, objects, seed, masks=False)[1].labels) for seed in range(20)}
    assert 0 in counts


def test_batches_are_cut_with_their_targets(drawn):
    path, objects = drawn
    samples = find_images(path.parent)
    labelled = Labelled(samples, np.ones((1, 2), bool), CLASSES.names, objects=ObjectLabels((objects,), CLASSES))
    transform = DenseTransform(Preprocess((48, 48), 8), None, (0.5, 2.0), fitted=True)
    batch = ObjectCrops(labelled, transform, True, cache=True).__getitems__([Key(0, 5, 0), Key(0, 6, 0), Key(0, 5, 1)])
    assert batch.pixels.shape == (3, 48, 48, 3)
    assert torch.equal(batch.pixels[0], batch.pixels[2])
    parts = batch.targets.split(2)
    assert [len(part) for part in parts] == [2, 1]
    assert isinstance(parts[0], Targets)


def test_recipes_are_as_published():
    sizes = ((768, 12), (1024, 24), (1280, 32))
    for (width, depth), decay, drop, epochs in zip(
        sizes, (0.7, 0.8, 0.9), (0.1, 0.4, 0.5), (100, 100, 75), strict=True
    ):
        found = settle_objects("vitdet", DenseFacts(width, depth, 118_287), {})
        assert (found.layer_decay, found.drop_path, round(found.epochs)) == (decay, drop, epochs)
        assert (found.weight_decay, found.batch_size, found.resize, found.regions) == (0.1, 64, (0.1, 2.0), 512)
        whole = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}[depth]
        assert found.attention == AttentionConfig(window=14, whole=whole, relative="decomposed", cls=False)
    steps = settle_objects("vitdet", DenseFacts(768, 12, 118_287), {}).steps
    assert steps == pytest.approx(184_375, rel=0.01)
    with pytest.raises(UsageError, match="auto, vitdet"):
        settle_objects("official", DenseFacts(768, 12, 100), {})
