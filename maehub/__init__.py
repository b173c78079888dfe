"""Masked autoencoders: load every published one, take features, look at reconstructions, train, publish.

    import maehub

    encoder = maehub.load("vit-b")
    table = maehub.extract_features(encoder, "photos/")

    autoencoder = maehub.load_autoencoder("vit-l")
    maehub.reconstruct(autoencoder, "dog.jpg").save("dog_mae.png")

The names are listed in ``__init__.pyi`` and imported when they are first used, so that ``import maehub`` is fast and
imports no torch. Every room below does the same: its ``__init__.pyi`` lists what others may use of it.
"""

from typing import Any

from maehub.version import __version__ as __version__

_ROOMS = ("interop", "train")


def __getattr__(name: str) -> Any:
    from lazy_loader import attach_stub  # not above: whoever only imports maehub does not wait for it

    attribute, _, names = attach_stub(__name__, __file__)
    if name == "__all__":
        return sorted({*names} - {"__version__", *_ROOMS}, key=str.lower)
    return attribute(name)


def __dir__() -> list[str]:
    return [*__getattr__("__all__"), "__version__", *_ROOMS]
