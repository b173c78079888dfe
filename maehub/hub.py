"""Load a model by name: from the catalog, the Hub, a folder or a file, to an encoder or an autoencoder."""

import logging
from pathlib import Path

import torch

from maehub.autoencoder import MaskedAutoencoder, Target
from maehub.encoder import Encoder, Origin
from maehub.errors import UsageError
from maehub.fetching import PathLike
from maehub.locating import Located, locate
from maehub.patches import Size
from maehub.positions import ResizeRule
from maehub.weights import open_autoencoder, open_encoder
from maehub.building import Wanted

log = logging.getLogger("maehub")


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
    raise NotImplementedError
def load_autoencoder(source, **kw):
    found = locate(source, "autoencoder")
    return open_autoencoder(found.path)
