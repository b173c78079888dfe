"""What errors, warnings and help advise exists, and helps where it is followed.

Every text of the package that names a command, a flag, an argument, an extra, a function or a page is collected from
the syntax trees. What it names must exist where the text can appear; and each text either stands in one of the tables
below, which provoke it and follow it, or in the list of those that are not followed here, with the reason.
"""

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maehub
from maehub.cli import command_line
from maehub.cli.help_page import _rows, help_page
from maehub.cli.parsing import parsed
from maehub.models import AutoencoderConfig, EncoderConfig
from maehub.weights import to_official, write_tensors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "maehub"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SHARED = {"--json", "--quiet", "-q", "--debug", "-h", "--help", "--help-all", "--version"}


def arguments_of(command):
    """The dataclass that a command line is read into."""
    module, _, kind = command_line.COMMANDS[command].config.partition(":")
    return getattr(importlib.import_module(f"maehub.{module}"), kind)


FLAGS = {
    command: SHARED | {name for row in _rows(arguments_of(command)) for name in row.names}
    for command in command_line.COMMANDS
}

# ---- the collection

VERBS = ("again", "block", "did", "does", "fills", "has", "loads", "or", "reads", "takes")  # maehub is what does them
_MARKS = re.compile(
    rf"`|\bmaehub (?!(?:{'|'.join(VERBS)})\b)[a-z]|--[a-z]|\b[a-z_]+=(?!=)|maehub\[|pip install|docs/|\(\.\.\."
    r"|\bmaehub(?:\.\w+)+\(|\b(?:MAEHUB|HF|OMP)_[A-Z]"
)
_NOT_SAID = ("default", "arg", "compile")  # calls whose texts are part of help pages, see below, and patterns


def is_text(node):
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def words(node):
    """A text as it is written, with the expressions of an f-string in braces."""
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(words(part) if is_text(part) else f"{{{ast.unparse(part.value)}}}" for part in node.values)


def collected(source):
    """(function or class, text) of each text of a module that advises something. Code in a text is not advice here."""
    found = []
    for top in ast.parse(source).body:
        waiting = [top]
        while waiting:
            node = waiting.pop()
            called = node.func if isinstance(node, ast.Call) else None
            if getattr(called, "id", getattr(called, "attr", None)) in _NOT_SAID:
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
                continue
            if not is_text(node):
                waiting += ast.iter_child_nodes(node)
                continue
            text = words(node)
            if (
                _MARKS.search(text)
                and not re.fullmatch(r"-?-[a-z-]*|[A-Z_]+", text)
                and not re.search("```|</?[a-z]", text)
            ):
                found.append((getattr(top, "name", ""), text))
    return sorted(found)


ADVICE = sorted(
    (".".join([*path.relative_to(PACKAGE).with_suffix("").parts, scope]).strip("."), text)
    for path in PACKAGE.rglob("*.py")
    for scope, text in collected(path.read_text())
)

# ---- what may be named where

# By which commands, and by which functions, a text comes to be read, for the longest beginning of its place. A flag
# must be one of all those commands, an argument one of all those functions. Of a class of settings, see `commands_of`.
TRAINING, FROZEN = ("pretrain", "finetune"), ("probe", "knn", "compare")
LABELLED = ("finetune", *FROZEN, "evaluate")
COMMANDS = {
    "cli.commands.run_list": ("list",),
    "cli.commands.run_push": ("push",),
    "cli.commands.run_training": TRAINING,
    "cli.commands.wanted_size": ("features", "predict", "reconstruct"),
    "cli.reconstruct": ("reconstruct",),
    "conversion": ("convert",),
    "conversion.identifying": ("identify",),
    "data": (*TRAINING, "plan", *FROZEN, "evaluate"),
    "data.inspection": ("data",),
    "data.loader.check_shared_memory": ("pretrain",),
    "data.label_sources": LABELLED,
    "features": ("features",),
    "features.extraction._Work": ("features", "predict"),
    "features.table.check_bad_files": ("features", "predict"),
    "figures": ("reconstruct",),
    "files": ("convert", "evaluate", "probe", "compare"),
    "files.check_place": ("data", "predict", "knn"),
    "publishing": ("push",),
    "train.engine": TRAINING,
    "train.networks": LABELLED,
    "train.networks.presets": ("pretrain", "plan"),
    "train.evaluation.class_matching": ("evaluate",),
    "train.evaluation.corruptions": ("evaluate",),
    "train.evaluation.evaluating": ("evaluate",),
    "train.evaluation.predicting": ("predict",),
    "train.pretraining": ("pretrain",),
    "train.pretraining.loop.view_of": ("pretrain", "plan"),
    "train.pretraining.network": ("pretrain", "plan"),
    "train.finetuning": ("finetune",),
    "train.probing.comparing": ("compare",),
    "train.probing.config.CompareConfig": ("compare",),
    "train.probing.probing": ("probe", "knn"),
    "train.probing.probing._trained": ("probe",),
    "train.planning": ("plan",),
    "train.reports.classifier": ("finetune",),
    "train.reports.report": TRAINING,
}
# Programs of others: what is advised of them.
OTHERS = {
    "hf": {"auth", "login", "download", "--local-dir"},
    "docker": {"--shm-size"},
    "git": {"lfs", "pull"},
    "tar": {"-A"},
    "cat": set(),
    "pip": {"install"},
}
FACTS = set("bytes crop_mode crop_pct crop_size final_norm format global_pool interpolation kind".split()) | set(
    "layer_norm_eps resample size".split()
)  # what a file says of itself
FUNCTIONS = {
    "conversion": ("convert",),
    "data.workers": ("extract_features", "check_data"),
    "features.extraction": ("extract_features",),
    "features.table": ("extract_features",),
    "features.table.FeatureTable": ("FeatureTable.save",),
    "figures.reconstruction.attention_overlay": ("figures.attention_overlay",),
    "figures.reconstruction": ("reconstruct",),
    "figures.rendering": ("AutoencoderConfig",),
    "files.check_place": ("train.evaluation.PredictConfig", "train.KnnConfig"),
    "files.check_free": ("save", "convert", "train.ProbeConfig", "train.CompareConfig", "train.EvaluateConfig"),
    "hub": ("load", "load_autoencoder", "download"),
    "hub.loading": ("load_autoencoder",),
    "interop.pyramid": ("interop.FeaturePyramid",),
    "models.autoencoder.AutoencoderConfig": ("AutoencoderConfig|EncoderConfig",),
    "models.autoencoder.MaskedAutoencoder": ("MaskedAutoencoder.predict|AutoencoderConfig",),
    "models.encoder.EncoderConfig": ("EncoderConfig",),
    "models.encoder.Encoder": ("Encoder.features|Encoder.attention",),
    "models.encoder": ("Encoder.features",),
    "models.masking": ("reconstruct",),
    "models.positions": ("load",),
    "train.evaluation.config": ("train.evaluation.PredictConfig", "train.KnnConfig"),
    "train.pretraining.objective": ("load_autoencoder|AutoencoderConfig|train.pretraining.Objective",),
    "weights.config_inference": ("load_autoencoder", "convert"),
    "weights.config_json": ("convert",),
    "weights.keys": ("convert",),
    "weights.library_keys": ("convert",),
    "weights.model_folder": ("load_autoencoder", "convert"),
}
WHOSE = {("data.loader.batches_of", "--resume"): TRAINING}  # where the text itself says whose the flag is
# Expressions in a command that are one word, whatever happens, and such a word. Others must be quoted for the shell.
FILLED = {
    "command": "list",
    "label.name": "vit-b",
    "name": "vit-b",
    "path": "vit-b",
    "text": "vit-b",
    "recipe": "linear",
    "results.get('pool')": "cls",
}
READ = " ".join(  # where variables of the environment are read
    path.read_text()
    for folder, names in (
        (PACKAGE, ("files.py", "hub/client.py", "hub/cache.py", "publishing/remote.py")),
        (Path(importlib.import_module("huggingface_hub").__file__).parent, ("constants.py", "utils/_auth.py")),
    )
    for path in map(folder.joinpath, names)
)
_BRACES = re.compile(r"\{([^{}]*(?:\{[^{}]*\})?[^{}]*)\}")
_CALL = re.compile(
    r"\b((?:maehub|timm)(?:\.\w+)+|[a-z_]{4,}(?=\(\.\.\.|\([a-z]+\.[a-z]+\)))(\((?:[^()]|\([^()]*\))*\))?"
)


def longest(table, place):
    """The row of a table for a place."""
    return table.get(max((key for key in table if f"{place}.".startswith(f"{key}.")), key=len, default=None))


def commands_of(place):
    """The commands that a text is read by: of a class of settings, those whose class is one."""
    module, _, name = place.rpartition(".")
    kind = getattr(importlib.import_module(f"maehub.{module}"), name, None) if module else None
    if inspect.isclass(kind) and (own := [one for one in FLAGS if issubclass(arguments_of(one), kind)]):
        return tuple(own)
    return longest(COMMANDS, place) or tuple(FLAGS)


def resolved(name):
    """What a dotted name is; without a module in front one of maehub or of `maehub.interop`."""
    first, *rest = name.split(".")
    if first not in ("maehub", "timm"):
        first, rest = "maehub.interop" if hasattr(maehub.interop, first) else "maehub", [first, *rest]
    thing = importlib.import_module(first)
    for part in rest:
        thing = getattr(thing, part, None) or importlib.import_module(f"{thing.__name__}.{part}")
    return thing


