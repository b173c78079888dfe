"""What a process takes of memory. ``ru_maxrss`` does not tell: a child begins with its parent's, and it never falls."""

import contextlib
import os
import re
import sys
from pathlib import Path

PROCESS = Path("/proc/self")
WITH_TESTS = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
"""The environment of a child that measures itself."""


def taken(field, file="status"):
    """A line of a file of /proc/self, kB."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", (PROCESS / file).read_text(), re.MULTILINE)[1])


def own():
    """kB that no other process shares."""
    return taken("Private_Dirty", "smaps_rollup") + taken("Private_Clean", "smaps_rollup")


@contextlib.contextmanager
def peak():
    """A list that gets the kB by which the largest this process was inside the block exceeds what it took before."""
    (PROCESS / "clear_refs").write_text("5")  # the peak is from now on
    before, grown = taken("VmRSS"), []
    yield grown
    grown.append(taken("VmHWM") - before)
