"""Networks of other libraries in memory: timm's, transformers', and a pyramid for detection."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
