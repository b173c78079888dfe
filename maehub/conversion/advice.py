"""The lines to type next, for a plain Vision Transformer or masked autoencoder that was identified."""

import json
import shlex
from pathlib import Path

from maehub.conversion.identification import Network, Role
from maehub.conversion.plain_vit import Plain
from maehub.hub import ModelInfo
from maehub.models import PRESETS, Target


def next_lines(
    file: str,
    form: str,
    plain: Plain,
    network: Network | None,
    role: Role,
    target: Target | None,
    info: ModelInfo | None,
) -> tuple[str, ...]:
    """What to type to load or convert it, with every argument that neither shapes nor a configuration tell.

    Args:
        file: the path as it was given.
        form: ``"safetensors"`` or ``"pickle"``.
        plain, network: what was found.
        role: what the file holds.
        target: of its decoder, as far as it is known.
        info: the catalog row whose file it is, None if none.
    """
    if network is None:
        return ()
    first = (f"maehub.load{'_autoencoder' if role == 'autoencoder' else ''}({info.name!r})",) if info else ()
    said = _said(plain, network, role, target)
    lines: list[str] = []
    if not plain.configured and not _is_square(network):
        lines.append(_configuration(form, network, said))
        file = "FOLDER"
    known = {"heads": network.heads, "decoder_heads": network.decoder.heads if network.decoder else None}
    guessed = [name for name in known if name in said and not known[name]]
    if file == "FOLDER":
        said.pop("heads", None)
    if form == "pickle":
        words = [f"--{name.replace('_', '-')} {value}" for name, value in said.items()]
        folder = shlex.quote(Path(file).stem or "converted") if file != "FOLDER" else "OUT"
        lines.append(" ".join(["maehub convert", shlex.quote(file), "-o", folder, *words]))
    else:
        encoder_said = {name: value for name, value in said.items() if name == "heads"}
        if role == "autoencoder":
            lines.append(f"maehub.load_autoencoder({file!r}{_arguments(said)})")
        if role != "autoencoder" or file != "FOLDER":  # beside a configuration the decoder's heads are needed too
            lines.append(f"maehub.load({file!r}{_arguments(encoder_said)})")
    if guessed:
        lines.append(f"{' and '.join(guessed)} in it is a guess: who made the file knows")
    return (*first, *lines)


def _said(plain: Plain, network: Network, role: Role, target: Target | None) -> dict[str, int | str]:
    """What must be said to load it, since neither shapes nor a configuration tell it."""
    if plain.configured:
        return {}
    said: dict[str, int | str] = {}
    key = (network.width, network.depth, network.patch_size)
    if key not in {(one.width, one.depth, one.patch_size) for one in PRESETS.values()}:
        said["heads"] = network.heads or max(1, network.width // 64)  # 64 a head is what nearly all have
    decoder = network.decoder
    if role == "autoencoder" and decoder and decoder.depth and decoder.width != 512:
        said["decoder_heads"] = decoder.heads or max(1, decoder.width // 32)
    if target in ("pixels", "normalised_pixels"):
        said["target"] = target
    return said


def _is_square(network: Network) -> bool:
    """Whether a loader that is told no size takes the right one."""
    return network.image_size is not None and network.image_size[0] == network.image_size[1]


def _configuration(form: str, network: Network, said: dict[str, int | str]) -> str:
    """The config.json that says a size which is no square: no argument does."""
    size = list(network.image_size) if network.image_size else ["HEIGHT", "WIDTH"]
    arguments = {"img_size": size} | ({"num_heads": said["heads"]} if "heads" in said else {})
    words = json.dumps({"architecture": "vit_base_patch16_224", "model_args": arguments}).replace(
        '"HEIGHT", "WIDTH"', "HEIGHT, WIDTH"
    )
    name = " as model.safetensors" if form == "safetensors" else ""
    return f"put it into a FOLDER of its own{name}, with a config.json that says its size: {words}"


def _arguments(said: dict[str, int | str]) -> str:
    return "".join(f", {name}={value!r}" for name, value in said.items())
