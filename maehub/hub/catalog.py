"""The models that maehub knows by name.

``catalog.toml`` has one literal row per published file. A name says what the weights are: FAIR published, per size, an
encoder pre-trained on normalised pixels (``vit-b``, the paper's numbers), the same with its decoder
(``vit-b-normpix-full``), another autoencoder trained on plain pixels (``vit-b-pixel``) and a fine-tuned classifier
(``vit-b-in1k``). A short name resolves by what is asked: see `resolve`.
"""

import os
import shlex
import tomllib
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urljoin

from maehub.errors import UsageError

Role = Literal["encoder", "autoencoder", "classifier"]
"""What a file holds."""

Want = Literal["encoder", "autoencoder", "pretrain"]
"""What is asked of a name; ``pretrain`` is the autoencoder that pre-training goes on from."""

FAIR_BASE = "https://dl.fbaipublicfiles.com/"
"""Where the relative addresses of the table begin."""

LARGE = 448  # pixels; the size in names that end in -448


@dataclass(frozen=True)
class Source:
    """One place that has the file of a model.

    ``kind`` ``"hub"``: ``filename`` in ``repo`` at ``revision`` (a branch, a reference or a 40-digit commit; where
    ``commit`` is given, the commit must begin with it). ``"url"``: an address. ``"package"``: a file inside maehub.
    ``sha256`` and ``md5`` are hexadecimal and may be the first digits only, where the publisher names no more.
    """

    kind: Literal["hub", "url", "package"]
    filename: str
    format: Literal["safetensors", "pickle"]
    repo: str = ""
    revision: str = ""
    commit: str = ""
    dialect: str = ""
    sha256: str = ""
    md5: str = ""

    @property
    def url(self) -> str:
        """The address of a ``"url"`` source; empty for the others."""
        return urljoin(FAIR_BASE, self.filename) if self.kind == "url" else ""

    @property
    def pinned(self) -> bool:
        """Whether exactly one sequence of bytes is accepted, and a Hub source is asked for by commit."""
        return len(self.sha256) == 64 and (self.kind != "hub" or len(self.revision) == 40)

    def where(self) -> str:
        """One word for a person: repository and revision, address, or the package."""
        if self.kind == "hub":
            return self.repo if self.revision in ("", "main") else f"{self.repo}@{self.revision[:12]}"
        return self.url if self.kind == "url" else "inside maehub"


@dataclass(frozen=True)
class Number:
    """A published result in percent, and where it was published."""

    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class ModelInfo:
    """One row of the catalog.

    ``image_size`` and ``native_size`` are (height, width) in pixels: the size that the loaded model has, and the one
    that the file was made at; they differ in the ``-448`` rows. ``target`` is what the decoder predicts, or what the
    encoder was pre-trained on; None for classifiers, and where its publisher does not say it. ``parameters`` counts
    the values in the file, 0 if not known.
    """

    name: str
    title: str
    architecture: str
    role: Role
    target: Literal["pixels", "normalised_pixels"] | None
    image_size: tuple[int, int]
    native_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    classes: int
    pool: Literal["cls", "mean"]
    parameters: int
    licence: str
    licence_note: str
    sources: tuple[Source, ...]
    numbers: tuple[Number, ...]
    note: str
    unsupported: str  # why it cannot be loaded yet; empty if it can
    gated: bool = False  # whether its repository is given only to those who were let in

    @property
    def pinned(self) -> bool:
        """Whether every source is pinned, so that a name always means the same bytes."""
        return all(source.pinned for source in self.sources)

    @property
    def access(self) -> str:
        """How to get a file whose owner lets people in; empty for the others."""
        if not self.gated:
            return ""
        source = next(source for source in self.sources if source.kind == "hub")
        return (
            f"accept the terms at https://huggingface.co/{source.repo} and wait to be let in, then run `hf auth login` "
            f"and `hf download {source.repo} {source.filename} --local-dir .`"
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self) | {"pinned": self.pinned, "places": [source.where() for source in self.sources]}

    def describe(self) -> str:
        """All of it as text for a person."""
        size, native = ("×".join(map(str, pair)) for pair in (self.image_size, self.native_size))
        values = f"{self.parameters:,} values, {self.parameters * 4 / 1e6:,.0f} MB in float32"
        facts = [
            ("what", f"{self.title} ({self.role})"),
            ("target", (self.target or "").replace("_", " ")),
            ("network", f"{self.depth} blocks of width {self.width}, {self.heads} heads, patch {self.patch_size}"),
            ("size", f"{size}{'' if size == native else f' (weights {native})'} pixels"),
            ("weights", self.parameters and values),
            ("classes", self.classes),
            ("pooling", "class token" if self.pool == "cls" else "mean of the patch tokens"),
            ("licence", " — ".join(text for text in (self.licence, self.licence_note) if text)),
        ]
        for source in self.sources:
            state = "pinned" if source.pinned else "unpinned"
            detail = f"{source.where()} {source.filename}" if source.kind == "hub" else source.where()
            facts.append(("source", f"{detail} ({source.format}, {state})"))
        facts += [("result", f"{number.value:g} % {number.metric} ({number.source})") for number in self.numbers]
        facts += [("access", self.gated and f"gated: {self.access}"), ("note", self.note)]
        facts.append(("note", self.unsupported and f"cannot be loaded yet: {self.unsupported}"))
        return "\n".join([self.name, *(f"  {key:<9}{text}" for key, text in facts if text)])


