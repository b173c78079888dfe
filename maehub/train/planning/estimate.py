"""What `maehub.train.planning.planning` says of a run, as values and as text."""

import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from maehub.train.evaluation import duration_text
from maehub.train.networks import costs
from maehub.train.planning.devices import Device


class Reading(NamedTuple):
    """What reading pictures costs."""

    pictures_per_second: float
    """That the device asks for."""
    milliseconds: float
    """Of one core, for a picture."""
    source: str
    cores: int
    """That read as fast as the device computes, over all processes."""


class Utilisation(NamedTuple):
    """Share of a device's peak rate that is reckoned with, and where it is from."""

    share: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The estimate for one run. Bytes and FLOPs are of one process; rates, hours and steps of the whole run."""

    network: str
    parameters: costs.Parameters
    view: tuple[int, int]
    """(height, width) in pixels."""
    work: costs.Work
    forward_flops: int
    """Of one view."""
    training_flops: int
    """Of one view: forward, backward, and forward again with ``checkpoint_activations``."""
    decoder_share: float
    """Of the forward FLOPs."""
    device: Device
    precision: Literal["bf16", "fp32"]
    utilisation: Utilisation
    processes: int
    fixed_bytes: int
    view_bytes: int
    micro_batch: int
    """Views that a process computes at once; 0 if not even one fits."""
    accumulation: int
    """Micro-batches of a step."""
    images: int
    """That are trained on, those held out being left out."""
    steps: int
    batch_size: int
    learning_rate: float
    step_seconds: float
    images_per_second: float
    """Views a second, computed."""
    hours: float
    reading: Reading
    checkpoint_bytes: int
    disk_bytes: int
    """Of the whole run folder but its pictures and metrics: ``keep`` checkpoints, one being written, the model."""
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        nested = ("parameters", "work", "device", "utilisation", "reading")
        return asdict(self) | {name: getattr(self, name)._asdict() for name in nested}

    def describe(self) -> str:
        """All of it as a table and plain sentences, for a person."""
        parameters, device, view = self.parameters, self.device, "×".join(map(str, self.view))
        each = "" if self.processes == 1 else f", on each of {self.processes}"
        rate = device.rate(self.precision)
        views = max(1, self.micro_batch)
        used = self.fixed_bytes + views * self.view_bytes
        batch = f"{self.processes:,} process{'es' * (self.processes > 1)} × {self.micro_batch:,}"
        batch += f" × {self.accumulation:,} accumulated" if self.accumulation > 1 else ""
        rows = {
            "network": f"{self.network}, {parameters.encoder / 1e6:,.1f} M parameters in the encoder, "
            f"{parameters.decoder / 1e6:,.1f} M in the decoder",
            "one view": f"{view} pixels, {self.work.patches} patches: {self.work.kept} seen, "
            f"{self.work.predicted} predicted",
            "FLOPs": f"{self.forward_flops / 1e9:,.1f} G forward, {self.training_flops / 1e9:,.1f} G a training step; "
            f"{self.decoder_share:.0%} of them in the decoder",
            "device": f"{device.name}, {number_words(rate)} TFLOP/s in {self.precision}, {device.memory:,.0f} GiB "
            f"({device.source})",
            "utilisation": f"{self.utilisation.share:.0%} of that ({self.utilisation.source})",
            "memory": f"{byte_words(used)} = {byte_words(self.fixed_bytes)} + {views:,} × {byte_words(self.view_bytes)}"
            + each,
            "batch": f"{self.batch_size:,} views = {batch if self.micro_batch else 'does not fit'}",
            "peak lr": f"{self.learning_rate:.3g}",
            "length": f"{self.steps:,} steps, {self.steps * self.batch_size / self.images:,.1f} views of each of "
            f"{self.images:,} images",
            "speed": f"{number_words(self.images_per_second)} views/s, {number_words(self.step_seconds)} s a step",
            "time": f"{duration_text(3600 * self.hours)}"
            + (f", {number_words(self.hours * self.processes)} device hours" if self.processes > 1 else ""),
            "reading": f"{number_words(self.reading.pictures_per_second)} pictures/s at "
            f"{self.reading.milliseconds:.2f} ms: {self.reading.cores:,} core{'s' * (self.reading.cores != 1)} "
            f"({self.reading.source})",
            "disk": f"{byte_words(self.disk_bytes)}, a checkpoint {byte_words(self.checkpoint_bytes)}",
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
        lines += ["", "What to change"] if self.advice else []
        bullets = textwrap.TextWrapper(100, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
        return "\n".join([*lines, *map(bullets.fill, self.advice)])


def number_words(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def byte_words(count: float) -> str:
    """MiB, from 1024 of them on GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
