"""Masked autoencoding of pictures without labels."""
