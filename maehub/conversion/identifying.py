"""What a stranger's checkpoint is, and what to do with it.

No code of a file is run. Of safetensors only the header and the position table are read, of anything the bytes once
for their hash; the decoder is run on two photos where that decides its target and the file is small, or if asked.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from maehub.conversion.advice import next_lines
from maehub.conversion.checkpoints import Checkpoint, open_checkpoint
from maehub.conversion.families import Family, generalised, recognise, without_numbers
from maehub.conversion.identification import DecoderShape, Identification, Network, Role, Tuning
from maehub.conversion.plain_vit import Plain, read_plain, share_of_known_names
from maehub.conversion.target_detection import Judgement, can_judge, judge
from maehub.errors import MaehubError
from maehub.hub import ModelInfo, file_hashes, published_as
from maehub.models import PRESETS, AutoencoderConfig, EncoderConfig, Target
from maehub.weights import build_autoencoder, strip_wrappers, to_official, with_target

log = logging.getLogger("maehub")

LARGEST_JUDGED = 500_000_000
"""Bytes of a file up to which its decoder is run unasked: ViT-B's autoencoder takes seconds and 450 MB."""

_MOST_LISTED = 5
_ENOUGH_KNOWN = 0.6  # share of known names from which tensors count as parts of a plain ViT


