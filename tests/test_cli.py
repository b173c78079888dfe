"""The command line: what a person types, and everything that can go wrong with it."""

import contextlib
import importlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rights import as_nobody, let_enter, needs_root

import maehub
from maehub.cli import arguments
from maehub.cli import command_line as cli
from maehub.cli.command_line import COMMANDS, main
from maehub.data import workers as processes
from maehub.errors import CheckpointError, DivergedError
from maehub.hub.catalog import list_models

ASSETS = Path(maehub.__file__).parent / "assets"
TRAINING = ["--steps", 2, "--batch-size", 4, "--image-size", 32, "--workers", 0, "--device", "cpu", "--seed", 1]


@pytest.fixture(autouse=True)
def quiet_again():
    """``main`` sets how much maehub logs."""
    yield
    logging.getLogger("maehub").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((60 + number, 48), Image.Resampling.BICUBIC)
        picture.save(folder / ("more" if number > 3 else "") / f"{number}.{'png' if number % 2 else 'jpg'}")
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder: (exit code, lines of stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def ran(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return ran


@pytest.fixture
def idle(monkeypatch):
    """No command computes anything."""
    for owner, name in (
        (maehub.Encoder, "features"),
        (maehub.Encoder, "forward"),
        (maehub.MaskedAutoencoder, "forward"),
        (maehub.MaskedAutoencoder, "loss"),
        (processes._Pool, "__enter__"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("computed"))


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """Pictures of two classes, and a classifier of these."""
    folder = tmp_path_factory.mktemp("classified")
    for kind in ("cat", "dog"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (20, 16), (number * 9, 99, 9)).save(folder / "pictures" / kind / f"{kind}{number}.png")
    config = maehub.EncoderConfig(16, 4, 3, 32, 1, 2, classes=2, class_names=("cat", "dog"))
    maehub.save(maehub.Encoder(config), folder / "classifier")
    return folder


def child(*words, **options):
    """A process of the command line; ``mark`` in its environment finds what it leaves behind."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, "-m", "maehub", *map(str, words)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, env=environment, **piped)


# -- every command does what it says


def test_without_arguments_and_help(run):
    code, out, err = run()
    assert (code, err) == (0, [])
    assert [line.split()[0] for line in out if line.startswith("  ") and "--" not in line] == list(COMMANDS)
    assert {"--json", "--quiet", "--debug"} <= set(" ".join(out).replace(",", " ").split())
    assert run("--help") == run("help") == run("-h") == (code, out, err)
    assert run("--version") == (0, [f"maehub {maehub.__version__}"], [])


def test_help_is_not_broken_where_the_source_is(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    _, out, _ = run("probe", "--help")
    assert any("or a folder level below DATA as a number." in line for line in out)


def test_as_a_module():
    process = child("--version")
    assert process.communicate(timeout=60) == (f"maehub {maehub.__version__}\n", "")
    assert process.returncode == 0


def test_list(run):
    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out[1:]] == list_models()
    assert out[0].split() == ["NAME", "SIZE", "ROLE", "TARGET", "LICENCE", "SOURCE"]
    code, out, _ = run("list", "vit-b*")
    assert [line.split()[0] for line in out[1:]] == list_models("vit-b*")
    (line,) = [line.split() for line in out if line.startswith("vit-b-448 ")]
    assert line[1:5] == ["448", "encoder", "normalised_pixels", "CC-BY-NC-4.0"]
    code, out, _ = run("list", "vit-b*", "--json")
    assert [row["name"] for row in json.loads(out[-1])["models"]] == list_models("vit-b*")
    assert run("list", "zzz*")[0] == 2


def test_info_of_the_448_model_is_honest(run):
    code, out, _ = run("info", "vit-h-448")
    text = " ".join(out)
    assert code == 0
    assert "448×448 (weights 224×224)" in text
    assert "no 448 weights were published" in text
    assert "CC-BY-NC-4.0" in text
    code, out, _ = run("--json", "info", "vit-h-448")
    info = json.loads(out[-1])
    assert (info["image_size"], info["native_size"], info["depth"]) == ([448, 448], [224, 224], 32)


def test_info_of_a_file_names_the_command_for_it(run, tmp_path):
    (tmp_path / "my model").mkdir()
    code, _, err = run("info", "my model")
    assert code == 2
    assert "maehub identify 'my model'" in err[0]


def test_download_and_verify(run, tmp_path):
    weights = ASSETS / "vit-nano.safetensors"
    assert run("download", "vit-nano")[1] == [f"vit-nano is at {weights}"]
    assert json.loads(run("download", "vit-nano", "--json")[1][-1]) == {"path": str(weights)}
    code, out, _ = run("verify", "vit-nano")
    assert code == 0
    assert str(weights) in out[0]
    assert "the catalog" in out[0]
    (entry,) = json.loads(run("verify", "vit-nano", "--json")[1][-1])["files"]
    assert entry["compared_with"] == "the catalog"
    assert out[0].startswith(entry["sha256"][:12])


def test_convert(run, tmp_path):
    model = maehub.load_autoencoder("vit-nano")
    maehub.save(model, tmp_path / "nano")
    code, out, _ = run("convert", "nano", "-o", "official", "--to", "official", "--json")
    assert code == 0
    result = json.loads(out[-1])
    assert result["folder"] == "official"
    assert 0 <= result["difference"] <= 1e-5
    again = maehub.load_autoencoder(tmp_path / "official")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert run("convert", "nano", "-o", "official")[0] == 2
    assert run("convert", "nano", "-o", "official", "--overwrite", "--to", "timm")[0] == 0
    assert maehub.load(tmp_path / "official").config.depth == 5
    assert run("convert", ASSETS / "vit-nano.safetensors", "-o", "unpacked")[0] == 0  # what its header says is known
    again = maehub.load_autoencoder(tmp_path / "unpacked")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.config == model.config
    assert again.preprocess == model.preprocess


@pytest.mark.parametrize("ending", [".safetensors", ".npz", ".parquet", ".csv"])
def test_features_and_again(run, photos, tmp_path, ending, monkeypatch):
    line = ("features", photos, "-o", f"f{ending}", "--workers", 0, "--image-size", 64, "--precision", "fp32")
    code, out, _ = run(*line, "--json")
    assert code == 0
    assert json.loads(out[-1]) == {"out": f"f{ending}", "images": 6, "skipped": 0, "shape": [6, 192], "passed_over": {}}
    table = maehub.FeatureTable.load(tmp_path / f"f{ending}")
    encoder = maehub.load("vit-nano", image_size=64)
    assert [Path(path).name for path in table.paths] == ["0.jpg", "1.png", "2.jpg", "3.png", "4.jpg", "5.png"]
    expected = maehub.extract_features(encoder, photos, workers=0, progress=False).features
    torch.testing.assert_close(table.features, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(maehub.Encoder, "features", lambda *_, **__: pytest.fail("computed"))
    before = (tmp_path / f"f{ending}").read_bytes()
    again = run(*line)
    assert again[0] == 0
    assert "6 images" in again[1][-1]
    assert (tmp_path / f"f{ending}").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f{ending}"]


def test_features_options_reach_the_library(run, photos, tmp_path):
    words = ["-o", "f.npz", "--pool", "tokens", "--layers", 0, -1, "--image-size", 32, 64, "--batch-size", 3]
    words += ["--workers", 0, "--quiet"]
    assert run("features", photos, *words) == (0, [], [])
    table = maehub.FeatureTable.load(tmp_path / "f.npz")
    assert table.features.shape == (6, 2, 4 * 8, 192)
    assert table.provenance["decode"]["jpeg"] == "scaled"
    assert run("features", photos, *words, "--exact-decode", "--overwrite")[0] == 0
    assert maehub.FeatureTable.load(tmp_path / "f.npz").provenance["decode"]["jpeg"] == "exact"


def test_row_39_bad_pictures(run, photos, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_bytes((photos / "0.jpg").read_bytes())
    (tmp_path / "p" / "b.jpg").write_text("not a picture")
    code, out, err = run("features", "p", "-o", "f.csv", "--workers", 0)
    assert code == 5
    assert "p/b.jpg" in " ".join(err)
    assert not (tmp_path / "f.csv").exists()
    code, out, err = run("features", "p", "-o", "f.csv", "--workers", 0, "--skip-bad", "--json")
    assert code == 9
    assert json.loads(out[-1])["skipped"] == 1
    assert "b.jpg" in (tmp_path / "bad_files.csv").read_text()


def figure(path):
    with Image.open(path) as image:
        return image.size


def test_reconstruct_without_arguments(run, tmp_path):
    code, out, _ = run("reconstruct")
    assert (code, out) == (0, ["reconstruction.png"])
    width, height = figure(tmp_path / "reconstruction.png")
    assert width > 2 * height
    assert run("reconstruct")[0] == 2  # the figure is there now
    code, out, _ = run("reconstruct", "--json", "--overwrite")
    facts = json.loads(out[-1])
    assert facts["figures"] == ["reconstruction.png"]
    (numbers,) = facts["images"]
    assert numbers["mask_ratio"] == 0.75
    assert numbers["psnr"] > 15  # the model that comes with maehub is a trained one
    assert numbers["image"].endswith("cat.jpg")


def test_reconstruct_several_pictures_and_ratios(run, photos, tmp_path):
    options = ["--image-size", "64", "--json"]
    one = run("reconstruct", photos / "0.jpg", "-o", "one.png", *options)
    assert one[0] == 0
    ratios = run("reconstruct", photos / "0.jpg", "-o", "ratios.png", "--mask-ratio", 0.25, 0.5, 0.9, *options)
    shares = [row["mask_ratio"] for row in json.loads(ratios[1][-1])["images"]]
    assert shares == [pytest.approx(share, abs=1 / 64) for share in (0.25, 0.5, 0.9)]
    many = run("reconstruct", photos, "-o", "many.png", *options)
    assert [Path(row["image"]).name for row in json.loads(many[1][-1])["images"]] == [
        "0.jpg",
        "1.png",
        "2.jpg",
        "3.png",
        "4.jpg",
        "5.png",
    ]
    heights = [figure(tmp_path / name)[1] for name in ("one.png", "ratios.png", "many.png")]
    assert heights[0] < heights[1] < heights[2]


def test_reconstruct_into_a_folder(run, photos, tmp_path):
    words = ["reconstruct", photos, photos / "more", "-o", "figures/", "--image-size", "64"]
    code, out, _ = run(*words)
    assert code == 0
    assert out == [f"figures/{number}_mae.png" for number in range(6)]  # two of them were named twice
    assert all(figure(tmp_path / path)[0] > 100 for path in out)
    assert run(*words)[0] == 2
    assert run(*words, "--overwrite", "--mask-ratio", 0.5, 0.75)[0] == 0


def test_no_figure_replaces_another_of_the_same_run(run, photos, tmp_path):
    for name in ("b/0.jpg", "a/0.jpg", "a/0-2.jpg", "0.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.link(photos / "0.jpg", tmp_path / name)
    words = ["reconstruct", "0.jpg", "a", "b", "-o", "figures", "--image-size", "64"]
    assert run(*words)[1] == [f"figures/{name}_mae.png" for name in ("0", "0-2", "0-3", "0-4")]


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_reconstruct_strategies_and_seeds(run, strategy, tmp_path):
    def drawn(name, *words):
        assert run("reconstruct", "--strategy", strategy, "--image-size", 64, "-o", name, *words)[0] == 0
        return (tmp_path / name).read_bytes()

    first = drawn("a.png")
    assert drawn("b.png", "--seed", 0) == first
    assert drawn("c.png", "--seed", 5) != first or strategy == "grid"


def test_reconstruct_from_an_address(run, hub, tmp_path):
    address = hub.add_page("/pictures/coffee.jpg?size=large", ASSETS / "coffee.jpg")
    hub.pages["/pictures/coffee.jpg"] = hub.pages["/pictures/coffee.jpg?size=large"]
    code, out, _ = run("reconstruct", address, "-o", "figures", "--image-size", 64)
    assert (code, out) == (0, ["figures/coffee_mae.png"])
    code, out, err = run("reconstruct", hub.endpoint + "/nothing.jpg", "-o", "a.png")
    assert (code, out) == (3, [])
    assert "nothing.jpg" in " ".join(err)


def test_reconstruct_leaves_no_folder_for_a_model_that_is_not_there(run, tmp_path):
    assert run("reconstruct", "-o", "figures/", "-m", "vit-nothing")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_reconstruct_with_a_mask_image(run, tmp_path):
    mask = np.zeros((96, 96), np.uint8)
    mask[:, :48] = 255  # white is hidden
    Image.fromarray(mask).save(tmp_path / "mask.png")
    code, out, _ = run("reconstruct", "--mask-image", "mask.png", "-o", "a.png", "--json")
    assert code == 0
    assert json.loads(out[-1])["images"][0]["mask_ratio"] == 0.5
    assert run("reconstruct", "--mask-image", "mask.png", "--error-map", "-o", "b.png")[0] == 2
    assert run("reconstruct", "--mask-image", "none.png", "-o", "b.png")[0] == 5
    Image.fromarray(mask[:, 48:]).save(tmp_path / "black.png")
    assert run("reconstruct", "--mask-image", "black.png", "-o", "b.png")[0] == 2  # nothing is hidden


def test_reconstruct_an_error_map(run, tmp_path):
    code, out, _ = run("reconstruct", "--error-map", "--image-size", 64, "-o", "a.png", "--json")
    assert code == 0
    (numbers,) = json.loads(out[-1])["images"]
    assert 0 < numbers["score"] < 1
    assert "psnr" not in numbers
    code, out, _ = run("reconstruct", "--error-map", "--mask-ratio", 0.5, 0.75, "--image-size", 64, "-o", "b.png")
    assert code == 0
    assert figure(tmp_path / "b.png")[1] > figure(tmp_path / "a.png")[1]


def test_a_perfect_reconstruction_is_json_too(run, monkeypatch):
    """Its PSNR is infinite, which JSON has no word for."""
    monkeypatch.setattr("maehub.figures.reconstruction._psnr", lambda *_: float("inf"))
    code, out, _ = run("reconstruct", "--image-size", 64, "--json")
    assert code == 0
    assert "Infinity" not in out[-1]
    assert json.loads(out[-1])["images"][0]["psnr"] is None


def test_a_file_name_that_is_no_text(run, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9\n.jpg")
    (folder / name).write_bytes((ASSETS / "cat.jpg").read_bytes())
    code, out, _ = run("reconstruct", "odd", "-o", "figures/", "--image-size", 64, "--json")
    assert code == 0
    assert json.loads(out[-1])["images"][0]["image"] == f"odd/{name}"
    assert run("reconstruct", "odd", "-o", "figures/", "--image-size", 64, "--overwrite")[0] == 0


def test_pretrain_resume_and_an_existing_run(run, photos, tmp_path):
    words = ["pretrain", photos, "-o", "run", *TRAINING]
    code, out, err = run(*words, "--json", "--quiet")
    assert code == 0
    assert json.loads(out[-1]) == {"run": "run", "step": 2, "exit_code": 0, "passed_over": {}}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all({"step", "loss", "lr", "images_per_second"} <= set(line) for line in lines if "loss" in line)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exit_code"] == 0
    tree = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert {"checkpoints", "config.json", "metrics.jsonl", "model", "run.json"} <= set(tree)

    code, _, err = run(*words)
    assert code == 2
    assert "--resume" in " ".join(err)
    assert run(*words, "--resume")[0] == 0
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == lines
    assert run(*words, "--resume", "--overwrite")[0] == 2
    assert run(*words, "--overwrite")[0] == 0

    # a run folder is a model for every other command
    assert run("features", photos, "-m", "run", "-o", "f.npz", "--workers", 0)[0] == 0
    assert run("reconstruct", "-m", "run", "-o", "r.png")[0] == 0
    fine = ["pretrain", photos, "-o", "next", "--from", "run", *TRAINING]
    assert run(*fine)[0] == 0
    assert run("info", "run")[0] == 2


@pytest.mark.parametrize("command", ["list", "info vit-b", "download vit-nano", "verify vit-nano", "reconstruct"])
def test_json_is_the_last_line(run, command):
    code, out, _ = run(*command.split(), "--json")
    assert code == 0
    assert isinstance(json.loads(out[-1]), dict)


def test_quiet_prints_nothing(run):
    for command in ("download vit-nano", "verify vit-nano", "reconstruct -o a.png"):
        assert run(*command.split(), "--quiet") == (0, [], [])
    assert run("reconstruct", "-q", "-o", "b.png") == (0, [], [])


# -- row 83: any argument list

FLAGS = sorted({word for command in COMMANDS for word in ("-h", "--help", "-o", "-m", "--json", "--quiet", "-q")} | {
    "--" + name.rstrip("_").replace("_", "-")
    for kind in (*vars(arguments).values(), maehub.train.PretrainConfig)
    if hasattr(kind, "__dataclass_fields__")
    for name in kind.__dataclass_fields__
})  # fmt: skip
VALUES = [
    *("0", "1", "-1", "3", "0.5", "nan", "inf", "-0", "1e400", "99999999999999999999999", "True", "None", ""),
    *("auto", "cpu", "cuda", "cuda:99", "meta", "vit-nano", "vit-b-nonsense", "no/model", "./no", "random", "grid"),
    *("cls", "tokens", "true", "visible", "pixels", "out.png", "out.npz", "out.csv", "out", "..", "photo.jpg"),
    *("nothing.jpg", "x" * 300, "--", "-", "--tyro-print-completion", "--tyro-write-completion", "bash", "×", "\udcff"),
]
WORDS = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(VALUES),
    st.tuples(st.sampled_from(FLAGS), st.sampled_from(VALUES)).map("=".join),
    st.text(st.characters(blacklist_characters="\0/", blacklist_categories=()), max_size=12),
).filter(lambda word: word != "--debug")
LINES = st.tuples(st.sampled_from([*COMMANDS, "", "help", "--version", "featuers"]), st.lists(WORDS, max_size=8))


def check_row_83(code, err, allowed):
    assert code in allowed, (code, err)
    assert "Traceback" not in err
    assert "did not expect" not in err
    lines = err.splitlines()
    parsed = lines and "--help` shows" in lines[-1]
    assert len(lines) <= (12 if parsed else 6), err


@given(LINES)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_83_any_argument_list_is_parsed_or_refused(capsys, monkeypatch, line):
    for name, command in COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, command._replace(run=lambda config, shared: 0))
    capsys.readouterr()
    code = main([line[0], *line[1]])
    check_row_83(code, capsys.readouterr().err, {0, 2})


SWITCHES = ["--overwrite", "--error-map", "--exact-decode", "--skip-bad", "--json"]
TAKING = [
    *("--seed", "--layers", "--mask-ratio", "--image-size", "--pool", "--batch-size", "--device", "--strategy"),
    *("-m", "-o", "--mask-image", "--statistics"),
]
REAL = st.tuples(
    st.sampled_from(
        [
            ["features", "photo.jpg", "-o", "f.npz", "--workers", "0"],
            ["reconstruct", "photo.jpg"],
            *([name] for name in ("features", "reconstruct", "list", "info", "verify", "convert", "download")),
        ]
    ),
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(SWITCHES)),
            st.tuples(st.sampled_from(TAKING), st.sampled_from(VALUES)),
            st.tuples(st.sampled_from(VALUES)),
        ),
        max_size=4,
    ),
)


@given(REAL)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_83_odd_values_are_refused_by_name(capsys, monkeypatch, tmp_path, photos, line):
    """The commands themselves; 3, 4 and 5 too, where a model is not here, a picture is no model, or one is missing."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(FileExistsError):
        os.link(photos / "0.jpg", "photo.jpg")
    capsys.readouterr()
    code = main([*line[0], *itertools.chain(*line[1])])
    check_row_83(code, capsys.readouterr().err, {0, 2, 3, 4, 5})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["featuers", "x"], "did you mean features?"),
        (["x" * 300], "commands: list, info"),
        (["convert", "x"], "-o PATH"),
        (["features", "x", "-m", "y" * 300], "no model is called"),
        (["features", "x", "-m", "~nobody/y"], "there is no file or folder"),
        (["reconstruct", "-o", f"{'z' * 300}.png"], "File name too long"),
        (["features", str(ASSETS), "-o", f"{'z' * 300}.npz"], "File name too long"),
        (["features", "x", "-o", "a.npz", "--nonsense"], "--nonsense"),
        (["features", "x", "-o", "a.npz", "--batch-size", "many"], "--batch-size"),
        (["pretrain", "x", "-o", "a"], "--steps or as --epochs"),
        (["pretrain", "x", "-o", "a", "--steps", "1", "--mask-ratio", "nan"], "--mask-ratio must be"),
        (["pretrain", "x", "-o", "a", "--steps", "1", "--seed", "9" * 30], "--seed"),
        (["list", "--tyro-write-completion", "bash", "stolen"], "--tyro"),
        (["reconstruct", "--mask-ratio"], "--mask-ratio takes at least one number"),
        (["reconstruct", "--image-size", "1", "2", "3"], "--image-size takes a side"),
        (["reconstruct", "--seed", "9" * 30], "64 bits"),
        (["reconstruct", "--image-size", "100"], "not divisible by the patch of 8"),
    ],
)
def test_row_83_refusals_say_what_is_wrong(run, tmp_path, line, says):
    code, out, err = run(*line)
    assert (code, out) == (2, [])
    assert says in "\n".join(err)
    assert err[0].startswith("maehub: ")
    assert len(err) <= 12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_row_83_a_sample_as_a_process(tmp_path, encoding):
    """The parser draws its complaint with other characters here than in a test."""
    words = ["features", "x", "-o", "a.npz", "--batch-size", "many", "--pool", "x"]
    process = child(*words, cwd=tmp_path, env={"PYTHONIOENCODING": encoding})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    check_row_83(2, err, {2})
    assert err.startswith("maehub: ")
    assert not set(err) & set("│╭╰─|")
    assert "'cls', 'mean', 'cls+mean', 'tokens', 'map'" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