def parameters(names):
    """The arguments of one of several functions."""
    return {one for name in names.split("|") for one in inspect.signature(resolved(name)).parameters}


def wrong_command(line):
    """What is wrong about the words after `maehub`."""
    expressions = [one for one in _BRACES.findall(line) if not re.match(r"(shlex\.)?quote\(", one)]
    if unquoted := [one for one in expressions if one not in FILLED]:
        return f"{unquoted[0]} may have a space in it"
    line = _BRACES.sub(lambda found: FILLED.get(found[1], "quoted"), line)
    command, *rest = shlex.split(re.sub(r"\bN\b", "3", line))
    if command not in FLAGS:
        return f"{command} is no command"
    if flags := [word for word in rest if re.fullmatch(r"--?[a-z][a-z-]*", word) and word not in FLAGS[command]]:
        return f"{command} has no {flags[0]}"
    if rest and "…" not in rest and not SHARED & set(rest):
        try:
            parsed(command, arguments_of(command), rest)
        except maehub.MaehubError as error:
            return str(error)
    return None


def mistakes(place, text):
    """What a text names that is not there."""
    found, rest = [], text
    for line in re.findall(r"`maehub ([^`]+)`", text):
        found.append(wrong_command(line))
    rest = re.sub(r"`maehub [^`]+`", "", rest)
    for line in re.findall(r"(?:^|: |\. )maehub ([a-z]+ [A-Z{][^\n]*)", rest):  # at the end of a line
        found.append(wrong_command(line))
        rest = rest.replace(f"maehub {line}", "")
    for program, said in re.findall(r"\b(hf|docker|git|tar|pip)\b:? ([^`\n)]*)", rest):
        named = [word for word in said.split() if re.fullmatch(r"-{0,2}[A-Za-z-]+", word)]
        expected = OTHERS[program]
        if program != "pip" and named and named[0] in expected:
            found += [f"{program} has no {word}" for word in named if word.startswith("-") and word not in expected]
            rest = rest.replace(said, "")
    found += [
        f"maehub {word}?" for word in re.findall(r"\bmaehub ([a-z]+)(?!:)\b", rest) if word not in {*VERBS, *FLAGS}
    ]
    rest = _BRACES.sub("{}", rest)
    for call in _CALL.finditer(rest):
        try:
            kind = resolved(call[1])
        except (ImportError, AttributeError):
            found.append(f"there is no {call[1]}")
            continue
        if call[2]:
            given = re.findall(r"\b([a-z_]+)=", call[2])
            found += [f"{call[1]} has no {name}" for name in given if name not in inspect.signature(kind).parameters]
            rest = rest.replace(call[0], "")
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]|(?<![\w-])-[a-z]\b", rest):
        if flag != "--tyro":  # the parser's own, which is refused
            commands = commands_of(place) if (place, flag) not in WHOSE else WHOSE[place, flag]
            found += [f"{one} has no {flag}" for one in commands if flag not in FLAGS[one]]
    for name in re.findall(r"(?<![\w.-])([a-z_]+)=(?!=)", rest):
        if name not in FACTS:
            functions = longest(FUNCTIONS, place) or ()
            found += [f"{one} has no {name}=" for one in functions if name not in parameters(one)]
            found += [f"of which function is {name}=?"] * (not functions)
    found += [f"there is no extra {name}" for name in re.findall(r"maehub\[(\w+)\]", rest) if name not in EXTRAS]
    found += [f"there is no {page}" for page in re.findall(r"docs/[\w/.-]*\w", rest) if not (ROOT / page).exists()]
    for name in re.findall(r"\b(?:MAEHUB|HF|OMP)_[A-Z_]+", rest):
        found += [f"nobody reads {name}"] * (f'"{name}"' not in READ)
    return [one for one in found if one]


@pytest.mark.parametrize("place", sorted({place for place, _ in ADVICE}))
def test_what_a_text_names_is_there(place):
    for text in (text for where, text in ADVICE if where == place):
        assert not mistakes(place, text), text


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("train.engine.resume", "Start again by --reusme."),
        ("train.probing.config.KnnConfig", "look at it by --method fast"),
        ("cli.commands", "`maehub lisst` shows all"),
        ("cli.commands", "maehub lisst shows all"),
        ("hub.fetching", "run `maehub download vit-b --cache FOLDER`"),
        ("hub.fetching", "run `maehub convert {file} -o FOLDER`"),
        ("hub.fetching", "Convert it: maehub convert FILE --output FOLDER"),
        ("hub.fetching", "run `maehub convert FILE -o FOLDER --heads many`"),
        ("weights.config_inference", "say the native size: image_size=(height, width)"),
        ("weights.library_settings", "no such transform; say preprocess="),
        ("hub.loading", "maehub.load(..., size=) resizes it"),
        ("hub.loading", "maehub.lode(...) reads it"),
        ("hub.loading", "see docs/lading.md"),
        ("hub.loading", "set HF_CACHE_DIR"),
        ("data.tables", "pip install 'maehub[tables]'"),
        ("hub.client", "run `hf download FILE --folder .`"),
    ],
)
def test_what_is_not_there_would_be_found(place, text):
    assert collected(f"raise UsageError({text!r})") == [("", text)]
    assert mistakes(place, text)


@pytest.mark.parametrize("command", FLAGS)
def test_what_help_names_is_there(command):
    page = " ".join(help_page(command, arguments_of(command), "", everything=True).split())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", page)) <= FLAGS[command]
    assert set(re.findall(r"`maehub (\w+)", page)) <= FLAGS.keys()


# ---- what is advised helps

# Pictures, labels and models of the folder that the lines below are run in.
CONFIG = EncoderConfig(32, 8, 3, 48, 2, 4)
DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with pictures and tiny models of every kind."""
    home = tmp_path_factory.mktemp("prepared")
    colours = {"rose": 40, "tulip": 200}
    for name, shade in colours.items():
        for number in range(6):
            values = np.random.default_rng(number).integers(0, 50, (40, 48, 3)) + shade
            picture = Image.fromarray(values.astype(np.uint8))
            for folder in (f"flowers/{name}", f"grouped/{name}/p{number % 3}", f"split/train/{name}", "photos"):
                (home / folder).mkdir(parents=True, exist_ok=True)
                picture.save(home / folder / f"{name}{number}.jpg", quality=90)
    for source, target in (("flowers/rose", "one/rose"), ("split/train", "split/val"), ("photos", "bad")):
        shutil.copytree(home / source, home / target)
    shutil.copytree(home / "flowers", home / "renamed")
    (home / "renamed" / "rose").rename(home / "renamed" / "Rosa")
    (home / "bad" / "broken.jpg").write_bytes((home / "photos" / "rose0.jpg").read_bytes()[:300])
    (home / "mask.png").write_bytes(b"")
    Image.new("L", (48, 40), 255).save(home / "mask.png")
    rows = [f"{path},{path.parent.name}" for path in sorted((home / "flowers").rglob("*.jpg"))]
    (home / "scans.csv").write_text("\n".join(["path,diagnosis", *rows]))
    numbers = [f"{row.split(',')[0]},{place},{place * 7 % 11}" for place, row in enumerate(rows)]
    (home / "numbers.csv").write_text("\n".join(["path,a,b", *numbers]))
    (home / "several.csv").write_text("\n".join(["path,label", *(row.replace(",rose", ",rose|tulip") for row in rows)]))
    (home / "Rosa.txt").write_text("Rosa\ntulip\n")
    torch.manual_seed(0)
    encoder, plain = maehub.Encoder(CONFIG), AutoencoderConfig(CONFIG, **DECODER, target="pixels")
    named = {"classes": 2, "class_names": ("rose", "tulip")}
    wide = replace(CONFIG, image_size=(32, 48))
    models = {
        "enc": encoder,
        "mean": maehub.Encoder(replace(CONFIG, pool="mean")),
        "clf": maehub.Encoder(replace(CONFIG, **named)),
        "meanclf": maehub.Encoder(replace(CONFIG, pool="mean", **named)),
        "wide": maehub.Encoder(wide),
        "fresh": maehub.Encoder(replace(CONFIG, positions="sincos")),
        "five": maehub.Encoder(replace(CONFIG, channels=5)),
        "mae": maehub.MaskedAutoencoder(plain),
        "widemae": maehub.MaskedAutoencoder(replace(plain, encoder=wide)),
        "unknown": maehub.MaskedAutoencoder(replace(plain, target="unknown")),
        "pca": maehub.MaskedAutoencoder(replace(plain, target="pca", outputs=8)),
        "tokens": maehub.MaskedAutoencoder(replace(plain, target="tokens", outputs=16)),
        "colours": maehub.MaskedAutoencoder(replace(plain, target="tokens", outputs=512, tokenizer="mean-colour")),
        "seen": maehub.MaskedAutoencoder(replace(plain, mask_tokens="encoder")),
    }
    with torch.no_grad():
        models["fresh"].pos_embed.add_(0.1)
        models["pca"].decoder.centre.zero_()
        models["pca"].decoder.components.copy_(torch.eye(8, 192))
    for name, model in models.items():
        maehub.save(model.eval(), home / name)
    for name in ("enc", "mae", "wide", "tokens"):
        write_tensors(home / f"{name}.safetensors", to_official(models[name].state_dict()).state, {})
        torch.save(to_official(models[name].state_dict()).state, home / f"{name}.pth")
    shutil.copy(home / "enc.pth", home / "an encoder.pth")
    bare = {name: value for name, value in to_official(encoder.state_dict()).state.items() if name != "cls_token"}
    write_tensors(home / "classless.safetensors", bare | {"pos_embed": bare["pos_embed"][:, 1:].contiguous()}, {})
    (home / "pickled").mkdir()
    shutil.copy(home / "enc.pth", home / "pickled" / "pytorch model.bin")
    for folder in ("pickled", "theirs"):
        if folder == "theirs":
            maehub.convert(home / "enc", home / folder, to="transformers")
        config = json.loads((home / "theirs" / "config.json").read_text()) if folder == "theirs" else {}
        config.pop("maehub", None)
        (home / folder / "config.json").write_text(json.dumps(config))
    return home


@pytest.fixture
def names(prepared, tmp_path, monkeypatch):
    """The names that lines of Python know, in a copy of the folder."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return {
        "np": np,
        "torch": torch,
        "replace": replace,
        "Path": Path,
        "maehub": maehub,
        "CONFIG": CONFIG,
        "re": re,
    } | {
        "DECODER": DECODER,
        "AutoencoderConfig": AutoencoderConfig,
        "EncoderConfig": EncoderConfig,
        "json": json,
        "edit": lambda name, old, new: Path(name).write_text(Path(name).read_text().replace(old, new)),
        "shell": lambda line: subprocess.run(line, shell=True, check=True),  # noqa: S602
    }


