"""Load a model by name: from the catalog, the Hub, a folder or a file, to an encoder or an autoencoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from maehub.errors import UsageError, log
from maehub.files import atomic_write, cache_folder
from maehub.hub.cache import PathLike
from maehub.hub.catalog import Want
from maehub.hub.fetching import Located, locate
from maehub.hub.verification import known_finite, mark_finite
from maehub.images import Size
from maehub.models import Encoder, MaskedAutoencoder, Origin, ResizeRule, Target, usable_device
from maehub.weights import LoadOptions, open_autoencoder, open_encoder, read_pickle, to_official, write_tensors


def load(
    source: PathLike | Located,
    *,
    image_size: int | Size | None = None,
    channels: int | None = None,
    classes: int | None = None,
    heads: int | None = None,
    positions: ResizeRule = "bicubic",
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
    verify: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Encoder:
    """An encoder by name, in eval mode. Of an autoencoder its encoder.

        encoder = maehub.load("vit-b")
        features = encoder(encoder.preprocess(picture)[None])

    Args:
        source: a catalog name (`maehub.list_models`), a Hub id ``user/repo[@revision]``, a model or run folder, or a
            ``.safetensors`` file of any dialect. A pickle is refused; `maehub.convert` makes it safe.
        image_size: native size in pixels, an int or (height, width) divisible by the patch. Position tables are
            resized on their grid. Any other size still works in a forward; this one is stored.
        channels: image channels, where not those of the file: the stem is adapted.
        classes: a new head with this many outputs; 0 for none.
        heads: attention heads, for a file of an unpublished shape without a configuration.
        positions: how position tables are resized; "bicubic" keeps the rule that a model folder was saved with, which
            is bicubic in all published files.
        revision: branch, tag or commit on the Hub, instead of the catalog's.
        cache_dir: where downloads lie; None is the Hub's own cache.
        offline: use no network.
        verify: hash the file again even if it is unchanged since it was verified.
        device: where the weights go; "auto" is a GPU if there is one.
        dtype: of the weights; None is float32, whatever the file holds.

    Raises:
        UsageError: there is no such model, or an argument that cannot be.
        HubError: it cannot be downloaded.
        IntegrityError: the bytes are wrong, the file is broken or not safe, or holds other tensors than it should.
    """
    options = LoadOptions(image_size, channels, classes, positions, dtype, usable_device(device))
    located = locate(source, "encoder", revision=revision, cache_dir=cache_dir, offline=offline, verify=verify)
    with _resolved(located, "encoder", options, heads, cache_folder(cache_dir), verify) as opened:
        return open_encoder(**opened)


def load_autoencoder(
    source: PathLike | Located,
    *,
    image_size: int | Size | None = None,
    channels: int | None = None,
    classes: int | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    target: Target | None = None,
    positions: ResizeRule = "bicubic",
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
    verify: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> MaskedAutoencoder:
    """A full autoencoder by name, in eval mode.

        autoencoder = maehub.load_autoencoder("vit-l")
        maehub.reconstruct(autoencoder, "dog.jpg").save("dog_mae.png")

    Args:
        source: as in `load`. A short name such as ``vit-l`` means the model trained on plain pixels, which draws
            directly.
        decoder_heads: attention heads of the decoder, for a file without a configuration whose decoder is not 512 wide.
        target: what the decoder was trained to predict, where nothing says it: "pixels", "normalised_pixels", "pca" or
            "tokens".
        image_size, channels, heads, positions, revision, cache_dir, offline, verify, device, dtype: as in `load`; both
            position tables are resized, and the pixel head is adapted too.
        classes: must be None or 0, since an autoencoder has no head.

    Raises:
        UsageError, HubError, IntegrityError: as in `load`; IntegrityError also for a file without a decoder.
    """
    options = LoadOptions(image_size, channels, classes, positions, dtype, usable_device(device))
    located = locate(source, "autoencoder", revision=revision, cache_dir=cache_dir, offline=offline, verify=verify)
    info = located.info
    if target and info and info.target not in (None, target):
        raise UsageError(f"{located.name} was trained to predict {info.target}, not {target}; leave target= out")
    target = target or (info.target if info else None)
    with _resolved(located, "autoencoder", options, heads, cache_folder(cache_dir), verify) as opened:
        return open_autoencoder(**opened, decoder_heads=decoder_heads, target=target)


@contextmanager
def _resolved(
    located: Located, want: Want, options: LoadOptions, heads: int | None, cache: Path, verify: bool
) -> Iterator[dict[str, Any]]:
    """Arguments of `open_encoder` and `open_autoencoder`; official pickles of the catalog are converted once.

    After the first load of a download what its licence forbids is said, and that its weights are finite remembered.
    """
    info, fetched, path = located.info, located.fetched, located.path
    if fetched and fetched.source.format == "pickle":
        path = _converted(path, fetched.sha256, cache, verify)
    if info and info.note:
        log.info("%s: %s", info.name, info.note)
    if info and info.image_size != info.native_size and options.image_size is None:
        options = replace(options, image_size=info.image_size)
    if options.positions == "bicubic":
        options = replace(options, positions=None)
    opened = {"path": path, "heads": heads or (info.heads if info else None), "options": options}
    if not fetched:
        yield opened
        return
    options = replace(options, check_finite=not known_finite(path, cache, want))
    origin = Origin(located.name, fetched.revision, fetched.sha256, fetched.licence)
    yield opened | {"config": fetched.config, "options": options, "origin": origin}
    if want == "autoencoder" or options.classes is None:  # the file's own head was looked at too
        if "-nc" in fetched.licence.lower() and options.check_finite:
            log.warning("%s: licence %s, no commercial use", located.name, fetched.licence)
        mark_finite(path, cache, want)


def _converted(pickle: Path, sha256: str, cache: Path, afresh: bool) -> Path:
    """The safetensors of one of the catalog's official pickles, written once beside the other things of the cache."""
    path = cache / "converted" / f"{sha256}.safetensors"
    if afresh or not path.exists():
        log.info("converting %s to safetensors, once", pickle.name)
        state = to_official(read_pickle(pickle)[0]).state
        with atomic_write(path, parents=True) as temporary:
            temporary.unlink()  # it is written as a new file
            write_tensors(temporary, state, {"format": "pt", "source_sha256": sha256})
    return path