# -- errors


def test_unexpected_errors_are_short_too(run, monkeypatch):
    def broken(config, shared):
        raise KeyError("first line\nsecond line")

    monkeypatch.setitem(cli.COMMANDS, "list", COMMANDS["list"]._replace(run=broken))
    code, out, err = run("list")
    assert (code, out) == (1, [])
    assert len(err) == 2
    assert err[0].startswith("maehub: KeyError: ")
    assert "--debug" in err[1]
    with pytest.raises(KeyError):
        main(["list", "--debug"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_output_that_is_full():
    with open("/dev/full", "w") as full, child("list", stdout=full) as process:
        assert process.stderr.read().startswith("maehub: the output: No space left on device")


@pytest.mark.parametrize(
    ("raised", "code"),
    [(DivergedError("d"), 7), (CheckpointError("c"), 6), (KeyboardInterrupt(), 130), (MemoryError(), 1)],
)
def test_exit_codes(run, monkeypatch, raised, code):
    def broken(config, shared):
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "list", COMMANDS["list"]._replace(run=broken))
    got, out, err = run("list")
    assert (got, out) == (code, [])
    assert len(err) <= 2
    with pytest.raises(type(raised)):
        main(["--debug", "list"])


# -- row 84: Ctrl-C


def running_with(mark):
    """Processes with a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes() and (entry / "cmdline").read_bytes():
                    found.append(entry.name)
    return found


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupted(process, condition, mark):
    """Press Ctrl-C when something is there: stderr; the exit code is 130, and nothing runs on."""
    wait_for(condition, process)
    begin = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone in the foreground
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10  # a guard; it takes a fraction of a second, or to the end of a step
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not running_with(mark)
    return err


@pytest.fixture
def crowd(tmp_path, photos):
    """Enough pictures to be interrupted in."""
    folder = tmp_path / "crowd"
    folder.mkdir()
    for number in range(3000):
        os.link(ASSETS / "coffee.jpg", folder / f"{number}.jpg")
    return folder


def no_temporaries(folder):
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".incomplete", ".staging"))] == []


def test_row_84_ctrl_c_while_extracting(crowd, tmp_path):
    mark = uuid.uuid4().hex
    words = ["features", crowd, "-o", tmp_path / "f.npz", "--workers", 2, "--batch-size", 8, "--exact-decode"]
    process = child(*words, start_new_session=True, env={"MARK": mark})
    journal = tmp_path / "f.npz.partial" / "commits.jsonl"
    err = interrupted(process, lambda: journal.exists() and journal.stat().st_size, mark)
    assert err.splitlines()[-1] == "maehub: interrupted"
    assert no_temporaries(tmp_path)
    assert not (tmp_path / "f.npz").exists()


def test_row_84_ctrl_c_while_drawing(crowd, tmp_path):
    mark = uuid.uuid4().hex
    figures = tmp_path / "figures"
    process = child("reconstruct", crowd, "-o", figures, start_new_session=True, env={"MARK": mark})
    err = interrupted(process, lambda: figures.exists() and len(list(figures.glob("*.png"))) > 1, mark)
    assert err.splitlines()[-1] == "maehub: interrupted"
    assert no_temporaries(tmp_path)
    for path in figures.iterdir():
        with Image.open(path) as image:
            image.load()


def test_row_84_ctrl_c_while_training_and_going_on(crowd, tmp_path, run):
    mark = uuid.uuid4().hex
    words = ["pretrain", crowd, "-o", tmp_path / "run", *TRAINING, "--workers", 1]
    words[words.index("--steps") + 1] = 100_000
    process = child(*words, start_new_session=True, env={"MARK": mark})
    metrics = tmp_path / "run" / "metrics.jsonl"
    interrupted(process, lambda: metrics.exists() and metrics.stat().st_size, mark)
    assert no_temporaries(tmp_path)
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["state"], state["exit_code"]) == ("preempted", 130)
    step = state["last_good_step"]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 1))
    from maehub.train.engine.checkpoint import newest_checkpoint

    folder, _ = newest_checkpoint(tmp_path / "run")
    assert folder.name == f"step-{step}"


# -- row 85: outputs that cannot be


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("features PHOTOS -o there.npz", "there.npz exists"),
        ("features PHOTOS -o folder.npz", "is a folder"),
        ("features PHOTOS -o no/f.npz", "does not exist"),
        ("features PHOTOS -o f.txt", ".safetensors"),
        ("features PHOTOS -o f.csv --pool map", "one vector a picture"),
        ("features PHOTOS -o f.csv --skip-bad", "bad_files.csv exists"),
        ("reconstruct -o there.png", "there.png exists"),
        ("reconstruct -o no/r.png", "does not exist"),
        ("reconstruct -o r.zzz", "not a format"),
        ("reconstruct -o r.txt", "not a format"),
        ("reconstruct -o there", "is a file"),
        ("pretrain PHOTOS -o full --steps 1", "full exists"),
        ("pretrain PHOTOS -o there --steps 1", "there exists"),
        ("pretrain PHOTOS -o full --steps 1 --overwrite", "no run folder"),
        ("convert NANO -o full --heads 6", "full exists"),
        ("convert gone.pth -o full", "full exists"),
        ("data check PHOTOS -o there.csv", "there.csv exists"),
        ("data check PHOTOS -o folder.csv", "is a folder"),
        ("data check PHOTOS -o no/c.csv", "does not exist"),
        ("predict PHOTOS -m CLASSIFIED/classifier -o there.csv", "there.csv exists"),
        ("predict PHOTOS -m CLASSIFIED/classifier -o folder.csv", "is a folder"),
        ("predict PHOTOS -m CLASSIFIED/classifier -o no/p.csv", "does not exist"),
        ("predict PHOTOS -m CLASSIFIED/classifier -o p.csv --skip-bad", "bad_files.csv exists"),
        ("predict PHOTOS -m CLASSIFIED/classifier -o p.txt", "are written as .csv or .json"),
        ("evaluate CLASSIFIED/pictures -m CLASSIFIED/classifier -o full", "full exists"),
        ("evaluate CLASSIFIED/pictures -m CLASSIFIED/classifier -o full --overwrite", "is not overwritten"),
        ("evaluate CLASSIFIED/pictures -m CLASSIFIED/classifier -o there/e", "does not exist"),
        ("probe CLASSIFIED/pictures -m vit-nano -o full", "full exists"),
        ("probe CLASSIFIED/pictures -m vit-nano -o there/p", "does not exist"),
        ("probe CLASSIFIED/pictures -m vit-nano -o full --sweep", "full exists"),
        ("probe CLASSIFIED/pictures -m vit-nano -o full --method lars", "full exists"),
        ("knn CLASSIFIED/pictures -m vit-nano -o there.json", "there.json exists"),
        ("knn CLASSIFIED/pictures -m vit-nano -o no/k.json", "does not exist"),
        ("knn CLASSIFIED/pictures -m vit-nano -o k.csv", "are written as .json"),
        ("compare CLASSIFIED/pictures -m vit-nano -o full --protocol knn", "full exists"),
        ("finetune CLASSIFIED/pictures -m vit-nano -o full", "full exists"),
        ("finetune CLASSIFIED/pictures -m vit-nano -o full --overwrite", "no run folder"),
    ],
)
def test_row_85_outputs_are_refused_before_the_work(run, idle, photos, classified, tmp_path, words, says):
    for name in ("there", "there.npz", "there.png", "there.csv", "there.json", "bad_files.csv"):
        (tmp_path / name).write_text("mine")
    for folder in ("folder.npz", "folder.png", "folder.csv", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    words = words.replace("PHOTOS", str(photos)).replace("NANO", str(ASSETS / "vit-nano.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*words.replace("CLASSIFIED", str(classified)).split())
    assert (code, out) == (2, [])
    assert says in " ".join(err)
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == "mine" for path in before if path.is_file())


@needs_root
@pytest.mark.parametrize(
    "words",
    [
        "features PHOTOS -o f.npz --workers 0",
        "reconstruct -o r.png",
        "reconstruct -o figures/",
        "pretrain PHOTOS -o run --steps 1",
        "convert nano -o other",
        "data check PHOTOS -o c.csv",
        "predict PHOTOS -m CLASSIFIED/classifier -o p.csv",
        "evaluate CLASSIFIED/pictures -m CLASSIFIED/classifier -o e",
        "probe CLASSIFIED/pictures -m vit-nano -o p",
        "knn CLASSIFIED/pictures -m vit-nano -o k.json",
        "compare CLASSIFIED/pictures -m vit-nano -o c --protocol knn",
        "finetune CLASSIFIED/pictures -m vit-nano -o f --epochs 1",
    ],
)
def test_row_85_a_read_only_folder(run, idle, photos, classified, tmp_path, words):
    rooms = (
        "train.pretraining.loop",
        "train.finetuning.loop",
        "train.probing.comparing",
        "train.evaluation.evaluating",
    )
    for late in ("torch._dynamo", "maehub.conversion.conversion", *(f"maehub.{room}" for room in rooms)):
        importlib.import_module(late)  # it may lie where only root reads
    maehub.save(maehub.load_autoencoder("vit-nano"), tmp_path / "nano")
    let_enter(tmp_path, photos, classified)
    with as_nobody():
        code, out, err = run(*words.replace("PHOTOS", str(photos)).replace("CLASSIFIED", str(classified)).split())
    assert (code, out) == (6, []), err
    assert "Permission denied" in " ".join(err)
    assert [path.name for path in tmp_path.iterdir()] == ["nano"]


def test_row_85_a_closed_pipe_is_no_error():
    with child("list", "--json") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 128 + signal.SIGPIPE


# -- rows 86 to 89, 10 and 21


def test_row_86_parquet_without_pyarrow(run, idle, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, err = run("features", photos, "-o", "f.parquet")
    assert code == 2
    assert err == ["maehub: .parquet needs pyarrow: pip install 'maehub[parquet]'"]


WITHOUT = """
import contextlib, io, json, pkgutil, sys
from importlib import import_module
missing, lines = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(missing))
import maehub
for module in pkgutil.walk_packages(maehub.__path__, "maehub."):
    if not module.name.endswith("__main__"):
        import_module(module.name)
