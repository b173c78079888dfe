"""The command line: `commands` has what each command does, `arguments` what it takes.

Nothing here imports torch, so that ``--help``, ``list`` and a mistyped name answer at once.
"""

import contextlib
import errno
import io
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from maehub.cli import commands
from maehub.cli.commands import Shared, measuring
from maehub.cli.parsing import parsed
from maehub.cli.reconstruct import run_reconstruct
from maehub.errors import EXIT_DONE, EXIT_INTERRUPTED, SPACES, CheckpointError, MaehubError, UsageError, log, visible
from maehub.version import __version__

_SHARED_FLAGS = (("--json",), ("--quiet", "-q"), ("--debug",))
_SHARED_HELP = """\
Every command takes:
  --json              print one JSON object, the last line of the output
  -q, --quiet         print nothing but errors
  --debug             show the traceback of an error
  -h, --help          show what most runs need; --help-all shows every flag"""
_OVERVIEW = """\
maehub: masked autoencoders. Load, look, extract features, train, publish.

usage: maehub COMMAND [ARGUMENTS]      maehub COMMAND --help      maehub --version

{commands}

{shared}

Try `maehub reconstruct`: a model and a photo come with maehub."""


class Command(NamedTuple):
    """One row of the table below."""

    config: str  # module:class of its arguments in maehub, imported when the command is run
    run: Callable[[Any, Shared], int]
    summary: str


COMMANDS = {
    "list": Command("cli.arguments:List", commands.run_list, "the models of the catalog"),
    "info": Command("cli.arguments:Info", commands.run_info, "everything known about one model"),
    "download": Command(
        "cli.arguments:Download", commands.run_download, "fetch and verify a model for later use offline"
    ),
    "cache": Command("cli.arguments:Cache", commands.run_cache, "clean: remove what killed downloads left"),
    "verify": Command("cli.arguments:Verify", commands.run_verify, "hash a model's files again and compare"),
    "identify": Command("cli.arguments:Identify", commands.run_identify, "what a stranger's checkpoint is"),
    "convert": Command("cli.arguments:Convert", commands.run_convert, "between libraries; to ONNX and torch.export"),
    "features": Command("cli.arguments:Features", commands.run_features, "features of a folder of pictures"),
    "reconstruct": Command("cli.arguments:Reconstruct", run_reconstruct, "hide part of a picture and draw it anew"),
    "data": Command(
        "cli.arguments:Data", commands.run_data, "check: what cannot be read; stats: sizes, values, mean and std"
    ),
    "pretrain": Command("train:PretrainConfig", commands.run_training, "train an autoencoder on pictures"),
    "finetune": Command("train:FinetuneConfig", commands.run_training, "train a classifier on labelled pictures"),
    "probe": Command("train:ProbeConfig", commands.run_probe, "a linear classifier on features"),
    "knn": Command("train:KnnConfig", measuring("knn"), "what the nearest features tell of classes"),
    "compare": Command("train:CompareConfig", measuring("compare"), "several networks by the same protocols"),
    "evaluate": Command("train:EvaluateConfig", measuring("evaluate"), "measure a classifier on labelled pictures"),
    "predict": Command("train.evaluation:PredictConfig", commands.run_predict, "what pictures show, by a classifier"),
    "push": Command("cli.arguments:Push", commands.run_push, "publish a model on the Hub"),
    "plan": Command("train:PlanConfig", commands.run_plan, "memory, time and disk of a pretraining run"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code; `maehub.errors` lists them.
    """
    given = sys.argv[1:] if argv is None else argv
    shared = Shared({}, *(any(flag in given for flag in flags) for flags in _SHARED_FLAGS))
    words = [word for word in given if word not in itertools.chain(*_SHARED_FLAGS)]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # File names need not be text, and the terminal need not know ×.
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(_Visible())
    logging.basicConfig(handlers=[said])

    def keeps(record: logging.LogRecord) -> bool:
        shared.passed_over.update(getattr(record, "passed_over", {}))
        return True

    log.setLevel(logging.WARNING if shared.quiet else logging.INFO)
    log.addFilter(keeps)
    try:
        code = _run(words, shared)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if shared.debug:
            raise
        return _complain(error)
    finally:
        log.removeFilter(keeps)


class _Visible(logging.Formatter):
    """Messages alone; names of files and what servers say cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), SPACES)


def _complain(error: BaseException) -> int:
    """Say what went wrong, on stderr; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("maehub: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, MaehubError):
        if error.told_by is None or str(error.told_by) == os.environ.get("RANK", str(error.told_by)):
            print(visible(f"maehub: {error}", SPACES), file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = visible(str(error.filename or "the output"))
        print(f"maehub: {where}: {error.strerror}; --debug shows where", file=sys.stderr)
        return UsageError.exit_code if error.errno == errno.ENAMETOOLONG else CheckpointError.exit_code
    first = visible(str(error).strip().split("\n")[0])
    print(f"maehub: {type(error).__name__}: {first}\nmaehub did not expect this; --debug shows where", file=sys.stderr)
    return MaehubError.exit_code


def _run(words: list[str], shared: Shared) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
        print(_OVERVIEW.format(commands="\n".join(lines), shared=_SHARED_HELP))
        return EXIT_DONE
    if words[0] == "--version":
        print(f"maehub {__version__}")
        return EXIT_DONE
    name, *rest = words
    if name not in COMMANDS:
        from difflib import get_close_matches  # here, like what only some lines need, for a quick start

        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise UsageError(f"there is no command {name[:80]!r}; {hint}")
    module, _, kind = COMMANDS[name].config.partition(":")
    arguments = getattr(import_module(f"maehub.{module}"), kind)
    asked = set(itertools.takewhile(lambda word: word != "--", rest)) & {"-h", "--help", "--help-all"}
    if asked:
        from maehub.cli.help_page import help_page

        print(help_page(name, arguments, _SHARED_HELP, everything="--help-all" in asked))
        return EXIT_DONE
    return COMMANDS[name].run(parsed(name, arguments, rest), shared)
