"""What a source names: a catalog name, a Hub id, a folder or a file, as files on this machine. Imports no torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from maehub.errors import IntegrityError, UsageError
from maehub.hub.cache import PathLike
from maehub.hub.catalog import ModelInfo, Want, is_model, no_model, resolve
from maehub.hub.downloading import Fetched
from maehub.hub.fetching import PICKLE_ENDINGS, fetch, fetch_repo

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Located:
    """Files of a model on this machine."""

    name: str
    path: Path  # a folder, or a file of weights
    info: ModelInfo | None = None  # the catalog's row
    fetched: Fetched | None = None  # where it was downloaded from


def locate(
    source: PathLike | Located,
    want: Want,
    *,
    revision: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
    verify: bool = False,
) -> Located:
    """Find a model, downloading and verifying it where it is not on this machine.

    Args:
        source: a catalog name, a Hub id ``user/repo[@revision]``, a model or run folder, or a ``.safetensors`` file;
            or what this function returned before. A `Path`, or a string such as ``./vit-b``, is never a name.
        want: what a short catalog name should mean.
        revision, cache_dir, offline, verify: see `maehub.hub.fetching.fetch`.
    """
    if isinstance(source, Located):
        return source
    name, path = os.fspath(source), Path(os.path.expanduser(source))
    if isinstance(source, str) and is_model(name):
        info = resolve(name, want)
        fetched = fetch(info, revision=revision, cache_dir=cache_dir, offline=offline, verify=verify)
        return Located(info.name, fetched.path, info, fetched)
    if path.suffix in PICKLE_ENDINGS and os.path.isfile(path):
        raise IntegrityError(
            f"{path} is a pickle, which can run code when it is opened, so it is not loaded. Nothing was read.\n"
            f"Convert it once, which does not run code: maehub convert {path} -o {path.with_suffix('')}"
        )
    if os.path.exists(path):  # unlike the method of a path, False for a name that is too long
        return Located(name, path)
    if isinstance(source, str) and _HUB_ID.fullmatch(name) and path.suffix not in (".safetensors", *PICKLE_ENDINGS):
        fetched = fetch_repo(name, want=want, revision=revision, cache_dir=cache_dir, offline=offline, verify=verify)
        return Located(name, fetched.path, fetched=fetched)
    if not isinstance(source, str) or path.suffix in (".safetensors", *PICKLE_ENDINGS) or "/" in name:
        raise UsageError(f"there is no file or folder {name}, and it is no Hub id, which looks like user/repo")
    raise no_model(name)
