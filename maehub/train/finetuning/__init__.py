"""Training a classifier from a pretrained encoder."""
