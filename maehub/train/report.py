"""Placeholder while report.py is being written by its owner: overwrite this file."""

from pathlib import Path


def write_report(run: Path) -> Path:
    return run / "report.html"
