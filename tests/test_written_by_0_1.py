"""What version 0.1 wrote goes on working: models, runs and tables in data/from-0.1, whose README says how they came."""

import json
import shutil
from pathlib import Path

import PIL
import pytest
import torch
from hub_writes import Token
from safetensors.torch import load_file

import maehub
from maehub import cli
from maehub.train.engine import resume

FOLDER = Path(__file__).parent / "data" / "from-0.1"
HERE = ["--workers", "0", "--device", "cpu", "--quiet"]
RUN = ["--batch-size", "4", "--validate-every", "4", "--keep", "1", *HERE]
TABLES = ["features.safetensors", "features.npz", "features.parquet", "features.csv"]
RUNS = {
    "pretraining": "pretrain drawings --from autoencoder --steps 4 --seed 1",
    "finetuning": "finetune drawings -m pretrained --steps 4 --seed 1",
}


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch):
    """A copy, and the current folder: the paths in it begin there."""
    shutil.copytree(FOLDER, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")


def metrics(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def answer(capsys, *words):
    """What a command that succeeds says with --json."""
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def features(name):
    paths = sorted(Path("drawings").rglob("*.png"))
    return maehub.extract_features(maehub.load(name), paths, workers=0, progress=False).features


def test_the_record_names_no_place_of_the_machine_that_made_it():
    for path in FOLDER.rglob("*"):
        if path.is_file():
            assert [place for place in (b"/work", b"/root", b"/tmp", b"/home") if place in path.read_bytes()] == [], (
                path
            )


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("autoencoder", "autoencoder/model.safetensors"),
        ("pretrained", "pretrained/model/model.safetensors"),
        ("packed.safetensors", "packed.safetensors"),
    ],
)
def test_autoencoders_are_loaded(name, file):
    autoencoder, encoder = maehub.load_autoencoder(name), maehub.load(name)
    assert autoencoder.config.encoder.size == (16, 16)
    assert autoencoder.config.target == "pixels"
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in autoencoder.encoder.state_dict().items())
    stored = load_file(file)
    ours = autoencoder.state_dict()["encoder.blocks.0.mlp.fc1.weight"]
    assert sum(value.shape == ours.shape and torch.equal(value.float(), ours) for value in stored.values()) == 1
    panels = maehub.reconstruct(autoencoder, "drawings/dots/0.png")
    assert panels.original.shape == (16, 16, 3)
    assert panels.psnr > 0


def test_the_packed_file_is_the_folder_in_half_precision():
    folder, packed = (maehub.load_autoencoder(name).state_dict() for name in ("autoencoder", "packed.safetensors"))
    assert folder.keys() == packed.keys()
    assert all(torch.equal(value.half().float(), packed[name]) for name, value in folder.items() if "pos" not in name)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_and_hold_what_is_computed_today(name):
    table = maehub.FeatureTable.load(name)
    assert table.paths == [str(path) for path in sorted(Path("drawings").rglob("*.png"))]
    assert table.provenance["maehub"] == "0.1.0"
    assert table.provenance["pool"] == "cls"
    assert torch.allclose(table.features, features("pretrained"), atol=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_is_there_is_done_or_left_alone(name, capsys):
    """Another version of maehub or of the decoder is another provenance."""
    before, known = Path(name).read_bytes(), maehub.FeatureTable.load(name).provenance
    differing = ["decode"] * (known["decode"]["pillow"] != PIL.__version__)
    differing += ["maehub"] * (maehub.__version__ != "0.1.0")
    code = cli.main(["features", "drawings", "-m", "pretrained", "-o", name, "--precision", "fp32", *HERE])
    err = capsys.readouterr().err
    assert code == (2 if differing else 0), err
    assert not differing or f"was made with another {', '.join(differing)}; name another file, or overwrite" in err
    assert Path(name).read_bytes() == before


def test_the_classifier_is_loaded_evaluated_and_predicts(capsys):
    classifier = maehub.load("finetuned")
    assert classifier.config.class_names == ("dots", "lines")
    assert classifier(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    found = answer(capsys, "evaluate", "drawings", "-m", "finetuned", *HERE)
    then = json.loads(Path("finetuned", "scores.json").read_text())["scores"]
    assert (found["n"], found["top1"], found["confusion"]) == (2, then["top1"], then["confusion"])
    assert found["loss"] == pytest.approx(then["loss"], rel=1e-4)
    found = answer(capsys, "predict", "drawings", "-m", "finetuned", *HERE)
    assert len(found["predictions"]) == 10


@pytest.mark.parametrize("source", ["pretrained", "pretraining"])
def test_a_run_is_trained_on(source):
    """The one that was stopped has no model yet, and says how to get one."""
    code = cli.main(["pretrain", "drawings", "--from", source, "--steps", "1", "-o", "next", *RUN])
    assert code == (0 if source == "pretrained" else 2)
    if code == 0:
        first = metrics("next")[0]["loss"]
        assert first == pytest.approx(metrics("pretrained")[-2]["loss"], rel=0.5)
        assert first < 2


@pytest.mark.parametrize("run", sorted(RUNS))
def test_a_stopped_run_is_resumed_by_its_own_minor_version(run, monkeypatch):
    """What would make it another run is refused by name."""
    monkeypatch.setattr(resume, "__version__", "0.1.7")
    words, before = [*RUNS[run].split(), "-o", run, *RUN, "--resume"], metrics(run)
    assert before[-1]["step"] == 1
    assert cli.main([*words, "--base-lr", "0.5"]) == 2
    assert metrics(run) == before
    assert cli.main(words) == 0
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4]
    assert metrics(run)[0] == before[0]
    assert json.loads(Path(run, "run.json").read_text())["state"] == "completed"
    assert Path(run, "report.html").read_text().endswith("</main>\n")
    assert maehub.load(run).config.classes == (2 if run == "finetuning" else 0)


@pytest.mark.parametrize("version", ["0.2.0", "0.10.0", "1.1.0.dev1"])
@pytest.mark.parametrize("run", sorted(RUNS))
def test_a_stopped_run_is_not_resumed_by_another_version(run, version, monkeypatch, capsys):
    monkeypatch.setattr(resume, "__version__", version)
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}
    assert cli.main([*RUNS[run].split(), "-o", run, *RUN, "--resume"]) == 2
    err = capsys.readouterr().err
    assert f"maehub 0.1.0 started {run}, and this is {version}. Its code computes otherwise" in err
    assert "Nothing was changed." in err
    assert '`pip install "maehub==0.1.*"`, or start a new run.' in err  # it has no weights yet
    assert {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()} == before


