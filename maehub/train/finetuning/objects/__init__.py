"""Fine-tuning detectors: recipes, views, and what the loop runs."""
