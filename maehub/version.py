"""The version, which model files and requests carry."""

__version__ = "0.2.0"
