"""What each command does: a few lines that call one public function and say what came of it.

torch is imported inside the commands, so that ``list``, a mistyped name and a refusal answer at once.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from maehub import hub
from maehub.errors import EXIT_DONE, EXIT_SKIPPED, SPACES, DataError, UsageError, visible
from maehub.files import check_place, is_detector, is_segmenter, read_json, read_words

if TYPE_CHECKING:
    from maehub.cli import arguments


class Shared(NamedTuple):
    """Flags that every command takes, wherever they stand on the line."""

    passed_over: dict[str, dict[str, int]]  # what each search of this command left out, by ending
    json: bool
    quiet: bool
    debug: bool

    def searched(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts of a command that searches for pictures."""
        return facts | {"passed_over": dict(sum(map(Counter, self.passed_over.values()), Counter[str]()))}


def run_list(config: "arguments.List", shared: Shared) -> int:
    rows = [hub.model_info(name) for name in hub.list_models(config.pattern)]
    if not rows:
        raise UsageError(f"no model is called {config.pattern!r}; `maehub list` shows all of them")
    header = ("NAME", "SIZE", "ROLE", "TARGET", "LICENCE", "SOURCE")
    table = []
    for row in rows:
        size = "×".join(map(str, dict.fromkeys(row.image_size)))  # of a square one side
        table.append((row.name, size, row.role, row.target or "–", row.licence, row.sources[0].where()))
    widths = [max(map(len, column)) for column in zip(header, *table, strict=True)]
    text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *table))
    facts = {"models": [row.to_dict() for row in rows if shared.json]}
    return report(shared._replace(quiet=False), facts, text)


def run_info(config: "arguments.Info", shared: Shared) -> int:
    info = hub.model_info(config.name)
    return report(shared._replace(quiet=False), info.to_dict(), info.describe())


def run_download(config: "arguments.Download", shared: Shared) -> int:
    path = hub.download(
        config.name, revision=config.revision, cache_dir=config.cache_dir, lock_timeout=config.lock_timeout
    )
    return report(shared, {"path": str(path)}, f"{config.name} is at {path}")


def run_cache(config: "arguments.Cache", shared: Shared) -> int:
    cleaned = hub.clean_cache(config.cache_dir, dry_run=config.dry_run)
    return report(shared, cleaned.to_dict(), cleaned.describe())


def run_verify(config: "arguments.Verify", shared: Shared) -> int:
    checked = hub.verify(config.source)
    lines = [f"{entry.sha256[:12]}  {entry.compared_with:<22}  {entry.path}" for entry in checked]
    facts = {"files": [entry._asdict() | {"path": str(entry.path)} for entry in checked]}
    return report(shared, facts, "\n".join(lines))


def run_identify(config: "arguments.Identify", shared: Shared) -> int:
    from maehub.conversion import identify

    found = identify(
        config.file, heads=config.heads, decoder_heads=config.decoder_heads, decide_target=config.decide_target or None
    )
    return report(shared, found.to_dict(), found.describe(), found.exit_code)


def run_convert(config: "arguments.Convert", shared: Shared) -> int:
    from maehub import dense  # whose networks take a while to import, and are wanted in two cases alone
    from maehub.conversion import convert
    from maehub.weights import holds_dense

    if is_segmenter(config.source) and config.to in ("onnx", "torch-export"):
        result = dense.export_segmenter(config.source, config.out, config.to, overwrite=config.overwrite)
    elif config.to == "maehub" and holds_dense(config.source):
        result = dense.convert_published(config.source, config.out, overwrite=config.overwrite)
    else:
        result = convert(
            config.source,
            config.out,
            to=config.to,
            heads=config.heads,
            decoder_heads=config.decoder_heads,
            target=config.target,
            overwrite=config.overwrite,
        )
    certificate, largest = result.folder / "certificate.json", result.certificate.difference
    facts = {
        "folder": str(result.folder),
        "difference": largest.relative,
        "absolute_difference": largest.absolute,
        "bound": result.certificate.bound,
        "certificate": str(certificate),
    }
    text = (
        f"{result.folder}: largest difference after reloading {largest.absolute:.1e}, {largest.relative:.1e} of the "
        f"largest output; {certificate} says what was compared, renamed and left out"
    )
    return report(shared, facts, text)


