"""The command line: each command is a dataclass of its arguments and a few lines that call one public function.

torch is imported inside the commands, so that ``--help``, ``list`` and a mistyped name answer at once.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tyro.conf import Positional, arg

from maehub import __version__
from maehub.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_SKIPPED, MaehubError, UsageError
from maehub.locating import locate

EMBEDDED_PHOTO = Path(__file__).parent / "assets" / "cat.jpg"

Model = Annotated[str, arg(aliases=["-m"])]
Out = Annotated[Path, arg(aliases=["-o"])]


class Shared(NamedTuple):
    """Flags that every command takes, wherever they stand on the line."""

    json: bool
    quiet: bool
    debug: bool


@dataclass(frozen=True)
class List:
    """List the models of the catalog: size, role, target, licence, source."""

    pattern: Positional[str] = "*"
    """Names to show; * and ? are wildcards."""


@dataclass(frozen=True)
class Info:
    """Show everything that is known about a model."""

    name: Positional[str]
    """A name that `maehub list` shows."""


@dataclass(frozen=True)
class Download:
    """Download a model's files and verify them, for later use without a network."""

    name: Positional[str]
    """A name that `maehub list` shows, or a Hub id such as user/repo or user/repo@revision."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    cache_dir: Path | None = None
    """Where downloads are kept; None is the Hub's own cache."""


@dataclass(frozen=True)
class Verify:
    """Hash a model's files again and compare."""

    source: Positional[str]
    """A catalog name, a Hub id, a folder or a file."""


@dataclass(frozen=True)
class Convert:
    """Convert weights between the naming dialects; reads .pth and .bin files too."""

    source: Positional[Path]
    """A file or a folder: official, timm or transformers layout."""
    out: Out
    """Folder to write."""
    to: Literal["maehub", "official", "timm", "transformers"] = "maehub"
    """Layout to write."""
    heads: int | None = None
    """Attention heads, where the file's shape is not a published one."""
    decoder_heads: int | None = None
    """Attention heads of the decoder, where its width is not 512."""
    target: Literal["pixels", "normalised_pixels"] | None = None
    """What the decoder was trained to predict; no file says it."""
    overwrite: bool = False
    """Replace an existing folder."""


@dataclass(frozen=True)
class Features:
    """Features of every picture below a folder, written to a file."""

    source: Positional[Path]
    """A picture, or a folder searched at any depth."""
    out: Out
    """File to write; its ending says how: .safetensors, .npz, .parquet or .csv."""
    model: Model = "vit-nano"
    """A catalog name, a Hub id, a folder or a .safetensors file."""
    pool: Literal["cls", "mean", "cls+mean", "tokens", "map"] | None = None
    """None is the pooling that the weights were trained with."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs to take, 0 the first, -1 the last; none means the last block alone."""
    image_size: tuple[int, ...] = ()
    """Side in pixels, or height and width; none is the model's native size."""
    batch_size: int | None = None
    """Pictures computed at once; None chooses."""
    workers: int | None = None
    """Processes that read pictures; None fits the machine."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    exact_decode: bool = False
    """Decode JPEGs at full size instead of a smaller one that is large enough."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, list them in bad_files.csv, and exit with 9."""
    overwrite: bool = False
    """Replace an existing file."""
    seed: int = 0
    """Accepted everywhere; features have nothing random about them."""


