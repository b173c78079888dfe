"""What a stranger's checkpoint is, and what to do with it.

No code of a file is run. Of safetensors only the header and the position table are read, of anything the bytes once
for their hash; the decoder is run on two photos where that decides its target and the file is small, or if asked.
"""

import json
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from maehub.conversion.checkpoints import Checkpoint, open_checkpoint
from maehub.conversion.families import generalised, recognise
from maehub.conversion.plain_vit import Network, PlainVit, read_plain
from maehub.conversion.target_detection import Judgement, can_detect, detect_target
from maehub.errors import EXIT_DONE, IntegrityError, MaehubError, first_names, log
from maehub.hub import ModelInfo, Role, file_hashes, published_as
from maehub.models import AutoencoderConfig, MaskedAutoencoder, Target
from maehub.weights import (
    DECODER_HEAD_WIDTH,
    HEAD_WIDTH,
    Hints,
    build,
    published_decoder_heads,
    published_heads,
    strip_wrappers,
    to_official,
    with_target,
)

LARGEST_RUN = 500_000_000
"""Bytes of a file up to which its decoder is run unasked: ViT-B's autoencoder takes seconds and 450 MB."""

_MOST_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Identification:
    """What `identify` found out about one file."""

    file: str
    format: Literal["safetensors", "pickle"]
    bytes: int
    sha256: str
    family: str = "unknown"
    """``"vit"`` for what maehub computes, a name of ``families.toml`` for others, ``"unknown"``."""
    title: str = ""
    loadable: bool = False
    """Whether maehub reads it, at once or after `maehub.convert`."""
    role: Role | None = None
    dialect: str | None = None
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
    network: Network | None = None
    target: Target | None = None
    """What the decoder was trained to predict; None without a decoder."""
    target_from: str = ""
    judgement: Judgement | None = None
    """The figures behind a target that was decided by predictions."""
    published: str
    """The catalog row whose file this is; empty if none."""
    licence: str
    seen: tuple[str, ...] = ()
    """Names and shapes, of what is not known."""
    problems: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Of the command: 0 if it is known and whole, else that of `IntegrityError`."""
        return EXIT_DONE if self.family != "unknown" and not self.problems else IntegrityError.exit_code

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """All of it as a short table for a person."""
        network = self.network.describe() if self.network else {}
        head = network.pop("head", "")
        kind = "safetensors" if self.format == "safetensors" else "PyTorch pickle, read without running code"
        around = {
            f"inside {self.entry!r}": self.entry,
            f"names begin with {self.prefix}": self.prefix,
            f"beside it {', '.join(self.beside[:6])}": self.beside,
        }
        around_it = [words for words, there in around.items() if there]
        rows = {
            "what": self.title,
            "format": ", ".join([kind, *around_it, f"{self.bytes / 1e6:,.1f} MB"]),
            "names": self.dialect or "of no dialect that maehub reads",
            **network,
            "target": f"{self.target.replace('_', ' ')} ({self.target_from})" if self.target else "",
            "head": head,
            "weights": f"{self.parameters:,} values in {self.tensors:,} tensors, {self.dtype}",
            "sha256": self.sha256,
            "published": f"{self.published}, licence {self.licence}" if self.published else "",
            "figures": self.judgement.describe() if self.judgement else "",
        }
        lists = {"seen": self.seen, "problem": self.problems, "next": self.advice}
        lines = [(key, text) for key, text in rows.items() if text]
        lines += [(key, text) for key, texts in lists.items() for text in texts]
        return "\n".join([self.file, *(f"  {key:<10}{text}" for key, text in lines)])


def identify(
    file: str | Path, *, heads: int | None = None, decoder_heads: int | None = None, decide_target: bool | None = None
) -> Identification:
    """Say what a checkpoint is: family, network, names, what was trained, and the line to type next.

        print(maehub.identify("checkpoint-799.pth").describe())

    Args:
        file: a safetensors file or PyTorch pickle (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), a model or run folder, or
            a folder with one checkpoint.
        heads: attention heads of the encoder, where you know them and tensors do not tell.
        decoder_heads: likewise of the decoder.
        decide_target: run the decoder on photos to decide what it was trained to predict. None does so where nothing
            says it and the file has at most 500 MB; True also where the file is larger or a configuration says it.

    Raises:
        UsageError: there is no such file, or a folder has none or several.
        IntegrityError: the file is damaged, hostile, or no weights at all; the text says what it is.
    """
    checkpoint = open_checkpoint(file)
    plain, refused = read_plain(checkpoint, Hints(heads, decoder_heads))
    names = strip_wrappers(checkpoint.shapes)
    shapes = {names[name]: tuple(value.shape) for name, value in checkpoint.shapes.items()}
    family = None if plain and plain.whole else recognise(shapes)
    log.debug("hashing %s", checkpoint.file)
    hashes = file_hashes(checkpoint.file, "md5")
    info = published_as(hashes.sha256, hashes.other)
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in checkpoint.shapes.values())
    dtype = max(dtypes, key=lambda kind: dtypes[kind])
    first, bare = next(iter(names.items()))
    known = Identification(
        file=str(checkpoint.file),
        format=checkpoint.format,
        bytes=checkpoint.file.stat().st_size,
        sha256=hashes.sha256,
        entry=checkpoint.entry,
        prefix=first.removesuffix(bare),
        beside=checkpoint.beside,
        tensors=len(checkpoint.shapes),
        parameters=sum(value.numel() for value in checkpoint.shapes.values()),
        dtype=dtype + (f" and {', '.join(sorted(set(dtypes) - {dtype}))}" if len(dtypes) > 1 else ""),
        published=info.name if info else "",
        licence=info.licence if info else "",
    )
    if plain and not family and not plain.lacks_class_token and not plain.misfit.unexpected:
        known = _as_plain(known, checkpoint, plain, info, decide_target)
        advice = known.advice or _next_lines(str(file), known, plain.configured)
        unused = (f"its config.json was not used: {refused}",) if refused and plain.whole else ()
        return replace(known, advice=(*advice, *unused))
    if family:
        advice = (f"it is not one of maehub's networks: {family.advice}",)
        return replace(known, family=family.name, title=family.title, advice=advice)
    title = "a Vision Transformer with parts that are not known here" if plain else "not known here"
    if plain and plain.lacks_class_token:
        title = "a Vision Transformer without a class token, as I-JEPA's are"
    seen = [generalised(name, 120) for name in plain.misfit.unexpected + plain.misfit.misshaped] if plain else []
    most = 10 if seen else 8
    seen = seen or [f"{generalised(n, 80)} {'×'.join(map(str, shape)) or 'number'}" for n, shape in shapes.items()]
    return replace(
        known,
        title=title,
        dialect=plain.dialect if plain else None,
        seen=tuple(dict.fromkeys(seen))[:most],
        problems=(refused,) if refused and not plain else (),
        advice=("ask whoever made it which library loads it; the names above are what to search for",),
    )


def _as_plain(
    known: Identification, checkpoint: Checkpoint, plain: PlainVit, info: ModelInfo | None, decide_target: bool | None
) -> Identification:
    """A plain ViT or masked autoencoder, whole or not."""
    lists = zip(("missing", "too many", "of another shape"), plain.misfit, strict=True)
    problems = tuple(
        f"{what}, {len(names)}: {first_names([name[:120] for name in names], _MOST_LISTED)}"
        for what, names in lists
        if names
    )
    target, target_from, judgement = _target(checkpoint, plain, bool(problems), decide_target)
    if judgement and target not in ("unknown", judgement.target):
        problems += (f"its configuration says {target}, but its predictions look like those of {judgement.target}",)
    advice = "maehub does not load it as it is"
    if plain.misfit.missing and not plain.misfit.misshaped:
        advice = "the file is incomplete; download or save it again. Nothing in maehub fills in what is missing"
    role = plain.network.role if plain.network else "encoder"
    return replace(
        known,
        family="vit",
        title=f"{info.title} ({role})" if info else _title(plain, role),
        loadable=plain.whole and not problems,
        role=role,
        dialect=plain.dialect,
        network=plain.network,
        target=target,
        target_from=target_from,
        judgement=judgement,
        problems=problems,
        advice=(advice,) if problems else (),
    )


def _title(plain: PlainVit, role: Role) -> str:
    name = plain.network.name if plain.network else "ViT"
    if not plain.whole:
        return f"part of the tensors of a plain {name} {'autoencoder' if role == 'autoencoder' else ''}".rstrip()
    if role == "autoencoder":
        return f"a masked autoencoder, {name}"
    if role == "classifier":
        return f"a classifier, plain {name}"
    if plain.network and plain.network.positions == "sine-cosine":
        return f"the encoder of a masked autoencoder, {name}; MoCo v3 has the same tensors and fixed positions"
    return f"a plain {name} with learned positions: tensors do not tell DINO's, a supervised or a tuned MAE's apart"


def _target(
    checkpoint: Checkpoint, plain: PlainVit, broken: bool, asked: bool | None
) -> tuple[Target | None, str, Judgement | None]:
    """What the decoder predicts, how that is known, and the figures if the decoder was run."""
    config, network = plain.config, plain.network
    if not isinstance(config, AutoencoderConfig) or network is None:
        return None, "", None
    known: Target = config.target if plain.configured or config.target == "pca" else "unknown"
    how = "as its configuration says" if plain.configured else "by its components"
    other_width = not plain.configured and config.prediction_width != config.patch_values
    if known != "unknown" and (other_width or not asked):
        return known, how, None
    unsaid = ["--heads"] if network.heads is None else []
    if network.decoder and network.decoder.depth and network.decoder.heads is None:
        unsaid.append("--decoder-heads")
    if not unsaid and not network.image_size:
        unsaid = ["its image size in a config.json"]
    judgement = None
    if other_width:
        why = f"it predicts {config.prediction_width} values a patch, not its {config.patch_values} of pixels"
    elif broken:
        why = "the network is not whole"
    elif unsaid:
        why = f"undecided: say {' and '.join(unsaid)}, and its predictions are looked at"
    elif asked is False or (asked is None and checkpoint.file.stat().st_size > LARGEST_RUN):
        why = "undecided: --decide runs the decoder on two photos"
    else:
        judgement, why = _detect(checkpoint, plain, config, network)
        if known != "unknown":
            return known, how, judgement
    return (judgement.target, "by its predictions on two photos", judgement) if judgement else (known, why, None)


def _detect(
    checkpoint: Checkpoint, plain: PlainVit, config: AutoencoderConfig, network: Network
) -> tuple[Judgement | None, str]:
    """Run the decoder; None and why not where that cannot be."""
    encoder = replace(config.encoder, heads=network.heads or 1)
    heads = network.decoder.heads if network.decoder else None
    full = replace(config, encoder=encoder, decoder_heads=heads or config.decoder_heads)
    try:
        if config.target == "unknown":
            full = with_target(full, "pixels")
        state = to_official(checkpoint.values()).state
        autoencoder = build(MaskedAutoencoder, state, full, plain.preprocess, where=str(checkpoint.file))
        if not can_detect(autoencoder):
            return None, f"photos have 1 or 3 channels, and it takes {config.encoder.channels}"
        return detect_target(autoencoder), ""
    except MaehubError as error:
        return None, str(error).split("\n")[0]


def _next_lines(file: str, known: Identification, configured: bool) -> tuple[str, ...]:
    """What to type to load or convert it, with every argument that neither shapes nor a configuration tell."""
    network = known.network
    if network is None:
        return ()
    decoder = network.decoder
    arguments: dict[str, int | str] = {}
    if not configured and published_heads(network.width, network.depth, network.patch_size) is None:
        arguments["heads"] = network.heads or max(1, network.width // HEAD_WIDTH)
    if not configured and decoder and decoder.depth and published_decoder_heads(decoder.width) is None:
        arguments["decoder_heads"] = decoder.heads or max(1, decoder.width // DECODER_HEAD_WIDTH)
    if not configured and known.target in ("pixels", "normalised_pixels"):
        arguments["target"] = known.target
    heads = {"heads": network.heads, "decoder_heads": decoder.heads if decoder else None}
    guessed = [name for name in heads if name in arguments and not heads[name]]
    lines: list[str] = []
    if known.published:
        lines.append(f"maehub.load{'_autoencoder' if decoder else ''}({known.published!r})")
    size = network.image_size
    if not configured and (size is None or size[0] != size[1]):  # no argument says a size that is no square
        settings: dict[str, Any] = {"img_size": size or ["HEIGHT", "WIDTH"]}
        if "heads" in arguments:
            settings["num_heads"] = arguments.pop("heads")
        words = json.dumps({"architecture": "vit_base_patch16_224", "model_args": settings})
        words = words.replace('"HEIGHT", "WIDTH"', "HEIGHT, WIDTH")
        name = " as model.safetensors" if known.format == "safetensors" else ""
        lines.append(f"put it into a FOLDER of its own{name}, with a config.json that says its size: {words}")
        file = "FOLDER"
    if known.format == "pickle":
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in arguments.items()]
        folder = shlex.quote(Path(file).stem or "converted") if file != "FOLDER" else "OUT"
        lines.append(" ".join(["maehub convert", shlex.quote(file), "-o", folder, *flags]))
    else:
        keywords = {name: f", {name}={value!r}" for name, value in arguments.items()}
        if decoder:
            lines.append(f"maehub.load_autoencoder({file!r}{''.join(keywords.values())})")
        if not decoder or file != "FOLDER":  # beside a configuration the decoder's heads are needed too
            lines.append(f"maehub.load({file!r}{keywords.get('heads', '')})")
    if guessed:
        lines.append(f"{' and '.join(guessed)} in it is a guess: who made the file knows")
    return tuple(lines)
