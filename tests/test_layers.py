"""The rooms of the house: one ordered list. A room imports only rooms above it in the list, through their doors."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "maehub"

# From the ground up; a room of train/ is one of its own.
ROOMS = [
    *("version", "errors", "files", "rng"),
    *("images", "models", "weights", "data", "features", "hub", "figures", "conversion", "interop", "dense"),
    *("train.engine", "train.networks", "train.evaluation", "train.reports", "train.pretraining", "train.finetuning"),
    *("train.probing", "train.planning", "train"),
    *("publishing", "cli", "__main__", ""),
]
MOST_MODULES = 12
MOST_LINES = 400
# What answers at once: importing it imports nothing heavy, in no room that it enters.
LIGHT = {
    *(
        "errors",
        "version",
        "files",
        "cli.command_line",
        "cli.arguments",
        "cli.parsing",
        "cli.commands",
        "cli.help_page",
        "cli.reconstruct",
    ),
    *("hub.catalog", "hub.cache", "hub.downloading", "hub.fetching", "hub.client", "hub.urls"),
    "hub.deadlines",
    *("hub.verification", "publishing.remote", "publishing.committing"),
    *("train.engine.settings", "train.pretraining.config", "train.finetuning.config"),
    *("train.probing.config", "train.evaluation.config", "__main__", ""),
}
HEAVY = {"torch", "timm", "torchvision", "PIL", "numpy", "transformers", "huggingface_hub", "requests"}


def name_of(path):
    """``train.engine.steps``; of a package's ``__init__`` the package; "" of maehub itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
DOORS = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("__init__.pyi")}


def room_of(module):
    """The longest room that holds a module."""
    return next((room for room in sorted(ROOMS, key=len, reverse=True) if f"{module}.".startswith(f"{room}.")), None)


def imports(nodes):
    """(module, name) of every import of maehub; name is None for ``import maehub``."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maehub":
            for alias in node.names:
                yield node.module.removeprefix("maehub").removeprefix("."), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "maehub":
                    yield alias.name.removeprefix("maehub").removeprefix("."), None


def at_import(tree):
    """Statements that run when the module is imported: not those inside functions or for type checkers."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def behind(door, name):
    """The module from which a room gives a name."""
    for node in DOORS[door].body:
        if name in [alias.name for alias in node.names]:
            return f"{door}.{node.module}".strip(".") if node.module else f"{door}.{name}".strip(".")
    return None


@pytest.mark.parametrize("module", sorted(TREES))
def test_a_room_imports_rooms_below_it_through_their_doors(module):
    own = room_of(module)
    assert own is not None, f"{module} stands in no room: add it to ROOMS"
    for target, name in imports(ast.walk(TREES[module])):
        if target == "":  # from maehub import cli
            assert name in ROOMS, f"{module} imports {name} of maehub itself"
            target, name = name, None
        room = room_of(target)
        assert room is not None, f"{module} imports {target}, which stands in no room"
        assert ROOMS.index(room) <= ROOMS.index(own), f"{module} imports {target}, which is above it"
        if room != own:
            assert target == room, f"{module} imports {target} past the door of {room}"
            assert name is None or room not in DOORS or behind(room, name), f"{room} does not show {name}"


@pytest.mark.parametrize("door", sorted(DOORS))
def test_what_a_door_shows_is_there_and_wanted(door):
    submodules = {module.rpartition(".")[2] for module in TREES if module.rpartition(".")[0] == door}
    for node in DOORS[door].body:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name, "or a type checker does not see it"
            module = behind(door, alias.name)
            if node.module is None:
                assert module in TREES
                continue
            if module in DOORS:  # a room of train, or a room of maehub itself
                assert behind(module, alias.name)
                continue
            assert alias.name not in submodules, f"{door}.{alias.name} is a module already"
            made = {name for one in TREES[module].body for name in bound(one)}
            assert alias.name in made, f"{module} makes no {alias.name}"


def bound(node):
    """The names that a statement of a module makes."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names if alias.asname == alias.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_a_room_is_no_hall():
    packages = {path.parent for path in PACKAGE.rglob("*.py")}
    for package in packages:
        modules = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{package}: {len(modules)} modules"
    assert len([path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]) <= 13
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("module", sorted(TREES))
def test_a_module_fits_on_a_few_screens(module):
    path = PACKAGE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_what_answers_at_once_imports_nothing_heavy(module):
    waiting, seen = [module], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        nodes = list(at_import(TREES[one]))
        for node in nodes:
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            )
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {(name or "").split(".")[0] for name in names} & HEAVY, f"{module} imports {one}: {names}"
        for target, name in imports(nodes):
            target = (behind(target, name) if target in DOORS and name else None) or target
            while target in DOORS and name and (further := behind(target, name)):
                target = further
            waiting.append(target if target in TREES else name)


@pytest.mark.parametrize("module", sorted(module for module in TREES if module.startswith("train.")))
def test_configs_stop_at_their_loops(module):
    if module.endswith(("loop", "job", "config", "recipes")) or module.startswith("train.planning"):
        return
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            taken = ast.unparse(node.annotation)
            assert not re.search(r"(?<!type\[)\b(Run|Pretrain|Finetune)Config\b", taken), f"line {node.lineno}: {taken}"


def test_timm_is_imported_only_in_training_and_interop():
    for module, tree in TREES.items():
        if module.startswith(("train.", "interop.", "dense.")) or module == "publishing.round_trip":  # runs on its own
            continue
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            )
            assert not {str(name).split(".")[0] for name in names} & {"timm", "torchvision"}, module


def test_no_module_is_a_drawer():
    assert not {module.rpartition(".")[2] for module in TREES} & {"utils", "util", "common", "misc", "helpers"}
