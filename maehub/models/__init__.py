"""The networks of the paper, their patches, masks and positions: plain torch that knows no files and no names."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
