"""Classifiers of timm, transformers and the official code give the accuracy that the library they come from gives."""

import csv
import inspect
import json
import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import PretrainedCfg
from timm.models._hub import save_for_hf  # where it is in every version
from transformers import (
    BitImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

import maehub
from maehub.errors import DataError, UsageError
from maehub.images import Preprocess
from maehub.train.evaluation.class_matching import _certain_order
from maehub.train.evaluation.config import EvaluateConfig
from maehub.train.evaluation.evaluating import evaluate
from maehub.train.evaluation.predicting import predict
from maehub.weights.library_settings import _PRETRAINED, _PROCESSOR, timm_transform, transformers_transform

NAMES = ("cat", "dog", "hen")
SIDE = 28  # 0.875 of a whole number: the libraries round others differently


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders called by names, and by numbers of which text has another order."""
    root = tmp_path_factory.mktemp("photos")
    numbers = np.random.default_rng(0)
    for place in range(48):
        coarse = numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((40 + place % 7, 52 - place % 5), Image.Resampling.BICUBIC)
        for folder in (f"named/{NAMES[place % 3]}", f"numbered/{place % 12}"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"{place}.png")
    return root


def lively(network):
    """With weights so large that it tells pictures apart."""
    for weight in network.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return network.eval()


def timm_network(classes=3, **options):
    torch.manual_seed(1)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIDE,
        depth=2,
        embed_dim=48,
        num_heads=3,
        patch_size=7,
        num_classes=classes,
        **options,
    )
    return lively(network)


ARGUMENTS = {"img_size": SIDE, "depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 7}


def predicted(photos, network, transform):
    """File and class number of each picture, as another library has them."""
    with torch.no_grad():
        return {
            path.name: int(network(transform(Image.open(path).convert("RGB"))[None]).argmax())
            for path in sorted(photos.rglob("*.png"))
        }


def accuracy(photos, answers, classes):
    right = [answers[path.name] == classes.index(path.parent.name) for path in photos.rglob("*.png")]
    assert len(set(answers.values())) > 1  # it tells something apart
    return 100 * sum(right) / len(right)


def measured(data, model, **more):
    return evaluate(EvaluateConfig(data=str(data), model=str(model), device="cpu", quiet=True, **more))


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    network = timm_network()
    # Not the order of the alphabet, and a transform that is not the published one.
    network.pretrained_cfg |= {"input_size": (3, SIDE, SIDE), "crop_pct": 0.9, "interpolation": "bilinear"}
    network.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.25)}
    save_for_hf(
        network,
        folder,
        model_config={"label_names": ["hen", "cat", "dog"]},
        model_args=ARGUMENTS,
        safe_serialization=True,
    )
    return folder


def test_a_timm_folder_with_label_names(photos, timm_folder):
    network = timm_network()
    data = resolve_data_config(json.loads((timm_folder / "config.json").read_text())["pretrained_cfg"])
    answers = predicted(photos / "named", network, create_transform(**data))
    found = measured(photos / "named", timm_folder)
    assert found.scores.top1 == pytest.approx(accuracy(photos / "named", answers, ["hen", "cat", "dog"]))
    assert found.classes_used == ("hen", "cat", "dog")
    assert found.to_dict()["classes_used"] == ["hen", "cat", "dog"]


def test_predictions_have_the_names(photos, timm_folder):
    network = timm_network()
    data = resolve_data_config(json.loads((timm_folder / "config.json").read_text())["pretrained_cfg"])
    answers = predicted(photos / "named", network, create_transform(**data))
    paths = sorted((photos / "named").rglob("*.png"))
    said = predict(maehub.load(timm_folder), paths).top(1)
    assert [guess[0].name for guess in said] == [("hen", "cat", "dog")[answers[path.name]] for path in paths]


@pytest.mark.parametrize("names", ["id2label", "label2id"])
def test_a_transformers_folder(photos, tmp_path, names):
    torch.manual_seed(2)
    order = ["dog", "hen", "cat"]
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=SIDE,
        patch_size=7,
        id2label=dict(enumerate(order)),
        label2id={name: number for number, name in enumerate(order)},
        layer_norm_eps=1e-6,
    )
    network = lively(ViTForImageClassification(config))
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.2] * 3, image_std=[0.3] * 3)
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["label2id" if names == "id2label" else "id2label"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    answers = predicted(
        photos / "named",
        lambda images: network(images).logits,
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
    )
    found = measured(photos / "named", tmp_path)
    assert found.scores.top1 == pytest.approx(accuracy(photos / "named", answers, order))
    assert found.classes_used == tuple(order)


def test_the_official_layout_is_matched_by_numbers_as_numbers(photos, tmp_path, caplog):
    """As the published fine-tuning writes it: {"model": …}, fc_norm, a head; classes are numbers."""
    network = timm_network(12, global_pool="avg")
    torch.save({"model": network.state_dict(), "epoch": 3}, tmp_path / "finetuned.pth")
    maehub.convert(tmp_path / "finetuned.pth", tmp_path / "model", heads=3)
    transform = create_transform((3, SIDE, SIDE), interpolation="bicubic", crop_pct=0.875)
    answers = predicted(photos / "numbered", network, transform)
    with caplog.at_level(logging.INFO, "maehub"):
        found = measured(photos / "numbered", tmp_path / "model")
    order = [str(number) for number in range(12)]
    assert found.scores.top1 == pytest.approx(accuracy(photos / "numbered", answers, order))
    assert found.classes_used == tuple(order)
    assert "matched by their order, from 0 to 11" in caplog.text


@pytest.fixture(scope="module")
def unnamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unnamed")
    network = timm_network()
    torch.save({"model": network.state_dict()}, folder / "finetuned.pth")
    maehub.convert(folder / "finetuned.pth", folder / "model", heads=3)
    return folder / "model"


def test_an_order_that_is_a_guess_is_refused(photos, unnamed):
    with pytest.raises(DataError, match=r"does not name its 3 classes.*Give --classes-from FILE"):
        measured(photos / "named", unnamed)


def test_a_text_file_says_which_folder_is_which_output(photos, unnamed, tmp_path):
    answers = predicted(photos / "named", timm_network(), create_transform((3, SIDE, SIDE), crop_pct=0.875, interpolation="bicubic"))  # fmt: skip  # noqa: E501
    (tmp_path / "classes.txt").write_text("\ufeffdog\n cat \nhen\n", encoding="utf-8")
    found = measured(photos / "named", unnamed, classes_from=tmp_path / "classes.txt")
    assert found.scores.top1 == pytest.approx(accuracy(photos / "named", answers, ["dog", "cat", "hen"]))


def test_a_csv_scores_the_listed_classes_alone(photos, timm_folder, tmp_path):
    """Two of the three classes, one of them renamed and one by its number."""
    network = timm_network()
    data = resolve_data_config(json.loads((timm_folder / "config.json").read_text())["pretrained_cfg"])
    transform = create_transform(**data)
    (tmp_path / "map.csv").write_text("folder,class\nkitten,cat\nhen,0\n")
    for new, old in (("kitten", "cat"), ("hen", "hen")):
        (tmp_path / "data" / new).mkdir(parents=True)
        for path in (photos / "named" / old).glob("*.png"):
            (tmp_path / "data" / new / path.name).symlink_to(path)
    right = []
    with torch.no_grad():
        for path in (tmp_path / "data").rglob("*.png"):
            logits = network(transform(Image.open(path).convert("RGB"))[None])[0, [1, 0]]  # cat, hen
            right.append(int(logits.argmax()) == ["kitten", "hen"].index(path.parent.name))
    found = measured(tmp_path / "data", timm_folder, classes_from=tmp_path / "map.csv", out=tmp_path / "out")
    assert found.scores.top1 == pytest.approx(100 * sum(right) / len(right))
    assert found.classes_used == ("kitten", "hen")
    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["predicted"] for row in rows} <= {"kitten", "hen"}
    with pytest.raises(DataError, match="not among the 2 known ones"):
        measured(photos / "named", timm_folder, classes_from=tmp_path / "map.csv")


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.txt", "cat\ndog\n", "has 2 lines and the model 3 outputs"),
        ("a.txt", "cat\ndog\ncat\n", "row 3"),
        ("a.csv", "name,class\n", "first line must be folder,class"),
        ("a.csv", "folder,class\ncat,cow\n", "row 1"),
        ("a.csv", "folder,class\ncat,3\n", "row 1"),
        ("a.csv", "folder,class\na,cat\nb,cat\n", "each of another class"),
        ("a.csv", "folder,class\na,cat,1\n", "row 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(photos, timm_folder, tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=complaint):
        measured(photos / "named", timm_folder, classes_from=tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read"):
        measured(photos / "named", timm_folder, classes_from=tmp_path / "none.txt")


def test_wordnet_ids_are_in_their_published_order():
    published = ImageNetInfo("imagenet-1k").label_names()
    assert _certain_order(sorted(published), 1000) == tuple(published)
    assert _certain_order(published[:999], 999) is None
    assert _certain_order(["00", "02", "01"], 3) == ("00", "01", "02")
    assert _certain_order(["1", "2", "3"], 3) is None


# --- settings of their transforms


ENCODER = maehub.models.EncoderConfig(width=48, depth=1, heads=3, image_size=SIDE, patch_size=7, classes=3)
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((70, 52))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0, 60.0, 70.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"image_mean": 0.25, "image_std": 0.5},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3},
        {"do_rescale": False, "do_normalize": False},
    ],
)
@pytest.mark.parametrize("kind", ["ViT", "Bit"])
def test_a_processor_of_transformers_gives_the_same_pixels(settings, kind):
    if kind == "ViT":
        processor = ViTImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}} | settings)
    else:
        size = {"size": {"shortest_edge": 36}, "crop_size": {"height": SIDE, "width": SIDE}}
        processor = BitImageProcessorPil(**size | settings)
    said = json.loads(processor.to_json_string())
    said["image_processor_type"] = f"{kind}ImageProcessor"
    transform = transformers_transform(said, ENCODER, "a processor")
    theirs = torch.as_tensor(processor(PICTURE, return_tensors="pt")["pixel_values"][0], dtype=torch.float32)
    levels = (transform(PICTURE) - theirs).abs() * torch.tensor(transform.std)[:, None, None] * 255
    assert levels.max() <= 1.01


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"resample": 0}, "resample=0"),
        ({"do_pad": True}, "do_pad changes pixels"),
        ({"size": 40}, "is no transform to 28×28"),
        ({"size": {"shortest_edge": 28}}, "is no transform"),
        ({"do_resize": False, "do_center_crop": True}, "without do_resize"),
    ],
)
def test_what_no_transform_here_does_is_refused_by_name(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        transformers_transform(settings, ENCODER, "a processor")


def test_unknown_settings_are_warned_of_by_name(caplog):
    transformers_transform({"image_mean": [0.5] * 3, "sharpen": 3}, ENCODER, "a processor")
    timm_transform({"mean": 0.5, "std": (0.5,), "polish": True}, ENCODER, "a folder")
    assert "nothing is known here of its sharpen" in caplog.text
    assert "nothing is known here of its polish" in caplog.text


def test_pictures_are_taken_as_they_are_without_resizing():
    transform = transformers_transform({"do_resize": False, "image_mean": [0.5] * 3}, ENCODER, "a processor")
    assert transform.resize == "native"
    assert isinstance(transform, Preprocess)


def test_every_setting_of_the_libraries_is_known():
    assert set(PretrainedCfg.__dataclass_fields__) <= _PRETRAINED
    for kind in (ViTImageProcessorPil, BitImageProcessorPil, ViTImageProcessor):
        saved = set(json.loads(kind().to_json_string()))
        named = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs", "args"}
        assert saved | named <= _PROCESSOR | {"do_pad", "pad_size", "size_divisor"}, kind
