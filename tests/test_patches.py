import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maehub.errors import UsageError
from maehub.images.sizes import as_size, grid_size
from maehub.models.patches import denormalise_patches, normalise_patches, patchify, unpatchify


def test_values_of_a_patch_run_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # patch 4 is row 1, column 1 of a 2×3 grid
    expected = [images[1, c, 2 + row, 2 + column] for row in range(2) for column in range(2) for c in range(3)]
    assert patches[1, 4].tolist() == [int(value) for value in expected]


@settings(deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 3, 7])
)  # fmt: skip
def test_unpatchify_undoes_patchify(batch, channels, rows, columns, patch):
    images = torch.rand(batch, channels, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, rows * columns, patch * patch * channels)
    assert torch.equal(unpatchify(patches, (rows, columns), patch), images)


def test_normalised_patches_have_unbiased_variance_one_and_come_back():
    patches = torch.rand(2, 5, 48, dtype=torch.float64) * 3 + 1
    normalised = normalise_patches(patches, eps=0.0)
    assert torch.allclose(normalised.patches.mean(-1), torch.zeros(2, 5, dtype=torch.float64))
    assert torch.allclose(normalised.patches.var(-1, unbiased=True), torch.ones(2, 5, dtype=torch.float64))
    assert torch.allclose(denormalise_patches(*normalised, eps=0.0), patches)


def test_a_flat_patch_normalises_to_zero():
    assert normalise_patches(torch.full((1, 1, 12), 0.3)).patches.abs().max() < 1e-4


def test_a_size_that_is_not_divisible_names_the_nearest_that_is():
    with pytest.raises(UsageError, match="224×240"):
        grid_size(225, 236, 16)


@pytest.mark.parametrize("size", [0, -1, (3,), (1, 2, 3), (2.5, 3), "12", True])
def test_a_bad_size_is_refused(size):
    with pytest.raises(UsageError):
        as_size(size)


def test_unpatchify_refuses_a_grid_of_another_number():
    with pytest.raises(UsageError, match="do not fill"):
        unpatchify(torch.zeros(1, 6, 12), (2, 2), 2)