def run_push(config: "arguments.Push", shared: Shared) -> int:
    can_ask = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and not shared.json
    if not (config.dry_run or config.yes or can_ask):
        raise UsageError("nobody can be asked here: look at the plan by --dry-run, then say --yes; nothing was sent")
    about = read_words(config.about) if config.about else ""
    from maehub.publishing import Plan, push

    def confirm(plan: Plan) -> bool:
        if not shared.json:
            report(shared, {}, plan.describe())
        return config.yes or config.dry_run or input("send this? [y/N] ").strip().lower() in ("y", "yes")

    done = push(
        config.source,
        config.repo,
        licence=config.licence,
        about=about,
        dataset=config.dataset,
        with_pictures=config.with_pictures,
        revision=config.revision,
        parent=config.parent,
        private=config.private or None,
        pull_request=config.pr,
        dry_run=config.dry_run,
        confirm=confirm,
        message=config.message,
        progress=not shared.quiet,
    )
    return report(shared, done.to_dict(), done.describe())


def run_features(config: "arguments.Features", shared: Shared) -> int:
    size = wanted_size(config.image_size)
    found = hub.locate(config.model, "encoder")  # before torch is imported: a model that is not there fails at once
    from maehub.features import extract_features
    from maehub.hub import load

    encoder = load(found, image_size=size, device=config.device)
    table = extract_features(
        encoder,
        config.source,
        precision=natively(config).precision,
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
    text = f"{config.out}: {len(table)} images, {tuple(table.features.shape)}{skipped}"
    return report(shared, shared.searched(facts), text, EXIT_SKIPPED if table.skipped else EXIT_DONE)


def run_data(config: "arguments.Data", shared: Shared) -> int:
    if config.out is not None:
        check_place(config.out, config.overwrite)
    from maehub.data import (
        SAMPLE,
        check_data,
        check_label_maps,
        check_objects,
        data_statistics,
        is_object_set,
        map_folders,
        tell,
    )

    if config.what == "stats":
        sample = SAMPLE if config.sample is None else config.sample
        found = data_statistics(config.data, sample=sample, workers=config.workers, progress=not shared.quiet)
        return report(shared, found.to_dict(), found.describe())
    told = None if shared.json or shared.quiet else tell
    checked = check_data(config.data, workers=config.workers, progress=not shared.quiet, on_bad=told)
    if config.out is not None:
        checked.save(config.out)
    facts, text, bad = checked.to_dict(), checked.describe(), bool(checked.bad)
    if not bad and map_folders(config.data):  # pictures beside label maps
        maps = check_label_maps(config.data)
        facts, text, bad = facts | {"label_maps": maps.to_dict()}, f"{text}\n\n{maps.describe()}", bool(maps.wrong)
    if not checked.bad and is_object_set(config.data):
        objects = check_objects(config.data)
        facts, text = facts | {"objects": objects.to_dict()}, f"{text}\n\n{objects.describe()}"
        bad = bad or bool(objects.wrong)
    return report(shared, facts, text, DataError.exit_code if bad else EXIT_DONE)


def run_training(config: Any, shared: Shared) -> int:
    from maehub import train

    trained = train.pretrain if isinstance(config, train.PretrainConfig) else train.finetune
    result: Any = trained(natively(replace(config, quiet=shared.quiet)))
    facts = {"run": str(result.run), "step": result.step, "exit_code": result.exit_code}
    text = f"{result.run}: {result.step} steps done"
    if result.exit_code:
        text = f"{result.run}: stopped at step {result.step}; the same line with --resume goes on"
    if scores := getattr(result, "scores", None):  # of what was fine-tuned
        facts |= scores.summary() | ({} if config.task in ("segment", "detect") else {"kept": result.kept})
        if result.probe:
            key = "probe_r2" if config.task == "regression" else "probe_top1"
            facts[key] = result.probe.summary()[key.removeprefix("probe_")]
        text = f"{scores}\n\n{text}. {result.run}/report.html shows it"
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one tells
        report(shared, shared.searched(facts), text)
    return int(result.exit_code)


def natively(config: Any) -> Any:
    """With what ``--precision auto`` means in a command: what this machine multiplies fastest in.

    A run that is resumed keeps its own.
    """
    if config.precision != "auto":
        return config
    from maehub.models import multiplies_in_tiles, settled_precision, usable_device

    if getattr(config, "resume", False) and (config.out / "config.json").is_file():
        return replace(config, precision=read_json(config.out / "config.json").get("precision", "auto"))
    device = usable_device(config.device)
    precision = settled_precision("auto", device)
    tiles = device.type == "cpu" and multiplies_in_tiles()
    return replace(config, precision="bf16" if tiles else precision)


def measuring(function: str) -> Callable[[Any, Shared], int]:
    """What a command does that calls a function of `maehub.train` and shows what it found."""

    def run(config: Any, shared: Shared) -> int:
        from maehub import train

        found = getattr(train, function)(natively(replace(config, quiet=shared.quiet)))
        return report(shared, shared.searched(found.to_dict()), str(found))

    return run


def run_probe(config: Any, shared: Shared) -> int:
    return measuring("probe_sweep" if config.sweep else "probe")(config, shared)


def run_predict(config: Any, shared: Shared) -> int:
    if is_segmenter(config.model) or is_detector(config.model):
        return run_predict_dense(config, shared)
    if config.out is not None:
        from maehub.train.evaluation import check_target

        check_target(config.out, config.overwrite)
    size = wanted_size(config.image_size)
    located = hub.locate(config.model, "encoder")  # before torch is imported: a model that is not there fails at once
    from maehub.data import find_images
    from maehub.features import check_bad_files
    from maehub.hub import load
    from maehub.train import predict

    if config.skip_bad and config.out is not None and config.out.suffix == ".csv":
        check_bad_files(config.out, config.overwrite)
    paths = dict.fromkeys(path for source in config.pictures for path in find_images(source).paths())
    encoder = load(located, image_size=size, device=config.device)
    found = predict(
        encoder,
        list(paths),
        precision=natively(config).precision,
        top=config.top,
        batch_size=config.batch_size,
        workers=config.workers,
        skip_bad=config.skip_bad,
        progress=not shared.quiet,
    )
    facts, text = found.to_dict(), str(found)
    if config.out is not None:
        found.save(config.out, overwrite=config.overwrite)
        facts = {"out": str(config.out), "images": len(found), "skipped": len(found.skipped)}
        text = f"{config.out}: {len(found)} images" + (f", {len(found.skipped)} skipped" if found.skipped else "")
    return report(shared, shared.searched(facts), text, EXIT_SKIPPED if found.skipped else EXIT_DONE)


def run_predict_dense(config: Any, shared: Shared) -> int:
    from maehub import dense, train

    detects = is_detector(config.model)
    kind, what = ("detector", "objects") if detects else ("segmenter", "label maps")
    for name in ("image_size", "batch_size"):
        if getattr(config, name):
            raise UsageError(f"--{name.replace('_', '-')} is for classifiers: a {kind} has windows of its own")
    if config.out is not None and config.out.suffix:
        raise UsageError(f"{config.out}: {what} are written into a folder, whose name has no ending")
    found = getattr(train, "predict_objects" if detects else "predict_maps")(
        getattr(dense, f"load_{kind}")(config.model, device=config.device),
        config.pictures,
        config.out,
        overwrite=config.overwrite,
        precision=natively(config).precision,
        skip_bad=config.skip_bad,
        progress=not shared.quiet,
    )
    facts, text = found.to_dict(), str(found)
    if config.out is not None:
        facts = {"out": str(config.out), "images": len(found), "skipped": len(found.skipped)}
        text = f"{text}\n\n{config.out}: {', '.join(found.members)}"
    return report(shared, shared.searched(facts), text, EXIT_SKIPPED if found.skipped else EXIT_DONE)


def run_plan(config: Any, shared: Shared) -> int:
    from maehub.train.planning import plan

    found = plan(config)
    return report(shared, found.to_dict(), found.describe())


def report(shared: Shared, facts: dict[str, Any], text: str, code: int = EXIT_DONE) -> int:
    """Say what came of a command: as JSON, in words, or not at all. Gives its exit code."""
    if shared.json:
        print(json.dumps(facts, allow_nan=False))
    elif not shared.quiet:
        print(visible(text, SPACES))
    return code


def wanted_size(sides: tuple[int, ...]) -> int | tuple[int, int] | None:
    """What ``--image-size`` means."""
    if not sides:
        return None
    if len(sides) > 2:
        raise UsageError(f"--image-size takes a side, or a height and a width, not {len(sides)} numbers")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
