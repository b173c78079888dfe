"""Frozen networks under one face, so that one protocol can measure all: ours, timm's, untrained ones, no network."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maehub.errors import HubError, IntegrityError, UsageError
from maehub.hub import load
from maehub.images import Preprocess, Size, as_size, grid_size
from maehub.models import PRESETS, Encoder, usable_device
from maehub.train.networks.presets import preset
from maehub.weights import crop_fraction, read_pickle, read_tensors

_LARGEST_PATCH = 16
_PIXELS_SIDE, _COLOURS_SIDE, _BINS = 32, 96, 8


@dataclass(frozen=True)
class Backbone:
    """A network in eval mode, and the features that it offers.

    ``parts`` are the features that one pass gives, each (B, D): ``"cls"`` and ``"mean"`` (of the patch tokens alone)
    of a token network that was trained on its class token, ``"mean"`` of one that was trained on the mean, ``"own"``
    (what it pools for its own classifier) of every other. Tokens go through the final norm at every layer.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    width: int
    """D of one part."""
    depth: int
    """Blocks whose outputs can be taken."""
    parts: tuple[str, ...]
    compute: Callable[[Tensor, Sequence[int]], Tensor]
    """(B, C, H, W) float32 and layers to (B, layers, parts, D)."""

    @property
    def pools(self) -> tuple[str, ...]:
        """What `features` takes."""
        return (*self.parts, "cls+mean") if self.parts == ("cls", "mean") else self.parts

    def features(self, images: Tensor, pool: str | None = None, layer: int = -1) -> Tensor:
        """Features of one layer: (B, C, H, W) float32, preprocessed, to (B, D), or (B, 2·D) of ``"cls+mean"``.

        ``pool`` is one of ``pools``, None the first; layer 0 is the first block, −1 the last.
        """
        return self.pooled(self.compute(images, self.layers([layer])), pool or self.pools[0])[:, 0]

    def pooled(self, parts: Tensor, pool: str) -> Tensor:
        """One pool of what ``compute`` gave: (…, parts, D) to (…, D) or (…, 2·D)."""
        if pool not in self.pools:
            raise UsageError(f"{self.name} offers the pools {', '.join(self.pools)}, and {pool!r} was asked for")
        return parts.flatten(-2) if pool == "cls+mean" else parts[..., self.parts.index(pool), :]

    def layers(self, layers: Sequence[int]) -> list[int]:
        """Layers counted from 0."""
        if wrong := [layer for layer in layers if not -self.depth <= layer < self.depth]:
            raise UsageError(
                f"{self.name} has layers from {-self.depth} to {self.depth - 1}, and {wrong[0]} was asked for"
            )
        return [layer % self.depth for layer in layers]


