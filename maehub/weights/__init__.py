"""Tensors to and from files, in every dialect and layout."""
