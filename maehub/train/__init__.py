"""Training: straight loops over plain torch, one screen each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maehub.train import recipes as recipes
    from maehub.train.comparing import Comparison as Comparison
    from maehub.train.comparing import compare as compare
    from maehub.train.config import PlanConfig as PlanConfig
    from maehub.train.config import PretrainConfig as PretrainConfig
    from maehub.train.evaluate_config import EvaluateConfig as EvaluateConfig
    from maehub.train.evaluating import Evaluation as Evaluation
    from maehub.train.evaluating import evaluate as evaluate
    from maehub.train.finetune_config import FinetuneConfig as FinetuneConfig
    from maehub.train.finetuning import FinetuneResult as FinetuneResult
    from maehub.train.finetuning import finetune as finetune
    from maehub.train.planning import plan as plan
    from maehub.train.predicting import Predictions as Predictions
    from maehub.train.predicting import predict as predict
    from maehub.train.pretraining import pretrain as pretrain
    from maehub.train.probe_config import CompareConfig as CompareConfig
    from maehub.train.probe_config import KnnConfig as KnnConfig
    from maehub.train.probe_config import ProbeConfig as ProbeConfig
    from maehub.train.probe_results import KnnResult as KnnResult
    from maehub.train.probe_results import ProbeResult as ProbeResult
    from maehub.train.probe_results import Sweep as Sweep
    from maehub.train.probing import knn as knn
    from maehub.train.probing import probe as probe
    from maehub.train.probing import probe_sweep as probe_sweep
    from maehub.train.scores import Scores as Scores

_HOMES = {
    "compare": "maehub.train.comparing",
    "CompareConfig": "maehub.train.probe_config",
    "Comparison": "maehub.train.comparing",
    "evaluate": "maehub.train.evaluating",
    "EvaluateConfig": "maehub.train.evaluate_config",
    "Evaluation": "maehub.train.evaluating",
    "finetune": "maehub.train.finetuning",
    "FinetuneConfig": "maehub.train.finetune_config",
    "FinetuneResult": "maehub.train.finetuning",
    "knn": "maehub.train.probing",
    "KnnConfig": "maehub.train.probe_config",
    "KnnResult": "maehub.train.probe_results",
    "plan": "maehub.train.planning",
    "PlanConfig": "maehub.train.config",
    "predict": "maehub.train.predicting",
    "Predictions": "maehub.train.predicting",
    "pretrain": "maehub.train.pretraining",
    "PretrainConfig": "maehub.train.config",
    "probe": "maehub.train.probing",
    "probe_sweep": "maehub.train.probing",
    "ProbeConfig": "maehub.train.probe_config",
    "ProbeResult": "maehub.train.probe_results",
    "Scores": "maehub.train.scores",
    "Sweep": "maehub.train.probe_results",
}

__all__ = [*_HOMES, "recipes"]


if not TYPE_CHECKING:  # or a type checker would take every misspelled name for one of these

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name == "recipes":
            return import_module("maehub.train.recipes")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)
