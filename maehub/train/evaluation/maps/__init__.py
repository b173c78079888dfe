"""How well a segmenter does: intersection over union of classes, pictures of truth and prediction, label maps."""
