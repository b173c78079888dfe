from .classifier import with_head as with_head
from .config import FinetuneConfig as FinetuneConfig
from .loop import FinetuneResult as FinetuneResult
from .loop import finetune as finetune
from .measuring import look_for_twins as look_for_twins
