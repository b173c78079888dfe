from .certificate import LARGEST_DIFFERENCE as LARGEST_DIFFERENCE
from .certificate import difference as difference
from .certificate import fixed_images as fixed_images
from .certificate import largest as largest
from .conversion import convert as convert
from .identifying import identify as identify
