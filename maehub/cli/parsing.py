"""The words of a command line to the dataclass of a command, by tyro; its complaints as our errors. No torch here."""

import contextlib
import io
import itertools
import textwrap
from dataclasses import replace
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from maehub.errors import MaehubError, UsageError

Arguments = TypeVar("Arguments")

_MOST_LINES = 10  # of a complaint
_FRAME = set(" ─-╰╯")


def parsed(command: str, kind: type[Arguments], words: list[str]) -> Arguments:
    """The arguments of a command."""
    if any(word.startswith("--tyro") for word in words):  # flags of the parser's own, which write files
        raise UsageError(f"maehub {command} has no --tyro flags")
    for part in kind.__mro__[:-1]:
        for name, described in docstrings(part).items():
            if "\n" in described:  # tyro keeps the line breaks of those that are indented
                told = tyro.conf.arg(help=" ".join(described.split()))
                part.__annotations__[name] = Annotated[part.__annotations__[name], told]
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            prog, config = f"maehub {command}", (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
            return tyro.cli(kind, args=words, prog=prog, config=config, registry=registry, add_help=False)
    except SystemExit as stop:
        cause = stop.__context__
        while cause is not None:
            if isinstance(cause, MaehubError):  # of a class that checks its own values
                raise cause from None
            cause = cause.__context__
        lines = [*_unframed(complaint.getvalue()), f"`maehub {command} --help` shows what it takes"]
        raise UsageError("\n".join(lines)) from None


def docstrings(kind: type) -> dict[str, str]:
    """Those of the fields that a class itself has."""
    return {field.arg_name: field.description or "" for field in docstring_parser.parse_from_object(kind).params}


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """``T | None`` is typed as T: leaving the flag out is how one says None."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if NoneType not in get_args(info.type) or len(kinds) > 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return replace(spec, str_from_instance=lambda value: [] if value is None else spec.str_from_instance(value))


def _unframed(panel: str) -> list[str]:
    """What the parser complains about, without title, frame and what follows a rule, which is help."""
    rows = [row.strip("│").rstrip() for row in panel.splitlines()[1:]]
    body = itertools.dropwhile(lambda row: set(row) <= _FRAME, rows)
    text = itertools.takewhile(lambda row: not row or not set(row) <= _FRAME, body)
    lines = textwrap.dedent("\n".join(row for row in text if row)).splitlines()
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "…"]
