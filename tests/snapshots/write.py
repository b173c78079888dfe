"""What others rely on, as it is today: `python tests/snapshots/write.py` writes it anew, test_surface.py compares it.

A difference is a mistake, or a line in the CHANGELOG. Only what a user can reach is looked at, so modules may move.
"""

import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_type_hints
from unittest import mock

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from snapshots.formats import formats

HERE = Path(__file__).parent
DOCUMENTED = {  # by README, docs and examples, outside of __all__
    "maehub.errors": "CheckpointError DataError DistributedError DivergedError HubError IntegrityError "
    "MissingDependencyError UsageError",
    "maehub.figures": "AttentionMap ErrorMap attention_overlay compose error_map grid save_figure",
    "maehub.images": "open_image",
    "maehub.weights": "pack",
    "maehub.train.recipes": "beit_like domain_continuation paper small_data tiny vit_masked_patch_prediction",
}

# -- names, signatures, fields


def surface():
    """Every public name. Types stand without their modules."""
    modules = {name: import_module(name) for name in ("maehub", "maehub.train", "maehub.interop", *DOCUMENTED)}
    names = {name: DOCUMENTED[name].split() if name in DOCUMENTED else modules[name].__all__ for name in modules}
    found = {f"{module}.{name}": getattr(modules[module], name) for module in names for name in names[module]}
    return {name: _described(value) for name, value in found.items() if not inspect.ismodule(value)}


def _described(value):
    if not inspect.isclass(value):
        return _signature(value) if callable(value) else repr(value)
    if issubclass(value, BaseException):
        return {"bases": [base.__name__ for base in value.__mro__[1:-1]], "exit code": value.exit_code}
    found = {"bases": [base.__name__ for base in value.__mro__[1:-1] if not base.__module__.startswith("maehub")]}
    kinds = get_type_hints(value)
    if hasattr(value, "_fields"):
        found["fields"] = [_field(name, kinds[name], value._field_defaults) for name in value._fields]
    elif is_dataclass(value):
        found["fields"] = [_field(one.name, kinds[one.name], _default(one)) for one in fields(value)]
    else:
        found["made by"] = _signature(value.__init__)
    for part in (part for part in value.__mro__ if part.__module__.startswith("maehub")):
        for name, member in vars(part).items():
            if isinstance(member, property):
                found.setdefault("properties", {})[name] = _signature(member.fget)
            elif (not name.startswith("_") or name in ("__call__", "__len__", "__str__")) and inspect.isroutine(member):
                found.setdefault("methods", {})[name] = _signature(getattr(value, name))
    return found


def _default(field):
    if field.default_factory is not MISSING:
        return {field.name: f"{field.default_factory.__name__}()"}
    return {} if field.default is MISSING else {field.name: repr(field.default)}


def _field(name, kind, defaults):
    return f"{name}: {_bare(inspect.formatannotation(kind))}" + (f" = {defaults[name]}" if name in defaults else "")


def _signature(function):
    names = {"Size": tuple[int, int], "Tensor": torch.Tensor, "Image": Image}
    while True:
        try:
            return _bare(str(inspect.signature(function, locals=names, eval_str=True)))
        except NameError as error:  # imported for type checkers alone
            names[error.name] = type(error.name, (), {})


def _bare(words):
    """Without the modules of types, which are no part of a string in quotes; ``Optional[int]`` is ``int | None``."""
    bare = re.sub(r"(?<!['\w.])(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", words)
    return re.sub(r"Optional\[(\w+)\]", r"\1 | None", bare)


# -- commands


def commands():
    """What ``--help-all`` shows of each flag beside its words, and exit codes."""
    from maehub.cli import main

    def said(*words):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return main([*words]), out.getvalue()

    with mock.patch.dict(os.environ, {"COLUMNS": "2000"}):
        names = re.findall(r"^  (\w+)  ", said("--help")[1], re.MULTILINE)
        return {name: _flags(said(name, "--help-all")[1]) for name in names} | {"exit codes": _exit_codes(said, names)}


def _flags(page):
    """Of each flag or position: what is shown behind its words, such as ``(default: 0)``; of most switches nothing."""
    rows = [row[2:].rstrip() for row in page.splitlines() if row.startswith("  ")]
    found, head = {}, ""
    for row in filter(None, rows):
        if not row.startswith(" "):
            head, _, row = row.partition("  ")
            found[head] = ""
        found[head] = f"{found[head]} {row.strip()}".strip()
    ends = {head: re.search(r"\((default: .*|required)\)$", words) for head, words in found.items()}
    return {_each_with_its_value(head): end[0] if end else "" for head, end in ends.items()}


def _each_with_its_value(head):
    """``-o PATH, --out PATH`` of ``-o, --out PATH``."""
    *names, last = head.split(", ")
    flag, _, value = last.partition(" ")
    return ", ".join(f"{name} {value}".strip() for name in (*names, flag)) if names else head


