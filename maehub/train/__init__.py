"""Training: straight loops over plain torch, one screen each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maehub.train import recipes as recipes
    from maehub.train.config import PlanConfig as PlanConfig
    from maehub.train.config import PretrainConfig as PretrainConfig
    from maehub.train.planning import plan as plan
    from maehub.train.pretraining import pretrain as pretrain

_HOMES = {
    "PlanConfig": "maehub.train.config",
    "PretrainConfig": "maehub.train.config",
    "plan": "maehub.train.planning",
    "pretrain": "maehub.train.pretraining",
}

__all__ = ["PlanConfig", "PretrainConfig", "plan", "pretrain", "recipes"]


if not TYPE_CHECKING:  # or a type checker would take every misspelled name for one of these

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name == "recipes":
            return import_module("maehub.train.recipes")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
