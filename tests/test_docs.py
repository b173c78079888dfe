"""The documentation is true where a machine can tell: links lead somewhere, what is named exists.

`test_documented_code.py` runs its code.
"""

import re
import shlex
from pathlib import Path

import pytest

from maehub.cli import command_line as cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    return [code for kind, code in _BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def test_commands_in_the_tables_of_recipes_parse(monkeypatch, capsys):
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in re.findall(r"`(maehub [^`…]+)`", row)]
    for name, command in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, command._replace(run=lambda config, shared: 0))
    assert len(cells) > 20
    for cell in cells:
        assert cli.main(shlex.split(cell)[1:]) == 0, f"{cell}: {capsys.readouterr().err}"


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
