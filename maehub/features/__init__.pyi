from .extraction import extract_features as extract_features
from .inference import outputs as outputs
from .table import FeatureTable as FeatureTable
from .table import Skipped as Skipped
from .table import check_bad_files as check_bad_files
from .table import write_bad_files as write_bad_files
