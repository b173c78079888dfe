"""The families of vision networks that a state dictionary can be told to be, by names and shapes alone.

Nothing of a tensor's values is read. The families are the rows of ``families.toml``.
"""

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Family(NamedTuple):
    """One family: what it is, its signs, and what to do with a file of it; see ``families.toml``."""

    name: str
    title: str
    advice: str
    signs: Sequence[str] = ()
    absent: Sequence[str] = ()
    stem: Sequence[int] = ()
    stem_rank: int = 0

    def fits(self, names: Collection[str], kernel: tuple[int, ...]) -> bool:
        """Whether tensors show every sign of it and none that it does not have; ``kernel`` is that of the patches."""

        def shown(sign: str) -> bool:
            return any(re.search(sign, name) for name in names)

        return (
            self.stem_rank in (0, len(kernel))
            and kernel[len(kernel) - len(self.stem) :] == tuple(self.stem)
            and all(map(shown, self.signs))
            and not any(map(shown, self.absent))
        )


_STEM = re.compile(r"(patch_embed\.(\d+\.)?proj|patch_embed\.projection|patch_embeddings?(\.proj(ection)?)?)\.weight$")


@lru_cache(maxsize=1)
def families() -> tuple[Family, ...]:
    """Every row, in the order of the table."""
    table = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
    return tuple(Family(**row) for row in table["families"])


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """The family that tensors are of, by names without wrappers such as ``module.``; None if no row fits."""
    tokens = (shape for name, shape in shapes.items() if re.search(r"(^|\.)cls_token$", name) and len(shape) == 3)
    count = next(tokens, (0, 0, 0))[1]
    if count > 1:
        return Family(
            "pixio",
            f"a ViT with {count} class tokens, as Pixio has several",
            "load it with transformers' PixioModel; the networks here have one class token",
        )
    kernels = (shape for name, shape in shapes.items() if _STEM.search(name) and len(shape) in (4, 5))
    kernel = next(kernels, ())
    return next((family for family in families() if family.fits(shapes.keys(), kernel)), None)


def generalised(name: str, most: int) -> str:
    """The start of a name with the numbers of its blocks as N: what a person needs to see of a stranger."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "N", name)[:most]
