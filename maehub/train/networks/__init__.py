"""Architectures by name, frozen backbones of any library, and what a network costs."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
