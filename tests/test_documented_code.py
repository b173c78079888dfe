"""The code of every page and docstring runs, or is listed with the reason why it is only parsed; `test_examples.py`
runs the examples.

The blocks of a page are run in order in one folder, with the embedded model in place of the catalog's, small pictures
in place of a reader's, and one step in place of a training; the tables below say what stands for what.
"""

import ast
import io
import os
import re
import shlex
import shutil
import tarfile
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from map_files import lay_maps
from object_files import lay_objects
from PIL import Image

import maehub
from maehub import train
from maehub.cli import command_line
from maehub.hub import catalog
from maehub.images import open_image
from maehub.models import PRESETS, AutoencoderConfig, EncoderConfig
from maehub.train.engine import settings
from maehub.train.evaluation import PredictConfig
from maehub.weights import to_official

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ASSETS = Path(maehub.__file__).parent / "assets"
SHELLS = ("sh", "bash", "console")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Many small trainings each; `scripts/test --all` runs them.
SLOW = ["README.md", "docs/probing.md", "docs/recipes.md", "maehub/train/recipes.py:recipes"]
PYTHON = ["README.md"]  # of these, whose Python trains nothing

# ---- what stands for what

MODELS = "|".join(re.escape(name) for name in sorted({*catalog.list_models(), *PRESETS} - {"vit-nano"}, key=len)[::-1])
TRAIN = "--steps 1 --batch-size 4 --workers 0 --device cpu --skip-twins"
IN_COMMANDS = [
    (rf"(?<=-m )({MODELS})-in1k\b", "runs/flowers"),
    (r"(?<=-m )timm/\S+", "baseline/pixels"),
    (rf"(?<=-m )untrained/({MODELS})\b", "untrained/vit-nano"),
    (rf"((?:-m|--model|--from|convert|download|verify|info) )({MODELS})(?![\w/-])", r"\1vit-nano"),
    (r"--image-size 224 448", "--image-size 96 192"),
    (r"--image-size 448", "--image-size 96"),
    # once for each of several flags of a line; a plan keeps them
    *[(r"(maehub (?:pretrain|finetune) .*?) --(?:epochs|steps|batch-size|\S+-every|minutes) \S+", r"\1")] * 5,
    (r"--seeds 0 1 2", "--seeds 0 1"),
    (r"--workers 16", ""),
    (r"(?<=maehub )(pretrain .*)", rf"\1 {TRAIN.removesuffix(' --skip-twins')}"),
    (r"(?<=maehub )(finetune .*)", rf"\1 {TRAIN}"),
    (r"(?<=maehub )(compare .*finetune.*)", r"\1 --steps 1 --skip-twins"),
    (r"(?<=maehub )(probe .*--method lars.*)", r"\1 --skip-twins"),
    (r"shards/\{000\.\.099\}\.tar", "shards/{000..001}.tar"),
]
IN_PYTHON = [
    (rf'"untrained/({MODELS})"', '"untrained/vit-nano"'),
    (rf'"({MODELS})-in1k"', '"runs/flowers"'),
    (rf'"({MODELS})"', '"vit-nano"'),
    (r"image_size=\(224, 448\)", "image_size=(96, 192)"),
    (r"pretrain\(((?:recipes\.)?paper\(.*\))\)", r"pretrain(shortened(\1))"),
    (r"(PretrainConfig\(.*)epochs=\d+\)", r"\1steps=1, batch_size=4, workers=0)"),
    (r"(FinetuneConfig\(.*)\)\)", r"\1, steps=1, batch_size=4, workers=0, skip_twins=True))"),
]
# Code that is only parsed: a page, words of a block or of one of its lines, and why.
PARSED = [
    ("README.md", "scripts/demo", "installs a whole environment"),
    ("README.md", "scripts/test", "this test is run by it"),
    ("README.md", "maehub push", "a Hub; tests/test_publishing.py pushes"),
    ("CONTRIBUTING.md", "scripts/", "whole runs of their own"),
    ("docs/data.md", "someone/scans", "a live Hub"),
    ("docs/design.md", "", "drawings"),
    ("docs/evaluation.md", "scripts/labelled-data", "downloads"),
    ("docs/evaluation.md", "benchmarks/protocols.py", "hours"),
    ("docs/file-formats.md", "user/repo", "a live Hub; tests/test_publishing.py reads one back so"),
    ("docs/identifying.md", "benchmarks/deciding_targets.py", "hours"),
    ("docs/nano-data.md", "scripts/nano-data", "downloads"),
    ("docs/publishing.md", "maehub push", "a Hub; tests/test_publishing.py pushes"),
    ("docs/publishing.md", "maehub.push", "a Hub; tests/test_publishing.py pushes"),
    ("docs/reconstructions.md", "benchmarks/statistics_floor.py", "minutes"),
    ("docs/replication.md", "scripts/labelled-data", "downloads"),
    ("docs/replication.md", "benchmarks/replication.py", "a GPU for hours"),
    ("docs/scaling.md", "#SBATCH", "a cluster"),
    ("docs/scaling.md", "torchrun", "a cluster"),
    ("docs/detection.md", "boxes", "a set with objects; tests/test_detection.py has these lines"),
    ("docs/detection.md", "DENSE", "downloads"),
    ("docs/detection.md", "load_detector", "a run; tests/test_detection.py has these lines"),
    ("docs/segmentation.md", "pictures/", "a set with label maps; tests/test_segmentation.py has these lines"),
    ("docs/segmentation.md", "DENSE", "downloads"),
    ("docs/segmentation.md", "load_segmenter", "a run; tests/test_segmentation.py has these lines"),
    ("docs/targets.md", "benchmarks/variants.py", "minutes"),
    ("docs/targets.md", "pretrain(config, tokenizer=tokens_of)", "a tokenizer of the reader's; tests/test_targets.py"),
    ("docs/vit-nano.md", "scripts/nano-data", "downloads"),
    ("docs/vit-nano.md", "benchmarks/nano_reconstruction.py", "minutes"),
    ("docs/pretraining.md", "torchrun", "many GPUs or hosts; tests/test_distributed.py"),
    ("docs/finetuning.md", "torchrun", "many GPUs; tests/test_finetuning_distributed.py"),
]
OUTPUT = [  # blocks without a language: what a program prints, files, drawings
    ("README.md", "maehub/\n  errors"),
    ("docs/data.md", "path,label,split,patient"),
    ("docs/design.md", "image (B, C, H, W)"),
    ("docs/design.md", "version  errors"),
    ("docs/finetuning.md", "it will take up to 4 minutes"),
    ("docs/finetuning.md", "on 332 pictures that were not trained"),
    ("docs/identifying.md", "checkpoint-799.pth\n  what"),
    ("docs/nano-data.md", "scripts/nano-data OUT"),
    ("docs/probing.md", "MODEL               POOL"),
    ("docs/segmentation.md", "pictures/images/a.jpg"),
]


