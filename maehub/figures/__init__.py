"""Reconstructions, error maps and attention as pictures."""
