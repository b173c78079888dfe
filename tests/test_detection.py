"""Detectors trained: runs, measuring, predicting, kills, several processes, and data that cannot be used."""

import json
from functools import partial

import pytest
from dense_runs import check_close, check_held_out, check_killed, check_micro_batches, finetune_words, scores_of
from object_files import CLASSES, FORMATS, coco, lay_objects
from PIL import Image
from processes import Launch, metrics, state

import maehub
from maehub import cli
from maehub.errors import DataError, UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    for side, numbers in (("train", range(24)), ("val", range(24, 36))):
        lay_objects(folder / side, "coco", numbers)
    return folder


def words(data, out, **changes):
    return finetune_words(
        data, out, **{"task": "detect", "steps": 6, "image-size": 48, "validate-every": 100} | changes
    )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(words(data, out, steps=50, validate_every=25, base_lr=0.01)) == 0
    return out


# -- a run


def test_a_run_finds_objects(run, data, told, tmp_path):
    scores = scores_of(run)
    assert (scores["n"], scores["objects"]) == (12, 14)
    assert scores["ap50"] > 25  # of fresh heads: 0
    assert scores["mask_ap50"] > 25
    assert state(run)["state"] == "completed"
    measured = {line["step"]: line["val_ap50"] for line in metrics(run) if "val_ap50" in line}
    assert measured[0] < 5
    assert measured[50] == scores["ap50"]
    code, facts = told("evaluate", data, "-m", run, "-o", tmp_path / "e", "--precision", "fp32")
    assert code == 0
    assert {"ap", "ap50", "ap75", "mask_ap", "n", "low", "high", "per_class"} <= facts.keys()
    for name in ("ap", "ap50", "mask_ap"):
        assert facts[name] == pytest.approx(scores[name])
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"evaluation.json", "worst.png", "detections.json"}
    page = (run / "report.html").read_text()
    assert all(word in page for word in ("AP", *CLASSES))


def test_the_numbers_are_pycocotools_own(run, data, told, tmp_path):
    """Of the files that were written, by its own reader."""
    coco_module, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    code, facts = told("evaluate", data, "-m", run, "-o", tmp_path / "e", "--precision", "fp32")
    assert code == 0
    said = coco(range(24, 36))
    number_of = {name: place for place, name in enumerate(facts["images"], 1)}
    for image in said["images"]:
        image["id"] = number_of[image["file_name"]]
    for note in said["annotations"]:
        *_, width, height = note["bbox"]
        note |= {"image_id": number_of[f"{note['image_id']:03}.png"], "area": width * height, "id": note["id"] + 1}
    (tmp_path / "truth.json").write_text(json.dumps(said))
    truth = coco_module.COCO(str(tmp_path / "truth.json"))
    measured = evaluation.COCOeval(truth, truth.loadRes(str(tmp_path / "e" / "detections.json")), "bbox")
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    assert facts["ap"] == pytest.approx(100 * measured.stats[0], abs=1e-6)
    assert facts["ap50"] == pytest.approx(100 * measured.stats[1], abs=1e-6)


def test_a_run_exports_a_detector_and_its_encoder(run, data):
    model = maehub.load_detector(run)
    assert model.config.classes.names == CLASSES
    assert model.config.masks
    found = model.predict(data / "val" / "images" / "025.png")
    assert len(found) == len(found.masks) > 0
    assert maehub.load(run).config.depth == 5
    timm = pytest.importorskip("timm")
    timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)


def test_predictions_are_coco_results(run, data, tmp_path, told):
    code, facts = told("predict", data / "val" / "images", "-m", run, "-o", tmp_path / "p", "--precision", "fp32")
    assert code == 0
    assert facts["images"] == 12
    results = json.loads((tmp_path / "p" / "detections.json").read_text())
    assert {row["category_id"] for row in results} <= {0, 7}
    assert all(row["segmentation"]["size"] == [40, 48] for row in results)
    assert (tmp_path / "p" / "overlays" / "025.png").exists()
    assert cli.main(["predict", str(tmp_path / "no.png"), "-m", str(run)]) != 0