def list_models(pattern: str = "*") -> list[str]:
    """Names of the catalog, in its order; ``*`` and ``?`` in the pattern are wildcards."""
    return [name for name in _models() if fnmatchcase(name, pattern)]


def is_model(name: str) -> bool:
    """Whether `model_info` knows a name; some are known and not listed."""
    return _find(name) is not None


def model_info(name: str) -> ModelInfo:
    """What is known about a model.

    Args:
        name: a name that `list_models` gives, an autoencoder's with ``-448`` at the end, or an encoder's with
            ``-encoder`` at the end, which is the encoder and nothing else.

    Raises:
        UsageError: no such name; the text has close ones.
    """
    if info := _find(name):
        return info
    raise no_model(name)


def no_model(name: str) -> UsageError:
    """The error that says so, with close names."""
    if os.path.exists(name):
        return UsageError(
            f"{name} is a file or folder, and no model is called so; "
            f"`maehub identify {shlex.quote(name)}` says what it is"
        )
    close = get_close_matches(name, _models(), n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    return UsageError(
        f"no model is called {name!r}{meant}\n"
        "`maehub list` shows the names; a Hub id looks like user/repo, a folder or file needs to exist"
    )


def published_as(sha256: str, md5: str) -> ModelInfo | None:
    """The row that a file of this content belongs to, where its publisher or the catalog states a hash."""
    for info in _models().values():
        for source in info.sources:
            if (source.sha256 and sha256.startswith(source.sha256)) or (source.md5 and md5.startswith(source.md5)):
                return info
    return None


def architecture_heads(width: int, depth: int, patch_size: int) -> int | None:
    """Attention heads of the architecture of the catalog with these numbers; None if there is none."""
    for row in _table()["architectures"].values():
        if (row["width"], row["depth"], row["patch_size"]) == (width, depth, patch_size):
            return int(row["heads"])
    return None


def resolve(name: str, want: Want) -> ModelInfo:
    """The row that a name means, given what is asked.

    ``vit-b``, ``vit-l``, ``vit-h`` and the same with ``-448``: asked for an encoder, the paper's encoder; for an
    autoencoder, the one on plain pixels, since it draws directly; for pre-training, the one on normalised pixels. Any
    other name is that row; an autoencoder or a classifier can be asked for its encoder.
    """
    short = _table()["short"]
    info = model_info(short[name][want] if name in short else name)
    check_supported(info)
    if want != "encoder" and info.role != "autoencoder":
        others = "no row of its architecture has one"
        if siblings := short.get(info.architecture):
            others = "{autoencoder} has one on plain pixels, {pretrain} one on normalised pixels".format(**siblings)
        kind = "a classifier" if info.role == "classifier" else "an encoder alone"
        raise UsageError(f"{name} is {kind}, without a decoder; {others}")
    return info


def check_supported(info: ModelInfo) -> None:
    """Raise a UsageError for a row that cannot be loaded; it says why, and how to get a gated file."""
    if info.unsupported:
        gated = f"\n{info.name} is gated: {info.access}" if info.gated else ""
        raise UsageError(f"{info.name} cannot be loaded: {info.unsupported}{gated}")


def _find(name: str) -> ModelInfo | None:
    models, row = _models(), name.removesuffix("-encoder")
    if row in models and (row == name or models[row].role == "encoder"):
        return models[row]
    base = models.get(name.removesuffix(f"-{LARGE}"))
    if base and base.role == "autoencoder" and base.architecture in _table()["short"]:
        return _at_large(base, {})
    return None


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _models() -> dict[str, ModelInfo]:
    """Every row, in the order of the table."""
    models: dict[str, ModelInfo] = {}
    for name, row in _table()["models"].items():
        base = row.get("resized_from")
        models[name] = _at_large(models[base], row) if base else _row(name, row)
    return models


def _row(name: str, row: dict[str, Any]) -> ModelInfo:
    network = _table()["architectures"][row["architecture"]]
    side = row.get("image_size", network["image_size"])
    unsaid: dict[str, Any] = dict.fromkeys(("licence_note", "note", "unsupported"), "")
    unsaid |= {"target": None, "classes": 0, "pool": "cls", "parameters": 0}
    own = {
        "name": name,
        "image_size": (side, side),
        "native_size": (side, side),
        "sources": tuple(Source(**source) for source in row["sources"]),
        "numbers": tuple(Number(**number) for number in row.get("numbers", ())),
    }
    return ModelInfo(**unsaid | network | row | own)


def _at_large(base: ModelInfo, row: dict[str, Any]) -> ModelInfo:
    """The same file with its positions resized to 448 pixels when it is loaded; no published number is claimed."""
    grid = LARGE // base.patch_size
    note = (
        f"Pre-trained at {base.native_size[0]} pixels, positions resized to the {grid}×{grid} grid when loaded; "
        "no 448 weights were published."
    )
    return replace(
        base,
        name=f"{base.name}-{LARGE}",
        title=row.get("title", f"{base.title} at {LARGE} pixels"),
        image_size=(LARGE, LARGE),
        numbers=(),
        note=row.get("note", note),
    )
