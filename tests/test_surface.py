"""The public names, signatures, commands, flags and exit codes: what scripts rely on. Importing has no effects."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from snapshots.write import HERE, SNAPSHOTS, as_text

import maehub
from maehub import errors
from maehub.cli.command_line import COMMANDS, main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "maehub"

LOADING = {
    "image_size": None,
    "channels": None,
    "classes": None,
    "heads": None,
    "positions": "bicubic",
    "revision": None,
    "cache_dir": None,
    "offline": False,
    "verify": False,
    "device": "cpu",
    "dtype": None,
}
# name: (positional parameters, keyword-only parameters and their defaults)
FUNCTIONS = {
    "load": (["source"], LOADING),
    "load_autoencoder": (["source"], LOADING | {"decoder_heads": None, "target": None}),
    "list_models": (["pattern"], {}),
    "model_info": (["name"], {}),
    "extract_features": (
        ["encoder", "source"],
        {
            "pool": None,
            "layers": None,
            "preprocess": None,
            "batch_size": None,
            "workers": None,
            "precision": "fp32",
            "out": None,
            "skip_bad": False,
        },
    ),
    "reconstruct": (
        ["autoencoder", "image"],
        {
            "mask": None,
            "strategy": "random",
            "mask_ratio": 0.75,
            "seed": 0,
            "statistics": "visible",
            "preprocess": None,
        },
    ),
    "save": (["model", "folder"], {}),
    "convert": (["source", "folder"], {"to": "maehub", "heads": None, "decoder_heads": None, "target": None}),
    "push": (
        ["source", "repo_id"],
        {
            "licence": None,
            "about": "",
            "dataset": "",
            "with_pictures": (),
            "revision": "main",
            "parent": None,
            "private": None,
            "pull_request": False,
            "dry_run": False,
        },
    ),
    "download": (["name"], {"revision": None, "cache_dir": None}),
    "verify": (["source"], {"cache_dir": None}),
    "check_data": (["folder"], {}),
    "load_segmenter": (["folder"], {"device": "cpu"}),
    "load_detector": (["folder"], {"device": "cpu"}),
    "save_segmenter": (["model", "folder"], {"card": None, "overwrite": False}),
    "identify": (["file"], {}),
    "data_statistics": (["folder"], {}),
}
# Keyword-only parameters with defaults that came later.
LATER = {
    "extract_features": {"exact_decode": False, "overwrite": False, "progress": True},
    "save": {"dtype": None, "card": None, "overwrite": False},
    "convert": {"overwrite": False},
    "download": {"lock_timeout": 60.0},
    "identify": {"heads": None, "decoder_heads": None, "decide_target": None},
    "push": {"confirm": None, "message": "", "token": None, "progress": True},
    "check_data": {"workers": None, "progress": False, "on_bad": None},
    "data_statistics": {"sample": 2000, "workers": None, "progress": False},
}
POSITIONAL_DEFAULTS = {("list_models", "pattern"): "*"}
METHODS = {
    ("Encoder", "forward"): (["images"], {}),
    ("Encoder", "features"): (["images"], {"pool": None, "layers": None, "norm": True}),
    ("Encoder", "attention"): (["images"], {"layer": -1}),
    ("MaskedAutoencoder", "forward"): (["images", "masked"], {"mask_ratio": 0.75, "seeds": None}),
    ("MaskedAutoencoder", "loss"): (["images", "masked"], {"kept": None}),
    ("MaskedAutoencoder", "predict"): (["images", "masked"], {"kept": None, "wanted": None, "leave_out": False}),
    ("Panels", "figure"): ([], {}),
    ("Panels", "save"): (["path"], {}),
    ("Preprocess", "__call__"): (["image"], {}),
}
CLASSES = {
    "Encoder",
    "EncoderConfig",
    "MaskedAutoencoder",
    "AutoencoderConfig",
    "ModelInfo",
    "Preprocess",
    "Panels",
    "FeatureTable",
    "MaehubError",
    "Segmenter",
    "SegmenterConfig",
}
FIELDS = {
    "EncoderConfig": {"image_size", "patch_size", "channels", "width", "depth", "heads", "classes", "pool"},
    "AutoencoderConfig": {"encoder", "target", "mask_tokens", "outputs", "tokenizer"},
    "Panels": {"original", "masked", "reconstruction", "pasted", "mask", "mse", "psnr", "seed", "statistics"},
    "FeatureTable": {"paths", "features"},
}
# Flags that outside scripts type, and those that every command has.
SHARED = ["--json", "--quiet", "--debug"]
FLAGS = {
    "list": "",
    "info": "",
    "download": "--revision --cache-dir --lock-timeout",
    "cache": "--dry-run --cache-dir",
    "verify": "",
    "identify": "--heads --decoder-heads --decide",
    "push": "--licence --about --dataset --with-pictures --revision --parent --private --pr --message --dry-run --yes",
    "convert": "-o --out --to --heads --decoder-heads --target --overwrite",
    "features": "-m --model -o --out --overwrite --image-size --device --seed --workers --pool --layers --batch-size "
    "--exact-decode --skip-bad",
    "reconstruct": "-m --model -o --out --overwrite --image-size --device --seed --strategy --mask-ratio --mask-image "
    "--statistics --error-map",
    "data": "-o --out --overwrite --sample --workers",
    "pretrain": "-m --model -o --out --overwrite --image-size --device --seed --workers --steps --epochs --batch-size "
    "--checkpoint-every --resume --from --mask-ratio --strategy --target --base-lr",
    "finetune": "-m --model -o --out --overwrite --image-size --device --seed --workers --steps --epochs --batch-size "
    "--checkpoint-every --resume --base-lr --recipe --blocks --pool --layer-decay --drop-path --weight-decay --warmup "
    "--randaugment --mixup --cutmix --smoothing --erasing --ema --class-weights --val-share --group --label --fsdp "
    "--precision --compile --time-limit --skip-twins --validate-every",
    "probe": "-m --model -o --out --overwrite --image-size --device --seed --workers --batch-size --method "
    "--pool --layer --sweep --val-share --group --label",
    "knn": "-m --model -o --out --overwrite --image-size --device --seed --workers --batch-size --pool --layer",
    "compare": "-m --model -o --out --overwrite --image-size --device --seeds --workers --batch-size "
    "--protocol --epochs",
    "evaluate": "-m --model -o --out --overwrite --image-size --device --seed --workers --batch-size --label --group",
    "predict": "-m --model -o --out --overwrite --image-size --device --seed --workers --batch-size --top --skip-bad",
    "plan": "-m --model --image-size --steps --epochs --batch-size --checkpoint-every --from --mask-ratio --strategy "
    "--target --base-lr --images --on --processes --utilisation",
}
TRAINING = {
    *("PretrainConfig", "PlanConfig", "FinetuneConfig", "ProbeConfig", "KnnConfig", "CompareConfig", "EvaluateConfig"),
    *("pretrain", "plan", "finetune", "probe", "probe_sweep", "knn", "compare", "evaluate", "predict", "recipes"),
    *("Comparison", "Evaluation", "FinetuneResult", "KnnResult", "Predictions", "ProbeResult", "Scores", "Sweep"),
    *("MapEvaluation", "MapPredictions", "MapScores", "predict_maps"),
    *("ObjectEvaluation", "ObjectPredictions", "ObjectScores", "predict_objects"),
}
EXIT_CODES = {
    "MaehubError": 1,
    "UsageError": 2,
    "MissingDependencyError": 2,
    "HubError": 3,
    "IntegrityError": 4,
    "DataError": 5,
    "CheckpointError": 6,
    "DivergedError": 7,
    "DistributedError": 8,
}


def signature(function):
    """Positional parameters, keyword-only ones with their defaults, and whether there is anything else."""
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    keyword = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert len(positional) + len(keyword) == len(parameters), f"{function} takes *args or **kwargs"
    return positional, keyword


def test_exported_names():
    assert set(maehub.__all__) == CLASSES | set(FUNCTIONS)
    assert maehub.__all__ == sorted(maehub.__all__, key=str.lower)
    assert set(dir(maehub)) == set(maehub.__all__) | {"__version__", "interop", "train"}
    for name in maehub.__all__:
        assert getattr(maehub, name).__module__.startswith("maehub.")
        assert not (PACKAGE / f"{name}.py").exists()  # no module has the name of a public function
    assert inspect.isclass(maehub.MaehubError)
    assert {name for name in CLASSES if not inspect.isclass(getattr(maehub, name))} == set()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = maehub.nonsense
    assert set(maehub.train.__all__) == TRAINING
    for name in TRAINING - {"recipes"}:
        assert getattr(maehub.train, name).__module__.startswith("maehub.train.")
    for name in ("finetune", "evaluate", "probe", "knn", "compare"):
        assert signature(getattr(maehub.train, name)) == (["config"], {})
    predicting = {
        "top": 5,
        "batch_size": None,
        "workers": None,
        "precision": "fp32",
        "skip_bad": False,
        "progress": True,
    }
    assert signature(maehub.train.predict) == (["encoder", "source"], predicting)
    assert signature(maehub.train.pretrain) == (["config"], {"tokenizer": None})
    assert signature(maehub.train.plan) == (["config"], {})
    with pytest.raises(AttributeError, match="nonsense"):
        _ = maehub.train.nonsense


def test_names_for_type_checkers_are_the_names_at_run_time():
    source = (PACKAGE / "__init__.pyi").read_text()
    for name in maehub.__all__:
        room = getattr(maehub, name).__module__.split(".")[1]
        assert f"from .{room} import {name} as {name}\n" in source


@pytest.mark.parametrize(("old", "name"), [
    ("maehub.drawing", "compose"), ("maehub.drawing", "save_figure"), ("maehub.packing", "pack"),
    ("maehub.train.augment", "crop"), ("maehub.train.baselines", "baselines"),
])  # fmt: skip
def test_imports_of_0_1_that_were_documented_work_until_0_3(old, name):
    module = importlib.import_module(old)
    with pytest.warns(DeprecationWarning, match=r"goes in 0\.3"):
        assert getattr(module, name).__module__.startswith("maehub.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.compile asks all modules for any name
        assert not hasattr(module, "nonsense")
        assert not hasattr(module, "torch")


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_signatures(name):
    positional, keyword = signature(getattr(maehub, name))
    assert (positional, keyword) == (FUNCTIONS[name][0], FUNCTIONS[name][1] | LATER.get(name, {}))
    for parameter in inspect.signature(getattr(maehub, name)).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.default == POSITIONAL_DEFAULTS.get((name, parameter.name), inspect.Parameter.empty)


@pytest.mark.parametrize(("owner", "method"), sorted(METHODS))
def test_methods(owner, method):
    assert signature(getattr(getattr(maehub, owner), method)) == METHODS[owner, method]


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_fields(name):
    assert {field.name for field in fields(getattr(maehub, name))} >= FIELDS[name]


def test_output_of_the_autoencoder():
    from maehub.models.autoencoder import Output

    assert Output._fields == ("loss", "prediction", "masked")


@pytest.mark.parametrize("name", sorted(SNAPSHOTS))
def test_what_others_rely_on_is_as_it_was(name):
    """Names, commands, imports and file formats. After a change on purpose: `python tests/snapshots/write.py`."""
    assert json.loads((HERE / f"{name}.json").read_text()) == json.loads(as_text(SNAPSHOTS[name]()))


def test_exit_codes():
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, maehub.MaehubError)
    }
    assert found == EXIT_CODES
    others = (errors.EXIT_DONE, errors.EXIT_SKIPPED, errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED)
    assert others == (0, 9, 75, 130)
    builtins = {
        "UsageError": ValueError,
        "HubError": OSError,
        "IntegrityError": ValueError,
        "DataError": ValueError,
        "CheckpointError": OSError,
        "DivergedError": ArithmeticError,
        "DistributedError": RuntimeError,
    }
    for name, builtin in builtins.items():
        assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_flags_are_in_the_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help-all"]) == 0
    out = capsys.readouterr().out
    words = out.replace(",", " ").split()
    assert [flag for flag in FLAGS[command].split() + SHARED if flag not in words] == []
    assert max(map(len, out.splitlines())) <= 80
    assert "None" not in words  # nobody types it
    assert set(FLAGS) == set(COMMANDS)


def helped(capsys, *words):
    """The lines of a page of help, and the flags that it shows."""
    assert main([*words]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line[2:] for line in lines[: lines.index("Every command takes:")] if re.match("  -", line)]
    return lines, [flag for head in heads for flag in re.findall(r"--[\w-]+", head.split("  ")[0])]


@pytest.mark.parametrize("command", ["pretrain", "finetune", "plan"])
def test_help_shows_the_flags_that_most_runs_need_under_headings(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines, few = helped(capsys, command, "--help")
    everything, flags = helped(capsys, command, "--help-all")
    assert 10 <= len(few) <= 15
    assert len(flags) > 40
    assert [flag for flag in flags if flag in few] == few
    assert lines[-1] == f"--help-all shows all {len(flags)} flags"
    assert max(map(len, lines + everything)) <= 80
    headings = [line for line in everything if re.fullmatch("[a-z]+", line)]
    known = ["data", "model", "objective", "augmentation", "training", "validation", "output", "machine"]
    assert headings == [one for one in known if one != "objective" or command != "finetune"]
    assert [line for line in lines if re.fullmatch("[a-z]+", line)] == [one for one in headings if one in lines]
    assert {"data", "model", "training", "machine"} <= set(lines)
    assert helped(capsys, command, "-h") == (lines, few)
    assert helped(capsys, command, "anything", "--help", "--nonsense") == (lines, few)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_all_shows_every_flag_that_is_parsed(command, capsys):
    module, _, kind = COMMANDS[command].config.partition(":")
    names = {field.name.strip("_") for field in fields(getattr(importlib.import_module(f"maehub.{module}"), kind))}
    everything, flags = helped(capsys, command, "--help-all")
    shown = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    called = {"decide_target": "decide"}  # where a flag has another name than its field
    positions = {"pattern", "name", "what", "source", "data", "images", "file", "repo", "pictures"}
    assert {called.get(name, name) for name in names} - shown <= positions | {"quiet"}
    if command not in ("pretrain", "finetune", "plan"):
        assert helped(capsys, command, "--help") == (everything, flags)


# -- importing: row 89

WATCH = """
import json, sys, warnings, logging, signal, os
events = []
def hook(name, args):
    if name.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "shutil.", "os.mkdir",
                        "os.rename", "os.remove", "os.symlink", "os.putenv", "os.unsetenv")):
        events.append([name, repr(args)[:200]])
    if name == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+") or
                           args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        events.append([name, repr(args)[:200]])
