"""How well a detector does: average precision as COCO measures it, pictures of truth and detections, result files."""
