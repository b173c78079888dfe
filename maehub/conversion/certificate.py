"""What a conversion proves of itself: the certificate that `maehub.convert` writes beside the weights.

It holds nothing that changes from run to run or from machine to machine but the last digits of the differences: no
times, no paths.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maehub.weights import OfficialNames, is_decoder, parts

CERTIFICATE = "certificate.json"

FORMAT = 1
"""Version of the certificate."""

LARGEST_DIFFERENCE = 1e-5
"""Largest difference, relative to the largest output, between two networks that are said to be the same."""

_FORMULA = "value i of the whole batch, counted along image, channel, row and column, is 2·sin(0.618033988749895·i)"


class Difference(NamedTuple):
    """How far an output of the written network is from the original's."""

    absolute: float  # largest
    relative: float  # the same, by the largest output


@dataclass(frozen=True)
class Certificate:
    """The numbers, names and hashes of one conversion."""

    source: str  # how the input names its tensors
    to: str
    compared: str  # what with what, in words
    inputs: tuple[tuple[int, ...], ...]  # shapes (B, C, H, W) of the fixed images
    bound: float
    differences: Mapping[str, Difference]  # by output
    names: Mapping[str, Mapping[str, list[str]]]  # by file: a tensor of the input, and what became of it
    left_out: Mapping[str, str]  # tensors and entries of the input that were not written, and why
    added: Mapping[str, str]  # tensors that were written and are not in the input, and why
    read: Mapping[str, str]  # sha256 of the files that were read
    written: Mapping[str, str]  # sha256 of the files that were written
    versions: Mapping[str, str]

    @property
    def difference(self) -> Difference:
        """The largest of all outputs."""
        return largest(self.differences.values())

    @property
    def holds(self) -> bool:
        """Whether the written network computes the same. NaN does not."""
        return all(one.relative <= self.bound for one in self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """As it is written, for JSON."""
        outputs = {name: one._asdict() for name, one in self.differences.items()}
        return {
            "format": FORMAT,
            "versions": dict(self.versions),
            "from": self.source,
            "to": self.to,
            "compared": self.compared,
            "fixed_input": {"values": _FORMULA, "dtype": "float32", "shapes": [list(shape) for shape in self.inputs]},
            "bound": {"relative": self.bound},
            "difference": self.difference._asdict() | {"outputs": outputs},
            "names": {file: dict(table) for file, table in self.names.items()},
            "left_out": dict(self.left_out),
            "added": dict(self.added),
            "sha256": {"read": dict(self.read), "written": dict(self.written)},
        }


def fixed_images(shape: tuple[int, ...]) -> Tensor:
    """Images that are the same everywhere and no two values of which repeat: float32 of ``shape`` (B, C, H, W)."""
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (2 * (values * 0.618033988749895).sin()).float().reshape(shape)


def difference(ours: Tensor, theirs: Tensor) -> Difference:
    """How far ``ours`` is from ``theirs``, of the same shape, at most, and the same by the largest of ``theirs``.

    The one comparison of networks: of what is converted, of other libraries' networks, of what is published.
    """
    absolute, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if absolute == 0:
        return Difference(0.0, 0.0)
    return Difference(absolute, absolute / scale if scale else math.inf)


def largest(differences: Iterable[Difference]) -> Difference:
    """The largest of several comparisons; NaN is larger than every number."""
    absolute, relative = zip(*differences, strict=True)
    return Difference(*(max(values, key=lambda v: math.inf if math.isnan(v) else v) for values in (absolute, relative)))


def names_table(read: OfficialNames, written: OfficialNames) -> dict[str, list[str]]:
    """What became of each tensor of the input: its name in the input, and the names that hold it now.

    A part of a fused tensor is told from the others, so that a key does not lead to where a query is.
    """
    holders: dict[str, list[str]] = {}
    for name, official in sorted(written.names.items()):
        for part in parts(official):
            holders.setdefault(part, []).append(name)
    table = {}
    for name, official in sorted(read.names.items()):
        holding = dict.fromkeys(holder for part in parts(official) for holder in holders.get(part, []))
        if holding:
            table[name] = list(holding)
    return table


def left_out(read: OfficialNames, kept: Iterable[str], beside: Iterable[str], to: str) -> dict[str, str]:
    """What of the input was not written in the form ``to``, and why.

    ``kept`` are those of its tensors that are in a written file, ``beside`` the entries of a pickle beside tensors.
    """
    reasons = dict.fromkeys(beside, "an entry beside the tensors") | dict(read.dropped)
    for name in read.names.keys() - set(kept):
        reason = "what follows the last block, which ViTDet does not have"
        if is_decoder(read.names[name]):
            reason = f"the decoder, which {to} has no place for"
        elif read.names[name] == "cls_token":
            reason = "the class token, which ViTDet does not use"
        reasons[name] = reason
    return dict(sorted(reasons.items()))
