"""Features of many pictures, in memory and in files."""