def open_backbone(
    name: str, *, image_size: int | Size | None = None, device: str | torch.device = "cpu", seed: int = 0
) -> Backbone:
    """A frozen network by name.

    Args:
        name: what `maehub.load` takes; ``timm/NAME``, any network of timm with its published weights, or
            ``timm/NAME@FILE`` with those of a file; ``untrained/NAME`` with fresh weights, NAME being a preset such as
            vit-nano or timm/NAME; ``baseline/pixels``, 32×32 pixels as they are, and ``baseline/colours``, a histogram
            of 8 bins a channel. A folder called ``timm`` is ``./timm``.
        image_size: side or (height, width) in pixels; None is the model's own.
        device: "auto" is a GPU if there is one.
        seed: of fresh weights.
    """
    device = usable_device(device)
    kind, _, rest = name.partition("/")
    if kind == "baseline":
        flat: Callable[[Tensor], Tensor] = partial(torch.flatten, start_dim=1)
        kinds = {"baseline/pixels": (_PIXELS_SIDE, flat), "baseline/colours": (_COLOURS_SIDE, _colours)}
        if name not in kinds:
            raise UsageError(f"there is no {name}; there are {' and '.join(kinds)}")
        side, compute = kinds[name]
        size = as_size(side if image_size is None else image_size, "image_size")
        plain = Preprocess(size, _patch(size), crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
        width = _BINS**3 if compute is _colours else 3 * math.prod(size)
        return Backbone(
            name, nn.Identity(), plain, width, 1, ("own",), lambda images, _: compute(images)[:, None, None]
        )
    if kind == "timm":
        return _timm(name, rest, image_size, device)
    if kind == "untrained":
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            if rest.startswith("timm/"):
                return _timm(name, rest.removeprefix("timm/"), image_size, device, untrained=True)
            if rest not in PRESETS:
                raise UsageError(f"{name}: after untrained/ stands one of {', '.join(PRESETS)}, or timm/NAME")
            sides = as_size(image_size, "image_size") if image_size is not None else ()
            return backbone_of(name, Encoder(*preset(rest, sides)).to(device))  # what pretraining starts with
    return backbone_of(name, load(name, image_size=image_size, classes=0, device=device))


def backbone_of(name: str, encoder: Encoder) -> Backbone:
    """An encoder of ours as a backbone; it is put into eval mode and frozen."""
    encoder.eval().requires_grad_(False)
    config = encoder.config
    parts = ("mean",) if config.pool == "mean" else ("cls", "mean")

    def compute(images: Tensor, layers: Sequence[int]) -> Tensor:
        pooled = encoder.features(images, pool="mean" if len(parts) == 1 else "cls+mean", layers=layers)
        return pooled.unflatten(2, (len(parts), config.width))

    return Backbone(name, encoder, encoder.preprocess, config.width, config.depth, parts, compute)


def _timm(
    name: str, words: str, image_size: int | Size | None, device: torch.device, *, untrained: bool = False
) -> Backbone:
    timm = importlib.import_module("timm")
    architecture, _, file = words.partition("@")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(pretrained=not untrained), n=3)
        known = f"near: {', '.join(near)}" if near else "`timm.list_models()` has them all"
        raise UsageError(f"timm has no network {architecture!r}; {known}")
    try:
        published = importlib.import_module("timm.models").get_pretrained_cfg(architecture, allow_unregistered=False)
    except RuntimeError as error:
        known = ", ".join(timm.list_models(f"{architecture.partition('.')[0]}.*", pretrained=True))
        raise UsageError(
            f"timm has no weights called {architecture}; it has {known or 'none of that network'}"
        ) from error
    sizes = {"img_size": as_size(image_size, "image_size")} if image_size and published.fixed_input_size else {}
    if file:
        network = _with_file(architecture, Path(file), sizes)
    elif untrained:
        network = timm.create_model(architecture, num_classes=0, **sizes)
    else:
        if not published.has_weights:
            raise UsageError(f"timm has no weights of {architecture!r}; untrained/{name} has fresh ones")
        try:
            network = timm.create_model(architecture, pretrained=True, num_classes=0, **sizes)
        except Exception as error:  # of the Hub's client, its transport, or the disk: they share no base
            raise HubError(
                f"the weights of timm/{architecture} cannot be fetched: {_first_line(error)} "
                f"Fetch them where there is a network, or name a file of them: timm/{architecture}@FILE"
            ) from error
    network = network.to(device).eval().requires_grad_(False)
    preprocess = _timm_preprocess(name, network, image_size)
    shape = (1, preprocess.channels, *preprocess.size)
    ramp = torch.linspace(-1, 1, math.prod(shape), device=device).reshape(shape)  # something to look at
    try:
        with torch.inference_mode():
            own = network(ramp)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = "×".join(map(str, preprocess.size))
        raise UsageError(f"{name} cannot compute pictures of {size} pixels: {_first_line(error)}") from error
    if parts := _timm_parts(network):
        tokens = _timm_tokens(network, parts)
        with torch.inference_mode():
            last = tokens(ramp, [-1])[:, 0, 0 if network.global_pool == "token" else -1]
        # Not every network of timm pools as its settings say.
        if last.shape == own.shape and torch.allclose(last, own, rtol=1e-3, atol=1e-4):
            return Backbone(name, network, preprocess, network.num_features, len(network.blocks), parts, tokens)

    def pooled(images: Tensor, _: Sequence[int]) -> Tensor:
        return network(images)[:, None, None]

    return Backbone(name, network, preprocess, own.shape[1], 1, ("own",), pooled)


