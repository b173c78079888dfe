"""Training: straight loops over plain torch, one screen each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maehub.train.config import PretrainConfig as PretrainConfig
    from maehub.train.pretraining import pretrain as pretrain

_HOMES = {"PretrainConfig": "maehub.train.config", "pretrain": "maehub.train.pretraining"}

__all__ = ["PretrainConfig", "pretrain"]


if not TYPE_CHECKING:  # or a type checker would take every misspelled name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
