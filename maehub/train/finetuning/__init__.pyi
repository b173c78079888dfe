from .classifier import with_head as with_head
from .config import FinetuneConfig as FinetuneConfig
from .head_start import parts_of as parts_of
from .loop import FinetuneResult as FinetuneResult
from .loop import finetune as finetune
from .measuring import look_for_twins as look_for_twins
