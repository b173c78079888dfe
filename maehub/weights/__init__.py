"""Tensors in files: every dialect of names, model folders, single files, model cards."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
