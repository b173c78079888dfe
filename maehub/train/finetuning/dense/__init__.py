"""Fine-tuning segmenters and detectors: recipes, views, networks with their losses, and what the loop runs."""
