"""What frozen features know: linear probes, neighbours, comparisons."""
