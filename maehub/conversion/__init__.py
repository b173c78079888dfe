"""Checkpoints of other libraries: identified, converted into each other, certified."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
