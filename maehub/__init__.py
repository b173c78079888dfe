"""Masked autoencoders: load every published one, take features, look at reconstructions, train, publish.

    import maehub

    encoder = maehub.load("vit-b")
    table = maehub.extract_features(encoder, "photos/")

    autoencoder = maehub.load_autoencoder("vit-l")
    maehub.reconstruct(autoencoder, "dog.jpg").save("dog_mae.png")

The names are listed in ``__init__.pyi`` and imported when they are first used, so that ``import maehub`` is fast and
imports no torch. Every room below does the same: its ``__init__.pyi`` lists what others may use of it.
"""

import sys
from typing import Any

from maehub.version import __version__ as __version__

_ROOMS = ("interop", "train")
_MOVED = {  # imports that the documentation of 0.1 showed; they go in 0.3
    "maehub.drawing": "maehub.figures",
    "maehub.packing": "maehub.weights",
    "maehub.train.augment": "maehub.images",
    "maehub.train.baselines": "maehub.train.pretraining.baselines",
}


def __getattr__(name: str) -> Any:
    from lazy_loader import attach_stub  # not above: whoever only imports maehub does not wait for it

    attribute, _, names = attach_stub(__name__, __file__)
    if name == "__all__":
        return sorted({*names} - {"__version__", *_ROOMS}, key=str.lower)
    return attribute(name)


class _Moved(type(sys)):
    """A module under its name of 0.1."""

    def __getattr__(self, name: str) -> Any:
        from importlib import import_module
        from warnings import warn

        if name.startswith("__"):
            raise AttributeError(name)
        now = _MOVED[self.__name__]
        value = getattr(import_module(now), name)
        if not str(getattr(value, "__module__", "")).startswith(now):  # torch.compile asks every module for any name
            raise AttributeError(name)
        warn(f"{self.__name__} is {now} since 0.2; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
        return value


sys.modules.update({name: _Moved(name) for name in _MOVED if name not in sys.modules})


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__", *_ROOMS]