def settings():
    return repr([warnings.filters, logging.root.handlers, logging.root.level, sys.excepthook, dict(os.environ),
                 [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)], sys.path,
                 sys.getrecursionlimit(), sys.flags])
before = settings()
sys.addaudithook(hook)
"""
IMPORT = (
    WATCH
    + """
import maehub
maehub.__all__, dir(maehub), maehub.__version__
for heavy in ("torch", "timm", "torchvision", "PIL", "numpy", "huggingface_hub", "requests", "tyro"):
    assert heavy not in sys.modules, heavy
assert settings() == before
print(json.dumps(events))
"""
)
HELP = (
    WATCH
    + """
import contextlib, io
from maehub.cli import command_line as cli
with contextlib.redirect_stdout(io.StringIO()):
    codes = [cli.main([*words]) for words in ([], ["--help"], ["list"], ["info", "vit-b"], ["features", "-h"],
                                              ["pretrain", "-h"], ["list", "--json"], ["info", "vit"])]
assert codes == [0, 0, 0, 0, 0, 0, 0, 2], codes
for heavy in ("torch", "timm", "torchvision", "PIL", "numpy", "huggingface_hub", "transformers"):
    assert heavy not in sys.modules, heavy
print(json.dumps(events))
"""
)


@pytest.mark.parametrize("script", [IMPORT, HELP], ids=["import", "help"])
def test_row_88_89_importing_and_help_have_no_effects(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert list(tmp_path.iterdir()) == []


def test_row_89_loading_and_drawing_change_no_global_setting():
    import random
    import warnings

    import numpy as np
    import torch
    from PIL import Image, ImageFile

    def settings():
        return [
            Image.MAX_IMAGE_PIXELS,
            ImageFile.LOAD_TRUNCATED_IMAGES,
            [str(one) for one in warnings.filters],
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            os.getcwd(),
            dict(os.environ),
        ]

    before = settings()
    mae = maehub.load_autoencoder("vit-nano", image_size=64)
    panels = maehub.reconstruct(mae, PACKAGE / "assets" / "cat.jpg")
    table = maehub.extract_features(mae.encoder, PACKAGE / "assets", workers=0, progress=False)
    assert panels.original.shape == (64, 64, 3)
    assert len(table) == 2
    assert settings() == before


# -- type checkers and the wheel

SCRIPT = '''
import maehub

encoder = maehub.load("vit-h-448")
table = maehub.extract_features(encoder, "photos/")

mae = maehub.load_autoencoder("vit-l")
panels = maehub.reconstruct(mae, "dog.jpg", mask_ratio=0.75, seed=0)
panels.save("dog_mae.png")


def share(names: list[str]) -> float:
    """What a stranger writes next."""
    small: maehub.Encoder = maehub.load("vit-b", image_size=(224, 448), classes=10, device="cpu")
    config: maehub.EncoderConfig = small.config
    width: int = config.width + mae.config.encoder.width
    paths: list[str] = list(maehub.extract_features(small, names, pool="mean", layers=[-1], workers=0).paths)
    shown: float = panels.psnr + panels.mse
    try:
        maehub.model_info(maehub.list_models("vit-*")[0]).describe()
    except maehub.MaehubError as error:
        print(error.exit_code)
    return shown / len(paths) / width
'''
WRONG = """
import maehub