def _exit_codes(said, names):
    """Of what is refused before any work."""
    into = {"convert": "a", "features": "a.csv", "predict": "a.csv", "data check": "a.csv", "reconstruct": "a.png"}
    into |= dict.fromkeys(("pretrain", "finetune", "probe", "evaluate", "compare"), "a")
    more = {"pretrain": ["--steps", "1"], "evaluate": ["-m", "vit-nano"], "predict": ["-m", "vit-nano"]}
    more |= {"compare": ["-m", "vit-nano", "-m", "vit-nano"]}
    lines = {"": [], "--help": ["--help"], "--version": ["--version"], "unknown command": ["nonsense"]}
    # Behind a word, since older versions of tyro take a flag for a position that is missing.
    lines |= {f"{name} --nonsense": [name, "missing", "--nonsense"] for name in names}
    for name in (*into, "identify", "knn", "verify", "info", "data stats", "download"):
        out = ["-o", "new" + Path(into[name]).suffix] if name in into else []
        lines[f"{name}, missing input"] = [*name.split(), "missing", *more.get(name, []), *out]
    lines["push, missing input"] = ["push", "missing", "a/b", "--yes"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in ("a/x", "b/x"):
            Path("photos", name).parent.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (20, 20), (number * 60, 0, 0)).save(Path("photos", f"{name}{number}.png"))
        for name in ("a.csv", "a.png"):
            Path(name).write_text("in the way")
        Path("a").mkdir()
        Path("a", "file").write_text("in the way")
        for name, out in into.items():
            source = {"convert": "vit-nano", "reconstruct": "photos/a/x0.png"}.get(name, "photos")
            lines[f"{name}, existing output"] = [*name.split(), source, *more.get(name, []), "-o", out]
        return {name: said(*words)[0] for name, words in lines.items()}


# -- what is imported

HEAVY = (
    *("PIL", "datasets", "docstring_parser", "fsspec", "huggingface_hub", "jinja2", "matplotlib", "numpy", "onnx"),
    *("pandas", "pyarrow", "requests", "safetensors", "scipy", "simplejpeg", "sklearn", "tensorboard", "timm", "torch"),
    *("torchvision", "tqdm", "transformers", "tyro", "webdataset"),
)
WATCH = f"""
import contextlib, io, json, os, sys
HEAVY, found, known = {HEAVY!r}, {{}}, set()
def stage(name):
    new = [one for one in HEAVY if one in sys.modules and one not in known]
    known.update(new)
    found[name] = new
def silent(*words):
    from maehub import cli
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*words]) == 0
"""
WITHOUT_TORCH = """
import maehub
stage("import maehub")
silent("--help")
stage("maehub --help")
silent("list")
stage("maehub list")
silent("info", "vit-b")
stage("maehub info vit-b")
silent("pretrain", "--help")
stage("maehub pretrain --help")
"""
# Each name in a process of its own, forked. Those that need torch find it imported, which takes seconds; those of train
# and interop are looked at together.
NAMES = """
import maehub, maehub.train, maehub.interop
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("torch is needed")
def alone(names, before=()):
    reading, writing = os.pipe()
    if not os.fork():
        try:
            for module, name in names:
                getattr(module, name)
            new = sorted(one for one in HEAVY if one in sys.modules and one not in before)
        except ImportError:
            new = None
        os.write(writing, json.dumps(new).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    return json.loads(os.read(reading, 9999))
names = [(module, name) for module in (maehub, maehub.train, maehub.interop) for name in module.__all__]
sys.meta_path.insert(0, Stop())
light = {one: alone([one]) for one in names}
del sys.meta_path[0]
import torch
before = {one for one in HEAVY if one in sys.modules}
heavy = {}
for (module, name), new in light.items():
    if new is None:
        heavy.setdefault(name if module is maehub else "what needs torch", []).append((module, name))
    else:
        found[f"{module.__name__}.{name}"] = new
for name, group in heavy.items():
    for module in {module for module, _ in group}:
        mine = [one for one in group if one[0] is module]
        found[f"{module.__name__}.{name}"] = ["torch", *alone(mine, before)]
        if len(mine) > 1:
            found[f"{module.__name__} needs torch for"] = sorted(name for _, name in mine)
found["import torch"] = sorted(before)
"""
USE = """
from pathlib import Path
import maehub
encoder = maehub.load("vit-nano")
stage("load")
photos = [Path(maehub.verify("vit-nano")[0].path).with_name(f"{name}.jpg") for name in ("cat", "coffee")]
maehub.extract_features(encoder, photos, workers=0, progress=False)
stage("extract_features")
maehub.extract_features(encoder, photos, workers=1, progress=False)
stage("extract_features with a reading process")
panels = maehub.reconstruct(maehub.load_autoencoder("vit-nano"), photos[0])
stage("load_autoencoder, reconstruct")
panels.figure()
stage("figure")
"""
# What every process imports, by a hook of Python's own: the reading processes end without a word.
HOOK = f"""
import os, sys
seen = set()
def look(event, args):
    name = str(args[0]) if event == "import" else ""
    if name in {HEAVY!r} and name not in seen:
        seen.add(name)
        with open(os.path.join({{folder!r}}, str(os.getpid())), "a") as file:
            file.write(name + "\\n")
sys.addaudithook(look)
"""


def imports():
    """Which of the large packages are imported by what; stages of one process show what each adds."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(HOOK.format(folder=folder))
        found = {}
        for script in (WITHOUT_TORCH, NAMES, USE):
            hooked = [folder] if script is USE else []
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([*hooked, *map(os.path.abspath, sys.path[1:])])}
            code = WATCH + script + "\nprint(json.dumps([os.getpid(), found]))\n"
            done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
            main, told = json.loads(done.stdout)
            found |= told
        (reader,) = [file for file in Path(folder).iterdir() if file.name.isdigit() and file.name != str(main)]
        found["the reading process"] = sorted(reader.read_text().split())
    return {name: " ".join(packages) for name, packages in found.items()}


SNAPSHOTS = {"commands": commands, "formats": formats, "imports": imports, "surface": surface}


def as_text(snapshot):
    return json.dumps(snapshot, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, taken in SNAPSHOTS.items():
        (HERE / f"{name}.json").write_text(as_text(taken()))
