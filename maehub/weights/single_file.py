"""A whole model in one safetensors file, its configuration in the header, as the embedded one is."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from maehub.errors import IntegrityError
from maehub.files import atomic_write
from maehub.models import MaskedAutoencoder
from maehub.weights.config_json import Block, our_block, read_block
from maehub.weights.keys import to_official
from maehub.weights.tensorfile import write_tensors

_KEY = "maehub_config"


def pack(model: MaskedAutoencoder, path: Path, dtype: torch.dtype) -> None:
    """Write a model with its configuration into one file; a file that is there is replaced."""
    block = our_block(model.config, model.preprocess, model.encoder.origin, dtype, {})
    state = to_official(model.state_dict()).state
    with atomic_write(path) as temporary:
        temporary.unlink()  # it is written as a new file
        write_tensors(temporary, state, {"format": "pt", _KEY: json.dumps(block, sort_keys=True)}, dtype)


def packed_block(metadata: Mapping[str, str], where: str) -> Block | None:
    """The configuration in a file's header; None where the file is no packed model.

    Args:
        metadata: of the header.
        where: the file, for messages.
    """
    if _KEY not in metadata:
        return None
    try:
        values = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: the configuration in its header is no JSON") from error
    return read_block(values, where)
