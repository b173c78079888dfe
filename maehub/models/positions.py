"""Two-dimensional position tables: the sine-cosine one that MAE starts from, and resizing a table on its grid."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from maehub.errors import UsageError
from maehub.images import Size

ResizeRule = Literal["bicubic", "antialias", "sincos"]
"""How a table meets a grid that it was not made for.

``bicubic`` is the published rule (bicubic, no antialiasing, ``align_corners=False``), ``antialias`` is timm's (the same
with antialiasing, which differs only when the grid shrinks), ``sincos`` computes a fresh sine-cosine table.
"""


def sincos_table(width: int, grid: Size) -> Tensor:
    """The sine-cosine table of a grid, as in the published weights.

    The first half of the channels encodes the column, the second half the row. Each half is all sines, then all
    cosines, of position · 10000^(−i / (D/4)), i = 0 … D/4 − 1. Computed in float64 (Vaswani et al. 2017, in 2-D).

    Args:
        width: D, divisible by 4.
        grid: (rows, columns).

    Returns:
        (rows · columns, D) float32 on the CPU, row by row.
    """
    if width % 4:
        raise UsageError(f"a sine-cosine table needs a width divisible by 4, not {width}")
    rows, columns = grid
    # On the CPU whatever the default device: some devices have no float64, and arange on the meta device makes torch
    # load a second's worth of modules.
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))

    def axis(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequencies  # (count, D/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (count, D/2)

    column_half = axis(columns)[None].expand(rows, columns, -1)  # (rows, columns, D/2)
    row_half = axis(rows)[:, None].expand(rows, columns, -1)
    return torch.cat([column_half, row_half], dim=-1).reshape(rows * columns, width).float()


def with_cls_row(table: Tensor) -> Tensor:
    """A table with the class token's row of zeros in front: (N, D) to (1, N + 1, D), on the default device."""
    whole = torch.cat([table.new_zeros(1, table.shape[1]), table])[None]  # (1, N + 1, D)
    return whole.to(torch.empty(0).device)  # moved last, see `sincos_table` on the meta device


def resize_table(table: Tensor, source: Size, target: Size, rule: ResizeRule = "bicubic") -> Tensor:
    """Resize a position table on its two-dimensional grid; the class token's row stays as it is.

    Args:
        table: (1, 1 + rows·columns, D) floating, class token first.
        source: (rows, columns) of the table.
        target: (rows, columns) of the result.
        rule: see `ResizeRule`.

    Returns:
        (1, 1 + target rows·columns, D), dtype and device of ``table``; the same tensor if the grids are equal.
    """
    if rule not in get_args(ResizeRule):
        raise UsageError(f"positions={rule!r} is not one of {', '.join(get_args(ResizeRule))}")
    if source == target:
        return table
    cls, patches = table[:, :1], table[:, 1:]  # (1, 1, D), (1, rows·columns, D)
    if patches.shape[1] != source[0] * source[1]:
        raise UsageError(f"a position table of {patches.shape[1]} rows does not belong to a grid of {source}")
    if rule == "sincos":
        resized = sincos_table(table.shape[2], target)[None].to(table)
    else:
        image = patches.float().reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        image = F.interpolate(image, size=target, mode="bicubic", align_corners=False, antialias=rule == "antialias")
        resized = image.permute(0, 2, 3, 1).reshape(1, target[0] * target[1], -1).to(table.dtype)
    return torch.cat([cls, resized], dim=1)