from maehub.cli.command_line import main
for line in lines:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(line)
    print(json.dumps([code, err.getvalue().splitlines()[-1]]))
"""
# Of each extra a command that needs it, and what is to be installed.
NEEDING = [
    ("features PHOTOS -o f.parquet", 2, "maehub: .parquet needs pyarrow: pip install 'maehub[parquet]'"),
    ("features FOLDER/s.heic -o f.csv", 5, "it is HEIC, which takes: pip install 'maehub[formats]'"),
    ("data check FOLDER/t.parquet", 2, "need the datasets library: pip install 'maehub[data]'"),
    ("data check s3://bucket/t.tar", 2, "need a package that is not installed: pip install 'maehub[data]'"),
    ("convert NANO -o graph --to onnx", 2, "pip install 'maehub[onnx]'"),
    ("finetune PHOTOS --task detect -o run --device cpu", 2, "pip install 'maehub[detect]'"),
    (
        "pretrain PHOTOS -o run --tensorboard --target pixels",
        2,
        '--tensorboard needs TensorBoard: pip install "maehub[log]"',
    ),
]


def test_row_86_without_any_extra_all_is_imported_and_commands_say_what_to_install(photos, tmp_path):
    (tmp_path / "s.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    extras = "pyarrow pillow_heif datasets fsspec s3fs webdataset tensorboard onnx onnxscript onnxruntime"
    extras += " transformers pycocotools"
    names = {"PHOTOS": str(photos), "FOLDER": str(tmp_path), "NANO": str(ASSETS / "vit-nano.safetensors")}
    lines = []
    for words, _, _ in NEEDING:
        for name, path in names.items():
            words = words.replace(name, path)
        lines.append([*words.split(), *(map(str, TRAINING) if "pretrain" in words else ())])
    command = [sys.executable, "-c", WITHOUT, json.dumps([extras.split(), lines])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for (words, code, says), (got, line) in zip(NEEDING, told, strict=True):
        assert (got, says in line) == (code, True), (words, got, line)


@pytest.mark.parametrize("command", ["features", "reconstruct", "pretrain"])
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "nonsense"])
def test_row_87_a_device_that_is_not_there(run, idle, photos, monkeypatch, command, device, tmp_path):
    if device == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("there are many GPUs here")
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    words = {"features": [photos, "-o", "f.npz"], "reconstruct": ["-o", "r.png"], "pretrain": [photos, "-o", "p"]}
    extra = ["--steps", 1] if command == "pretrain" else []
    code, out, err = run(command, *words[command], *extra, "--device", device)
    assert (code, out) == (2, [])
    assert err[-1].startswith(f"maehub: device {device} cannot be used here: ")
    assert len(err) == 1
    assert list(tmp_path.iterdir()) == []


def test_row_87_auto_takes_what_is_there(monkeypatch):
    from maehub.models.devices import usable_device

    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "words",
    [
        "features PHOTOS -o f.npz --workers -1",
        "features PHOTOS -o f.npz --batch-size 0",
        "features PHOTOS -o f.npz --batch-size -3",
        "features PHOTOS -o f.npz --layers 5",
        "features PHOTOS -o f.npz --image-size 0",
        "features PHOTOS -o f.npz --image-size -8",
        "reconstruct --mask-ratio 1",
        "reconstruct --mask-ratio -0.1",
        "reconstruct --mask-ratio 0.5 --strategy grid",
        "pretrain PHOTOS -o p --steps 1 --workers -1",
        "pretrain PHOTOS -o p --steps 1 --batch-size 0",
        "pretrain PHOTOS -o p --steps 0",
        "pretrain PHOTOS -o p --epochs inf",
        "pretrain PHOTOS -o p --steps 1 --image-size 100",
        "pretrain PHOTOS -o p --steps 1 --model vit-xxl",
        "pretrain PHOTOS -o p --steps 1 --from vit-b-nonsense",
    ],
)
def test_row_87_numbers_that_cannot_be(run, idle, photos, tmp_path, words):
    code, out, err = run(*words.replace("PHOTOS", str(photos)).split())
    assert (code, out) == (2, [])
    assert 1 <= len(err) <= 6
    assert list(tmp_path.iterdir()) == []


def test_row_88_no_sockets(run, photos, monkeypatch):
    """The embedded model needs no network, and nothing else asks for one."""
    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("a socket"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name look-up"))
    for command in ("list", "info vit-b", "download vit-nano", "verify vit-nano", "reconstruct", "list --help"):
        assert run(*command.split())[0] == 0
    assert run("features", photos, "-o", "f.npz", "--workers", 1)[0] == 0
    assert run("pretrain", photos, "-o", "run", *TRAINING, "--model", "vit-nano")[0] == 0


def test_row_88_a_download_sends_nothing_about_its_user(hub, photos, tmp_path, monkeypatch):
    """In a process of its own: the Hub's client reads its settings when it is first imported, here by others."""
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    maehub.save(maehub.load_autoencoder("vit-nano"), tmp_path / "nano")
    files = {str(path.relative_to(tmp_path / "nano")): path for path in (tmp_path / "nano").rglob("*.*")}
    hub.add_repo("user/nano", files)
    process = child("features", photos, "-m", "user/nano", "-o", tmp_path / "f.npz", "--workers", 0, env=hub.env())
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert {one.path for one in hub.log if "user/nano" not in one.path} == set()
    assert {one.method for one in hub.log} == {"GET", "HEAD"}
    sent = json.dumps([[one.path, one.headers] for one in hub.log])
    assert all(word not in sent for word in ("telemetry", "torch", "photos", "0.jpg"))


