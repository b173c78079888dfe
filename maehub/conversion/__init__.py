"""Checkpoints of other libraries: told apart, converted, certified."""
