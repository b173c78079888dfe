"""The networks, their masks and their positions: plain torch that knows no files."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
