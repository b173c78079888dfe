"""What a run runs on, and which code: for its record, and to compare processes."""

import contextlib
import hashlib
import os
import platform
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch

from maehub.train.engine.distributed import Group
from maehub.version import __version__


def describe_environment(group: Group) -> dict[str, Any]:
    """Versions, device and host counts; every process must call it."""
    named = re.search(r"(?m)^model name\s*:(.*)", _text("/proc/cpuinfo"))
    processor = named[1].strip() if named else platform.machine()
    hosts = group.all(socket.gethostname(), "the names of the hosts")
    return {
        "maehub": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else processor,
        "processes": group.size,
        "hosts": len(set(hosts)),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


@cache
def code_digest() -> str:
    """sha256 of maehub's own source, so that a process with another version of it is noticed."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def available_bytes() -> int:
    """Memory that a process could take now without swapping or being killed by the limit of its container."""
    available = re.search(r"MemAvailable:\s*(\d+)", _text("/proc/meminfo"))
    free = int(available[1]) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # what the control group leaves (version 2, at its usual place); no file or "max" where there is no limit
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(free, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else free


def _text(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""
