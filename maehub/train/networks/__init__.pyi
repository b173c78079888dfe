from . import costs as costs
from .backbones import Backbone as Backbone
from .backbones import backbone_of as backbone_of
from .backbones import open_backbone as open_backbone
from .presets import pair as pair
from .presets import preset as preset
