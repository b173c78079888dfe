"""Whatever holds pictures: folders, lists, tar shards, tables; their labels and splits; processes that read them."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
