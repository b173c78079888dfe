"""What ``maehub reconstruct`` does: pictures and ratios to figures, each checked before a model is loaded."""

import itertools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maehub import hub
from maehub.cli.commands import Shared, report, wanted_size
from maehub.errors import UsageError
from maehub.files import write_error

if TYPE_CHECKING:
    from maehub.cli.arguments import Reconstruct

_PHOTO = Path(__file__).parents[1] / "assets" / "cat.jpg"


def run_reconstruct(config: "Reconstruct", shared: Shared) -> int:
    if config.mask_image and config.error_map:
        raise UsageError("--error-map hides every patch in turn, so it takes no --mask-image")
    if not config.mask_ratio:
        raise UsageError("--mask-ratio takes at least one number, such as 0.75")
    size = wanted_size(config.image_size)
    sources = config.images or (str(_PHOTO),)
    images = list(dict.fromkeys(image for source in sources for image in _pictures(source)))
    one_each = config.out.is_dir() or not config.out.suffix
    outs = _figure_paths(images, config.out) if one_each else [config.out]
    if taken := [out for out in outs if out.exists() and not config.overwrite]:
        raise UsageError(f"{taken[0]} exists; choose another --out, or replace it with --overwrite")
    found = hub.locate(config.model, "autoencoder")
    if one_each:
        if config.out.exists() and not config.out.is_dir():
            raise UsageError(f"{config.out} is a file; name a folder, or a figure by its ending such as .png")
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(config.out, error) from error

    from maehub.figures import check_figure, error_map, grid, open_mask, reconstruct, save_figure
    from maehub.hub import load_autoencoder

    check_figure(outs[0])
    model = load_autoencoder(found, image_size=size, device=config.device)
    mask = open_mask(config.mask_image) if config.mask_image else None

    def drawn(image: str, ratio: float) -> Any:
        if config.error_map:
            return error_map(model, image, mask_ratio=ratio, seed=config.seed)
        return reconstruct(
            model,
            image,
            mask=mask,
            strategy=config.strategy,
            mask_ratio=ratio,
            seed=config.seed,
            statistics=config.statistics,
        )

    numbers = []
    for out, share in zip(outs, [[image] for image in images] if one_each else [images], strict=True):
        rows = [drawn(image, ratio) for image in share for ratio in config.mask_ratio]
        save_figure(rows[0].figure() if len(rows) == 1 else grid(rows), out)
        names = [image for image in share for _ in config.mask_ratio]
        numbers += [{"image": image, **_numbers(row)} for image, row in zip(names, rows, strict=True)]
    return report(shared, {"figures": [str(out) for out in outs], "images": numbers}, "\n".join(map(str, outs)))


def _pictures(source: str) -> list[str]:
    """The pictures that one argument names: an address, a file, or all of a folder."""
    if source.startswith(("http://", "https://")) or os.path.isfile(source):
        return [source]
    from maehub.data import find_images

    return [os.fsdecode(path) for path in find_images(source).paths()]


def _figure_paths(images: list[str], folder: Path) -> list[Path]:
    """A figure in a folder for each picture; pictures of one name are numbered."""
    names: dict[str, None] = {}
    for stem in (Path(image).stem for image in images):
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        names[next(name for name in itertools.chain([stem], numbered) if name not in names)] = None
    return [folder / f"{name}_mae.png" for name in names]


def _numbers(figure: Any) -> dict[str, Any]:
    """What was measured for one figure; JSON has no infinity, which is the PSNR of a perfect one."""
    names = ("mask_ratio", "seed", "mse", "psnr", "score")
    values = {name: getattr(figure, name) for name in names if hasattr(figure, name)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