def shortened(config):
    """The recipe of a paper as one step of a small network."""
    small = {"model": "vit-nano", "image_size": (96,), "batch_size": 4, "workers": 0, "steps": 1, "epochs": None}
    return replace(config, **small)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """(language, code) of every block of a page."""
    return _BLOCK.findall(path.read_text(encoding="utf-8"))


def commands(code):
    """The lines of a shell block, continued ones joined, without comments."""
    joined = re.sub(r"\\\n\s*", "", code)
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def is_parsed_only(page, text):
    return any(page == where and words and words in text for where, words, _ in PARSED)


def words_of(line):
    """The words behind `maehub` in a line without variables in front; None where it is another program's."""
    words = shlex.split(line, comments=True)
    if "torchrun" in words:
        words = words[words.index("-m", words.index("torchrun")) + 1 :]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words[1:] if words[:1] == ["maehub"] else None


def changed(text, table):
    for found, instead in table:
        text = re.sub(found, instead, text)
    return text


# ---- parsed


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=name_of)
def test_every_block_is_of_a_kind_that_is_looked_at(path):
    for language, code in blocks(path):
        known = language in ("python", *SHELLS) or any(
            name_of(path) == page and code.startswith(words) for page, words in OUTPUT
        )
        assert known or is_parsed_only(name_of(path), code), f"neither run nor listed: {code}"
        if language == "python":
            compile(code, name_of(path), "exec")


def test_the_lists_name_what_is_there():
    for page, words, _ in PARSED:
        assert any(words in code for _, code in blocks(ROOT / page)), (page, words)
    for page, words in OUTPUT:
        assert any(code.startswith(words) for language, code in blocks(ROOT / page) if not language), (page, words)


@pytest.fixture
def parser(monkeypatch):
    """Commands that only read their words."""
    for name, command in list(command_line.COMMANDS.items()):
        monkeypatch.setitem(command_line.COMMANDS, name, command._replace(run=lambda config, shared: 0))


