"""Folders, shards and tables of pictures, with and without labels."""