def follow(lines, names):
    """Do lines: commands, commands that are only read (?), and Python. A number behind # is the exit code, else 0."""
    for line in filter(None, map(str.strip, lines.splitlines())):
        if not re.match(r"(\? )?maehub ", line):
            exec(line, names)
            continue
        _, *given = shlex.split(line.removeprefix("? "), comments=True)
        if line.startswith("? "):
            parsed(given[0], arguments_of(given[0]), given[1:])
            continue
        code = int(found[1]) if (found := re.search(r"# (\d+)$", line)) else 0
        assert command_line.main(given) == code, line


SETTLE = "from maehub.models import Origin\nfrom maehub.publishing.licences import settle_licence\n"
OBJECTIVE = """from maehub.train.pretraining import Objective
def made(name, target=None, **settings): mae = maehub.load_autoencoder(name, target=target); \
return Objective(mae, mae.preprocess, kept=4, **settings)
"""
TABLE = """import datasets
pictures = [path.read_bytes() for path in sorted(Path("photos").iterdir())]
rows = datasets.Dataset.from_dict({"image": pictures, "kind": ["rose"] * 6 + ["tulip"] * 6})
rows.to_parquet("table.parquet")"""
TRAIN = "--steps 1 --workers 0 --device cpu --batch-size 4"
# Where a text comes from, some words of it, lines that bring it up, and lines that do what it says.
ROWS = [
    (
        "train.finetuning.config.FinetuneConfig",
        "--recipe ade20k is for",
        "maehub finetune flowers -o run --recipe ade20k",
        "? maehub finetune flowers -o run\n? maehub finetune flowers -o run --recipe ade20k --task segment",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "--decoder is for",
        "maehub finetune flowers -o run --decoder linear",
        "? maehub finetune flowers -o run\n? maehub finetune flowers -o run --decoder linear --task segment",
    ),
    (
        "train.evaluation.evaluating._read",
        "and no classes",
        """maehub probe numbers.csv -m enc --task regression --label a,b --pool cls -o probed
        maehub evaluate numbers.csv -m probed --label a""",
        "maehub evaluate numbers.csv -m probed --label a,b",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "is for classes",
        "maehub finetune numbers.csv -o run --task regression --mixup 0.2",
        "? maehub finetune numbers.csv -o run --task regression\n? maehub finetune flowers -o run --mixup 0.2",
    ),
    (
        "train.probing.config.ProbeConfig",
        "--method lars is",
        "maehub probe numbers.csv -m enc --task regression --method lars -o lars",
        "? maehub probe numbers.csv -m enc --task regression\n? maehub probe flowers -m enc --method lars -o lars",
    ),
    ("cli.arguments.Data", "--out is for", "maehub data stats photos --out a.csv", "maehub data stats photos --json"),
    (
        "cli.arguments.Data",
        "--sample is for",
        "maehub data check photos --sample 3",
        "maehub data stats photos --sample 3",
    ),
    (
        "cli.arguments.Push",
        "--dry-run sends",
        "maehub push enc me/x --dry-run --yes",
        "? maehub push enc me/x --dry-run\n? maehub push enc me/x --yes",
    ),
    (
        "cli.command_line",
        "Every command takes",
        "maehub --help",
        "maehub list --json\nmaehub list -q\nmaehub list --debug\nmaehub list -h\nmaehub list --help-all",
    ),
    ("cli.command_line", "Try `maehub", "maehub --help", "maehub reconstruct\nmaehub list --help\nmaehub --version"),
    (
        "files.check_place",
        "exists; choose",
        "maehub data check photos -o a.csv\nmaehub data check photos -o a.csv",
        """maehub data check photos -o b.csv
        maehub data check photos -o a.csv --overwrite
        maehub predict photos -m clf -o a.csv --overwrite""",
    ),
    ("cli.commands.run_list", "no model is called", "maehub list nosuch", "maehub list"),
    (
        "cli.commands.wanted_size",
        "--image-size takes",
        "maehub features photos -m enc --image-size 8 16 24",
        "maehub features photos -m enc -o a.npz --image-size 16\n"
        "maehub features photos -m enc -o b.npz --image-size 16 24",
    ),
    ("cli.help_page.help_page", "--help-all", "maehub pretrain --help", "maehub pretrain --help-all"),
    ("cli.parsing.parsed", "--help` shows", "maehub info", "maehub info --help"),
    ("cli.parsing.parsed", "--tyro", "maehub list --tyro-x", "maehub list"),
    (
        "cli.reconstruct.run_reconstruct",
        "--error-map hides",
        "maehub reconstruct photos/rose0.jpg -m mae --error-map --mask-image mask.png",
        "maehub reconstruct photos/rose0.jpg -m mae --error-map",
    ),
    (
        "cli.reconstruct.run_reconstruct",
        "--mask-ratio takes",
        "maehub reconstruct photos/rose0.jpg -m mae --mask-ratio",
        "maehub reconstruct photos/rose0.jpg -m mae --mask-ratio 0.75",
    ),
    (
        "cli.reconstruct.run_reconstruct",
        "exists; choose",
        "maehub reconstruct photos/rose0.jpg -m mae -o a.png\nmaehub reconstruct photos/rose0.jpg -m mae -o a.png",
        """maehub reconstruct photos/rose0.jpg -m mae --out b.png
        maehub reconstruct photos/rose0.jpg -m mae --out a.png --overwrite""",
    ),
    ("conversion.checkpoints._find", "a model is called so", "maehub identify vit-b", "maehub info vit-b"),
    (
        "conversion.conversion.convert",
        "is not one of",
        "maehub.convert('enc', 'out', to='tim')",
        "maehub.convert('enc', 'out', to='timm')",
    ),
    (
        "conversion.exporting.write_exported",
        "positions='antialias'",
        "maehub convert fresh -o out --to torch-export",
        """maehub.save(maehub.load("fresh", positions="antialias"), "resized")
        maehub convert resized -o out --to torch-export""",
    ),
    (
        "conversion.identifying._target",
        "undecided: --decide",
        "print(maehub.identify('mae.pth', heads=4, decoder_heads=4, decide_target=False).target_from)",
        "maehub identify mae.pth --heads 4 --decoder-heads 4 --decide",
    ),
    (
        "conversion.library_folders.check_foreign_form",
        "ViTDet",
        "maehub convert wide -o out --to detectron2",
        """maehub.save(maehub.load("wide", image_size=32), "square")
        maehub convert square -o out --to detectron2""",
    ),
    (
        "conversion.library_folders.check_foreign_form",
        "would not compute",
        "maehub convert widemae -o out --to lightly",
        """maehub convert widemae -o out --to maehub
        maehub.save(maehub.load("widemae"), "encoder")
        maehub convert encoder -o theirs-too --to lightly""",
    ),
    (
        "data.inspection.DataStatistics",
        "maehub.Preprocess",
        "maehub data stats photos",
        """transform = eval(re.search(r"maehub[.]Preprocess[(].*[)]", said)[0])
        maehub.extract_features(maehub.load("enc"), "photos", preprocess=replace(transform, size=(32, 32)))""",
    ),
    ("data.inspection.DataStatistics", "data check", "maehub data stats bad", "maehub data check bad # 5"),
    (
        "data.label_sources._columns",
        "--label",
        "maehub knn scans.csv -m enc",
        "maehub knn scans.csv -m enc --label diagnosis",
    ),
    (
        "data.label_sources._numbers",
        "names a column twice",
        "maehub knn numbers.csv -m enc --task regression --label a,a",
        "maehub knn numbers.csv -m enc --task regression --label a,b",
    ),
    (
        "data.label_sources.folder_groups",
        "is no level",
        "maehub knn grouped -m enc --group patient",
        "maehub knn grouped -m enc --group 2",
    ),
    (
        "data.label_sources.folder_groups",
        "a group is the name",
        "maehub knn flowers -m enc --group 2",
        "maehub knn grouped -m enc --group 2",
    ),
    (
        "data.label_sources._folders",
        "--group 1",
        "maehub knn grouped -m enc --group 1",
        "maehub knn grouped -m enc --group 2",
    ),
    (
        "data.label_sources.read_label_source",
        "is no table",
        "maehub knn flowers -m enc --label kind",
        "maehub knn flowers -m enc",
    ),
    (
        "data.shards._members",
        "tar -A",
        """shell("tar -cf a.tar -C photos rose0.jpg; tar -cf b.tar -C photos rose1.jpg; cat a.tar b.tar > c.tar")
        maehub data check c.tar""",
        """shell("cp a.tar c.tar; tar -A -f c.tar b.tar")
        maehub data check c.tar""",
    ),
    (
        "features.extraction._Work",
        "--skip-bad",
        "maehub features bad -m enc -o a.npz",
        "maehub features bad -m enc -o a.npz --skip-bad # 9",
    ),
    (
        "features.extraction._checked_job",
        "layers=",
        "maehub features photos -m enc --layers 5",
        "maehub features photos -m enc --layers -1",
    ),
    (
        "features.extraction._checked_job",
        "native size",
        """native = replace(maehub.load("enc").preprocess, resize="native")
        maehub.extract_features(maehub.load("enc"), "photos", preprocess=native, pool="map")""",
        """maehub.extract_features(maehub.load("enc"), "photos", preprocess=native, pool="mean")""",
    ),
    (
        "features.extraction._checked_job",
        "pool={pool} is not one of",
        "maehub.extract_features(maehub.load('enc'), 'photos', pool='clas')",
        "maehub.extract_features(maehub.load('enc'), 'photos', pool='cls')",
    ),
    (
        "features.extraction._finished",
        "--overwrite",
        "maehub features photos -m enc -o a.npz\nmaehub features photos -m enc -o a.npz --pool mean",
        "maehub features photos -m enc -o a.npz --pool mean --overwrite",
    ),
    (
        "features.extraction._finished",
        "leaves out",
        "maehub features bad -m enc -o a.npz --skip-bad # 9\nmaehub features bad -m enc -o a.npz",
        "maehub features bad -m enc -o a.npz --skip-bad # 9",
    ),
    (
        "features.table.FeatureTable",
        "overwrite=True",
        """table = maehub.extract_features(maehub.load("enc"), "photos", out="a.npz")
        table.save("a.npz")""",
        'table.save("a.npz", overwrite=True)',
    ),
    (
        "features.table.check_bad_files",
        "list of skipped",
        "Path('bad_files.csv').touch()\nmaehub features bad -m enc -o a.npz --skip-bad",
        "maehub features bad -m enc -o a.npz --skip-bad --overwrite # 9",
    ),
    (
        "features.table.check_ending",
        "one vector a picture",
        "maehub features photos -m enc -o a.csv --pool tokens",
        "maehub features photos -m enc -o a.npz --pool tokens\n"
        "maehub features photos -m enc -o a.safetensors --pool tokens",
    ),
    (
        "figures.reconstruction.attention_overlay",
        "head=",
        "from maehub.figures import attention_overlay as draw\ndraw(maehub.load('enc'), 'photos/rose0.jpg', head=9)",
        "draw(maehub.load('enc'), 'photos/rose0.jpg', head=3)\ndraw(maehub.load('enc'), 'photos/rose0.jpg', head=None)",
    ),
    (
        "figures.reconstruction.reconstruct",
        "statistics=",
        "maehub.reconstruct(maehub.load_autoencoder('mae'), 'photos/rose0.jpg', statistics='all')",
        "maehub.reconstruct(maehub.load_autoencoder('mae'), 'photos/rose0.jpg', statistics='true')",
    ),
    (
        "figures.rendering.check_target",
        "a tokenizer that is not part",
        "maehub reconstruct photos/rose0.jpg -m tokens",
        "maehub reconstruct photos/rose0.jpg -m colours",
    ),
    (
        "figures.rendering.check_target",
        "is unknown",
        "maehub reconstruct photos/rose0.jpg -m unknown",
        """maehub.reconstruct(maehub.load_autoencoder("unknown", target="normalised_pixels"), "photos/rose0.jpg")
        maehub convert unknown -o known --target pixels
        maehub reconstruct photos/rose0.jpg -m known""",
    ),
    ("files.check_free", "--overwrite", "maehub convert enc -o clf", "maehub convert enc -o clf --overwrite"),
    ("hub.catalog.no_model", "shows the names", "maehub info nosuch", "maehub list"),
    ("hub.catalog.no_model", "is a file or folder", "maehub info enc", "maehub identify enc"),
    (
        "hub.fetching.locate",
        "is a pickle",
        "maehub features photos -m 'an encoder.pth'",
        "maehub convert 'an encoder.pth' -o out --heads 4\nmaehub features photos -m out",
    ),
    (
        "hub.loading.load_autoencoder",
        "leave target= out",
        "maehub.load_autoencoder('vit-nano', target='normalised_pixels')",
        "maehub.load_autoencoder('vit-nano')",
    ),
    (
        "interop.pyramid.FeaturePyramid",
        "four blocks",
        "from maehub.interop import FeaturePyramid\nFeaturePyramid(maehub.load('enc'), layers=[0, 1])",
        "FeaturePyramid(maehub.load('enc'), layers=[0, 0, 1, 1])",
    ),
    (
        "models.autoencoder.AutoencoderConfig",
        "a linear head",
        "AutoencoderConfig(CONFIG, decoder_depth=0)",
        "AutoencoderConfig(CONFIG, decoder_depth=0, mask_tokens='encoder')\nAutoencoderConfig(CONFIG, decoder_depth=1)",
    ),
    (
        "models.autoencoder.AutoencoderConfig",
        "has no head and ends",
        "AutoencoderConfig(replace(CONFIG, pool='mean', classes=2))",
        "AutoencoderConfig(replace(CONFIG, pool='cls', classes=0))",
    ),
    (
        "models.autoencoder.AutoencoderConfig",
        "belongs to target='tokens'",
        "AutoencoderConfig(CONFIG, tokenizer='mean-colour')",
        "AutoencoderConfig(CONFIG, tokenizer='mean-colour', target='tokens', outputs=512)",
    ),
    (
        "models.autoencoder.AutoencoderConfig",
        "mean colours are",
        "AutoencoderConfig(CONFIG, tokenizer='mean-colour', target='tokens', outputs=9)",
        "AutoencoderConfig(CONFIG, tokenizer='mean-colour', target='tokens', outputs=512)",
    ),
    (
        "models.autoencoder.AutoencoderConfig",
        "needs outputs",
        "AutoencoderConfig(CONFIG, target='tokens')",
        "AutoencoderConfig(CONFIG, target='tokens', outputs=9)",
    ),
    (
        "models.autoencoder.MaskedAutoencoder",
        "so it has no loss",
        "maehub.load_autoencoder('unknown').loss(torch.zeros(1, 3, 32, 32), torch.eye(16)[:1] > 0)",
        """mae = maehub.load_autoencoder("unknown", target="pixels")
        mae.loss(torch.zeros(1, 3, 32, 32), torch.eye(16)[:1] > 0)""",
    ),
    (
        "models.autoencoder.MaskedAutoencoder",
        "so it needs wanted",
        """mae, images = maehub.load_autoencoder("mae"), torch.zeros(1, 3, 32, 32)
        masked, wanted = torch.arange(16)[None] > 3, torch.tensor([[8, 9]])
        mae.predict(images, masked, leave_out=True)""",
        "mae.predict(images, masked, leave_out=True, wanted=wanted)",
    ),
    (
        "models.autoencoder.MaskedAutoencoder",
        "some of the wanted ones",
        """mae, images = maehub.load_autoencoder("mae"), torch.zeros(1, 3, 32, 32)
        masked = torch.arange(16)[None] > 3
        mae.predict(images, masked, leave_out=True, wanted=torch.tensor([[0, 9]]))""",
        "mae.predict(images, masked, leave_out=True, wanted=torch.tensor([[8, 9]]))",
    ),
    (
        "models.encoder.Encoder",
        "images must be",
        "maehub.load('enc')(torch.zeros(1, 1, 32, 32))",
        "maehub.load('enc', channels=1)(torch.zeros(1, 1, 32, 32))",
    ),
    (
        "models.encoder.Encoder",
        "layer=",
        "maehub.load('enc').attention(torch.zeros(1, 3, 32, 32), layer=7)",
        "maehub.load('enc').attention(torch.zeros(1, 3, 32, 32), layer=-1)",
    ),
    (
        "models.encoder.Encoder",
        "layers=",
        "maehub.load('enc').features(torch.zeros(1, 3, 32, 32), layers=[7])",
        "maehub.load('enc').features(torch.zeros(1, 3, 32, 32), layers=[-2, 1])",
    ),
    (
        "models.encoder.Encoder",
        "pool={pool}",
        "maehub.load('enc').features(torch.zeros(1, 3, 32, 32), pool='clas')",
        "maehub.load('enc').features(torch.zeros(1, 3, 32, 32), pool='cls')",
    ),
    (
        "models.encoder.Encoder",
        "not a trained feature",
        "maehub.load('mean').features(torch.zeros(1, 3, 32, 32), pool='cls')",
        "maehub.load('mean').features(torch.zeros(1, 3, 32, 32), pool='mean')",
    ),
    (
        "models.masking.make_masks",
        "strategy=",
        "maehub.reconstruct(maehub.load_autoencoder('mae'), 'photos/rose0.jpg', strategy='blocks')",
        "maehub.reconstruct(maehub.load_autoencoder('mae'), 'photos/rose0.jpg', strategy='block')",
    ),
    (
        "models.encoder.EncoderConfig",
        "positions=",
        "maehub.load('enc', image_size=48, positions='sine')",
        "maehub.load('enc', image_size=48, positions='sincos')",
    ),
    (
        "train.engine.resume.check_run_folder",
        "is no run folder",
        f"maehub pretrain photos -o enc {TRAIN} --overwrite",
        f"? maehub pretrain photos --out new {TRAIN}",
    ),
    (
        "train.engine.resume.check_run_folder",
        "choose another --out",
        f"maehub pretrain photos -o enc {TRAIN}",
        f"? maehub pretrain photos --out new {TRAIN}",
    ),
    (
        "train.engine.settings.RunConfig",
        "--resume goes on",
        f"maehub pretrain photos -o run {TRAIN} --resume --overwrite",
        f"? maehub pretrain photos -o run {TRAIN} --resume\n? maehub pretrain photos -o run {TRAIN} --overwrite",
    ),
    (
        "train.evaluation.class_matching",
        "--classes-from FILE",
        "maehub evaluate renamed -m clf",
        """maehub evaluate renamed -m clf --classes-from Rosa.txt
        Path("some.csv").write_text("folder,class\\nRosa,rose\\ntulip,1\\n")
        maehub evaluate renamed -m clf --classes-from some.csv""",
    ),
    (
        "train.evaluation.evaluating.evaluate",
        "has no head",
        "maehub evaluate flowers -m enc",
        f"""maehub finetune flowers -m enc -o run {TRAIN} --skip-twins
        maehub evaluate flowers -m run
        maehub probe flowers -m enc""",
    ),
    (
        "train.evaluation.evaluating._read",
        "several labels",
        "maehub evaluate several.csv -m clf",
        f"maehub finetune several.csv -m enc -o run {TRAIN} --skip-twins\nmaehub evaluate several.csv -m run",
    ),
    (
        "train.evaluation.predicting.predict",
        "an Encoder with a head",
        "from maehub.train import predict\npredict(maehub.load('enc'), 'photos')",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins\npredict(maehub.load('run'), 'photos')",
    ),
    (
        "train.finetuning.classifier.freeze",
        "--blocks",
        f"maehub finetune flowers -m enc -o run {TRAIN} --blocks 3",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --blocks 2",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "--rot90",
        "maehub finetune flowers -o run --rot90 --image-size 32 48",
        "? maehub finetune flowers -o run --rot90 --image-size 32 32\n"
        "? maehub finetune flowers -o run --image-size 32 48",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "is for training the network",
        "maehub finetune flowers -o run --recipe linear --blocks 1",
        "? maehub finetune flowers -o run --recipe linear\n? maehub finetune flowers -o run --blocks 1",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "goes with neither",
        "maehub finetune flowers -o run --head-start probe --class-weights balanced",
        "? maehub finetune flowers -o r --class-weights balanced\n? maehub finetune flowers -o r --head-start probe",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "not both",
        "maehub finetune flowers -o run --steps 1 --epochs 1",
        "? maehub finetune flowers -o run --steps 1\n? maehub finetune flowers -o run --epochs 1",
    ),
    (
        "train.evaluation.corruptions.corruption_names",
        "of one size",
        "maehub evaluate flowers -m clf --image-size 16 --corruptions",
        "maehub evaluate flowers -m clf --image-size 32 --corruptions --workers 0",
    ),
    (
        "train.evaluation.corruptions.read_baseline",
        "write one by",
        """maehub evaluate flowers -m clf -o plain --workers 0
        maehub evaluate flowers -m clf --corruptions --baseline plain --workers 0""",
        "maehub evaluate flowers -m clf --corruptions -o spoilt --workers 0",
    ),
    (
        "train.finetuning.config.FinetuneConfig",
        "leave out --steps",
        "maehub finetune flowers -o run --steps 1 --minutes 1",
        "? maehub finetune flowers -o run --minutes 1",
    ),
    (
        "train.finetuning.fitting.Clock",
        "for the features of",
        "maehub finetune flowers -m enc -o run --workers 0 --device cpu --skip-twins --minutes 0.0001",
        "maehub finetune flowers -m enc -o run --workers 0 --device cpu --skip-twins --minutes 1",
    ),
    (
        "train.finetuning.recipes.settled",
        "--fsdp",
        f"maehub finetune flowers -m enc -o run {TRAIN} --fsdp --recipe linear",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --recipe linear",
    ),
    (
        "train.finetuning.recipes.settled",
        "--batch-size",
        f"maehub finetune flowers -m enc -o run {TRAIN} --mixup 0.8 --batch-size 3",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --mixup 0.8 --batch-size 4",
    ),
    (
        "train.finetuning.fitting.micro_batch_of",
        "an odd number",
        f"maehub finetune flowers -m enc -o run {TRAIN} --mixup 0.8 --micro-batch 3",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --mixup 0.8 --micro-batch 2",
    ),
    (
        "train.finetuning.fitting.micro_batch_of",
        "batch normalisation",
        f"maehub finetune flowers -m enc -o run {TRAIN} --recipe linear --micro-batch 1",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --recipe linear --micro-batch 2",
    ),
    (
        "train.finetuning.network.find_weights",
        "is no network",
        "maehub finetune flowers -m baseline/pixels -o run",
        "maehub probe flowers -m baseline/pixels",
    ),
    (
        "train.finetuning.network.open_network",
        "--channels",
        f"maehub finetune flowers -m untrained/vit_tiny_patch16_224 -o run {TRAIN} --channels 1",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --channels 1",
    ),
    (
        "train.finetuning.recipes.settle",
        "--recipe scratch",
        f"maehub finetune flowers -m vit-nano -o run {TRAIN} --recipe scratch",
        f"maehub finetune flowers -m untrained/vit-nano -o run {TRAIN} --skip-twins --image-size 32 --recipe scratch",
    ),
    (
        "train.finetuning.recipes.settle",
        "--smoothing",
        f"maehub finetune several.csv -m enc -o run {TRAIN} --smoothing 0.1",
        f"maehub finetune several.csv -m enc -o run {TRAIN} --skip-twins",
    ),
    (
        "train.finetuning.views.policy_of",
        "--randaugment",
        f"maehub finetune flowers -m enc -o run {TRAIN} --randaugment much",
        f"maehub finetune flowers -m enc -o run {TRAIN} --skip-twins --randaugment rand-m9-mstd0.5-inc1",
    ),
    (
        "train.networks.backbones._timm",
        "list_models()",
        "maehub knn flowers -m timm/qqqqqqqqqq",
        "import timm\nassert timm.list_models()",
    ),
    (
        "train.networks.presets.preset",
        "--image-size must",
        f"maehub pretrain photos -o run {TRAIN} --image-size 33",
        f"maehub pretrain photos -o run {TRAIN} --image-size 32",
    ),
    (
        "train.networks.presets.preset",
        "is not one of",
        f"maehub pretrain photos -o run {TRAIN} --model enc",
        f"maehub pretrain photos -o run {TRAIN} --from enc",
    ),
    (
        "train.planning.devices.device_row",
        "is not one of auto",
        "maehub plan --images 9 --epochs 1 --on h1000",
        "maehub plan --images 9 --epochs 1 --on h100",
    ),
    (
        "train.planning.planning._advice",
        "--compile:",
        "maehub plan --images 9 --epochs 1 --on h100",
        "maehub plan --images 9 --epochs 1 --on h100 --compile",
    ),
    (
        "train.planning.planning._advice",
        "--precision bf16",
        "maehub plan --images 9 --epochs 1 --on h100 --precision fp32",
        "maehub plan --images 9 --epochs 1 --on h100 --precision bf16",
    ),
    (
        "train.planning.planning._advice",
        "a smaller --batch-size",
        "maehub plan --images 9000 --epochs 1 --on h100 --batch-size 512",
        "maehub plan --images 9000 --epochs 1 --on h100 --batch-size 8",
    ),
    (
        "train.planning.planning._advice",
        "for each device",
        "maehub plan --images 9000000 --epochs 1 --on h100 --model vit-ti",
        "maehub plan --images 9000000 --epochs 1 --on h100 --model vit-ti --masks-per-image 2",
    ),
    (
        "train.planning.planning._advice",
        "The decoder takes",
        "maehub plan --images 9 --epochs 1 --on h100 --model vit-b --mask-ratio 0.9",
        "maehub plan --images 9 --epochs 1 --on h100 --model vit-b --mask-ratio 0.9 --decoder-depth 1",
    ),
    (
        "train.planning.planning._advice",
        "are few to start",
        "maehub plan --images 9 --epochs 1 --on h100",
        "maehub plan --images 9 --epochs 1 --on h100 --from vit-b",
    ),
    (
        "train.planning.planning._images",
        "leaves nothing",
        "maehub plan --images 9 --epochs 1 --on h100 --holdout 9",
        "maehub plan --images 9 --epochs 1 --on h100 --holdout 8",
    ),
    (
        "train.planning.planning._images",
        "how many images",
        "maehub plan --epochs 1 --on h100",
        "maehub plan --epochs 1 --on h100 --images 9\nmaehub plan photos --epochs 1 --on h100",
    ),
    (
        "train.planning.planning._memory_advice",
        "--checkpoint-activations",
        "maehub plan --images 99999 --epochs 1 --on t4 --model vit-l --batch-size 4096",
        "maehub plan --images 99999 --epochs 1 --on t4 --model vit-l --batch-size 4096 --checkpoint-activations",
    ),
    (
        "train.planning.planning._memory_advice",
        "--fsdp",
        "maehub plan --images 99999 --epochs 1 --on t4 --model vit-h --image-size 2240 --precision fp32",
        """maehub plan --images 99999 --epochs 1 --on t4 --model vit-h --image-size 2240 --precision fp32 \
 --fsdp --processes 8""",
    ),
    (
        "train.planning.planning._memory_advice",
        "is no multiple",
        "maehub plan --images 99999 --epochs 1 --on h100 --batch-size 9 --processes 2",
        "maehub plan --images 99999 --epochs 1 --on h100 --batch-size 8 --processes 2",
    ),
    (
        "train.planning.planning._memory_advice",
        "--micro-batch",
        "maehub plan --images 99999 --epochs 1 --on t4 --model vit-l --batch-size 4096 --micro-batch 4096",
        "maehub plan --images 99999 --epochs 1 --on t4 --model vit-l --batch-size 4096",
    ),
    (
        "train.planning.planning._precision",
        "--precision bf16",
        "maehub plan --images 9 --epochs 1 --on t4 --precision bf16",
        "maehub plan --images 9 --epochs 1 --on t4 --precision auto",
    ),
    (
        "train.pretraining.config.PretrainConfig",
        "--batch-size counts",
        "maehub pretrain photos -o run --steps 1 --batch-size 3 --masks-per-image 2",
        "? maehub pretrain photos -o run --steps 1 --batch-size 4 --masks-per-image 2",
    ),
    (
        "train.pretraining.config.PretrainConfig",
        "--decoder-depth 0",
        "maehub pretrain photos -o run --steps 1 --decoder-depth 0 --mask-tokens decoder",
        "? maehub pretrain photos -o run --steps 1 --decoder-depth 0 --mask-tokens encoder",
    ),
    (
        "train.pretraining.config.PretrainConfig",
        "--mask-ratio",
        "maehub pretrain photos -o run --steps 1 --strategy grid --mask-ratio 0.5",
        "? maehub pretrain photos -o run --steps 1 --strategy grid --mask-ratio 0.75",
    ),
    (
        "train.pretraining.config.PretrainConfig",
        "--predict-share",
        "maehub pretrain photos -o run --steps 1 --predict-share 0.5 --loss-on all",
        "? maehub pretrain photos -o run --steps 1 --predict-share 0.5\n"
        "? maehub pretrain photos -o run --steps 1 --loss-on all",
    ),
    (
        "train.pretraining.config.PretrainConfig",
        "--rot90",
        "maehub pretrain photos -o run --steps 1 --rot90 --image-size 32 48",
        "? maehub pretrain photos -o run --steps 1 --rot90 --image-size 32",
    ),
    (
        "train.pretraining.config.PretrainConfig",
        "one of the two",
        "maehub pretrain photos -o run",
        "? maehub pretrain photos -o run --steps 1\n? maehub pretrain photos -o run --epochs 1",
    ),
    (
        "train.pretraining.config.batch_size_of",
        "counts the views of all",
        """from maehub.train import PretrainConfig
        from maehub.train.pretraining import batch_size_of
        batch_size_of(PretrainConfig("photos", "run", steps=1, batch_size=4), 12, 3)""",
        "assert batch_size_of(PretrainConfig('photos', 'run', steps=1, batch_size=6), 12, 3) == 6",
    ),
    (
        "train.pretraining.config.batch_size_of",
        "is more than",
        f"maehub pretrain photos -o run --from mae {TRAIN} --batch-size 99",
        "maehub pretrain photos -o run --from mae --steps 1 --workers 0 --device cpu",
    ),
    (
        "train.pretraining.holdout.split_data",
        "on one side",
        f"maehub pretrain one -o run --from mae {TRAIN} --holdout 2 --group 1",
        f"maehub pretrain one -o run --from mae {TRAIN} --holdout 2",
    ),
    (
        "train.pretraining.holdout.split_data",
        "leaves none",
        f"maehub pretrain photos -o run --from mae {TRAIN} --holdout 99",
        f"maehub pretrain photos -o run --from mae {TRAIN} --holdout 2",
    ),
    (
        "train.pretraining.holdout.split_data",
        "leave --holdout out",
        f"maehub pretrain split -o run --from mae {TRAIN} --holdout 2",
        f"maehub pretrain split -o run --from mae {TRAIN}",
    ),
    (
        "train.pretraining.network.build_network",
        "is unknown",
        f"maehub pretrain photos -o run --from unknown {TRAIN}",
        f"maehub pretrain photos -o run --from unknown {TRAIN} --target pixels",
    ),
    (
        "train.pretraining.loop.view_of",
        "--corruption",
        f"maehub pretrain photos -o run --from mae {TRAIN} --corruption 0.8 0.1 0.1",
        f"maehub pretrain photos -o run --from mae {TRAIN} --corruption 0.8 0.1 0.1 --mask-tokens encoder",
    ),
    (
        "train.pretraining.loop.view_of",
        "--rot90",
        f"maehub pretrain photos -o run --from widemae {TRAIN} --rot90",
        f"maehub pretrain photos -o run --from widemae {TRAIN} --image-size 32 --rot90",
    ),
    (
        "train.pretraining.loop.view_of",
        "say --channels",
        f"maehub pretrain photos -o run --from five {TRAIN}",
        f"maehub pretrain photos -o run --from five {TRAIN} --channels 3",
    ),
    (
        "train.pretraining.validation.Validation",
        "--knn needs",
        f"maehub pretrain photos -o run --from mae {TRAIN} --knn one",
        f"maehub pretrain photos -o run --from mae {TRAIN} --knn flowers",
    ),
    (
        "train.probing.config.CompareConfig",
        "--protocol finetune",
        "maehub compare flowers -m enc --protocol finetune",
        "? maehub compare flowers -m enc --protocol finetune --out folder",
    ),
    (
        "train.probing.config.CompareConfig",
        "with commas",
        "maehub compare flowers -m enc --protocol probe+knn",
        "maehub compare flowers -m enc --protocol probe,knn",
    ),
    (
        "train.probing.config.CompareConfig",
        "not both",
        "maehub compare flowers -m enc --steps 1 --epochs 1",
        "? maehub compare flowers -m enc --steps 1\n? maehub compare flowers -m enc --epochs 1",
    ),
    (
        "train.probing.config.ProbeConfig",
        "sees the last layer",
        "maehub probe flowers -m enc --method lars --out folder --layer 0",
        "? maehub probe flowers -m enc --method lars --out folder\n"
        "? maehub probe flowers -m enc --method fast --layer 0",
    ),
    (
        "train.probing.config.ProbeConfig",
        "name one by --out",
        "maehub probe flowers -m enc --method lars",
        "? maehub probe flowers -m enc --method lars --out folder",
    ),
    (
        "train.probing.config.ProbeConfig",
        "several --layer",
        "maehub probe flowers -m enc --layer 0 1",
        "maehub probe flowers -m enc --layer 0 1 --sweep",
    ),
    (
        "train.probing.config.ProbeConfig",
        "several --model",
        "maehub probe flowers -m enc -m mae",
        "maehub probe flowers -m enc -m mae --sweep\nmaehub compare flowers -m enc -m mae",
    ),
    (
        "train.probing.probing._pools",
        "offers the pools",
        "maehub probe flowers -m mean --pool cls",
        "maehub probe flowers -m mean --pool mean",
    ),
    (
        "train.probing.probing._trained",
        "takes --pool",
        "maehub probe flowers -m enc --method lars --out folder --pool cls+mean",
        "? maehub probe flowers -m enc --method lars --out folder --pool mean",
    ),
    (
        "train.probing.probing._trained",
        "exists and is not empty",
        "maehub probe flowers -m enc --method lars --out enc",
        "? maehub probe flowers -m enc --method lars --out folder",
    ),
    (
        "train.probing.probing.why_no_model",
        "--pool",
        "maehub probe flowers -m enc --pool mean -o a",
        "maehub probe flowers -m enc --pool cls -o b\nassert Path('b/model').is_dir()",
    ),
    (
        "weights.building.build",
        "has no head",
        "maehub.load_autoencoder('mae', classes=3)",
        "assert maehub.load('mae', classes=3).config.classes == 3",
    ),
    (
        "weights.building.build",
        "cannot be adapted",
        "maehub.load_autoencoder('colours', channels=1)",
        "maehub.load('colours', channels=1)",
    ),
    (
        "weights.config_inference._with_decoder",
        "decoder_heads=",
        "maehub.load_autoencoder('mae.safetensors', heads=4)",
        """maehub.load_autoencoder('mae.safetensors', heads=4, decoder_heads=4)
        maehub convert mae.safetensors -o out --heads 4 --decoder-heads 4
        maehub.load_autoencoder("out")""",
    ),
    (
        "weights.config_inference._with_outputs",
        "target='tokens'",
        "maehub.load_autoencoder('tokens.safetensors', heads=4, decoder_heads=4)",
        """maehub.load_autoencoder('tokens.safetensors', heads=4, decoder_heads=4, target='tokens')
        maehub convert tokens.safetensors -o out --heads 4 --decoder-heads 4 --target tokens""",
    ),
    (
        "weights.config_inference._inferred",
        "heads=",
        "maehub features photos -m enc.safetensors",
        """maehub.load("enc.safetensors", heads=4)
        maehub convert enc.safetensors -o out --heads 4
        maehub features photos -m out""",
    ),
    (
        "weights.config_inference._inferred",
        "no class token and a square",
        "maehub convert wide.safetensors -o out --heads 4",
        """shown = next(line for line in maehub.identify("wide.safetensors").advice if "config.json" in line)
        Path("own").mkdir()
        Path("wide.safetensors").rename("own/model.safetensors")
        Path("own/config.json").write_text(shown.partition(": ")[2].replace("HEIGHT, WIDTH", "32, 48"))
        maehub convert own -o out --heads 4
        assert maehub.load("out").config.size == (32, 48)""",
    ),
    (
        "weights.config_inference._inferred",
        "without a class token",
        "maehub convert classless.safetensors -o out --heads 4",
        "",
    ),
    (
        "weights.config_inference.with_target",
        "say another target=",
        "maehub.load_autoencoder('unknown', target='pca')",
        "maehub.load_autoencoder('unknown', target='pixels')",
    ),
    (
        "weights.config_json.transformers_config",
        "would not compute",
        "maehub convert unknown -o out --to transformers",
        "maehub convert unknown -o out --to maehub",
    ),
    (
        "weights.config_json.transformers_config",
        " or target=",
        "maehub convert unknown -o out --to transformers",
        "maehub.convert('unknown', 'out', to='transformers', target='pixels')",
    ),
    (
        "weights.config_json.transformers_config",
        "say to='timm'",
        "maehub convert mean -o out --to transformers",
        "maehub convert mean -o out --to timm",
    ),
    (
        "weights.library_keys.to_foreign",
        "has no place for",
        "maehub convert pca -o out --to lightly",
        "maehub convert pca -o out --to maehub",
    ),
    *(
        (
            "weights.library_settings",
            "without this file",
            f"""settings = json.loads(Path("theirs/preprocessor_config.json").read_text()) | {settings}
            Path("theirs/preprocessor_config.json").write_text(json.dumps(settings))
            maehub features photos -m theirs""",
            """Path("theirs/preprocessor_config.json").unlink()
            maehub features photos -m theirs
            maehub.extract_features(maehub.load("theirs"), "photos", preprocess=maehub.load("enc").preprocess)""",
        )
        for settings in (
            {"do_resize": False, "do_center_crop": True},
            {"resample": 1},
            {"do_flip": True},
            {"crop_size": {"height": 9, "width": 9}},
            {"size": {"height": 9, "width": 9}, "do_center_crop": False},
        )
    ),
    (
        "weights.library_settings.timm_transform",
        "without mean and std",
        """from maehub.interop import from_timm, to_timm
        config = json.loads(Path("enc/config.json").read_text())
        config.pop("maehub")
        config["pretrained_cfg"]["interpolation"] = "nearest"
        Path("enc/config.json").write_text(json.dumps(config))
        network = to_timm(maehub.load("mean"))
        network.pretrained_cfg["interpolation"] = "nearest"
        maehub features photos -m enc""",
        """del config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]
        Path("enc/config.json").write_text(json.dumps(config))
        maehub features photos -m enc
        from_timm(network, preprocess=maehub.load("clf").preprocess)""",
    ),
    (
        "weights.model_folder.read_config",
        "leave target= out",
        "maehub.load_autoencoder('mae', target='normalised_pixels')",
        "maehub.load_autoencoder('mae')",
    ),
    (
        "weights.model_folder.read_folder",
        "convert it once",
        "maehub features photos -m pickled",
        "maehub convert 'pickled/pytorch model.bin' -o out --heads 4\nmaehub features photos -m out",
    ),
    (
        "weights.model_folder.read_folder",
        "maehub convert",
        "maehub features photos -m pickled",
        "maehub convert 'pickled/pytorch model.bin' -o out --heads 4",
    ),
    (
        "weights.building.build",
        "without the decoder",
        "maehub.load_autoencoder('enc')",
        "maehub.load('enc')\nmaehub info vit-b-pixel",
    ),
    *(
        (
            "weights.tensorfile",
            kind,
            f"""torch.save(torch.load("enc.pth"), "odd.safetensors", _use_new_zipfile_serialization={new})
            maehub features photos -m odd.safetensors""",
            "maehub convert odd.safetensors -o out --heads 4\nmaehub features photos -m out",
        )
        for kind, new in (("a zip archive", True), ("a Python pickle", False))
    ),
    *(
        (
            "publishing.licences.settle_licence",
            words,
            f"{SETTLE}settle_licence({asked!r}, {base})",
            f"settle_licence({right!r}, {base})",
        )
        for words, asked, base, right in (
            ("takes an identifier", "my own", "None", "apache-2.0"),
            ("these weights were", None, "None", "apache-2.0"),
            ("leave --licence out", "mit", "Origin('x', licence='cc-by-nc-4.0')", None),
        )
    ),
    *(
        ("train.pretraining.objective._check_settings", words, f"{OBJECTIVE}made({wrong})", f"made({right})")
        for words, wrong, right in (
            ("of unknown target", "'unknown'", "'unknown', target='pixels'"),
            ("loss_on={loss_on}", "'mae', loss_on='some'", "'mae', loss_on='all'"),
            ("loss_on='all'", "'mae', predict_share=0.5, loss_on='all'", "'mae', loss_on='all'"),
            ("say mask_tokens", "'mae', corruption=(0.8, 0.1, 0.1)", "'seen', corruption=(0.8, 0.1, 0.1)"),
            ("give it as tokenizer=", "'tokens'", "'tokens', tokenizer=len"),
            ("must be left out", "'mae', tokenizer=len", "'mae'"),
        )
    ),
    (
        "cli.commands.run_training",
        "with --resume",
        f"maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --time-limit 0.0001",
        f"maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume",
    ),
    (
        "train.reports.report._ending",
        "--resume",
        f"""maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --time-limit 0.0001
        print(Path("run/report.html").read_text())""",
        f"maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume",
    ),
    (
        "train.engine.checkpoint.newest_checkpoint",
        "--overwrite",
        f"""maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --time-limit 0.0001
        whole = next(Path("run/checkpoints").glob("step-*"))
        kept = (whole / "model.safetensors").read_bytes()
        (whole / "model.safetensors").write_bytes(b"")
        maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume""",
        f"""damaged = next(Path("run/checkpoints").glob("*.corrupt"))
        (damaged / "model.safetensors").write_bytes(kept)
        damaged.rename(whole)
        maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume
        maehub pretrain photos --from mae -o run {TRAIN} --overwrite""",
    ),
    (
        "train.engine.run_log.RunLog",
        "--base-lr, --clip-grad",
        f"maehub pretrain photos --from mae -o run {TRAIN} --steps 40 --base-lr 1e30 --warmup 0",
        f"""maehub pretrain photos --from mae -o run-2 {TRAIN} --base-lr 1e-3
        maehub pretrain photos --from mae -o run-3 {TRAIN} --clip-grad 1
        maehub pretrain photos --from mae -o run-4 {TRAIN} --precision fp32""",
    ),
    (
        "train.engine.resume._check_same",
        "--allow-data-change",
        f"""maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --time-limit 0.0001
        Path("photos/rose0.jpg").rename("photos/other.jpg")
        maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume""",
        f"maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume --allow-data-change",
    ),
    (
        "train.engine.resume._check_same",
        "with other settings",
        f"""maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --time-limit 0.0001
        maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --mask-ratio 0.5 --resume""",
        f"""maehub pretrain photos --from mae --out run-2 {TRAIN} --mask-ratio 0.5
        maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume""",
    ),
    (
        "train.engine.resume.check_run_folder",
        "go on with it",
        f"""maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --time-limit 0.0001
        maehub pretrain photos --from mae -o run {TRAIN} --steps 99""",
        f"""maehub pretrain photos --from mae -o run {TRAIN} --steps 99 --resume
        maehub pretrain photos --from mae -o run {TRAIN} --overwrite""",
    ),
    *(
        (
            "train.engine.resume.check_version",
            words,
            f"""maehub {line} -o run {TRAIN}
            edit("run/run.json", "completed", "preempted")
            edit("run/config.json", maehub.__version__, "0.1.0")
            maehub {line} -o run {TRAIN} --resume""",
            f"maehub {again} -o run-2 {TRAIN}",
        )
        for words, line, again in (
            ("maehub finetune", "finetune flowers -m enc --skip-twins", "finetune flowers -m run"),
            ("maehub pretrain", "pretrain photos --from mae", "pretrain photos --from run"),
            ("Finish it with", "pretrain photos --from mae", "pretrain photos --from run"),
        )
    ),
    (
        "train.finetuning.network._timms",
        "--blocks",
        f"maehub finetune flowers -m untrained/timm/vit_tiny_patch16_224 -o run --image-size 32 {TRAIN} --blocks 1",
        f"maehub finetune flowers -m untrained/timm/vit_tiny_patch16_224 -o run --image-size 32 {TRAIN} --skip-twins",
    ),
    (
        "data.label_sources._table",
        "--label",
        f"{TABLE}\nmaehub knn table.parquet -m enc",
        "maehub knn table.parquet -m enc --label kind",
    ),
    (
        "data.tables.image_column",
        "select_columns",
        f"{TABLE}\nrows.add_column('again', pictures).to_parquet('both.parquet')\nmaehub data check both.parquet",
        "rows.add_column('again', pictures).select_columns(['image']).to_parquet('one.parquet')\n"
        "maehub data check one.parquet",
    ),
]