def test_every_format_trains(tmp_path):
    for form in FORMATS:
        lay_objects(tmp_path / form, form, range(12))
        assert cli.main(words(tmp_path / form, tmp_path / f"{form}-run", steps=2)) == 0
        assert maehub.load_detector(tmp_path / f"{form}-run").config.masks == (form != "voc")


def test_what_a_run_held_out_is_measured_again(tmp_path, told):
    data = lay_objects(tmp_path / "d", "coco", range(20))
    check_held_out(words(data, tmp_path / "run", steps=2, seed=5), data, tmp_path / "run", "ap", told)


def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path):
    check_killed(partial(words, data), tmp_path, "detector.safetensors")


def test_two_processes_give_the_numbers_of_one(data, tmp_path):
    """What is drawn is a function of the picture, and losses are means of pictures'."""
    kinds = {"auto": {}, "vitdet": {"recipe": "vitdet", "drop_path": 0, "image_size": 32}}
    for kind, changes in kinds.items():
        assert cli.main(words(data, tmp_path / f"{kind}-one", steps=4, **changes)) == 0
    lines = [
        words(data, tmp_path / f"{kind}-{name}", steps=4, fsdp=name == "fsdp", **changes)
        for kind, changes in kinds.items() for name in ("ddp", "fsdp")
    ]  # fmt: skip
    launch = Launch(tmp_path / "launch", [{"words": line} for line in lines])
    assert launch.wait() == 0, launch.output()
    for kind in kinds:
        for name in ("ddp", "fsdp"):
            check_close([tmp_path / f"{kind}-{name}", tmp_path / f"{kind}-one"], rtol=2e-3)


def test_micro_batches_change_nothing_but_rounding(data, tmp_path):
    check_micro_batches(partial(words, data), tmp_path, 1e-3)


# -- what is asked for, and what cannot be used


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mixup": 0.5}, "--mixup"),
        ({"label": "x"}, "--label"),
        ({"decoder": "linear"}, "--decoder"),
        ({"head-start": "probe"}, "--head-start"),
        ({"compile": True}, "--compile"),
        ({"minutes": 0.001, "steps": False}, "too short"),
        ({"recipe": "official"}, "auto, vitdet"),
        ({"recipe": "ade20k"}, "--task segment"),
        ({"blocks": 9}, "--blocks"),
        ({"model": "timm/vit_tiny_patch16_224"}, "network of timm"),
        ({"task": "classification", "recipe": "vitdet"}, "--task detect"),
        ({"task": "classification", "short-side": 4}, "--short-side"),
    ],
)
def test_what_detection_has_no_use_for_is_refused(data, tmp_path, capsys, changes, word):
    assert cli.main(words(data, tmp_path / "run", **changes)) == UsageError.exit_code
    assert word in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_that_are_no_objects_are_refused(tmp_path, capsys):
    """Label maps, files with mistakes, and other classes on resume; nothing is written."""
    for kind in ("images", "masks"):
        (tmp_path / "maps" / kind).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (16, 16), number).save(tmp_path / "maps" / kind / f"{number}.png")
    assert cli.main(words(tmp_path / "maps", tmp_path / "run")) in (UsageError.exit_code, DataError.exit_code)
    assert "--task segment" in capsys.readouterr().err
    lay_objects(tmp_path / "d", "coco", range(12))
    assert cli.main(words(tmp_path / "d", tmp_path / "run", steps=2)) == 0
    path = tmp_path / "d" / "instances.json"
    path.write_text(path.read_text().replace("wedge", "ring"))
    assert cli.main([*words(tmp_path / "d", tmp_path / "run", steps=2), "--resume"]) == UsageError.exit_code
    said = json.loads(path.read_text())
    said["annotations"][0]["bbox"][0] = float("nan")
    path.write_text(json.dumps(said))
    assert cli.main(words(tmp_path / "d", tmp_path / "other")) == DataError.exit_code
    assert "instances.json" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_detector_meets_classes_that_it_does_not_know(run, tmp_path, told):
    lay_objects(tmp_path / "d", "coco", range(12))
    path = tmp_path / "d" / "instances.json"
    path.write_text(path.read_text().replace("wedge", "ring"))
    code, text = told("evaluate", tmp_path / "d", "-m", run)
    assert code == DataError.exit_code
    assert "ring" in text
