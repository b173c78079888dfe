"""What devices can do: a literal table for GPUs, a short measurement for the CPU of this machine."""

import functools
import timeit
from collections.abc import Callable
from typing import NamedTuple

import torch

from maehub.errors import UsageError
from maehub.train.engine import available_bytes

_SIDE = 1024  # of the matrices that are multiplied


class Device(NamedTuple):
    """One accelerator, or the CPU."""

    name: str
    bf16: float
    """Peak TFLOP/s of dense bf16 products with float32 sums; 0 where there is no such unit."""
    fp32: float
    """Peak TFLOP/s of float32 products, without TF32, which training does not turn on."""
    memory: float
    """GiB."""
    bandwidth: float
    """Of the memory, GB/s."""
    source: str

    def rate(self, precision: str) -> float:
        """Peak TFLOP/s in "bf16" or "fp32"."""
        return self.bf16 if precision == "bf16" else self.fp32


# Dense rates: datasheets print twice as much, "with sparsity", from the A100 on.
DEVICES = {
    row.name: row
    for row in (
        Device("v100", 0, 15.7, 32, 900, "NVIDIA V100 datasheet, SXM2 32 GB"),
        Device("t4", 0, 8.1, 16, 320, "NVIDIA T4 datasheet"),
        Device("a10", 125, 31.2, 24, 600, "NVIDIA A10 datasheet"),
        Device("a100-40", 312, 19.5, 40, 1555, "NVIDIA A100 datasheet, SXM 40 GB"),
        Device("a100-80", 312, 19.5, 80, 2039, "NVIDIA A100 datasheet, SXM 80 GB"),
        Device("rtx-3090", 71, 35.6, 24, 936, "NVIDIA GA102 whitepaper, appendix"),
        Device("rtx-a6000", 154.8, 38.7, 48, 768, "NVIDIA GA102 whitepaper, appendix"),
        Device("l4", 121, 30.3, 24, 300, "NVIDIA L4 datasheet"),
        Device("l40s", 362, 91.6, 48, 864, "NVIDIA L40S datasheet"),
        Device("rtx-4090", 165.2, 82.6, 24, 1008, "NVIDIA Ada whitepaper, appendix A"),
        Device("h100", 989, 67, 80, 3350, "NVIDIA H100 datasheet, SXM"),
        Device("h200", 989, 67, 141, 4800, "NVIDIA H200 datasheet, SXM"),
    )
}

# What torch calls them, the more particular names first. Memory tells the two A100 apart.
_TORCH_NAMES = (
    ("H200", "h200"), ("H100", "h100"), ("A100", "a100"), ("RTX A6000", "rtx-a6000"), ("RTX 4090", "rtx-4090"),
    ("RTX 3090", "rtx-3090"), ("L40S", "l40s"), ("L4", "l4"), ("A10", "a10"), ("V100", "v100"), ("T4", "t4"),
)  # fmt: skip


def device_row(on: str, device: str = "auto") -> Device:
    """The device to plan for: one of `DEVICES`, "cpu" of this machine, measured, or "auto", its GPU or else its CPU.

    For "auto" the ``--device`` of the run counts: "cpu" keeps it off a GPU.
    """
    if on in DEVICES:
        return DEVICES[on]
    if on == "cpu" or (on == "auto" and (device.startswith("cpu") or not torch.cuda.is_available())):
        return measured_cpu()
    if on != "auto":
        raise UsageError(f"--on {on} is not one of auto, cpu, {', '.join(DEVICES)}")
    number = torch.cuda.current_device() if device in ("auto", "cuda") else torch.device(device).index
    name, memory = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
    known = next((row for words, row in _TORCH_NAMES if words in name), None)
    if known is None:
        raise UsageError(
            f"{name} is not in the table of `maehub plan`; name a GPU like it by --on {', '.join(DEVICES)}"
        )
    if known == "a100":
        known = "a100-80" if memory > 60 * 2**30 else "a100-40"
    return DEVICES[known]._replace(memory=memory / 2**30)


def measured_cpu() -> Device:
    """This machine's CPU with the threads that torch uses: half a second of matrix products, and of copying.

    Its memory is what is free now.
    """
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
        rates[dtype] = 2 * _SIDE**3 * _per_second(functools.partial(torch.mm, matrix, matrix.T)) / 1e12
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)
    threads = torch.get_num_threads()
    return Device(
        name="cpu",
        bf16=rates[torch.bfloat16],
        fp32=rates[torch.float32],
        memory=available_bytes() / 2**30,
        bandwidth=2 * source.nbytes * _per_second(lambda: target.copy_(source)) / 1e9,
        source=f"measured here, {threads} thread{'s' * (threads > 1)}",
    )


def _per_second(call: Callable[[], object]) -> float:
    """How often a call can be made in a second, measured for at least a fifth of one after shorter tries."""
    count, seconds = timeit.Timer(call).autorange()
    return count / seconds
