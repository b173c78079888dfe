"""Sizes of pictures and of their grids of patches, vertical first."""

from maehub.errors import UsageError

Size = tuple[int, int]
"""(rows, columns) or (height, width): always vertical first."""

LONGEST_SIDE, LARGEST_PATCH = 16_384, 1024
"""Pixels of what a network takes: a file that says more is damaged or hostile."""


def as_size(size: int | tuple[int, int] | list[int], name: str = "size") -> Size:
    """One number for a square, or (height, width), as a tuple of two positive ints."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise UsageError(f"{name} must be a positive int or (height, width), not {size!r:.60}")
    if max(pair) > LONGEST_SIDE:
        raise UsageError(f"{name} must be at most {LONGEST_SIDE:,} pixels, not {size!r:.60}")
    return pair[0], pair[1]


def grid_size(height: int, width: int, patch_size: int) -> Size:
    """Rows and columns of patches in an image."""
    if height % patch_size or width % patch_size or not height or not width:
        near = [max(patch_size, round(side / patch_size) * patch_size) for side in (height, width)]
        raise UsageError(
            f"an image of {height}×{width} pixels is not divisible by the patch of {patch_size}; "
            f"the nearest size that is: {near[0]}×{near[1]}"
        )
    return height // patch_size, width // patch_size
