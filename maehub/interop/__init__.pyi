from .pyramid import LEVELS as LEVELS
from .pyramid import TORCHVISION_LEVELS as TORCHVISION_LEVELS
from .pyramid import FeaturePyramid as FeaturePyramid
from .pyramid import level_strides as level_strides
from .timm_models import from_timm as from_timm
from .timm_models import to_timm as to_timm
from .transformers_models import from_transformers as from_transformers
from .transformers_models import to_transformers as to_transformers
