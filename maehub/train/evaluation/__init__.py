"""How good a network is: scores, linear and nearest-neighbour classifiers, `evaluate`, `predict`."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