def test_a_finished_run_is_not_made_longer_by_another_version(monkeypatch, capsys):
    """It has weights to start a new run from."""
    words = ["finetune", "drawings", "-m", "pretrained", "--epochs", "2", "-o", "longer", *RUN]
    assert cli.main(words) == 0
    monkeypatch.setattr(resume, "__version__", "9.0.0")
    before = {path: path.read_bytes() for path in Path("longer").rglob("*") if path.is_file()}
    assert cli.main([*words, "--resume"]) == 0
    assert cli.main([*words, "--resume", "--epochs", "4"]) == 2
    assert "or start a new run from its weights: `maehub finetune … -m RUN`." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("longer").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("run", "words"), [("pretrained", RUNS["pretraining"]), ("finetuned", RUNS["finetuning"])])
def test_a_finished_run_is_done_and_not_written_over(run, words, monkeypatch, capsys):
    """By every version."""
    monkeypatch.setattr(resume, "__version__", "9.0.0")
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}
    line = [*words.replace(" --seed 1", "").split(), "-o", run, *RUN, "--checkpoint-every", "2"]
    assert cli.main(line) == 2
    assert "go on with it by --resume, or replace it by --overwrite" in capsys.readouterr().err
    assert cli.main([*line, "--resume"]) == 0
    assert {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()} == before


OF_ALL = {"README.md", "checksums.sha256", "config.json", "model.safetensors"}
OF_AUTOENCODERS = {"preprocessor_config.json", "timm/model.safetensors", "figures/reconstruction.png"}
OF_RUNS = {"metrics.jsonl", "recipe.json", "figures/curve.png"}


@pytest.mark.parametrize(
    ("source", "files"),
    [
        pytest.param("autoencoder", OF_ALL | OF_AUTOENCODERS, marks=pytest.mark.slow),
        ("pretrained", OF_ALL | OF_AUTOENCODERS | OF_RUNS),
        ("finetuned", OF_ALL | OF_RUNS | {"metrics.json", "figures/accuracy.png"}),
    ],
)
def test_it_is_published(source, files, hub, monkeypatch, capsys):
    """With nothing replaced: the other libraries read the repository that is built."""
    token = "hf_" + "t0k3n" * 7
    monkeypatch.setenv("HF_TOKEN", token)
    hub.tokens[token] = Token()
    found = answer(capsys, "push", source, "user/drawings", "--licence", "mit", "--dry-run", "--quiet")
    assert {file["name"] for file in found["plan"]["files"]} == files
    assert found["committed"] is None
    assert "user/drawings" not in hub.repos
    assert set(found["plan"]["verified"]) == {"maehub", "timm"} | ({"transformers"} if source != "finetuned" else set())
