"""What ``--help`` and ``--help-all`` show of a command: the fields of its dataclass under headings. No torch here."""

import shlex
import shutil
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from tyro.conf import Positional, Suppress

from maehub.cli.parsing import docstrings
from maehub.train.engine import COMMON, Section, annotation, option

_COLUMN = 22  # where the words about a flag begin
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", bool: ""}


class Row(NamedTuple):
    """A flag, or a position on the line."""

    section: Section | None
    names: list[str]
    metavar: str
    words: str
    required: bool
    common: bool

    def lines(self) -> list[str]:
        head = f"  {', '.join(self.names)} {self.metavar}".rstrip() if self.names else f"  {self.metavar}"
        indent = " " * _COLUMN
        lines = _wrapped(self.words, indent)
        if len(head) + 2 > _COLUMN:
            return [head, *lines]
        return [head.ljust(_COLUMN) + lines[0].lstrip(), *lines[1:]]


def help_page(command: str, kind: type, shared: str, *, everything: bool) -> str:
    """The page of a command, with what is said of flags that all share. Without common flags all are shown anyway."""
    rows = _rows(kind)
    flags = [row for row in rows if row.names]
    shown = rows if everything else [row for row in rows if row.common] or rows
    must = [row.metavar for row in rows if not row.names]
    must += [f"{row.names[0]} {row.metavar}" for row in flags if row.required]
    page = [" ".join(["usage: maehub", command, *must, *(["[FLAGS]"] if flags else [])])]
    page += ["", *_wrapped(str(kind.__doc__))]
    for section in (None, *Section):
        under = sorted((row for row in shown if row.section is section), key=lambda row: len(row.names) == 1)
        page += ["", *([section] if section else [])] if under else []
        page += [line for row in under for line in row.lines()]
    page += ["", shared]
    return "\n".join([*page, *(["", f"--help-all shows all {len(flags)} flags"] if len(shown) < len(rows) else [])])


def _rows(kind: Any) -> list[Row]:
    """A flag without a heading of its own stands under that of the field before it."""
    parts = [(vars(part).get("__annotations__", {}), docstrings(part)) for part in kind.__mro__[:-1]]
    section, rows = None, []
    for field in fields(kind):
        plain, said = annotation(field.type)
        section = next((one for one in reversed(said) if isinstance(one, Section)), section)
        if Suppress in said:
            continue
        told: dict[str, Any] = {}  # what `tyro.conf.arg` was told, the last word of each kind
        for one in said:
            if hasattr(one, "help_behavior_hint"):
                told |= {name: value for name, value in vars(one).items() if value is not None}
        flag = option(told.get("name", f"no_{field.name}" if field.default is True else field.name))
        own, *others = [words.get(field.name, "") for annotated, words in parts if field.name in annotated]
        words = " ".join((own or told.get("help") or "".join(others)).split())
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        hint = told.get("help_behavior_hint", f"(default: {' '.join(shlex.quote(str(value)) for value in values)})")
        hint = ("(required)" if field.default is MISSING else hint).replace(" ", "\xa0")  # on one line
        rows.append(
            Row(
                section,
                names=[] if Positional in said else [*told.get("aliases", ()), flag],
                metavar=told.get("metavar") or _metavar(plain),
                words=f"{words} {hint}".strip(),
                required=field.default is MISSING,
                common=COMMON in said,
            )
        )
    return rows


def _metavar(plain: Any) -> str:
    if get_origin(plain) is Literal:
        return "{" + ",".join(get_args(plain)) + "}"
    return " ".join(_METAVARS[part] for part in get_args(plain) or (plain,))


def _wrapped(words: str, indent: str = "") -> list[str]:
    width = shutil.get_terminal_size().columns
    lines = textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]
