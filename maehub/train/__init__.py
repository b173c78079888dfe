"""Training: straight loops over plain torch, one screen each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maehub.train import recipes as recipes
    from maehub.train.evaluation.config import EvaluateConfig as EvaluateConfig
    from maehub.train.evaluation.evaluating import Evaluation as Evaluation
    from maehub.train.evaluation.evaluating import evaluate as evaluate
    from maehub.train.evaluation.predicting import Predictions as Predictions
    from maehub.train.evaluation.predicting import predict as predict
    from maehub.train.evaluation.scores import Scores as Scores
    from maehub.train.finetuning.config import FinetuneConfig as FinetuneConfig
    from maehub.train.finetuning.loop import FinetuneResult as FinetuneResult
    from maehub.train.finetuning.loop import finetune as finetune
    from maehub.train.planning.planning import plan as plan
    from maehub.train.pretraining.config import PlanConfig as PlanConfig
    from maehub.train.pretraining.config import PretrainConfig as PretrainConfig
    from maehub.train.pretraining.loop import pretrain as pretrain
    from maehub.train.probing.comparing import Comparison as Comparison
    from maehub.train.probing.comparing import compare as compare
    from maehub.train.probing.config import CompareConfig as CompareConfig
    from maehub.train.probing.config import KnnConfig as KnnConfig
    from maehub.train.probing.config import ProbeConfig as ProbeConfig
    from maehub.train.probing.probing import knn as knn
    from maehub.train.probing.probing import probe as probe
    from maehub.train.probing.probing import probe_sweep as probe_sweep
    from maehub.train.probing.results import KnnResult as KnnResult
    from maehub.train.probing.results import ProbeResult as ProbeResult
    from maehub.train.probing.results import Sweep as Sweep

_HOMES = {
    "compare": "maehub.train.probing.comparing",
    "CompareConfig": "maehub.train.probing.config",
    "Comparison": "maehub.train.probing.comparing",
    "evaluate": "maehub.train.evaluation.evaluating",
    "EvaluateConfig": "maehub.train.evaluation.config",
    "Evaluation": "maehub.train.evaluation.evaluating",
    "finetune": "maehub.train.finetuning.loop",
    "FinetuneConfig": "maehub.train.finetuning.config",
    "FinetuneResult": "maehub.train.finetuning.loop",
    "knn": "maehub.train.probing.probing",
    "KnnConfig": "maehub.train.probing.config",
    "KnnResult": "maehub.train.probing.results",
    "plan": "maehub.train.planning.planning",
    "PlanConfig": "maehub.train.pretraining.config",
    "predict": "maehub.train.evaluation.predicting",
    "Predictions": "maehub.train.evaluation.predicting",
    "pretrain": "maehub.train.pretraining.loop",
    "PretrainConfig": "maehub.train.pretraining.config",
    "probe": "maehub.train.probing.probing",
    "probe_sweep": "maehub.train.probing.probing",
    "ProbeConfig": "maehub.train.probing.config",
    "ProbeResult": "maehub.train.probing.results",
    "Scores": "maehub.train.evaluation.scores",
    "Sweep": "maehub.train.probing.results",
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
