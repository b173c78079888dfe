"""Training segmenters by the command: from a folder to a model, its report, its predictions; resumed, in processes."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from dense_runs import check_close, check_held_out, check_killed, check_micro_batches, finetune_words, scores_of
from map_files import lay_maps, name_classes
from PIL import Image
from processes import Launch, losses, metrics, state
from safetensors.torch import load_file

import maehub
from maehub.cli import command_line as cli
from maehub.data import IGNORED, find_label_maps
from maehub.dense import Segmenter, SegmenterConfig
from maehub.errors import EXIT_SKIPPED, DataError, UsageError
from maehub.images import Preprocess
from maehub.train.finetuning.dense.map_job import MapObjective, _main_class
from maehub.train.finetuning.dense.recipes import DenseFacts, settle_maps
from maehub.train.finetuning.dense.views import MapTransform, changed_colours

NAMES = ["ground", "red", "blue"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    lay_maps(folder / "train", 24)
    lay_maps(folder / "val", 11, first=24)
    return name_classes(folder, NAMES)


def words(data, out, **changes):
    return finetune_words(data, out, **{"task": "segment", "steps": 8, "image-size": 32} | changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(words(data, out, steps=20, base_lr=0.002)) == 0
    return out


# -- a run


def test_a_run_tells_pixels(run, data, told):
    scores = scores_of(run)
    assert scores["n"] == 11
    assert scores["miou"] > 60  # all one class: 28
    assert state(run)["state"] == "completed"
    measured = {line["step"]: line["val_miou"] for line in metrics(run) if "val_miou" in line}
    assert 0 in measured
    assert measured[20] == scores["miou"]
    code, facts = told("evaluate", data, "-m", run, "--precision", "fp32")
    assert code == 0
    assert facts["miou"] == pytest.approx(scores["miou"])
    assert facts["n"] == 11
    assert {"pixel_accuracy", "mean_accuracy", "low", "high", "per_class"} <= facts.keys()


def test_a_run_exports_a_segmenter_and_its_encoder(run):
    model = maehub.load_segmenter(run)
    assert model.config.classes.names == tuple(NAMES)
    assert model.encoder.config.size == (32, 32)
    encoder = maehub.load(run)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert (encoder.features(images) == model.encoder.features(images)).all()
    card = (run / "model" / "README.md").read_text()
    assert "mIoU" in card
    assert "load_segmenter" in card


def test_a_report_shows_classes_and_pictures(run):
    page = (run / "report.html").read_text()
    for text in ("mIoU", "95 % interval", "Classes, worst first", "blue", "The worst mistakes", "pixels right"):
        assert text in page, text
    assert (run / "pictures" / "step-0.png").exists()
    assert (run / "pictures" / "mistakes.png").exists()


def test_an_evaluation_is_written(run, data, tmp_path, told):
    code, facts = told("evaluate", data, "-m", run, "-o", tmp_path / "e", "--precision", "fp32")
    assert code == 0
    assert [path.rpartition("/")[2] for path in facts["files"]] == ["evaluation.json", "worst.png"]
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["miou"] == facts["miou"]
    assert cli.main(["evaluate", str(data), "-m", str(run), "-o", str(tmp_path / "e")]) == UsageError.exit_code


def test_classes_are_matched_by_their_names(run, data, tmp_path, told):
    """The same pictures with other values, and then with a class that is not known."""
    lay_maps(
        tmp_path / "a", 11, first=24, write=lambda places: Image.fromarray(np.array([9, 4, 200], np.uint8)[places])
    )
    name_classes(tmp_path / "a", {"blue": 200, "red": 4, "ground": 9})
    code, facts = told("evaluate", tmp_path / "a", "-m", run, "--precision", "fp32")
    assert code == 0
    assert facts["miou"] == pytest.approx(scores_of(run)["miou"])
    name_classes(tmp_path / "a", {"azure": 200, "red": 4, "ground": 9})
    code, text = told("evaluate", tmp_path / "a", "-m", run)
    assert code == DataError.exit_code
    assert "azure" in text


def test_predictions_are_label_maps(run, data, tmp_path, told):
    code, facts = told("predict", data / "val" / "images", "-m", run, "-o", tmp_path / "p", "--precision", "fp32")
    assert code == 0
    assert facts["images"] == 11
    found = Image.open(tmp_path / "p" / "masks" / "024.png")
    assert found.mode == "P"
    assert (np.asarray(found) == maehub.load_segmenter(run).predict(data / "val" / "images" / "024.png")).all()
    assert (tmp_path / "p" / "overlays" / "034.png").exists()
    (tmp_path / "broken.png").write_bytes(b"no")
    line = ["predict", tmp_path / "broken.png", data / "val" / "images", "-m", run]
    assert told(*line)[0] == DataError.exit_code
    assert told(*line, "--skip-bad")[0] == EXIT_SKIPPED
    for wrong in (["-o", tmp_path / "x.csv"], ["--image-size", "64"]):
        assert told("predict", data / "val" / "images", "-m", run, *wrong)[0] == UsageError.exit_code


# -- resuming, and many processes


@pytest.mark.parametrize("decoder", ["linear", "upernet"])
def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path, decoder):
    check_killed(partial(words, data), tmp_path, "segmenter.safetensors", decoder=decoder, steps=6)


def test_two_processes_give_the_numbers_of_one(data, tmp_path):
    lines = {name: words(data, tmp_path / name, steps=5, decoder=kind, fsdp=name.endswith("fsdp"))
             for name, kind in (("ddp", "upernet"), ("fsdp", "upernet"), ("linear-ddp", "linear"))}  # fmt: skip
    assert cli.main(words(data, tmp_path / "one", steps=5, decoder="upernet")) == 0
    assert cli.main(words(data, tmp_path / "linear-one", steps=5)) == 0
    launch = Launch(tmp_path / "launch", [{"words": line} for line in lines.values()])
    assert launch.wait() == 0, launch.output()
    for name in lines:
        alone = tmp_path / ("linear-one" if "linear" in name else "one")
        check_close([tmp_path / name, alone], rtol=1e-4)
        scores = [scores_of(run) for run in (alone, tmp_path / name)]
        assert scores[1]["n"] == scores[0]["n"] == 11
        assert scores[1]["miou"] == pytest.approx(scores[0]["miou"], abs=0.5)


def test_batch_statistics_are_those_of_all_processes(data, tmp_path, monkeypatch):
    """The published recipe, of which only what is drawn is left out."""
    common = {"recipe": "ade20k", "steps": 3, "drop_path": 0, "image_size": 16}
    lines = [words(data, tmp_path / name, fsdp=name == "fsdp", **common) for name in ("ddp", "fsdp")]
    launch = Launch(tmp_path / "launch", [{"words": line, "fault": "keep_channels"} for line in lines])
    monkeypatch.setattr(torch.nn.Dropout2d, "forward", lambda part, x: x)
    assert cli.main(words(data, tmp_path / "one", **common)) == 0
    assert launch.wait() == 0, launch.output()
    alone = load_file(tmp_path / "one" / "model" / "segmenter.safetensors")
    assert alone["encoder.blocks.0.attn.table"].abs().max() > 0
    for name in ("ddp", "fsdp"):
        found = load_file(tmp_path / name / "model" / "segmenter.safetensors")
        check_close([tmp_path / name, tmp_path / "one"], rtol=1e-4)
        for key, value in alone.items():
            if "running" in key or "tracked" in key:
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)


def test_other_classes_are_refused_on_resume(data, tmp_path):
    lay_maps(tmp_path / "d", 8)
    name_classes(tmp_path / "d", NAMES)
    line = words(tmp_path / "d", tmp_path / "run", steps=2)
    assert cli.main(line) == 0
    name_classes(tmp_path / "d", ["ground", "red", "green"])
    assert cli.main([*line, "--resume"]) == UsageError.exit_code


def test_micro_batches_change_nothing_but_rounding(data, tmp_path):
    check_micro_batches(partial(words, data), tmp_path, 1e-4, decoder="upernet")


# -- what is asked for


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mixup": 0.5}, "--mixup"),
        ({"smoothing": 0.1}, "--smoothing"),
        ({"label": "x"}, "--label"),
        ({"pool": "cls"}, "--pool"),
        ({"crop-scale": "0.5 1"}, "--crop-scale"),
        ({"class-weights": "balanced"}, "--class-weights"),
        ({"recipe": "official"}, "auto, ade20k, linear"),
        ({"recipe": "linear", "decoder": "upernet"}, "linear decoder"),
        ({"head-start": "probe", "decoder": "upernet"}, "--decoder linear"),
        ({"blocks": 9}, "--blocks"),
        ({"model": "baseline/pixels"}, "no network"),
        ({"model": "timm/vit_tiny_patch16_224"}, "network of timm"),
        ({"image-size": 33}, "33"),
        ({"model": "untrained/vit-nano", "channels": 1}, "--channels 1"),
        ({"rot90": True, "image-size": "32 40"}, "square"),
        ({"task": "classification", "decoder": "linear"}, "--decoder is for --task segment"),
        ({"task": "classification", "recipe": "ade20k"}, "--task segment"),
    ],
)
def test_what_segmentation_has_no_use_for_is_refused(data, tmp_path, capsys, changes, word):
    line = []
    for part in words(data, tmp_path / "run", **changes):
        line += part.split() if part in ("0.5 1", "32 40") else [part]
    assert cli.main(line) == UsageError.exit_code
    assert word in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_recipes_are_as_published():
    facts = DenseFacts(768, 12, 20_210, trained=True)
    found = settle_maps("ade20k", facts, {})
    assert (found.layers, found.width, found.steps, found.batch_size) == ((3, 5, 7, 11), 768, 160_000, 16)
    assert (found.layer_decay, found.weight_decay, found.drop_path, found.falls) == (0.65, 0.05, 0.1, "linear")
    large = settle_maps("ade20k", DenseFacts(1024, 24, 20_210, trained=True), {})
    assert large.layers == (7, 11, 15, 23)
    assert settle_maps("linear", facts, {}).blocks == 0
    assert settle_maps("auto", facts, {"epochs": 2}).steps == -(-2 * 20_210 // 16)
    fresh = settle_maps("auto", DenseFacts(192, 5, 100, trained=False), {})
    assert fresh.head_start == "zero"


def test_a_run_from_fresh_weights_and_a_frozen_one(data, tmp_path):
    assert cli.main(words(data, tmp_path / "fresh", model="untrained/vit-nano", steps=2)) == 0
    assert cli.main(words(data, tmp_path / "probe", recipe="linear", steps=2)) == 0
    before, after = maehub.load("vit-nano").state_dict(), maehub.load(tmp_path / "probe").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "pos_embed")


def test_time_is_an_argument(data, tmp_path, caplog):
    line = words(data, tmp_path / "run", minutes=30, steps=False, **{"image-size": 16})
    caplog.set_level("INFO", "maehub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maehub.train.finetuning.dense.recipes._FEW_STEPS", 4)
        assert cli.main(line) == 0
    assert len(losses(tmp_path / "run")) == 100
    assert cli.main(words(data, tmp_path / "other", minutes=3)) == UsageError.exit_code


# -- parts


def test_a_crop_shows_the_same_part_of_picture_and_map():
    """Of a picture whose colours say the class, everything random on but colours."""
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)
    places = np.zeros((60, 80), np.int16)
    places[10:40, 20:50], places[30:60, 60:80] = 1, 2
    picture = Image.fromarray(colours[places])
    plain = Preprocess((32, 32), 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    transform = MapTransform(plain, None, (0.5, 2.0), vflip=True, rot90=True, colours=False)
    right, ignored = [], []
    for seed in range(60):
        pixels, target = transform.crop(picture, places, seed)
        assert pixels.shape == (32, 32, 3)
        assert target.shape == (32, 32)
        said = np.where(pixels[:, :, 0] > 127, 1, np.where(pixels[:, :, 2] > 127, 2, 0))
        known = target != IGNORED
        right.append((said == target)[known].mean())
        ignored.append(1 - known.mean())
    assert min(right) > 0.9
    assert np.mean(right) > 0.97
    assert max(ignored) > 0  # pictures that were made smaller than the window
    again = transform.crop(picture, places, 7)
    assert all((one == other).all() for one, other in zip(again, transform.crop(picture, places, 7), strict=True))


def test_a_crop_is_drawn_again_where_one_class_fills_it():
    places = np.zeros((400, 400), np.int16)
    places[:, 200:] = 1
    picture = Image.new("RGB", (400, 400))
    shape = Preprocess((64, 64), 8)
    common = {"hflip": False, "colours": False}
    mixed = []
    for most in (1.0, 0.75):
        transform = MapTransform(shape, None, (1.0, 1.0), most_of_one=most, **common)
        shares = [np.bincount(transform.crop(picture, places, seed)[1].reshape(-1), minlength=2) for seed in range(40)]
        mixed.append(np.mean([share.max() / share.sum() < 0.75 for share in shares]))
    assert mixed[1] > 2 * mixed[0]


def test_colours_are_changed_within_their_bounds():
    pixels = np.random.default_rng(0).integers(60, 190, (16, 16, 3), dtype=np.uint8)
    changed = [changed_colours(pixels, seed) for seed in range(64)]
    assert sum((one == pixels).all() for one in changed) in range(1, 16)  # a sixteenth is left alone
    means = [one.mean() for one in changed]
    assert min(means) < pixels.mean() - 10
    assert max(means) > pixels.mean() + 10
    assert (changed_colours(pixels[:, :, :1], 3).shape) == (16, 16, 1)


def test_the_loss_counts_every_picture_alike():
    torch.manual_seed(0)
    encoder = maehub.Encoder(maehub.EncoderConfig(16, 8, 3, 16, 1, 2))
    classes = maehub.data.MapClasses(("a", "b"), (0, 1), (0, 1))
    objective = MapObjective(Segmenter(encoder, SegmenterConfig(classes)), 0.0)
    images, targets = torch.randn(4, 3, 16, 16), torch.randint(-1, 2, (4, 16, 16))
    whole = float(objective(images, targets).detach())
    parts = torch.stack([objective(images[i : i + 1], targets[i : i + 1]) for i in range(4)]).mean()
    assert whole == pytest.approx(float(parts.detach()))
    scores = objective.network(images).detach()
    known = targets >= 0
    own = torch.nn.functional.cross_entropy(scores.permute(0, 2, 3, 1)[known], targets[known], reduction="sum")
    assert whole == pytest.approx(float(own / targets.numel()))


def test_patches_of_one_class_are_known():
    target = np.full((8, 8), IGNORED)
    target[:4, :4], target[:4, 4:], target[4:, :2] = 2, 0, 1
    target[0, 4] = 1
    main, share = _main_class(target, 4, 3)
    assert main.tolist()[:3] == [2, 0, 1]
    assert share.tolist() == [1, 15 / 16, 1 / 2, 0]


def test_bands_of_several_channels_and_grey_pictures(tmp_path):
    lay_maps(tmp_path, 10)
    for path in (tmp_path / "images").iterdir():
        Image.open(path).convert("L").save(path)
    assert cli.main(words(tmp_path, tmp_path / "run", steps=2, channels=1)) == 0
    assert maehub.load_segmenter(tmp_path / "run").encoder.config.channels == 1
    assert len(find_label_maps(tmp_path).training) == 10


def test_what_a_segmenter_is_not_taken_for_is_said(run, tmp_path, capsys, caplog):
    assert cli.main(["convert", str(run / "model"), "-o", str(tmp_path / "c")]) == 0
    assert "its encoder alone" in caplog.text


def test_what_a_run_held_out_is_measured_again(tmp_path, told):
    """Of a split that was made by the seed, not the pictures that it was trained on; and other maps are refused."""
    lay_maps(name_classes(tmp_path / "d", NAMES), 20)
    line = words(tmp_path / "d", tmp_path / "run", steps=2, seed=5)
    assert check_held_out(line, tmp_path / "d", tmp_path / "run", "miou", told) == 4
    path = tmp_path / "d" / "masks" / "003.png"
    Image.open(path).save(path, compress_level=0)
    assert cli.main([*line, "--resume"]) == DataError.exit_code


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_segmenter_is_a_graph(run, tmp_path, form):
    """Run by the other library it gives the scores of a window; beside it stand the names of the classes."""
    assert cli.main(["convert", str(run), "-o", str(tmp_path / "g"), "--to", form]) == 0
    model = maehub.load_segmenter(run)
    images = torch.randn(2, 3, *model.encoder.config.size)
    if form == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(tmp_path / "g" / "segmenter.onnx"), providers=["CPUExecutionProvider"])
        (found,) = session.run(["scores"], {"images": images.numpy()})
    else:
        found = torch.export.load(tmp_path / "g" / "segmenter.pt2").module()(images)[0].detach().numpy()
    np.testing.assert_allclose(found, model(images).detach().numpy(), atol=1e-3)
    assert json.loads((tmp_path / "g" / "segmenter.json").read_text())["classes"]["names"] == NAMES
    assert json.loads((tmp_path / "g" / "certificate.json").read_text())["to"] == form
