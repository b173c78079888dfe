"""Which architectures there are, and what they cost."""
