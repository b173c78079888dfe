"""The networks, their masks and their positions: plain torch that knows no files."""
