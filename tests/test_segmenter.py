"""Segmenters: decoders against an independent implementation, windows, folders; scores against a plain table."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import maehub
from maehub.data import MapClasses
from maehub.dense import Segmenter, SegmenterConfig, UPerNet, colours_of
from maehub.dense.segmenter import lines
from maehub.dense.windows import window_starts
from maehub.errors import DataError, IntegrityError, UsageError
from maehub.models import Encoder, EncoderConfig
from maehub.train import MapScores, predict_maps
from maehub.train.evaluation.dense.map_scores import confusion_of, score_maps
from maehub.train.evaluation.dense.predicting import label_map

CLASSES = MapClasses(("ground", "red", "blue"), (0, 1, 2), (0, 1, 2))
UPER = {"decoder": "upernet", "layers": (0, 1, 2, 3), "width": 12, "auxiliary": True}


def tiny(decoder="linear", *, window=32, patch=8, short_side=None, classes=CLASSES, **changes):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(window, patch, 3, 16, 4, 2))
    more = (UPER if decoder == "upernet" else {}) | changes
    model = Segmenter(encoder, SegmenterConfig(classes, **({"decoder": decoder} | more), short_side=short_side))
    torch.nn.init.normal_(model.decoder.classify.weight, std=0.5)
    return model.eval()


# -- decoders


def test_upernet_is_transformers():
    """Head and side head, by the weights of one in the other."""
    modeling = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import UperNetConfig

    config = UperNetConfig(hidden_size=12, pool_scales=[1, 2, 3, 6], num_labels=5, auxiliary_channels=12,
                           auxiliary_num_convs=1, auxiliary_concat_input=False, auxiliary_in_channels=16,
                           backbone_config=None, use_pretrained_backbone=False)  # fmt: skip
    torch.manual_seed(1)
    theirs = modeling.UperNetHead(config, in_channels=[16] * 4).eval()
    ours = UPerNet(16, 12, 5, 16, "batch").eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for part in ours.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)

    def give(own, other):
        convolution, norm = own[0], own[1]
        other.conv.load_state_dict(convolution.state_dict())
        other.batch_norm.load_state_dict(norm.state_dict())

    pools = [block.layers[1] for block in theirs.psp_modules.blocks]
    for own, other in zip(ours.pool, pools, strict=True):
        give(own, other)
    give(ours.bottleneck, theirs.bottleneck)
    give(ours.fuse, theirs.fpn_bottleneck)
    for own, other in zip(ours.lateral, theirs.lateral_convs, strict=True):
        give(own, other)
    for own, other in zip(ours.smooth, theirs.fpn_convs, strict=True):
        give(own, other)
    theirs.classifier.load_state_dict(ours.classify.state_dict())
    maps = [torch.randn(2, 16, 6, 7) for _ in range(4)]
    with torch.no_grad():
        taps = [resample(one) for resample, one in zip(ours.neck, maps, strict=True)]
        assert [tuple(tap.shape[2:]) for tap in taps] == [(24, 28), (12, 14), (6, 7), (3, 4)]
        difference = (ours(maps) - theirs(taps)).abs().max()
    assert difference < 1e-5


def test_the_neck_is_written_out():
    """Stride 4 of a patch of 16: each pixel becomes 2×2 by a matrix of its own, norm and GELU, and again."""
    ours = UPerNet(8, 4, 3, 16, "batch").eval()
    first, norm, _, second = ours.neck[0]
    x = torch.randn(1, 8, 2, 3)
    with torch.no_grad():
        found = ours.neck[0](x)

        def doubled(values, layer):
            parts = torch.einsum("bihw,iopq->bohpwq", values, layer.weight)
            return parts.reshape(1, 8, 2 * values.shape[2], 2 * values.shape[3]) + layer.bias[:, None, None]

        wanted = doubled(F.gelu(norm(doubled(x, first))), second)
        assert (found - wanted).abs().max() < 1e-5
        assert (ours.neck[2](x) == x).all()
        assert (ours.neck[3](torch.arange(6.0).reshape(1, 1, 2, 3)) == torch.tensor([[4.0, 5.0]])).all()


def test_a_linear_decoder_is_a_matrix_of_normed_patches():
    model = tiny()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.encoder.features(images, pool="tokens")
        weight, bias = model.decoder.classify.weight[:, :, 0, 0], model.decoder.classify.bias
        coarse = (tokens @ weight.T + bias).transpose(1, 2).reshape(2, 3, 4, 4)
        wanted = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
        assert (model(images) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_every_patch_gives_scores_of_the_size_of_the_picture(patch):
    model = tiny("upernet", window=3 * patch, patch=patch)
    assert model(torch.randn(1, 3, 3 * patch, 2 * patch)).shape == (1, 3, 3 * patch, 2 * patch)


def test_what_is_not_used_is_frozen():
    model = tiny("upernet", layers=(0, 0, 1, 2))
    assert not any(parameter.requires_grad for parameter in model.encoder.blocks[3].parameters())
    assert not model.encoder.norm.weight.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [{"decoder": "fcn"}, {"layers": (0, 1)}, {"layers": (7,)}, {"width": 3}, {"palette": ((0, 0, 0),)}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError):
        tiny(**({"decoder": "linear"} | wrong))


# -- windows


@given(st.integers(1, 400), st.integers(1, 100))
def test_windows_cover_a_side(side, window):
    starts = window_starts(side, window)
    covered = np.zeros(max(side, window), int)
    for start in starts:
        covered[start : start + window] += 1
    assert covered[:side].min() >= 1
    assert starts == sorted(set(starts))
    assert starts[-1] + window == max(side, window)


@pytest.mark.parametrize("size", [(70, 91), (32, 32), (20, 50), (9, 9), (33, 32)])
@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_rows_are_the_average_of_all_windows(size, decoder):
    model = tiny(decoder)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with torch.inference_mode():
        found = torch.cat([rows.clone() for _, rows in model.rows(pixels)], dim=1)
        padded = [max(32, side) for side in size]
        images = torch.zeros(1, 3, *padded)
        images[:, :, : size[0], : size[1]] = model.encoder.preprocess.normalise(torch.from_numpy(pixels[None]))
        sums, times = torch.zeros(3, *padded), torch.zeros(*padded)
        for top in window_starts(size[0], 32):
            for left in window_starts(size[1], 32):
                part = np.s_[top : top + 32, left : left + 32]
                sums[:, part[0], part[1]] += model(images[:, :, part[0], part[1]])[0]
                times[part] += 1
        wanted = (sums / times)[:, : size[0], : size[1]]
    assert found.shape == (3, *size)
    assert (found - wanted).abs().max() < 1e-5
    assert (model.predict(pixels) == wanted.argmax(dim=0).numpy()).mean() > 0.999


@given(st.tuples(*[st.integers(1, 30)] * 2), st.tuples(st.integers(1, 700), st.integers(1, 60)))
def test_lines_are_interpolated_as_all_at_once(small, size):
    scores = torch.randn(2, *small)
    found = torch.cat([rows for _, rows in lines(scores, size)], dim=1)
    wanted = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    assert (found - wanted).abs().max() < 1e-4


def test_pictures_are_scaled_as_the_network_was_trained():
    model = tiny(short_side=32)
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 48:] = 255
    with torch.inference_mode():
        small = torch.cat([rows.clone() for _, rows in model.rows(maehub.images.scaled(pixels, (32, 48)).numpy())], 1)
        wanted = F.interpolate(small[None], size=(64, 96), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert (model.predict(pixels) == wanted.numpy()).mean() > 0.999


def test_pictures_of_every_kind_are_taken(tmp_path):
    model = tiny()
    pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = model.predict(pixels)
    assert found.dtype == np.int16
    assert (model.predict(tmp_path / "a.png") == found).all()
    assert (model.predict(Image.fromarray(pixels)) == found).all()
    with pytest.raises(DataError, match="uint8"):
        model.predict(pixels.astype(float))


# -- folders


@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_a_folder_gives_the_same_segmenter(tmp_path, decoder):
    model = tiny(decoder, norm="batch")
    maehub.save_segmenter(model, tmp_path / "m", card="words")
    again = maehub.load_segmenter(tmp_path / "m")
    assert again.config == model.config
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert (again(images) == model(images)).all()
        assert (maehub.load(tmp_path / "m").features(images) == model.encoder.features(images)).all()
    with pytest.raises(UsageError, match="not empty"):
        maehub.save_segmenter(model, tmp_path / "m")
    maehub.save_segmenter(model, tmp_path / "m", overwrite=True)


def test_timm_loads_the_encoder(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(32, 16, 3, 192, 2, 3))
    model = Segmenter(encoder, SegmenterConfig(CLASSES)).eval()
    maehub.save_segmenter(model, tmp_path / "m")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert (theirs.forward_features(images)[:, 1:] - encoder.features(images, pool="tokens")).abs().max() < 1e-5


def broken(change):
    def act(folder):
        path = folder / "segmenter.json"
        said = json.loads(path.read_text())
        change(said)
        path.write_text(json.dumps(said))

    return act


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: (folder / "segmenter.safetensors").unlink(),
        lambda folder: (folder / "segmenter.safetensors").write_bytes(b"no"),
        lambda folder: (folder / "segmenter.json").write_text("{"),
        broken(lambda said: said.update(decoder="upernet")),
        broken(lambda said: said.update(format=9)),
        broken(lambda said: said.update(extra=1)),
        broken(lambda said: said.pop("classes")),
        broken(lambda said: said["classes"].update(names=["a"])),
        broken(lambda said: said.update(layers=["x"])),
    ],
)
def test_broken_folders_are_refused(tmp_path, act):
    maehub.save_segmenter(tiny(), tmp_path / "m")
    act(tmp_path / "m")
    with pytest.raises(IntegrityError):
        maehub.load_segmenter(tmp_path / "m")


def test_what_is_no_segmenter_is_refused(tmp_path):
    maehub.save(tiny().encoder, tmp_path / "m")
    with pytest.raises(UsageError, match="no segmenter"):
        maehub.load_segmenter(tmp_path / "m")
    with pytest.raises(UsageError):
        maehub.save_segmenter(tiny().encoder, tmp_path / "n")
    model = tiny()
    torch.nn.init.constant_(model.decoder.classify.bias, float("nan"))
    with pytest.raises(IntegrityError, match="NaN"):
        maehub.save_segmenter(model, tmp_path / "n")
    assert not (tmp_path / "n").exists()


# -- scores


def plain(truth, predicted, classes):
    """IoU of each class from sets of pixels; None where there are none."""
    shares = []
    for place in range(classes):
        both = sum(int(((t == place) & (p == place)).sum()) for t, p in zip(truth, predicted, strict=True))
        either = sum(
            int((((t == place) | (p == place)) & (t >= 0)).sum()) for t, p in zip(truth, predicted, strict=True)
        )
        shares.append(100 * both / either if either else None)
    return shares


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 1000))
def test_miou_is_of_areas_summed_over_the_set(count, classes, seed):
    draw = np.random.default_rng(seed)
    truth = [draw.integers(-1, classes, (5, 7)).astype(np.int16) for _ in range(count)]
    truth[0][0, 0] = 0
    predicted = [draw.integers(0, classes, (5, 7)).astype(np.int16) for _ in range(count)]
    tables = [confusion_of(*pair, classes) for pair in zip(truth, predicted, strict=True)]
    scores = score_maps(tables, [str(place) for place in range(classes)], None)
    wanted = plain(truth, predicted, classes)
    for row, share in zip(scores.per_class, wanted, strict=True):
        assert row.iou == (None if share is None else pytest.approx(share))
    assert scores.miou == pytest.approx(np.mean([share for share in wanted if share is not None]))
    known = np.concatenate([t.reshape(-1) for t in truth])
    said = np.concatenate([p.reshape(-1) for p in predicted])
    assert scores.pixel_accuracy == pytest.approx(100 * (known == said)[known >= 0].mean())
    assert MapScores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores


def test_miou_is_the_jaccard_index_of_others():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    truth, predicted = draw.integers(0, 4, (2, 12, 30, 30)).astype(np.int16)
    scores = score_maps([confusion_of(t, p, 4) for t, p in zip(truth, predicted, strict=True)], "abcd", None)
    theirs = metrics.jaccard_score(truth.reshape(-1), predicted.reshape(-1), average="macro")
    assert scores.miou == pytest.approx(100 * theirs)
    assert scores.low < scores.miou < scores.high


def test_intervals_are_over_groups_where_there_are_some():
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 2, (40, 9, 9)).astype(np.int16)
    predicted = np.where(draw.random((40, 1, 1)) < 0.5, truth, 0).astype(np.int16)
    tables = [confusion_of(t, p, 2) for t, p in zip(truth, predicted, strict=True)]
    alone = score_maps(tables, "ab", None)
    doubled = score_maps(tables * 4, "ab", np.tile(np.arange(40), 4))
    assert doubled.miou == pytest.approx(alone.miou)
    assert doubled.high - doubled.low == pytest.approx(alone.high - alone.low, rel=0.2)
    assert score_maps(tables, "ab", np.arange(40) % 3).low is None
    assert "no interval: 3 groups" in str(score_maps(tables, "ab", np.arange(40) % 3))


def test_scores_need_a_pixel():
    with pytest.raises(DataError, match="no pixel"):
        score_maps([np.zeros((2, 2), np.int64)], "ab", None)
    with pytest.raises(DataError, match="compared"):
        confusion_of(np.zeros((2, 2), np.int16), np.zeros((2, 3), np.int16), 2)


# -- label maps as files


def test_label_maps_have_the_values_and_colours_of_the_classes():
    places = np.array([[0, 1], [2, 2]])
    classes = MapClasses(("a", "b", "c"), (7, 1, 250), (0, 1, 2))
    picture = label_map(places, classes, colours_of(classes))
    assert np.asarray(picture).tolist() == [[7, 1], [250, 250]]
    assert np.asarray(picture.convert("RGB"))[1, 0].tolist() == list(colours_of(classes)[2])
    wide = MapClasses(("a", "b", "c"), (7, 1, 2500), (0, 1, 2))
    assert np.asarray(label_map(places, wide, colours_of(wide))).tolist() == [[7, 1], [2500, 2500]]
    coloured = MapClasses(("a", "b", "c"), (0, 0x0A0B0C, 0xFF0000), (0, 1, 2), coloured=True)
    assert np.asarray(label_map(places, coloured, colours_of(coloured)))[0, 1].tolist() == [10, 11, 12]
    assert len(set(colours_of(MapClasses(tuple(map(str, range(200))), tuple(range(200)), tuple(range(200)))))) == 200


def test_predictions_are_a_set_that_is_read_again(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png"):
        Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
            tmp_path / "in" / name
        )
    (tmp_path / "in" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    model = tiny(classes=MapClasses(("a", "b", "c"), (4, 9, 200), (0, 1, 2)))
    with pytest.raises(DataError, match=r"c\.png"):
        predict_maps(model, tmp_path / "in", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    found = predict_maps(model, tmp_path / "in", tmp_path / "out", skip_bad=True, progress=False)
    assert len(found) == 2
    assert len(found.skipped) == 1
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    classes = maehub.data.maps.label_maps.read_classes(tmp_path / "out" / "classes.json")
    again = classes.decode(maehub.images.read_label_map(tmp_path / "out" / "masks" / "sub" / "b.png"))
    assert (again == model.predict(tmp_path / "in" / "sub" / "b.png")).all()
    with pytest.raises(UsageError, match="not empty"):
        predict_maps(model, tmp_path / "in", tmp_path / "out", skip_bad=True, progress=False)
    with pytest.raises(UsageError, match="several pictures are called a"):
        predict_maps(model, [tmp_path / "in" / "a.jpg"] * 2, tmp_path / "other", progress=False)