def _with_file(architecture: str, file: Path, sizes: dict[str, Size]) -> Any:
    """A network with the tensors of a file: all of them and no others, with or without the classifier's.

    Tensors of other names are taken in their order if not one name is the network's and all shapes agree.
    """
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    timm = importlib.import_module("timm")
    state = read_tensors(file).tensors if file.suffix == ".safetensors" else read_pickle(file)[0]
    for options in ({}, {"num_classes": 0}):
        network = timm.create_model(architecture, **options, **sizes)
        expected = network.state_dict()
        if state.keys() == expected.keys():
            renamed = dict(state)
        elif not state.keys() & expected.keys() and len(state) == len(expected):
            renamed = dict(zip(expected, state.values(), strict=True))
        else:
            continue
        if all(renamed[key].shape == value.shape for key, value in expected.items()):
            network.load_state_dict(renamed)
            network.reset_classifier(0)
            return network
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    raise IntegrityError(
        f"{file} does not hold the tensors of timm's {architecture}: of {len(expected)} it lacks {len(missing)} "
        f"({', '.join(missing[:3])} …) and has {len(unknown)} others ({', '.join(unknown[:3])} …), or the shapes "
        "differ. Nothing was loaded; name the architecture that the file was saved from"
    )


def _timm_preprocess(name: str, network: Any, image_size: int | Size | None) -> Preprocess:
    """The transform that timm evaluates a network with, at its own or another size."""
    data = importlib.import_module("timm.data").resolve_data_config({}, model=network, verbose=False)
    size = as_size(data["input_size"][1:] if image_size is None else image_size, "image_size")
    mode, share = data["crop_mode"], data["crop_pct"]
    if data["interpolation"] not in ("bicubic", "bilinear") or not (
        mode == "center" or (mode == "squash" and share == 1)
    ):
        raise UsageError(f"{name}: timm's transform {data} is not one that maehub has; no other would be right")
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch is not None:
        patch = as_size(patch)[0]
        grid_size(size[0], size[1], patch)  # timm would leave out what does not fill a patch
    return Preprocess(
        size,
        patch_size=patch or _patch(size),
        resize="centre-crop" if mode == "center" else "squash",
        crop_fraction=crop_fraction(share, min(size)),
        interpolation=data["interpolation"],
        mean=data["mean"],
        std=data["std"],
    )


def _timm_parts(network: Any) -> tuple[str, ...]:
    """The parts of a network that tells class token and patches apart; none of any other."""
    taker = getattr(network, "forward_intermediates", None)
    if taker is None or "return_prefix_tokens" not in inspect.signature(taker).parameters:
        return ()
    if getattr(network, "global_pool", None) not in ("token", "avg") or not hasattr(network, "fc_norm"):
        return ()
    # Where the mean is normalised in place of the tokens, nothing was trained on the class token.
    normed = not isinstance(getattr(network, "norm", None), nn.Identity)
    return ("cls", "mean") if network.num_prefix_tokens and normed else ("mean",)


def _timm_tokens(network: Any, parts: tuple[str, ...]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Parts of the tokens of any layers; the norm after pooling too, where a network has that one."""
    depth = len(network.blocks)

    def compute(images: Tensor, layers: Sequence[int]) -> Tensor:
        numbers = sorted({layer % depth for layer in layers})
        intermediates = network.forward_intermediates(
            images, numbers, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        outputs = {}
        for number, tokens in zip(numbers, intermediates, strict=True):
            patches, prefix = tokens if isinstance(tokens, tuple) else (tokens, None)
            pooled = {"mean": patches.mean(dim=1), "cls": None if prefix is None else prefix[:, 0]}
            outputs[number] = torch.stack([network.fc_norm(pooled[part]) for part in parts], dim=1)  # (B, parts, D)
        return torch.stack([outputs[layer % depth] for layer in layers], dim=1)

    return compute


def _colours(images: Tensor) -> Tensor:
    """Share of the picture in each of 8 × 8 × 8 colours: (B, 3, H, W) in [0, 1] to (B, 512)."""
    red, green, blue = (images * _BINS).long().clamp(0, _BINS - 1).unbind(1)
    bins = ((red * _BINS + green) * _BINS + blue).flatten(1)  # (B, H·W)
    counts = torch.zeros(len(bins), _BINS**3, device=bins.device)
    return counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=counts.dtype)) / bins.shape[1]


def _patch(size: Size) -> int:
    """As what pictures count that are not cut into patches: the largest square of at most 16 pixels that tiles them."""
    return next(side for side in range(_LARGEST_PATCH, 0, -1) if not size[0] % side and not size[1] % side)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
