"""What a run runs on, and which code: for its record, and to compare processes."""

import hashlib
import math
import os
import platform
import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch

from maehub.train.engine.distributed import Group
from maehub.version import __version__


def describe_environment(group: Group) -> dict[str, Any]:
    """Versions, device and host counts; every process must call it."""
    device = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else _processor()
    hosts = group.all(socket.gethostname(), "the names of the hosts")
    return {
        "maehub": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
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
    return int(min(_free_of_machine(), _free_of_container()))


def _free_of_container() -> float:
    """What the control group leaves (version 2, at its usual place); no limit where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