def texts_of(place, fragment):
    """The texts that a row is about."""
    found = [text for where, text in ADVICE if where == place and fragment in text]
    return [text for text in found if text == fragment] or found


def spaced(text):
    return re.sub(r"\s+", " ", text)


def pattern(text):
    """What a text looks like when it is said, with one space for any."""
    text = spaced(text)
    return re.compile(
        r".*?".join(re.escape(piece) for piece in re.split(_BRACES.pattern.replace("(", "(?:", 1), text)), re.DOTALL
    )


BESIDES = (
    "--skip-twins",
    "--heads",
    "--decoder-heads",
    "--image-size",
)  # that are needed for what these rows begin with, or save time


def is_slow(row):
    """Whether something is trained, or a slow library is imported."""
    return re.search(r"(?m)^ *maehub (finetune|pretrain)", row[3]) or "datasets" in row[2] or "torch-export" in row[3]


@pytest.mark.parametrize(
    ("place", "fragment", "wrong", "right"),
    [pytest.param(*row, id=f"{row[0]}: {row[1]}", marks=[pytest.mark.slow] if is_slow(row) else []) for row in ROWS],
)
def test_what_is_advised_helps(place, fragment, wrong, right, names, capsys, caplog, monkeypatch):
    (text,) = texts_of(place, fragment)
    caplog.set_level("INFO", "maehub")
    monkeypatch.setenv("COLUMNS", "10000")
    said = ""
    for line in wrong.strip().splitlines():
        try:
            follow(re.sub(r"^( *maehub .*?)(# \d+)?$", r"\1", line), names)
        except AssertionError:  # a command that fails, as it should
            pass
        except (maehub.MaehubError, UserWarning) as error:
            said += str(error)
    said = spaced(said + "".join(capsys.readouterr()) + caplog.text)
    assert pattern(text).search(said), said
    new = set(re.findall(r"--[a-z][a-z0-9-]*", right)) - set(re.findall(r"--[a-z][a-z0-9-]*", f"{wrong} {TRAIN}"))
    caplog.clear()
    follow(right, names | {"said": said})
    again = spaced("".join(capsys.readouterr()) + caplog.text)
    assert not pattern(text).search(again) or text.startswith(("Every", "maehub: masked")), again
    assert new <= {*re.findall(r"--[a-z][a-z0-9-]*", said), *BESIDES}, "more than was advised"


