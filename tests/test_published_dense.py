"""Published segmenters and detectors: files under their names and of their shapes; the real ones were not read."""

import os
import pickle

import numpy as np
import pytest
import torch

import maehub
from maehub import cli
from maehub.data import MapClasses, ObjectClasses
from maehub.dense import AttentionConfig, Detector, DetectorConfig, Segmenter, SegmenterConfig, published
from maehub.errors import IntegrityError

DEPTH, WIDTH, HEADS = 12, 24, 2
MMSEG = (("norm1", "ln1"), ("norm2", "ln2"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"))
KINDS = {"pool": "psp_modules.{}.1", "lateral": "lateral_convs.{}", "smooth": "fpn_convs.{}"}


def stirred(model):
    """Every tensor is something else than what it begins as."""
    draw = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(0.05 * torch.randn(value.shape, generator=draw).abs_() if "var" in name else
                       0.05 * torch.randn(value.shape, generator=draw))  # fmt: skip
    return model.eval()


def segmenter():
    encoder = maehub.Encoder(maehub.EncoderConfig(64, 16, 3, WIDTH, DEPTH, HEADS))
    classes = MapClasses(tuple(f"class {number}" for number in range(1, 6)), (1, 2, 3, 4, 5, 0), (0, 1, 2, 3, 4, -1))
    config = SegmenterConfig(classes, "upernet", (3, 5, 7, 11), WIDTH, "batch", auxiliary=True, short_side=64,
                             attention=AttentionConfig(relative="table", layer_scale=True))  # fmt: skip
    model = stirred(Segmenter(encoder, config))
    for block in model.encoder.blocks:
        block.attn.qkv.bias.data[WIDTH : 2 * WIDTH] = 0  # keys have none in the file
    return model


def mmseg_names(model, kind):
    """The state of a segmenter as a file has it: of the code for BEiT, or of mmsegmentation's own MAE."""
    ours, file = model.state_dict(), {}
    beit = kind == "beit"
    for name, value in ours.items():
        room, _, rest = name.partition(".")
        if room == "encoder":
            if rest.startswith("norm."):
                continue
            if rest.startswith("blocks."):
                _, number, part = rest.split(".", 2)
                at = f"backbone.{'blocks' if beit else 'layers'}.{number}."
                if part == "attn.table":
                    file[at + "attn.relative_position_bias_table"] = value
                    file[at + "attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
                elif part == "attn.qkv.bias":
                    file[at + "attn.q_bias"], _, file[at + "attn.v_bias"] = value.chunk(3)
                elif beit:
                    file[at + part] = value
                else:
                    for a, b in (
                        ("norm1", "ln1"),
                        ("norm2", "ln2"),
                        ("mlp.fc1", "ffn.layers.0.0"),
                        ("mlp.fc2", "ffn.layers.1"),
                    ):
                        part = part.replace(a, b)
                    file[at + part] = value
            else:
                file["backbone." + (rest if beit else rest.replace("proj", "projection"))] = value
            continue
        first, _, last = rest.partition(".")
        number, _, leaf = last.partition(".")
        conv = {"0": "conv", "1": "bn"}
        if first == "neck" and number == "0":
            file[("backbone.fpn1." if beit else "neck.upsample_4x.") + leaf] = value
        elif first == "neck" and number == "1":
            file[("backbone.fpn2." if beit else "neck.upsample_2x.") + leaf] = value
        elif first in ("pool", "lateral", "smooth"):
            layer, _, end = leaf.partition(".")
            old = {
                "pool": f"psp_modules.{number}.1",
                "lateral": f"lateral_convs.{number}",
                "smooth": f"fpn_convs.{number}",
            }
            file[f"decode_head.{old[first]}.{conv[layer]}.{end}"] = value
        elif first in ("bottleneck", "fuse"):
            old = {"bottleneck": "bottleneck", "fuse": "fpn_bottleneck"}[first]
            file[f"decode_head.{old}.{conv[number]}.{leaf}"] = value
        elif first == "classify":
            file[f"decode_head.conv_seg.{last}"] = value
        elif number == "2":
            file[f"auxiliary_head.conv_seg.{leaf}"] = value
        else:
            layer, _, end = leaf.partition(".")
            file[f"auxiliary_head.convs.0.{conv[layer]}.{end}"] = value
    return file


@pytest.mark.parametrize("kind", ["beit", "mmseg"])
def test_upernet_is_read(kind, tmp_path):
    model = segmenter()
    torch.save({"state_dict": mmseg_names(model, kind), "meta": {"epoch": 1}}, tmp_path / "upernet.pth")
    assert cli.main(["convert", str(tmp_path / "upernet.pth"), "-o", str(tmp_path / "m")]) == 0
    again = maehub.load_segmenter(tmp_path / "m")
    assert again.config == model.config
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(images), model(images))
    torch.testing.assert_close(again.scores(images)[1], model.scores(images)[1])
    assert maehub.load(tmp_path / "m").config.depth == DEPTH


def detector():
    encoder = maehub.Encoder(maehub.EncoderConfig(256, 16, 3, WIDTH, DEPTH, HEADS))
    config = DetectorConfig(ObjectClasses(("class 1", "class 2", "class 3"), (1, 2, 3)), masks=True,
                            attention=AttentionConfig(4, (2, 5, 8, 11), "decomposed", cls=False))  # fmt: skip
    return stirred(Detector(encoder, config))


def detectron_names(model):
    """The state of a detector as detectron2 names it: nothing is its last class, and it has no box and no mask."""
    file = {}
    level = {
        "0": ("simfp_2", {"project": "4", "smooth": "5"}),
        "1": ("simfp_3", {"project": "1", "smooth": "2"}),
        "2": ("simfp_4", {"project": "0", "smooth": "1"}),
        "3": ("simfp_5", {"project": "1", "smooth": "2"}),
    }
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if name.startswith("pyramid.encoder."):
            rest = name.removeprefix("pyramid.encoder.")
            if rest != "cls_token" and not rest.startswith("norm."):
                file[f"backbone.net.{rest}"] = value
        elif parts[0] == "pyramid":
            _, _, number, part, *rest = parts
            net, places = level[number]
            if part == "resample":
                file[f"backbone.{net}.{'.'.join(rest)}"] = value
            else:
                file[f"backbone.{net}.{places[part]}.{'norm.' * (rest[0] == '1')}{rest[1]}"] = value
        elif parts[1] == "proposals":
            old = {"cls_logits": "objectness_logits", "bbox_pred": "anchor_deltas"}
            at = f"conv.conv{parts[4]}" if parts[3] == "conv" else old[parts[3]]
            file[f"proposal_generator.rpn_head.{at}.{parts[-1]}"] = value
        elif parts[2] == "box_head":
            fc = parts[3] == "5"
            at = "fc1." if fc else f"conv{int(parts[3]) + 1}.{'norm.' * (parts[4] == '1')}"
            file[f"roi_heads.box_head.{at}{parts[-1]}"] = value
        elif parts[2] == "mask_head":
            file[f"roi_heads.mask_head.mask_fcn{int(parts[3]) + 1}.{'norm.' * (parts[4] == '1')}{parts[-1]}"] = value
        elif parts[3] == "cls_score":
            file[f"roi_heads.box_predictor.cls_score.{parts[-1]}"] = torch.cat([value[1:], value[:1]])
        elif parts[3] == "bbox_pred":
            file[f"roi_heads.box_predictor.bbox_pred.{parts[-1]}"] = value[4:]
        elif parts[3] == "classify":
            file[f"roi_heads.mask_head.predictor.{parts[-1]}"] = value[1:]
        else:
            file[f"roi_heads.mask_head.{parts[3].replace('deconvolve', 'deconv')}.{parts[-1]}"] = value
    return {name: value.numpy() for name, value in file.items()}


def test_vitdet_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_SIZE", 256)  # of 1024, so that it takes seconds
    model = detector()
    with open(tmp_path / "model_final.pkl", "wb") as file:
        pickle.dump({"model": detectron_names(model), "__author__": "x"}, file)
    assert cli.main(["convert", str(tmp_path / "model_final.pkl"), "-o", str(tmp_path / "m")]) == 0
    again = maehub.load_detector(tmp_path / "m")
    assert again.config == model.config
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    one, other = model.predict(pixels), again.predict(pixels)
    assert len(one) > 0
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
    np.testing.assert_array_equal(one.labels, other.labels)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_names_anything_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = detectron_names(detector())
    alone = {"model": {"a": files["backbone.net.pos_embed"]}}
    without = {"model": {name: one for name, one in files.items() if "rel_pos" not in name}}
    for number, bad in enumerate([Evil(), {"a": Evil()}, {"model": files | {"x": "text"}}, alone, without]):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps(bad))
        assert cli.main(["convert", str(path), "-o", str(tmp_path / "m")]) == IntegrityError.exit_code
        assert not (tmp_path / "evil").exists()
        assert not (tmp_path / "m").exists()
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"model": files})[:5000])
    assert cli.main(["convert", str(tmp_path / "cut.pkl"), "-o", str(tmp_path / "m")]) == IntegrityError.exit_code


def test_the_classes_of_coco_are_eighty():
    assert len(published._COCO_IDS) == 80
    assert {12, 26, 91}.isdisjoint(published._COCO_IDS)


def test_classes_of_published_sizes_have_their_names():
    ade, coco = published._ade20k(), published._coco()
    assert len(set(ade)) == 150
    assert (ade[0], ade[12], ade[149]) == ("wall", "person", "flag")
    assert len(set(coco)) == 80
    assert (coco[0], coco[79]) == ("person", "toothbrush")
