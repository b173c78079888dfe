"""What a person looks at: reconstructions, error maps, attention, curves."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