# Texts that no row follows, and why: a place, or a place and words of the text.
NOT_FOLLOWED = {
    "words of a run that begins or has begun: test_fitting.py has runs that say them": [
        ("train.finetuning.fitting.Clock", "--minutes says how long"),
        ("train.finetuning.fitting.Clock", "leaves no probe to export"),
        ("train.finetuning.head_start.look_early", ""),
    ],
    "a statement of what may be: any value that it names will do": [
        ("features.extraction._checked_job", "precision={precision} is not one of"),
        ("models.autoencoder.AutoencoderConfig", "is not divisible by"),
        ("models.autoencoder.AutoencoderConfig", "is not one of"),
        ("models.autoencoder.AutoencoderConfig", "outputs={outputs} does not fit"),
        ("models.autoencoder.AutoencoderConfig", "is not '' (the caller's)"),
        ("models.autoencoder.MaskedAutoencoder", "is no function of a patch's pixels"),
        ("models.encoder.EncoderConfig", "pool={self.pool} is not one of"),
        ("models.encoder.EncoderConfig", "is not divisible by"),
        ("models.positions.resize_table", ""),
        ("hub.fetching._check_revision", ""),
        ("hub.fetching._split", ""),
        ("train.pretraining.objective.Objective", "has no tokenizer"),
        ("train.pretraining.objective.store_components", ""),
        ("weights.config_json.transformers_hints", "layer_norm_eps"),
        ("weights.config_json.read_block", "has format="),
        ("weights.library_keys.check_foreign", "final_norm"),
        ("interop.timm_models._why_not", "global_pool"),
        ("train.pretraining.network.kept_patches", ""),
        ("weights.library_settings._resize", ""),
        ("weights.library_settings.transformers_transform", "resample="),
    ],
    "no advice: a card, a table, a label, a hash": [
        ("train.evaluation.corruptions.corruption_names", "of colour pictures"),
        ("features.extraction._provenance", ""),
        ("hub.urls._stream", ""),
        ("publishing.pushing.push", "maehub push: {kind}"),
        ("publishing.provenance._of_probe", ""),
        ("train.evaluation.evaluating._write", ""),
        ("train.finetuning.job.tell_pictures", ""),
        ("train.finetuning.measuring._card", ""),
        ("train.planning.planning", "docs/performance.md"),
        ("train.planning.planning._utilisation", "docs/scaling.md"),
        ("train.reports.classifier._how_measured", ""),
    ],
    "a Hub: test_hub.py, test_fetching.py, test_cache.py and test_publishing.py have one on loopback": [
        ("cli.commands.run_push", ""),
        ("conversion.checkpoints.open_checkpoint", "hf auth login"),
        ("hub.catalog.ModelInfo", "hf download"),
        ("hub.client", ""),
        ("hub.downloading", ""),
        ("hub.fetching._first_file", "loads only safetensors"),
        ("hub.fetching.verify", ""),
        ("publishing.pushing._open", ""),
        ("publishing.remote", ""),
        ("train.planning.planning.network_of", ""),
    ],
    "the package is installed here; that its extra exists is checked above": [
        ("conversion.exporting.check_exportable", ""),
        ("data.listing.passed_over_words", ""),
        ("data.storage._connected", ""),
        ("data.objects.objects.coco_masks", ""),
        ("data.tables._datasets", ""),
        ("features.table.check_ending", "pyarrow"),
        ("train.evaluation.corruptions.corruption_names", "need a package"),
        ("images.decoding.decoder_of", ""),
        ("interop.transformers_models.to_transformers", ""),
        ("train.engine.run_log.RunLog", "--tensorboard"),
    ],
    "a process that dies or a memory that is full: test_faults.py and test_training.py": [
        ("cli.command_line._complain", ""),
        ("data.loader", ""),
        ("data.workers.Readers", ""),
        ("train.engine.checkpoint.check_converging", ""),
        ("train.engine.distributed.Group", ""),
        ("train.engine.micro_batch.find_micro_batch", ""),
        ("train.engine.resume.Checkpoints", ""),
        ("train.engine.run_log.RunLog", "another process is training"),
        ("train.engine.run_log.RunLog", "usually %.3g"),
        ("train.engine.steps.step_errors", ""),
        ("train.pretraining.validation.tell_start", ""),
        ("train.probing.comparing._finetuned", ""),
        ("train.probing.probing._trained", "the probe was stopped"),
    ],
    "label maps: test_label_maps.py and test_segmentation.py have sets of them": [
        ("data.maps.folders.refuse_wrong", ""),
        ("dense.folder", ""),
        ("train.finetuning.dense.map_job.MapJob", ""),
        ("train.finetuning.dense.recipes.settle_maps", ""),
        ("train.finetuning.dense.job.DenseJob", ""),
        ("train.finetuning.dense.job.train_blocks", ""),
    ],
    "objects: test_object_sets.py and test_detection.py have sets of them": [
        ("data.objects.finding.drawn_maps", ""),
        ("data.objects.finding.find_objects", ""),
        ("train.finetuning.config.FinetuneConfig", "--short-side is for"),
        ("train.finetuning.config.FinetuneConfig", "--recipe vitdet is for"),
        ("train.finetuning.dense.object_job.ObjectJob", ""),
        ("train.finetuning.dense.recipes.settle_objects", ""),
    ],
    "another device": [
        ("train.planning.devices.device_row", "name a GPU like it"),
        ("train.planning.planning._advice", "and this machine has"),
    ],
    "test_identifying.py follows what it prints": [("conversion.identifying._next_lines", "")],
    "refused before: by `convert`, by the configuration": [("weights.keys._to_transformers", "")],
    "advice for another program": [("weights.tensorfile", "git lfs pull")],
    "names the function that trains such a model": [("models.autoencoder.MaskedAutoencoder", "Objective computes it")],
}


def is_followed(place, text):
    return any(text in texts_of(*row[:2]) for row in ROWS if row[0] == place)


def is_of(place, where):
    """Whether a text of a place is meant by a place of the list: itself, or a module with all its functions."""
    return place == where or (where.count(".") < 2 and place.startswith(f"{where}."))


def reasons_of(place, text):
    listed = [(reason, where, words) for reason, some in NOT_FOLLOWED.items() for where, words in some]
    return [reason for reason, where, words in listed if is_of(place, where) and words in text]


def test_every_advice_is_followed_or_listed():
    for place, text in ADVICE:
        assert is_followed(place, text) + len(reasons_of(place, text)) == 1, (place, text)


def test_no_row_is_of_a_text_that_is_gone():
    for place, words, *_ in ROWS:
        assert len(texts_of(place, words)) == 1, (place, words)
    for place, words in (one for some in NOT_FOLLOWED.values() for one in some):
        assert any(is_of(where, place) and words in text for where, text in ADVICE), (place, words)
