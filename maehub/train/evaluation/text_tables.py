"""Results as tables: in a terminal, and in a notebook."""

from collections.abc import Collection, Sequence

from maehub.errors import visible


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Aligned columns, two spaces apart: those ``left`` begin at the same place, the others end at the same place."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = enumerate(zip(line, widths, strict=True))
        return "  ".join(cell.ljust(width) if at in left else cell.rjust(width) for at, (cell, width) in cells).rstrip()

    return "\n".join(map(aligned, lines))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a notebook; texts are escaped. An empty header is left out."""
    import html  # here, since its table of entities takes as long as all the rest of this package

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table>{line('th', header) if header else ''}{body}</table>"


def percent(value: float | None) -> str:
    """A share in percent as text; a dash for None."""
    return "–" if value is None else f"{value:.1f} %"


def printable(text: str, longest: int = 32) -> str:
    """One line without control characters or broken Unicode, its end cut off where it is too long."""
    shown = visible(text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def duration_text(seconds: float) -> str:
    """A duration such as 5.3 min; from three days on with the days."""
    hours = seconds / 3600
    if hours >= 72:
        return f"{hours:,.0f} h ({hours / 24:,.1f} days)"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
