"""Masked autoencoders: load every published one, take features, look at reconstructions, train, publish.

    import maehub

    encoder = maehub.load("vit-b")
    table = maehub.extract_features(encoder, "photos/")

    autoencoder = maehub.load_autoencoder("vit-l")
    maehub.reconstruct(autoencoder, "dog.jpg").save("dog_mae.png")

Names are imported when they are first used, so that ``import maehub`` is fast and imports no torch.
"""

from typing import TYPE_CHECKING, Any

from maehub.version import __version__ as __version__

if TYPE_CHECKING:
    from maehub import interop as interop
    from maehub import train as train
    from maehub.conversion.conversion import convert as convert
    from maehub.conversion.identifying import identify as identify
    from maehub.data.inspection import check_data as check_data
    from maehub.data.inspection import data_statistics as data_statistics
    from maehub.errors import MaehubError as MaehubError
    from maehub.features.extraction import extract_features as extract_features
    from maehub.features.table import FeatureTable as FeatureTable
    from maehub.figures.reconstruction import Panels as Panels
    from maehub.figures.reconstruction import reconstruct as reconstruct
    from maehub.hub.catalog import ModelInfo as ModelInfo
    from maehub.hub.catalog import list_models as list_models
    from maehub.hub.catalog import model_info as model_info
    from maehub.hub.fetching import download as download
    from maehub.hub.fetching import verify as verify
    from maehub.hub.loading import load as load
    from maehub.hub.loading import load_autoencoder as load_autoencoder
    from maehub.images.preprocess import Preprocess as Preprocess
    from maehub.models.autoencoder import AutoencoderConfig as AutoencoderConfig
    from maehub.models.autoencoder import MaskedAutoencoder as MaskedAutoencoder
    from maehub.models.encoder import Encoder as Encoder
    from maehub.models.encoder import EncoderConfig as EncoderConfig
    from maehub.publishing.pushing import push as push
    from maehub.weights.model_folder import save as save

_HOMES = {
    "AutoencoderConfig": "maehub.models.autoencoder",
    "Encoder": "maehub.models.encoder",
    "EncoderConfig": "maehub.models.encoder",
    "FeatureTable": "maehub.features.table",
    "MaehubError": "maehub.errors",
    "MaskedAutoencoder": "maehub.models.autoencoder",
    "ModelInfo": "maehub.hub.catalog",
    "Panels": "maehub.figures.reconstruction",
    "Preprocess": "maehub.images.preprocess",
    "check_data": "maehub.data.inspection",
    "convert": "maehub.conversion.conversion",
    "data_statistics": "maehub.data.inspection",
    "download": "maehub.hub.fetching",
    "extract_features": "maehub.features.extraction",
    "identify": "maehub.conversion.identifying",
    "list_models": "maehub.hub.catalog",
    "load": "maehub.hub.loading",
    "load_autoencoder": "maehub.hub.loading",
    "model_info": "maehub.hub.catalog",
    "push": "maehub.publishing.pushing",
    "reconstruct": "maehub.figures.reconstruction",
    "save": "maehub.weights.model_folder",
    "verify": "maehub.hub.fetching",
}

_PACKAGES = ("interop", "train")

__all__ = sorted(_HOMES, key=str.lower)


if not TYPE_CHECKING:  # or a type checker would take every misspelled name for one of these

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name in _PACKAGES:
            return import_module(f"maehub.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", *_PACKAGES]