maehub.laod("vit-b")
maehub.load("vit-b", image_sise=224)
maehub.train.PretrainConfig(data=3)
mask: str = maehub.reconstruct(maehub.load_autoencoder("vit-b"), "a.jpg", strategy="bloc").seed
"""


def type_check(folder, options):
    (folder / "script.py").write_text(SCRIPT)
    (folder / "wrong.py").write_text(WRONG)
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{options}")
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull, "script.py", "wrong.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240).stdout


def check_types(found):
    assert "script.py" not in found, found
    assert 'wrong.py:4: error: Module has no attribute "laod"' in found
    assert 'Unexpected keyword argument "image_sise"' in found
    assert 'Argument "data" to "PretrainConfig"' in found


def test_a_users_script_passes_the_type_checker(tmp_path):
    """With the large libraries left out, which take most of the time."""
    large = "torch.*,torch,numpy.*,PIL.*,timm.*,transformers.*"
    check_types(type_check(tmp_path, f"\n[mypy-{large}]\nfollow_imports = skip\n"))


@pytest.mark.slow
def test_a_users_script_passes_the_type_checker_with_torch(tmp_path):
    found = type_check(tmp_path, "")
    check_types(found)
    assert 'Argument "strategy" to "reconstruct"' in found
    assert 'expression has type "int", variable has type "str"' in found


def test_wheel_holds_what_is_no_python(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert names >= {"maehub/py.typed", "maehub/hub/catalog.toml", "maehub/assets/vit-nano.safetensors"}
    assert names >= {f"maehub/assets/{photo}.jpg" for photo in ("cat", "coffee")}
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if not name.startswith("maehub")]
    golden = (ROOT / "tests" / "release-files.txt").read_text().splitlines()
    found = {re.sub(r"^maehub-\d[^/]*", "maehub-VERSION", name) for name in names}
    assert found == {line.removeprefix("wheel ") for line in golden if line.startswith("wheel ")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "maehub = maehub.__main__:main" in entry_points
    assert wheel.stat().st_size < 9_500_000
