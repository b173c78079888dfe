"""Every pixel: networks that put a decoder of maps on an encoder, how they see large pictures, and their folders."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
