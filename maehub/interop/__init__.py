"""Networks of other libraries, in memory: timm's and transformers' from ours and back, and a pyramid for detection."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maehub.interop.pyramid import LEVELS as LEVELS
    from maehub.interop.pyramid import TORCHVISION_LEVELS as TORCHVISION_LEVELS
    from maehub.interop.pyramid import FeaturePyramid as FeaturePyramid
    from maehub.interop.timm_models import from_timm as from_timm
    from maehub.interop.timm_models import to_timm as to_timm
    from maehub.interop.transformers_models import from_transformers as from_transformers
    from maehub.interop.transformers_models import to_transformers as to_transformers

_HOMES = {
    "FeaturePyramid": "maehub.interop.pyramid",
    "from_timm": "maehub.interop.timm_models",
    "from_transformers": "maehub.interop.transformers_models",
    "LEVELS": "maehub.interop.pyramid",
    "to_timm": "maehub.interop.timm_models",
    "to_transformers": "maehub.interop.transformers_models",
    "TORCHVISION_LEVELS": "maehub.interop.pyramid",
}

__all__ = sorted(_HOMES, key=str.lower)


if not TYPE_CHECKING:  # or a type checker would take every misspelled name for one of these

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