OFFLINE = """
import sys, time
from maehub.cli.command_line import main
begin = time.monotonic()
code = main(sys.argv[1:])
print(code, "torch" in sys.modules, time.monotonic() - begin < 1)
"""


@pytest.mark.parametrize(
    ("model", "code"), [("vit-h-448", 3), ("user/repo", 3), ("vit-h-44", 2), ("./vit-h", 2), ("x.safetensors", 2)]
)
@pytest.mark.parametrize("offline", ["0", "1"])
def test_row_10_21_no_network_and_no_cache(tmp_path, model, code, offline):
    """Before torch is imported; HF_ENDPOINT is an address where nobody listens."""
    words = ["features", "x.jpg", "-m", model]
    environment = os.environ | {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "MAEHUB_CACHE": str(tmp_path)}
    environment.pop("HF_HUB_CACHE")
    command = [sys.executable, "-c", OFFLINE, *words]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    exit_code, torch_imported, _ = ran.stdout.split()
    assert (int(exit_code), torch_imported) == (code, "False")
    assert model in ran.stderr
    assert len(ran.stderr.splitlines()) <= 6
    if code == 3:
        assert "maehub download" in ran.stderr or "cannot be reached" in ran.stderr
    if model == "vit-h-44":
        assert "vit-h-448" in ran.stderr


def test_names_do_not_steer_the_terminal(run, tmp_path):
    """Escape codes in the names of files, folders, classes and models are shown, never sent."""
    evil = "\x1b[2J\x1b]0;owned\x07\u202e"
    folder = tmp_path / f"d{evil}"
    for name in (f"cat{evil}", "dog"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{evil}.png").write_bytes(b"no picture")
    for words in (
        ["data", "check", str(folder)],
        ["info", f"vit{evil}"],
        ["evaluate", str(folder), "-m", f"gone{evil}"],
        ["identify", str(folder / f"cat{evil}" / f"{evil}.png")],
        ["features", str(folder), "-m", "vit-nano", "-o", str(tmp_path / "f.npz"), "--skip-bad"],
        [f"com{evil}mand"],
    ):
        _, out, err = run(*words)
        told = "".join(out + err)
        assert told
        assert "\x1b" not in told, words
        assert "\x07" not in told, words
        assert "\u202e" not in told, words