def identify(
    file: str | Path,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    decide_target: bool | None = None,
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
    plain, refused = read_plain(checkpoint, heads, decoder_heads)
    names = strip_wrappers(checkpoint.shapes)
    shapes = {names[name]: tuple(value.shape) for name, value in checkpoint.shapes.items()}
    family = None if plain and plain.whole else recognise(shapes)
    log.debug("hashing %s", checkpoint.file)
    hashes = file_hashes(checkpoint.file, "md5")
    info = published_as(hashes.sha256, hashes.other)
    found = _blank(checkpoint, names, hashes.sha256, info)
    if plain and not family and _is_plain(plain, checkpoint.shapes):
        return _plain(found, file, checkpoint, plain, refused, info, decide_target)
    if family:
        return replace(found, family=family.name, title=family.title, advice=(_foreign_advice(family),))
    title = "a Vision Transformer with parts that are not known here" if plain else "not known here"
    if plain and _lacks_class_token(plain):
        title = "a Vision Transformer without a class token, as I-JEPA's are"
    unknown = plain.unexpected + plain.misshaped if plain else ()
    return replace(
        found,
        title=title,
        dialect=plain.dialect if plain else None,
        seen=_each_once(unknown) if unknown else generalised(shapes),
        problems=(refused,) if refused and not plain else (),
        advice=("ask whoever made it which library loads it; the names above are what to search for",),
    )


def _is_plain(plain: Plain, tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a plain ViT, or part of them and nothing else."""
    if _lacks_class_token(plain):
        return False
    return plain.whole or (not plain.unexpected and share_of_known_names(tensors) >= _ENOUGH_KNOWN)


def _lacks_class_token(plain: Plain) -> bool:
    """Whether the token is all that is missing, so that it was never there."""
    return plain.missing == ("cls_token",) and not plain.unexpected


def _blank(checkpoint: Checkpoint, names: Mapping[str, str], sha256: str, info: ModelInfo | None) -> Identification:
    """What is known of any file."""
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in checkpoint.shapes.values())
    dtype = max(kinds, key=lambda kind: kinds[kind])
    first, bare = next(iter(names.items()))
    return Identification(
        file=str(checkpoint.file),
        format=checkpoint.format,
        bytes=checkpoint.file.stat().st_size,
        sha256=sha256,
        family="unknown",
        title="",
        loadable=False,
        role=None,
        dialect=None,
        entry=checkpoint.entry,
        prefix=first.removesuffix(bare),
        beside=checkpoint.beside,
        tensors=len(checkpoint.shapes),
        parameters=sum(value.numel() for value in checkpoint.shapes.values()),
        dtype=dtype + (f" and {', '.join(sorted(set(kinds) - {dtype}))}" if len(kinds) > 1 else ""),
        network=None,
        target=None,
        target_from="",
        judgement=None,
        published=info.name if info else "",
        licence=info.licence if info else "",
        seen=(),
        problems=(),
        advice=(),
    )


def _plain(
    found: Identification,
    file: str | Path,
    checkpoint: Checkpoint,
    plain: Plain,
    refused: str,
    info: ModelInfo | None,
    decide_target: bool | None,
) -> Identification:
    """A plain ViT or masked autoencoder, whole or not."""
    network, config = _network(plain), plain.config
    role: Role = "encoder"
    if isinstance(config, AutoencoderConfig):
        role = "autoencoder"
    elif network and network.classes:
        role = "classifier"
    problems = _problems(plain)
    target, target_from, judgement = _target(checkpoint, plain, network, bool(problems), decide_target)
    if judgement and target not in ("unknown", judgement.target):
        problems += (f"its configuration says {target}, but its predictions look like those of {judgement.target}",)
    advice = (
        next_lines(str(file), found.format, plain, network, role, target, info) if not problems else _mending(plain)
    )
    if refused and plain.whole:
        advice += (f"its config.json was not used: {refused}",)
    return replace(
        found,
        family="vit",
        title=_title(network, role, plain, info),
        loadable=plain.whole and not problems,
        role=role,
        dialect=plain.dialect,
        network=network,
        target=target,
        target_from=target_from,
        judgement=judgement,
        problems=problems,
        advice=advice,
    )


def _network(plain: Plain) -> Network | None:
    if plain.config is None:
        return None
    config = plain.config
    encoder = config.encoder if isinstance(config, AutoencoderConfig) else config
    decoder = None
    if isinstance(config, AutoencoderConfig):
        width = config.decoder_width if config.decoder_depth else encoder.width
        decoder = DecoderShape(width, config.decoder_depth, plain.decoder_heads)
    tuning: Tuning = "none"
    if plain.probe_head:
        tuning = "linear probe"
    elif encoder.classes:
        tuning = "head" if plain.sincos and encoder.pool == "cls" else "fine-tuned"
    return Network(
        name=_size_name(encoder),
        width=encoder.width,
        depth=encoder.depth,
        heads=plain.heads,
        patch_size=encoder.patch_size,
        channels=encoder.channels,
        image_size=encoder.size if plain.size_from else None,
        size_from=plain.size_from,
        positions="sine-cosine" if plain.sincos else "learned",
        pool=encoder.pool,
        classes=encoder.classes,
        tuning=tuning,
        decoder=decoder,
    )


def _size_name(encoder: EncoderConfig) -> str:
    same = [name for name, one in PRESETS.items() if (one.width, one.depth) == (encoder.width, encoder.depth)]
    if not same:
        return f"ViT of width {encoder.width}, depth {encoder.depth}, patch {encoder.patch_size}"
    size = same[0].removeprefix("vit-")
    return f"ViT-{size.upper() if len(size) == 1 else size.capitalize()}/{encoder.patch_size}"


def _title(network: Network | None, role: Role, plain: Plain, info: ModelInfo | None) -> str:
    name = network.name if network else "ViT"
    if info:
        return f"{info.title} ({role})"
    if not plain.whole:
        return f"part of the tensors of a plain {name} {'autoencoder' if role == 'autoencoder' else ''}".rstrip()
    if role == "autoencoder":
        return f"a masked autoencoder, {name}"
    if role == "classifier":
        return f"a classifier, plain {name}"
    if plain.sincos:
        return f"the encoder of a masked autoencoder, {name}; MoCo v3 has the same tensors and fixed positions"
    return f"a plain {name} with learned positions: tensors do not tell DINO's, a supervised or a tuned MAE's apart"


def _problems(plain: Plain) -> tuple[str, ...]:
    lists = (("missing", plain.missing), ("too many", plain.unexpected), ("of another shape", plain.misshaped))
    return tuple(f"{what}, {len(names)}: {_some(names)}" for what, names in lists if names)


def _mending(plain: Plain) -> tuple[str, ...]:
    if plain.missing and not plain.misshaped:
        return ("the file is incomplete; download or save it again. Nothing in maehub fills in what is missing",)
    return ("maehub does not load it as it is",)


def _target(
    checkpoint: Checkpoint, plain: Plain, network: Network | None, broken: bool, asked: bool | None
) -> tuple[Target | None, str, Judgement | None]:
    """What the decoder predicts, how that is known, and the figures if the decoder was run."""
    config = plain.config
    if not isinstance(config, AutoencoderConfig) or network is None or network.decoder is None:
        return None, "", None
    known: Target = config.target if plain.configured or config.target == "pca" else "unknown"
    how = "as its configuration says" if plain.configured else "by its components"
    if known != "unknown" and not asked:
        return known, how, None
    if not plain.configured and config.prediction_width != config.patch_values:
        if known == "unknown":
            return (
                known,
                f"it predicts {config.prediction_width} values a patch, not its {config.patch_values} of pixels",
                None,
            )
        return known, how, None
    if broken:
        return known, "the network is not whole", None
    if unsaid := _unsaid(network):
        return known, f"undecided: say {unsaid}, and its predictions are looked at", None
    if asked is False or (asked is None and checkpoint.file.stat().st_size > LARGEST_JUDGED):
        return known, "undecided: --decide runs the decoder on two photos", None
    judgement, why = _judge(checkpoint, plain, config, network)
    if known != "unknown":
        return known, how, judgement
    return (judgement.target, "by its predictions on two photos", judgement) if judgement else (known, why, None)


def _unsaid(network: Network) -> str:
    """What the caller must say before the decoder can be run; empty if nothing."""
    flags = ["--heads"] if network.heads is None else []
    if network.decoder and network.decoder.depth and network.decoder.heads is None:
        flags.append("--decoder-heads")
    return " and ".join(flags) if flags or network.image_size else "its image size in a config.json"


def _judge(
    checkpoint: Checkpoint, plain: Plain, config: AutoencoderConfig, network: Network
) -> tuple[Judgement | None, str]:
    """Run the decoder; None and why not where that cannot be."""
    encoder = replace(config.encoder, heads=network.heads or 1)
    heads = network.decoder.heads if network.decoder else None
    full = replace(config, encoder=encoder, decoder_heads=heads or config.decoder_heads)
    try:
        if config.target == "unknown":
            full = with_target(full, "pixels")
        state = to_official(checkpoint.values()).state
        autoencoder = build_autoencoder(state, full, plain.preprocess, where=str(checkpoint.file))
        if not can_judge(autoencoder):
            return None, f"photos have 1 or 3 channels, and it takes {config.encoder.channels}"
        return judge(autoencoder), ""
    except MaehubError as error:
        return None, str(error).split("\n")[0]


def _foreign_advice(family: Family) -> str:
    return f"it is not one of maehub's networks: {family.advice}"


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    """The first names, each once whatever the number of its block."""
    return tuple(dict.fromkeys(without_numbers(name)[:120] for name in names))[: 2 * _MOST_LISTED]


def _some(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(name[:120] for name in names[:_MOST_LISTED]) + rest
