"""A detector: an encoder with a pyramid and heads, from pictures of any size to the objects that they show."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from maehub.data import ObjectClasses, code_of
from maehub.dense.attention import AttentionConfig, attending
from maehub.dense.detections import Detections
from maehub.dense.regions import Regions, Target
from maehub.dense.windows import pixels_of, scaled_size, window_starts, windows_of
from maehub.errors import UsageError
from maehub.images import ImagePath, Size, scaled
from maehub.interop import TORCHVISION_LEVELS, FeaturePyramid
from maehub.models import Encoder

_AT_ONCE = 4  # windows
_SAME = 0.5  # intersection over union of two boxes of one class that are one object
_MOST = 100  # objects of a window, or of a picture that is one


@dataclass(frozen=True)
class DetectorConfig:
    """What a `Detector` has on top of its encoder.

    ``masks``: it draws objects, beside their boxes. ``width``: channels of the pyramid and of the heads,
    ``convolutions`` of the heads and ``hidden`` width of their linear layer; 256, 4 and 1024 as published. ``anchor``:
    side of an anchor in strides of its level. ``proposals``: regions of a window that are looked at. ``fitted``: the
    whole picture is scaled into one window, the encoder's native size; else ``short_side`` is what its shorter side is
    scaled to, None for its own size, and it is seen by windows. ``attention``: what blocks get.
    """

    classes: ObjectClasses
    masks: bool = False
    width: int = 256
    convolutions: int = 4
    hidden: int = 1024
    anchor: float = 8.0
    proposals: int = 1000
    fitted: bool = True
    short_side: int | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def __post_init__(self) -> None:
        numbers = (
            self.width,
            self.hidden,
            self.proposals,
            self.convolutions + 1,
            *([self.short_side] if self.short_side else []),
        )
        if not all(type(number) is int and number > 0 for number in numbers):
            raise UsageError(
                "width, hidden, proposals and short_side are positive whole numbers, convolutions one from 0"
            )
        if isinstance(self.anchor, bool) or not isinstance(self.anchor, int | float) or not 0.5 <= self.anchor <= 64:
            raise UsageError(f"anchor is a number of strides from 0.5 to 64, not {self.anchor!r}")
        if not isinstance(self.attention, AttentionConfig):
            raise UsageError(f"attention must be an AttentionConfig, not {self.attention!r:.60}")
        if not isinstance(self.masks, bool) or not isinstance(self.fitted, bool) or (self.fitted and self.short_side):
            raise UsageError("masks and fitted are true or false, and a fitted picture has no short_side")

    def inner_size(self, size: Size, window: Size) -> Size:
        """(height, width) that a picture of ``size`` is scaled to before it is seen by windows."""
        return scaled_size(size, self.short_side, window if self.fitted else None)


class Detector(nn.Module):
    """An encoder, ViTDet's simple pyramid, and heads. Parameters are ``pyramid.encoder.…``, ``pyramid.levels.…`` and
    ``regions.…``.

    ``encoder.config.size`` is the window that it sees at once, and ``encoder.preprocess`` normalises pixels.
    """

    def __init__(self, encoder: Encoder, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.pyramid = FeaturePyramid(attending(encoder, config.attention), config.width, names=TORCHVISION_LEVELS)
        self.regions = Regions(
            config.width,
            len(config.classes.names),
            self.pyramid.strides,
            convolutions=config.convolutions,
            hidden=config.hidden,
            anchor=config.anchor,
            proposals=config.proposals,
            masks=config.masks,
        )

    @property
    def encoder(self) -> Encoder:
        """Of its pyramid."""
        return self.pyramid.encoder

    def forward(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """Of each image boxes (n, 4) in its pixels, scores (n,), places of classes (n,), and masks (n, 28, 28), 0 to 1
        in the box, where the detector draws them; in eval mode alone.

        Args:
            images: (B, C, H, W), the dtype of the weights, preprocessed; H and W divisible by the patch.
        """
        height, width = images.shape[2:]
        return self.regions(self._levels(images), (height, width))

    def losses(self, images: Tensor, targets: Sequence[Target]) -> Tensor:
        """The sum of the losses of proposals, classes, boxes and masks, a mean over images; in training mode alone."""
        height, width = images.shape[2:]
        return self.regions.losses(self._levels(images), (height, width), targets)

    def _levels(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, level.float()) for name, level in self.pyramid(images).items())

    @torch.inference_mode()
    def predict(self, picture: ImagePath | Image.Image | np.ndarray) -> Detections:
        """The objects of a picture, up to a hundred a window, with scores above 0.05.

        A picture of more than one window is seen by windows that overlap by a third. Each is asked for the objects
        whose middle lies nearer to its own middle than to another's, and what is found twice is merged.

        Args:
            picture: a file, a PIL picture, or (H, W, C) uint8.

        Raises:
            DataError: it cannot be read, or has other channels than the model takes.
        """
        pixels = pixels_of(picture, self.encoder.config.channels)
        height, width = pixels.shape[:2]
        inner = self.config.inner_size((height, width), self.encoder.config.size)
        if inner != (height, width):
            pixels = scaled(pixels, inner).numpy()
            pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        training = self.training
        self.eval()
        try:
            found = self._by_windows(pixels)
        finally:
            self.train(training)
        scale = torch.tensor([width / inner[1], height / inner[0]] * 2, device=found[0].device)
        limits = torch.tensor([width, height] * 2, device=found[0].device)
        found[0] = (found[0] * scale).clamp(min=0).minimum(limits)
        kept = torch.where((found[0][:, 2:] > found[0][:, :2]).all(dim=1))[0]
        boxes, scores, labels, *masks = (part[kept].cpu() for part in found)
        drawn = None
        if self.config.masks:
            drawn = tuple(code_of(pasted(*one, (height, width))) for one in zip(masks[0], boxes, strict=True))
        return Detections(boxes.float().numpy(), scores.float().numpy(), labels.numpy(), drawn)

    def _by_windows(self, pixels: np.ndarray) -> list[Tensor]:
        """What `forward` gives, of a whole picture."""
        size, window = pixels.shape[:2], self.encoder.config.size
        tops, lefts = (window_starts(side, edge) for side, edge in zip(size, window, strict=True))
        corners = [(top, left) for top in tops for left in lefts]
        parts: list[list[Tensor]] = []
        for first in range(0, len(corners), _AT_ONCE):
            some = corners[first : first + _AT_ONCE]
            images = windows_of(self.encoder, pixels, some)
            for corner, found in zip(some, self(images), strict=True):
                boxes = found[0] + torch.tensor([corner[1], corner[0]] * 2, device=images.device)
                middles = (boxes[:, :2] + boxes[:, 2:]) / 2
                own = torch.ones(len(boxes), dtype=torch.bool, device=images.device)
                for axis, starts, edge, place in ((0, lefts, window[1], corner[1]), (1, tops, window[0], corner[0])):
                    low, high = _own(starts, edge, place)
                    own &= (middles[:, axis] >= low) & (middles[:, axis] < high)
                parts.append([one[own] for one in (boxes, *found[1:])])
        whole = [torch.cat(part) for part in zip(*parts, strict=True)]
        if len(corners) > 1:
            best = batched_nms(whole[0].float(), whole[1].float(), whole[2], _SAME)
            return [part[best] for part in whole]
        return whole


def _own(starts: Sequence[int], edge: int, start: int) -> tuple[float, float]:
    """From where to where the window at ``start`` is asked: to the middles of what it shares with others."""
    at = starts.index(start)
    low = -np.inf if at == 0 else (start + starts[at - 1] + edge) / 2
    high = np.inf if at == len(starts) - 1 else (starts[at + 1] + start + edge) / 2
    return low, high


def pasted(mask: Tensor, box: Tensor, size: Size) -> np.ndarray:
    """A mask (h, w) of shares from 0 to 1 that lies in a box, as (height, width) bool of the picture, half and more."""
    left, top, right, bottom = box.tolist()
    drawn = np.zeros(size, bool)
    rows = torch.arange(max(0, int(top)), min(size[0], int(np.ceil(bottom))))
    columns = torch.arange(max(0, int(left)), min(size[1], int(np.ceil(right))))
    if len(rows) and len(columns):
        y = 2 * (rows + 0.5 - top) / (bottom - top) - 1
        x = 2 * (columns + 0.5 - left) / (right - left) - 1
        grid = torch.stack([x[None].expand(len(rows), -1), y[:, None].expand(-1, len(columns))], dim=2)
        shares = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False, padding_mode="border")
        drawn[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] = (shares[0, 0] >= 0.5).numpy()
    return drawn
