"""Training: straight loops over plain torch, one screen each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maehub.train import recipes as recipes
    from maehub.train.comparing import Comparison as Comparison
    from maehub.train.comparing import compare as compare
    from maehub.train.evaluation.config import EvaluateConfig as EvaluateConfig
    from maehub.train.evaluation.evaluating import Evaluation as Evaluation
    from maehub.train.evaluation.evaluating import evaluate as evaluate
    from maehub.train.evaluation.predicting import Predictions as Predictions
    from maehub.train.evaluation.predicting import predict as predict
    from maehub.train.evaluation.scores import Scores as Scores
    from maehub.train.finetuning.config import FinetuneConfig as FinetuneConfig
    from maehub.train.finetuning.loop import FinetuneResult as FinetuneResult
    from maehub.train.finetuning.loop import finetune as finetune
    from maehub.train.planning import plan as plan
    from maehub.train.pretraining.config import PlanConfig as PlanConfig
    from maehub.train.pretraining.config import PretrainConfig as PretrainConfig
    from maehub.train.pretraining.loop import pretrain as pretrain
    from maehub.train.probe_config import CompareConfig as CompareConfig
    from maehub.train.probe_config import KnnConfig as KnnConfig
    from maehub.train.probe_config import ProbeConfig as ProbeConfig
    from maehub.train.probe_results import KnnResult as KnnResult
    from maehub.train.probe_results import ProbeResult as ProbeResult
    from maehub.train.probe_results import Sweep as Sweep
    from maehub.train.probing import knn as knn
    from maehub.train.probing import probe as probe
    from maehub.train.probing import probe_sweep as probe_sweep

_HOMES = {
    "compare": "maehub.train.comparing",
    "CompareConfig": "maehub.train.probe_config",
    "Comparison": "maehub.train.comparing",
    "evaluate": "maehub.train.evaluation.evaluating",
    "EvaluateConfig": "maehub.train.evaluation.config",
    "Evaluation": "maehub.train.evaluation.evaluating",
    "finetune": "maehub.train.finetuning.loop",
    "FinetuneConfig": "maehub.train.finetuning.config",
    "FinetuneResult": "maehub.train.finetuning.loop",
    "knn": "maehub.train.probing",
    "KnnConfig": "maehub.train.probe_config",
    "KnnResult": "maehub.train.probe_results",
    "plan": "maehub.train.planning",
    "PlanConfig": "maehub.train.pretraining.config",
    "predict": "maehub.train.evaluation.predicting",
    "Predictions": "maehub.train.evaluation.predicting",
    "pretrain": "maehub.train.pretraining.loop",
    "PretrainConfig": "maehub.train.pretraining.config",
    "probe": "maehub.train.probing",
    "probe_sweep": "maehub.train.probing",
    "ProbeConfig": "maehub.train.probe_config",
    "ProbeResult": "maehub.train.probe_results",
    "Scores": "maehub.train.evaluation.scores",
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