@pytest.mark.parametrize("path", [path for path in PAGES if "maehub " in path.read_text()], ids=name_of)
def test_every_command_is_read_by_the_command_line(path, parser, capsys):
    """Those of shell blocks, and those between backticks in the text and in tables, which may leave something out."""
    for language, code in blocks(path):
        for line in commands(code) if language in SHELLS else ():
            if (words := words_of(line)) is not None:
                assert command_line.main(list(words)) == 0, f"{line}: {capsys.readouterr().err}"
            elif not is_parsed_only(name_of(path), code):
                assert line.startswith("export "), f"neither run nor listed: {line}"
    for line in re.findall(r"`(maehub [a-z]+ [^`…\n]*)`", _BLOCK.sub("", path.read_text(encoding="utf-8"))):
        words = shlex.split(re.sub(r"\b(SECONDS|N)\b", "3", line))[1:]
        complaint = "" if command_line.main(words) == 0 else capsys.readouterr().err
        assert complaint.startswith("maehub: Missing") or not complaint, f"{line}: {complaint}"


def test_a_wrong_flag_would_be_found(parser):
    assert command_line.main(["list", "--no-such-flag"]) == 2


# ---- run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the pages name: photos, labelled pictures, checkpoints, a finished run."""
    home = tmp_path_factory.mktemp("pages")
    shutil.copytree(ASSETS, home / "maehub" / "assets")
    for number in range(6):
        for name, shade in (("rose", 30), ("tulip", 190)):
            values = np.random.default_rng(number).integers(0, 60, (96, 128, 3)) + shade
            picture = Image.fromarray(values.astype(np.uint8))
            folders = [
                *(f"{data}/{name}" for data in ("flowers", "test", "imagenet/train", "imagenet/val", "imagenet-a")),
                *(f"scans/{name}/p{number % 3}", f"pets/a {name}", "photos", "new", "DATA", "images"),
            ]
            for folder in folders:
                (home / folder).mkdir(parents=True, exist_ok=True)
                picture.save(home / folder / f"{name}{number}.jpg")
    shutil.copy(ASSETS / "cat.jpg", home / "dog.jpg")
    shutil.copy(ASSETS / "cat.jpg", home / "part_0173.png")
    mask = Image.new("L", (300, 300), 0)
    mask.paste(255, (60, 60, 160, 160))
    mask.save(home / "mask.png")
    files = sorted((home / "images").iterdir())
    rows = [f"images/{file.name},{file.stem[:-1]},{file.stem[:-1]},p{file.stem[-1]}" for file in files]
    rows = [f"{row},{30 + number},{number % 5}" for number, row in enumerate(rows)]
    (home / "scans.csv").write_text("\n".join(["path,label,diagnosis,patient,age,area", *rows]))
    (home / "leaves.csv").write_text("\n".join(["path,label,diagnosis,patient,length,area", *rows]))
    (home / "scenes.csv").write_text(
        "\n".join(["path,label", *(f"images/{file.name},beach|people" for file in files[:6])])
    )
    with (home / "scenes.csv").open("a") as table:
        table.writelines(f"\nimages/{file.name},people" for file in files[6:])
    (home / "shards").mkdir()
    for number in range(2):
        with tarfile.open(home / "shards" / f"00{number}.tar", "w") as shard:
            for file in files[number::2]:
                for ending, content in (("jpg", file.read_bytes()), ("cls", str(int("rose" in file.name)).encode())):
                    member = tarfile.TarInfo(f"{file.stem}.{ending}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    lay_maps(home / "streets")
    lay_objects(home / "boxes", "coco", range(12))
    (home / "pets.csv").write_text("folder,class\na rose,rose\na tulip,1\n")
    torch.manual_seed(0)
    mae = maehub.load_autoencoder("vit-nano")
    named = maehub.Encoder(
        EncoderConfig(96, 8, 3, 48, 2, 4, classes=2, class_names=("rose", "tulip"), pool="mean"),
    )
    for folder in ("runs/flowers/model", "a-timm-folder"):
        maehub.save(named.eval(), home / folder)
    for folder in ("runs/small/model", "runs/vit-nano/model", "runs/a/model"):
        maehub.save(mae, home / folder)
    usual = maehub.MaskedAutoencoder(AutoencoderConfig(PRESETS["vit-nano"], 512, 1, 16))
    (home / "downloads").mkdir()
    for name in ("checkpoint-799.pth", "mae_pretrain_vit_base.pth", "epoch_1600.pth", "nano.pth", "downloads/some.pth"):
        model = mae if name == "nano.pth" else usual
        torch.save({"model": to_official(model.state_dict()).state}, home / name)
    return home


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path


class Reader:
    """Does what a page says, block after block."""

    def __init__(self, path):
        self.page = name_of(path)
        self.names = {"__name__": "__main__", "maehub": maehub, "shortened": shortened}
        self.made = {}  # what commands write, and in which block
        self.block = 0

    def do(self, language, code):
        self.block += 1
        if language == "python":
            if not is_parsed_only(self.page, code):
                for path in [
                    path for path in self.made if f'"{path}"' in code and re.search(r"Config\(|paper\(", code)
                ]:
                    self.clear(path)
                exec(compile(changed(code, IN_PYTHON), f"{self.page}, block {self.block}", "exec"), self.names)
        elif language in SHELLS:
            for line in commands(code):
                only_parsed = is_parsed_only(self.page, line if words_of(line) else code)
                if not only_parsed and not line.startswith("export "):
                    self.command(line)

    def command(self, line):
        line = changed(re.split(r"\s#", line)[0].strip(), IN_COMMANDS)
        out = re.search(r"(?<= -o )\S+", line)
        if out and "--resume" not in line and self.made.get(out[0]) != self.block:
            self.clear(out[0])
        if out:
            self.made[out[0]] = self.block
        assert command_line.main(words_of(line)) == EXITS.get((self.page, line), 0), line

    def clear(self, path):
        """Remove what an earlier block wrote: the reader of this one begins with it."""
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)


