"""Imports go downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "maehub"

LAYERS = [
    {"errors"},
    {"patches", "masking", "positions", "images", "opening", "jpeg", "colours", "files", "folders"},
    {"encoder", "autoencoder"},
    {
        "keys",
        "tensorfile",
        "layouts",
        "building",
        "shapes",
        "weights",
        "packing",
        "catalog",
        "room",
        "caching",
        "leftovers",
        "delivery",
        "fetching",
        "transport",
        "verification",
        "locating",
        "pickles",
        "foreign_keys",
        "foreign_folders",
        "exporting",
        "certificate",
        "conversion",
        "card",
        "hub",
    },
    {
        "sources",
        "names",
        "searching",
        "storage",
        "tar_index",
        "shards",
        "tables",
        "reading",
        "examination",
        "inspection",
    }
    | {"features", "feature_files", "feature_store", "figures", "pictures", "drawing", "statistics"},
    {"train"},
    {"interop", "identifying", "publishing"},
    {"arguments", "parsing", "commands", "reconstruct_command", "cli", "__main__"},
]
TORCH_FREE = {
    "errors",
    "catalog",
    "room",
    "caching",
    "leftovers",
    "delivery",
    "fetching",
    "transport",
    "verification",
    "locating",
    "publishing/remote",
    "publishing/conditions",
    "publishing/committing",
    "commands",
    "reconstruct_command",
    "arguments",
    "parsing",
    "cli",
    "__main__",
    "__init__",
    "train/settings",
    "train/config",
    "train/finetune_config",
    "train/probe_config",
    "train/evaluate_config",
}


def modules():
    return {str(path.relative_to(PACKAGE).with_suffix("")): path for path in PACKAGE.rglob("*.py")}


def layer(module):
    top = module.split("/")[0]
    return next((number for number, names in enumerate(LAYERS) if top in names), None)


def at_import(tree):
    """Import statements that run when the module is imported: not those inside functions or for type checkers."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def imported(node):
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downwards(module):
    if module == "__init__":
        return
    own = layer(module)
    assert own is not None, f"{module} stands in no layer: add it to LAYERS"
    tree = ast.parse(modules()[module].read_text())
    for node in ast.walk(tree):  # an import inside a function is upward too
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in imported(node):
            if not name.startswith("maehub."):
                continue
            target = name.removeprefix("maehub.").replace(".", "/")
            assert layer(target) <= own, f"{module} (layer {own}) imports {target} (layer {layer(target)})"


@pytest.mark.parametrize("module", sorted(TORCH_FREE))
def test_what_answers_at_once_imports_no_torch(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in at_import(tree):
        for name in imported(node):
            assert name.split(".")[0] not in {"torch", "timm", "torchvision", "PIL", "transformers", "huggingface_hub"}


def test_timm_is_imported_only_in_training_and_interop():
    for module, path in modules().items():
        if module.startswith(("train/", "interop/")) or module == "publishing/readback":  # runs on its own
            continue
        names = [n for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom) for n in imported(node)]  # fmt: skip  # noqa: E501
        assert not any(name.split(".")[0] in {"timm", "torchvision"} for name in names), module


def test_no_module_is_a_drawer():
    assert not {Path(m).name for m in modules()} & {"utils", "util", "common", "misc", "helpers"}
