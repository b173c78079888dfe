"""Training a segmenter: its recipes, crops of pictures with their label maps, its start, and its job in the loop."""
