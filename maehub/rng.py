"""Randomness by counting: numbers that follow from a seed alone, in any process, on any device and in any order."""

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from maehub.errors import UsageError

# splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit constants
_STEP, _MIX_A, _MIX_B = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def sample_id(name: bytes) -> int:
    """A stable 63-bit id of a sample, from its path or its shard and member."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1


def sample_seed(seed: int, epoch: int, sample: int, view: int = 0) -> int:
    """The seed of everything random about one view of one sample in one epoch: an int in [0, 2⁶³)."""
    key = struct.pack("<QQQQ", *(number % 2**64 for number in (seed, epoch, sample, view)))
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def one_seed(seed: int) -> Tensor:
    """A seed as `make_masks` takes them: (1,) int64."""
    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"a seed must be a number of 64 bits, from -2**63 to 2**63 - 1, not {seed}")
    return torch.tensor([seed], dtype=torch.int64)


def random_bits(seeds: Tensor, count: int) -> Tensor:
    """Counter-based random numbers: (B,) int64 seeds to (B, count) int64 in [0, 2⁶³), on the device of ``seeds``."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=seeds.device)
    bits = seeds[:, None] + counter * _STEP  # (B, count), wraps around
    bits = (bits ^ _shift(bits, 30)) * _MIX_A
    bits = (bits ^ _shift(bits, 27)) * _MIX_B
    return (bits ^ _shift(bits, 31)) & (2**63 - 1)


def _shift(bits: Tensor, places: int) -> Tensor:
    """Logical shift to the right: int64 has only the arithmetic one."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def random_uniform(seed: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1), a pure function of the seed: for crops, flips and rectangles."""
    bits = random_bits(torch.tensor([seed], dtype=torch.int64), count)[0].numpy()
    return (bits >> 10) * 2.0**-53


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python and numpy for a while: what timm's transforms draw from."""
    python, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
