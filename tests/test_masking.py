import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from maehub.errors import DataError, UsageError
from maehub.figures.masks import mask_from_boxes, mask_from_image
from maehub.models.masking import covering_masks, kept_count, make_masks, split_index, visible_count
from maehub.rng import random_bits, random_uniform, sample_id, sample_seed

MASK64 = 2**64 - 1


def splitmix64(seed: int, index: int) -> int:
    """The published generator, on Python's unbounded ints."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return (z ^ (z >> 31)) & (2**63 - 1)


@given(st.integers(-(2**63), 2**63 - 1))
def test_random_bits_are_splitmix64(seed):
    bits = random_bits(torch.tensor([seed]), 5)[0].tolist()
    assert bits == [splitmix64(seed, index) for index in range(5)]


def test_splitmix64_known_value():
    # first output for seed 0 of the reference implementation: 0xE220A8397B1DCDAF
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF & (2**63 - 1)


def test_random_bits_look_uniform():
    bits = random_bits(torch.arange(1000), 64).double() / 2**63
    assert abs(bits.mean() - 0.5) < 0.005
    assert abs(bits.var() - 1 / 12) < 0.002
    between_seeds = np.corrcoef(bits[:-1].flatten(), bits[1:].flatten())[0, 1]
    assert abs(between_seeds) < 0.02


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**20), st.integers(0, 2**63 - 1), st.integers(0, 9)
)  # fmt: skip
def test_sample_seeds_depend_on_every_part(seed, epoch, sample, view):
    base = sample_seed(seed, epoch, sample, view)
    assert 0 <= base < 2**63
    others = [
        sample_seed(seed + 1, epoch, sample, view),
        sample_seed(seed, epoch + 1, sample, view),
        sample_seed(seed, epoch, sample + 1, view),
        sample_seed(seed, epoch, sample, view + 1),
    ]
    assert base not in others


def test_ids_and_uniform_numbers_are_the_same_for_ever():
    # golden values: a changed one would change every resumed run and every figure
    assert sample_id(b"photos/cat.jpg") == 6103056913726592533
    assert sample_seed(1, 2, 3, 4) == 7597657864365363701
    assert random_uniform(7, 3).tolist() == [0.7796594967825431, 0.033576589056312334, 0.8015213612137668]


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [(196, 0.75, 49), (196, 0.9, 19), (196, 0.8, 39), (196, 0.6, 78), (256, 0.75, 64), (256, 0.9, 25),
     (256, 0.8, 51), (256, 0.6, 102), (4, 0.99, 1), (10, 0.0, 10)],
)  # fmt: skip
def test_kept_count_rounds_as_published(patches, ratio, kept):
    assert kept_count(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(UsageError, match="mask_ratio"):
        kept_count(196, ratio)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["random", "block"]),
    st.integers(1, 15),
    st.integers(1, 15),
    st.floats(0, 0.99),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
)
def test_masks_hide_exactly_n_minus_k(strategy, rows, columns, ratio, seeds):
    masked = make_masks(strategy, torch.tensor(seeds), (rows, columns), ratio)
    patches = rows * columns
    assert masked.shape == (len(seeds), patches)
    assert masked.dtype == torch.bool
    assert (masked.sum(1) == patches - kept_count(patches, ratio)).all()
    again = make_masks(strategy, torch.tensor(seeds[-1:]), (rows, columns), ratio)
    assert torch.equal(masked[-1:], again), "a mask depends on its own seed alone"


def test_random_masks_hide_every_patch_equally_often():
    masked = make_masks("random", torch.arange(4000), (7, 7), 0.75)
    frequency = masked.float().mean(0)
    assert (frequency - frequency.mean()).abs().max() < 0.04  # five standard deviations


def test_block_masks_are_blocks():
    masks = make_masks("block", torch.arange(50), (14, 14), 0.5).reshape(-1, 14, 14)
    scattered = make_masks("random", torch.arange(50), (14, 14), 0.5).reshape(-1, 14, 14)
    edges = [(m[:, 1:] != m[:, :-1]).float().mean() + (m[:, :, 1:] != m[:, :, :-1]).float().mean() for m in (masks, scattered)]  # fmt: skip  # noqa: E501
    assert edges[0] < edges[1] / 3


def test_the_grid_keeps_one_of_each_two_by_two():
    masked = make_masks("grid", torch.arange(2), (4, 6)).reshape(2, 4, 6)
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            assert masked[0, row : row + 2, column : column + 2].sum() == 3
    assert torch.equal(masked[0], masked[1])
    with pytest.raises(UsageError, match=r"0\.75"):
        make_masks("grid", torch.arange(1), (4, 4), 0.5)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(UsageError, match="random, block, grid"):
        make_masks("stripes", torch.arange(1), (4, 4))


@settings(deadline=None)
@given(st.integers(2, 200), st.floats(0.02, 0.98), st.integers(0, 2**40))
def test_covering_masks_hide_every_patch(patches, ratio, seed):
    if kept_count(patches, ratio) == patches:
        return
    masked = covering_masks(seed, patches, ratio)
    assert (masked.sum(1) == patches - kept_count(patches, ratio)).all()
    times = masked.sum(0)
    assert times.min() >= 1


def test_four_masks_cover_at_three_quarters_three_times_each():
    masked = covering_masks(0, 196)
    assert masked.shape == (4, 196)
    assert (masked.sum(0) == 3).all()


def test_split_index_is_ascending_and_complete():
    masked = make_masks("random", torch.arange(3), (6, 6), 0.6)
    visible, hidden = split_index(masked, visible_count(masked))
    for row in range(3):
        assert visible[row].tolist() == torch.nonzero(~masked[row]).flatten().tolist()
        assert hidden[row].tolist() == torch.nonzero(masked[row]).flatten().tolist()


def test_ragged_and_full_masks_are_refused():
    ragged = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(DataError, match="between 1 and 2"):
        visible_count(ragged)
    with pytest.raises(DataError, match="hides every patch"):
        visible_count(torch.ones(2, 3, dtype=torch.bool))


def test_a_painted_mask_hides_where_it_is_white():
    painted = Image.new("L", (60, 40), 0)
    ImageDraw.Draw(painted).rectangle((30, 0, 59, 19), fill=255)
    expected = np.zeros((4, 6), dtype=bool)
    expected[:2, 3:] = True
    assert (mask_from_image(painted, (4, 6)) == expected).all()
    assert (mask_from_image(np.asarray(painted) > 0, (4, 6)) == expected).all()
    clear = Image.new("RGBA", (60, 40), (255, 255, 255, 0))
    assert not mask_from_image(clear, (4, 6)).any(), "transparent is not painted"


def test_boxes_hide_every_patch_that_they_touch():
    masked = mask_from_boxes([(10, 0, 21, 10)], (40, 60), (4, 6))
    assert np.argwhere(masked).tolist() == [[0, 1], [0, 2]]
    assert mask_from_boxes([(-50, -50, 500, 500)], (40, 60), (4, 6)).all()
    assert not mask_from_boxes([(-50, -50, -1, -1)], (40, 60), (4, 6)).any()
    for box in [(10, 10, 10, 20), (0, 0, float("nan"), 3), (1, 2, 3)]:
        with pytest.raises(UsageError, match="a box is"):
            mask_from_boxes([box], (40, 60), (4, 6))