EXITS = {}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, marks=[pytest.mark.slow, pytest.mark.timeout(1800)] * (name_of(path) in SLOW), id=name_of(path)
        )
        for path in PAGES
        if any(language in ("python", *SHELLS) for language, _ in blocks(path))
    ],
)
def test_the_code_of_a_page_runs(path, folder):
    reader = Reader(path)
    if path.name == "identifying.md":  # the page shows the embedded model's
        os.replace("nano.pth", "checkpoint-799.pth")
    for language, code in blocks(path):
        if "local-dir:" in code and not hasattr(timm.models._factory, "_MODEL_SOURCES"):
            continue  # this timm reads none
        reader.do(language, code)


@pytest.mark.parametrize("path", [ROOT / name for name in PYTHON], ids=PYTHON)
def test_the_python_of_a_page_runs(path, folder):
    reader = Reader(path)
    for language, code in blocks(path):
        if language == "python":
            reader.do(language, code)


def in_docstrings(path):
    """(name, code) of the indented paragraphs of docstrings that are code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            code = [
                part
                for part in text.split("\n\n")
                if re.match(r" {4}(?:import |from |\w+ = |print\(|\w[\w.]*\()", part)
            ]
            code = [part for part in code if not re.search(r"^ {4}\w+ +\(", part, re.MULTILINE)]
            if code:
                yield getattr(node, "name", path.stem), "\n".join(map(textwrap.dedent, code))


DOCSTRINGS = [
    (f"{path.relative_to(ROOT).as_posix()}:{name}", code)
    for path in sorted((ROOT / "maehub").rglob("*.py"))
    for name, code in in_docstrings(path)
]


@pytest.mark.parametrize(
    ("place", "code"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (one[0] in SLOW), id=one[0]) for one in DOCSTRINGS],
)
def test_the_code_of_a_docstring_runs(place, code, folder):
    compile(code, place, "exec")
    if place not in NOT_RUN:
        names = {"shortened": shortened, "maehub": maehub, "picture": open_image("dog.jpg"), "__name__": "__main__"}
        exec(changed(code, IN_PYTHON), names)


NOT_RUN = {
    "maehub/publishing/committing.py:committing": "a Hub",
}


# ---- paths in settings

SETTINGS = [
    *(train.PretrainConfig, train.FinetuneConfig, train.ProbeConfig, train.KnnConfig, train.CompareConfig),
    *(train.EvaluateConfig, train.PlanConfig, PredictConfig),
]


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("given", [str, Path], ids=["text", "path"])
def test_every_path_of_settings_may_be_text_or_a_path(kind, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {field.name: settings.annotation(field.type)[0] for field in fields(kind)}
    values = {name: given("place.json") for name, place in places.items() if place is Path}
    assert "out" in values
    values |= {"pictures": [given("photos")]} if "pictures" in places else {"data": given("photos")}
    values |= {"model": given("runs/a")} if "model" in places else {}
    values |= {"from_": given("runs/b"), "steps": 1} if "from_" in places else {}
    config = kind(**values)
    for name, value in values.items():
        kept = getattr(config, name)
        if places[name] is Path:
            assert kept == Path("place.json")
            assert isinstance(kept, Path)
        elif name != "steps":
            assert kept in (str(value), (str(value),), ("photos",))


def test_every_class_of_settings_is_among_them():
    commands = {command.config.partition(":") for command in command_line.COMMANDS.values()}
    public = {name for module, _, name in commands if module.startswith("train")}
    assert public == {kind.__name__ for kind in SETTINGS}
