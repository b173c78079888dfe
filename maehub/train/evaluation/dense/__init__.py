"""How well segmenters and detectors do: scores, pictures of truth and prediction, and what is predicted as files."""
