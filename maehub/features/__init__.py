"""Features of many pictures, in memory and in files that survive an interruption."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
