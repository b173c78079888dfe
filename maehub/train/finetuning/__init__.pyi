from .classifier import as_classifier as as_classifier
from .config import FinetuneConfig as FinetuneConfig
from .loop import FinetuneResult as FinetuneResult
from .loop import finetune as finetune
