"""The documentation is true where a machine can tell: code runs, commands parse, links lead somewhere.

Every Python block of the README and of the quickstart runs, the blocks of one file after each other, in a folder with
the pictures that they name. Models that would be downloaded are replaced by the embedded one.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import maehub
from maehub.cli import command_line as cli
from maehub.hub import catalog
from maehub.train.finetuning.classifier import as_classifier

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RUNNABLE = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
ASSETS = Path(maehub.__file__).parent / "assets"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return [code for kind, code in _BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def commands(path):
    """Every `maehub` line of the shell blocks, as words."""
    lines = [line for code in blocks(path, "sh") for line in code.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    words = [[word for word in line if not re.fullmatch(r"[A-Z_]+=\S*", word)] for line in words]
    return [line[1:] for line in words if line and line[0] == "maehub"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages name: photos, a mask, a finished run."""
    shutil.copytree(ASSETS, tmp_path / "photos", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(ASSETS / "cat.jpg", tmp_path / "dog.jpg")
    mask = Image.new("L", (300, 300), 0)
    mask.paste(255, (60, 60, 160, 160))
    mask.save(tmp_path / "mask.png")
    shutil.copytree(tmp_path / "photos", tmp_path / "new")
    maehub.save(maehub.load_autoencoder("vit-nano"), tmp_path / "runs" / "small" / "model")
    classifier = as_classifier(maehub.load("vit-nano"), ("rose", "tulip"), pool="mean")
    maehub.save(classifier, tmp_path / "runs" / "flowers" / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RUNNABLE, ids=name_of)
def test_python_blocks_run(path, workplace):
    others = "|".join(re.escape(name) for name in catalog.list_models() if name != "vit-nano")
    names = {"__name__": "__main__"}
    found = blocks(path, "python")
    assert found
    for number, code in enumerate(found):
        code = re.sub(rf'"(?:{others})"', '"vit-nano"', code)
        exec(compile(code, f"{name_of(path)}, block {number}", "exec"), names)
    assert (workplace / "dog_mae.png").is_file()


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=name_of)
def test_python_blocks_compile(path):
    for number, code in enumerate(blocks(path, "python")):
        compile(code, f"{name_of(path)}, block {number}", "exec")


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=name_of)
def test_commands_parse(path, monkeypatch, capsys):
    parsed = []
    for name, command in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, command._replace(run=lambda config, shared: parsed.append(config) or 0))
    for words in commands(path):
        assert cli.main(list(words)) == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
    assert len(parsed) == len(commands(path))


def test_commands_in_the_tables_of_recipes_parse(monkeypatch, capsys):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in re.findall(r"`(maehub [^`…]+)`", row)]
    for name, command in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, command._replace(run=lambda config, shared: 0))
    assert len(cells) > 20
    for cell in cells:
        assert cli.main(shlex.split(cell)[1:]) == 0, f"{cell}: {capsys.readouterr().err}"


def test_a_wrong_flag_would_be_found(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "list", cli.COMMANDS["list"]._replace(run=lambda config, shared: 0))
    assert cli.main(["list", "--no-such-flag"]) == 2


def test_the_first_two_commands_of_the_readme():
    first, second = blocks(ROOT / "README.md", "sh")[:2]
    assert (first.strip(), second.strip()) == ("scripts/demo", "scripts/test")
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()
    assert all(text.strip() for text in (first, second))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_scripts_that_pages_name_exist(path):
    for script in re.findall(r"(?<![\w/])((?:scripts|benchmarks|examples|tests)/[\w./-]*\w)", path.read_text()):
        assert (ROOT / script).exists(), script


def test_the_readme_tree_is_the_package():
    tree = next(code for code in blocks(ROOT / "README.md", "") if code.startswith("maehub/"))
    listed = re.findall(r"^ +(\w+)/ ", tree, re.MULTILINE)
    package = ROOT / "maehub"
    rooms = [path.parent.name for path in package.rglob("__init__.py") if path.parent != package]
    assert sorted(listed) == sorted([*rooms, "assets"]), "each room has one line in the README's tree"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    for found in _LINK.finditer(text):
        target = found[1] or found[2]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        assert aim.exists(), f"{name_of(path)} links to {target}"
        assert aim.is_relative_to(ROOT), f"{name_of(path)} links out of the repository: {target}"
        if anchor:
            assert anchor in anchors(aim), f"{name_of(path)} links to {target}"


def anchors(path):
    """The names that a repository host gives to headings."""
    text = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
