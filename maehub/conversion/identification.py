"""What a checkpoint turned out to be, as values and as text."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from maehub.conversion.target_detection import Judgement
from maehub.errors import EXIT_DONE, IntegrityError
from maehub.models import Target

Role = Literal["encoder", "autoencoder", "classifier"]

Tuning = Literal["none", "head", "linear probe", "fine-tuned"]
"""What was trained after pre-training: ``head`` is a head that may be a probe's or tuned with part of the network."""


@dataclass(frozen=True)
class DecoderShape:
    """The decoder of an autoencoder; ``heads`` is None where nothing tells it."""

    width: int
    depth: int
    heads: int | None


@dataclass(frozen=True)
class Network:
    """A plain Vision Transformer. None is what nothing tells."""

    name: str  # "ViT-B/16", or width, depth and patch
    width: int
    depth: int
    heads: int | None
    patch_size: int
    channels: int
    image_size: tuple[int, int] | None  # (height, width), pixels
    size_from: Literal["configuration", "positions", "square", ""]  # "square" is assumed: learned positions do not tell
    positions: Literal["sine-cosine", "learned"]
    pool: Literal["cls", "mean"]
    classes: int
    tuning: Tuning
    decoder: DecoderShape | None


@dataclass(frozen=True)
class Identification:
    """What `identify` found out about one file."""

    file: str
    format: Literal["safetensors", "pickle"]
    bytes: int
    sha256: str
    family: str
    """``"vit"`` for what maehub computes, a name of `maehub.conversion.families` for others, ``"unknown"``."""
    title: str
    loadable: bool
    """Whether maehub reads it, at once or after `maehub.convert`."""
    role: Role | None
    dialect: str | None
    """How the tensors are named; None where no dialect fits."""
    entry: str
    """The dictionary entry of a pickle that holds the tensors; empty if none."""
    prefix: str
    """What stands before every name, such as ``module.``."""
    beside: tuple[str, ...]
    """What else a pickle holds: ``optimizer``, ``args`` …"""
    tensors: int
    parameters: int
    """Values in the tensors."""
    dtype: str
    network: Network | None
    target: Target | None
    """What the decoder was trained to predict; None without a decoder."""
    target_from: str
    judgement: Judgement | None
    """The figures behind a target that was decided by predictions."""
    published: str
    """The catalog row whose file this is; empty if none."""
    licence: str
    seen: tuple[str, ...]
    """Names and shapes, of what is not known."""
    problems: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """Of the command: 0 if it is known and whole, else that of `IntegrityError`."""
        return EXIT_DONE if self.family != "unknown" and not self.problems else IntegrityError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """All of it as a short table for a person."""
        network, decoder = self.network, self.network.decoder if self.network else None
        rows = {
            "what": self.title,
            "format": f"{self._format_words()}, {self.bytes / 1e6:,.1f} MB",
            "names": self.dialect or "of no dialect that maehub reads",
            "network": _network_words(network) if network else "",
            "size": _size_words(network) if network else "",
            "decoder": f"{decoder.depth} blocks of width {decoder.width}, {_heads_words(decoder.heads)}"
            if decoder
            else "",
            "target": f"{self.target.replace('_', ' ')} ({self.target_from})" if self.target else "",
            "head": _head_words(network) if network else "",
            "weights": f"{self.parameters:,} values in {self.tensors:,} tensors, {self.dtype}",
            "sha256": self.sha256,
            "published": f"{self.published}, licence {self.licence}" if self.published else "",
        }
        lines = [self.file, *(f"  {key:<10}{text}" for key, text in rows.items() if text)]
        lines += [f"  {'figures':<10}{self.judgement.describe()}"] if self.judgement else []
        lines += [f"  {'seen':<10}{name}" for name in self.seen]
        lines += [f"  {'problem':<10}{problem}" for problem in self.problems]
        lines += [f"  {'next':<10}{line}" for line in self.advice]
        return "\n".join(lines)

    def _format_words(self) -> str:
        if self.format == "safetensors":
            return "safetensors" + (f", names begin with {self.prefix}" if self.prefix else "")
        parts = [f"inside {self.entry!r}"] if self.entry else []
        parts += [f"names begin with {self.prefix}"] if self.prefix else []
        parts += [f"beside it {', '.join(self.beside[:6])}"] if self.beside else []
        return "PyTorch pickle, read without running code" + "".join(f", {part}" for part in parts)


def _network_words(network: Network) -> str:
    size = f"{network.depth} blocks of width {network.width}, {_heads_words(network.heads)}"
    return f"{size}, patch {network.patch_size}, {network.positions} positions"


def _heads_words(heads: int | None) -> str:
    return f"{heads} heads" if heads else "a number of heads that tensors do not tell"


def _size_words(network: Network) -> str:
    channels = f"{network.channels} channel{'s' if network.channels > 1 else ''}"
    if network.image_size is None:
        return f"not told by a position table that is no square; {channels}"
    how = {
        "configuration": "as its configuration says",
        "positions": "by the values of its position table",
        "square": "if its pictures are square, which learned positions do not tell",
        "": "",
    }[network.size_from]
    return f"{network.image_size[0]}×{network.image_size[1]} pixels ({how}), {channels}"


def _head_words(network: Network) -> str:
    if network.tuning == "none":
        return "" if network.pool == "cls" else "none; tokens are averaged, then fc_norm: it was or is to be fine-tuned"
    kind = {
        "fine-tuned": "fine-tuned",
        "linear probe": "a linear probe: BatchNorm and a linear layer, which together are one",
        "head": "a linear probe, or fine-tuned in part: its positions are those of pre-training",
        "none": "",
    }[network.tuning]
    pool = "mean of the patch tokens" if network.pool == "mean" else "class token"
    return f"{network.classes} classes from the {pool} ({kind})"
