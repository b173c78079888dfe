"""Names of models, the Hub and its cache: from a name to a network."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
