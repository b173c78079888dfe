import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from maehub.errors import UsageError
from maehub.models.positions import resize_table, sincos_table, with_cls_row


def test_golden_row():
    # D = 8, row 0, column 1: the column's sines and cosines come first, then the row's
    golden = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1]
    assert torch.allclose(sincos_table(8, (3, 3))[1], torch.tensor(golden), atol=1e-7)


def test_every_entry_against_the_formula():
    rows, columns, width = 3, 5, 16
    table = sincos_table(width, (rows, columns))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for half, position in ((0, column), (1, row)):
                for i in range(quarter):
                    angle = position / 10000 ** (i / quarter)
                    place = table[row * columns + column, half * 2 * quarter :]
                    assert abs(place[i] - math.sin(angle)) < 1e-6
                    assert abs(place[quarter + i] - math.cos(angle)) < 1e-6


def test_the_class_token_has_a_row_of_zeros():
    table = with_cls_row(sincos_table(8, (2, 3)))
    assert table.shape == (1, 7, 8)
    assert not table[0, 0].any()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["bicubic", "antialias", "sincos"]))
def test_resizing_to_the_same_grid_is_the_identity(rows, columns, rule):
    table = torch.randn(1, 1 + rows * columns, 8)
    assert resize_table(table, (rows, columns), (rows, columns), rule) is table


def _two_axis_table(rows, columns):
    """Channel 0 is the row, channel 1 the column: linear in one axis, constant along the other."""
    down = torch.linspace(-1, 1, rows)[:, None].expand(rows, columns)
    right = torch.linspace(-1, 1, columns)[None].expand(rows, columns)
    grid = torch.stack([down, right], dim=-1)
    return torch.cat([torch.zeros(1, 1, 2), grid.reshape(1, rows * columns, 2)], dim=1)


def _keeps_axes_apart(table):
    grid = table[0, 1:].reshape(10, 20, 2)
    rows_constant = (grid[:, :, 0] - grid[:, :1, 0]).abs().max() < 1e-5
    columns_constant = (grid[:, :, 1] - grid[:1, :, 1]).abs().max() < 1e-5
    return bool(rows_constant and columns_constant)


def test_a_10_by_20_grid_keeps_rows_and_columns_apart():
    table = _two_axis_table(14, 14)
    assert _keeps_axes_apart(resize_table(table, (14, 14), (10, 20)))
    flat = F.interpolate(table[:, 1:].transpose(1, 2), size=200, mode="linear").transpose(1, 2)
    assert not _keeps_axes_apart(torch.cat([table[:, :1], flat], dim=1)), "a 1-D interpolation must not pass"


def test_resizing_keeps_the_class_row_and_the_dtype():
    table = torch.randn(1, 17, 8, dtype=torch.bfloat16)
    resized = resize_table(table, (4, 4), (6, 2))
    assert resized.shape == (1, 13, 8)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized[:, 0], table[:, 0])


def test_the_rules_differ_only_where_the_grid_shrinks():
    table = torch.randn(1, 65, 8)
    grown = [resize_table(table, (8, 8), (16, 16), rule) for rule in ("bicubic", "antialias")]
    shrunk = [resize_table(table, (8, 8), (4, 4), rule) for rule in ("bicubic", "antialias")]
    # torch's two bicubic filters have different constants, so growing agrees only roughly on noise
    assert (shrunk[0] - shrunk[1]).abs().max() > (grown[0] - grown[1]).abs().max()
    assert torch.allclose(resize_table(table, (8, 8), (3, 5), "sincos")[0, 1:], sincos_table(8, (3, 5)))


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="divisible by 4"):
        sincos_table(10, (2, 2))
    with pytest.raises(UsageError, match="does not belong"):
        resize_table(torch.zeros(1, 10, 8), (4, 4), (2, 2))
    with pytest.raises(UsageError, match="is not one of"):
        resize_table(torch.zeros(1, 5, 8), (2, 2), (4, 4), "linear")