@dataclass(frozen=True)
class Reconstruct:
    """Hide part of a picture and draw what the autoencoder makes of it."""

    images: Positional[tuple[str, ...]] = ()
    """Pictures, folders or addresses; none means a photo that comes with maehub."""
    out: Out = Path("reconstruction.png")
    """Figure to write; several pictures or ratios share it as rows. A folder gets one figure a picture."""
    model: Model = "vit-nano"
    """A catalog name, a Hub id, a folder or a .safetensors file."""
    mask_ratio: tuple[float, ...] = (0.75,)
    """Share of patches to hide; several draw a row each."""
    strategy: Literal["random", "block", "grid"] = "random"
    """Which patches are hidden."""
    mask_image: Path | None = None
    """A picture whose white parts are hidden, in place of a strategy."""
    statistics: Literal["visible", "true"] = "visible"
    """Of models trained on normalised pixels: where the hidden patches' mean and variance come from."""
    error_map: bool = False
    """Predict every patch unseen, by masks that cover the picture, and draw where the model errs."""
    image_size: tuple[int, ...] = ()
    """Side in pixels, or height and width; none is the model's native size."""
    seed: int = 0
    """Seed of the mask."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    overwrite: bool = False
    """Replace an existing figure."""


def run_list(config: List, shared: Shared) -> int:
    from maehub.catalog import list_models, model_info

    rows = [model_info(name) for name in list_models(config.pattern)]
    if not rows:
        raise UsageError(f"no model is called {config.pattern!r}; `maehub list` shows all of them")
    if shared.json:
        _print_json({"models": [row.to_dict() for row in rows]})
        return EXIT_DONE
    table = [("NAME", "SIZE", "ROLE", "TARGET", "LICENCE", "SOURCE")]
    table += [
        (row.name, _side(row.image_size), row.role, row.target or "–", row.licence, row.sources[0].where())
        for row in rows
    ]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return EXIT_DONE


def run_info(config: Info, shared: Shared) -> int:
    from maehub.catalog import model_info

    info = model_info(config.name)
    if shared.json:
        _print_json(info.to_dict())
    else:
        print(info.describe())
    return EXIT_DONE


def run_download(config: Download, shared: Shared) -> int:
    from maehub.fetching import download

    path = download(config.name, revision=config.revision, cache_dir=config.cache_dir)
    _report(shared, {"path": str(path)}, f"{config.name} is at {path}")
    return EXIT_DONE


def run_verify(config: Verify, shared: Shared) -> int:
    from maehub.fetching import verify

    checked = verify(config.source)
    lines = [f"{entry.sha256[:12]}  {entry.compared_with:<22}  {entry.path}" for entry in checked]
    _report(shared, {"files": [entry._asdict() | {"path": str(entry.path)} for entry in checked]}, "\n".join(lines))
    return EXIT_DONE


def run_convert(config: Convert, shared: Shared) -> int:
    from maehub.conversion import convert

    result = convert(
        config.source,
        config.out,
        to=config.to,
        heads=config.heads,
        decoder_heads=config.decoder_heads,
        target=config.target,
        overwrite=config.overwrite,
    )
    difference = f"largest relative difference after reloading {result.difference:.1e}"
    _report(shared, {"folder": str(result.folder), "difference": result.difference}, f"{result.folder}: {difference}")
    return EXIT_DONE


def run_features(config: Features, shared: Shared) -> int:
    found = locate(config.model, "encoder")  # before torch is imported: a model that is not there fails at once
    from maehub.features import extract_features
    from maehub.hub import load

    encoder = load(found, image_size=_size(config.image_size), device=_device(config.device))
    table = extract_features(
        encoder,
        config.source,
        pool=config.pool,
        layers=list(config.layers) or None,
        batch_size=config.batch_size,
        workers=config.workers,
        out=config.out,
        skip_bad=config.skip_bad,
        exact_decode=config.exact_decode,
        overwrite=config.overwrite,
        progress=not shared.quiet,
    )
    facts = {
        "out": str(config.out),
        "images": len(table),
        "skipped": len(table.skipped),
        "shape": list(table.features.shape),
    }
    skipped = f", {len(table.skipped)} skipped (see bad_files.csv)" if table.skipped else ""
    _report(shared, facts, f"{config.out}: {len(table)} images, {tuple(table.features.shape)}{skipped}")
    return EXIT_SKIPPED if table.skipped else EXIT_DONE


def run_reconstruct(config: Reconstruct, shared: Shared) -> int:
    sources = config.images or (str(EMBEDDED_PHOTO),)
    images = [image for source in sources for image in _pictures(source)]
    one_each = config.out.is_dir() or not config.out.suffix
    outs = [config.out / f"{Path(image).stem}_mae.png" for image in images] if one_each else [config.out]
    _refuse_taken(outs, config.overwrite)
    if config.mask_image and config.error_map:
        raise UsageError("--error-map hides every patch in turn, so it takes no --mask-image")
    found = locate(config.model, "autoencoder")

    from maehub.drawing import save_figure
    from maehub.figures import error_map, grid, reconstruct
    from maehub.hub import load_autoencoder
    from maehub.opening import open_image

    model = load_autoencoder(found, image_size=_size(config.image_size), device=_device(config.device))
    mask = open_image(config.mask_image, channels=1) if config.mask_image else None

    def drawn(image: str, ratio: float) -> Any:
        if config.error_map:
            return error_map(model, image, mask_ratio=ratio, seed=config.seed)
        return reconstruct(
            model,
            image,
            mask=mask,
            strategy=config.strategy,
            mask_ratio=ratio,
            seed=config.seed,
            statistics=config.statistics,
        )

    results = [[drawn(image, ratio) for ratio in config.mask_ratio] for image in images]
    if one_each:
        config.out.mkdir(parents=True, exist_ok=True)
    for panels, out in zip(results if one_each else [[one for row in results for one in row]], outs, strict=True):
        save_figure(panels[0].figure() if len(panels) == 1 else grid(panels), out)
    numbers = [{"image": image, **_numbers(one)} for image, row in zip(images, results, strict=True) for one in row]
    _report(shared, {"figures": [str(out) for out in outs], "images": numbers}, "\n".join(map(str, outs)))
    return EXIT_DONE


def run_pretrain(config: Any, shared: Shared) -> int:
    from maehub.train import pretrain

    result = pretrain(replace(config, quiet=config.quiet or shared.quiet))
    facts = {"run": str(result.run), "step": result.step, "exit_code": result.exit_code}
    _report(shared, facts, f"{result.run}: {result.step} steps done")
    return result.exit_code


class Command(NamedTuple):
    """One row of the table below."""

    config: str  # module:class of its arguments, imported when the command is run
    run: Callable[[Any, Shared], int]
    summary: str


COMMANDS = {
    "list": Command("maehub.cli:List", run_list, "the models of the catalog"),
    "info": Command("maehub.cli:Info", run_info, "everything known about one model"),
    "download": Command("maehub.cli:Download", run_download, "fetch and verify a model for later use offline"),
    "verify": Command("maehub.cli:Verify", run_verify, "hash a model's files again and compare"),
    "convert": Command("maehub.cli:Convert", run_convert, "official, timm, transformers and maehub layouts"),
    "features": Command("maehub.cli:Features", run_features, "features of a folder of pictures"),
    "reconstruct": Command("maehub.cli:Reconstruct", run_reconstruct, "hide part of a picture and draw it anew"),
    "pretrain": Command("maehub.train.config:PretrainConfig", run_pretrain, "train an autoencoder on pictures"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code; `maehub.errors` lists them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    shared = Shared(*(_taken(words, flag) for flag in ("--json", "--quiet", "--debug")))
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("maehub").setLevel(logging.WARNING if shared.quiet else logging.INFO)
    try:
        return _run(words, shared)
    except MaehubError as error:
        if shared.debug:
            raise
        print(f"maehub: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if shared.debug:
            raise
        print("maehub: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(words: list[str], shared: Shared) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return EXIT_DONE
    if words[0] == "--version":
        print(f"maehub {__version__}")
        return EXIT_DONE
    name, *rest = words
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {name!r}; {hint}")
    command = COMMANDS[name]
    module, _, config_class = command.config.partition(":")
    try:
        config = tyro.cli(
            getattr(import_module(module), config_class),
            args=rest,
            prog=f"maehub {name}",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as stop:  # the parser has printed its help or its complaint
        return int(stop.code or 0) and UsageError.exit_code
    code = command.run(config, shared)
    sys.stdout.flush()
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "maehub: masked autoencoders. Load, look, extract features, train.",
            "",
            "usage: maehub COMMAND [ARGUMENTS]      maehub COMMAND --help      maehub --version",
            "",
            *lines,
            "",
            "Every command takes --json (one JSON object, the last line of its output), --quiet and --debug.",
            "Try `maehub reconstruct`: a model and a photo come with maehub.",
        ]
    )


def _pictures(source: str) -> list[str]:
    """The pictures that one argument names: an address, a file, or all of a folder."""
    if source.startswith(("http://", "https://")):
        return [source]
    from maehub.sources import find_images

    return [os.fsdecode(path) for path in find_images(source).paths()]


def _refuse_taken(outs: list[Path], overwrite: bool) -> None:
    """Refuse figures that cannot be written, before any work."""
    for out in outs:
        if out.exists() and not overwrite:
            raise UsageError(f"{out} exists; choose another --out, or replace it with --overwrite")
        if out.suffix and len(outs) == 1 and not out.parent.is_dir():
            raise UsageError(f"{out} cannot be written: there is no folder {out.parent}")


def _numbers(figure: Any) -> dict[str, Any]:
    """What was measured for one figure."""
    names = ("mask_ratio", "seed", "mse", "psnr", "score")
    return {name: getattr(figure, name) for name in names if hasattr(figure, name)}


def _taken(words: list[str], flag: str) -> bool:
    """Whether a flag stands in the line; it is taken out."""
    present = flag in words
    while flag in words:
        words.remove(flag)
    return present


def _report(shared: Shared, facts: dict[str, Any], text: str) -> None:
    if shared.json:
        _print_json(facts)
    elif not shared.quiet:
        print(text)


def _print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, ensure_ascii=False))


def _side(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}×{size[1]}"


def _size(sides: tuple[int, ...]) -> int | tuple[int, int] | None:
    if not sides:
        return None
    if len(sides) > 2:
        raise UsageError(f"--image-size takes a side, or a height and a width, not {len(sides)} numbers")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
