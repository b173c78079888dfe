"""The heads of a detector: regions are proposed, classified, their boxes mended, and masks drawn in them.

Faster and Mask R-CNN (Ren et al. 2015, arXiv 1506.01497; He et al. 2017, arXiv 1703.06870) of torchvision's parts, with
what ViTDet (Li et al. 2022, arXiv 2203.16527, and its published configuration) has otherwise:

    levels ─┬─ proposals: 3×3, 3×3, objectness and box of every anchor ─ the best 1,000
            ├─ regions of 7×7 ─ 3×3 four times ─ linear ─ class, box of each class
            └─ regions of 14×14 ─ 3×3 four times ─ deconvolve ─ mask of each class, 28×28

Pixels of regions are taken where they are (aligned), by the true strides of the levels; losses of boxes are L1; every
loss is a mean over what was drawn from a picture, and then over pictures. That is what 64 pictures on 64 devices were
trained with, and it is the same for any number of processes and parts of a batch.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from maehub.rng import sample_seed

_RATIOS = (0.5, 1.0, 2.0)
_BOX, _MASK = 7, 14  # pixels of a region's side
_CANONICAL = 224  # pixels of the region that is taken from the level of stride 16, with anchors of 8 strides
_ANCHORS, _PROPOSALS = 256, 1000  # of a picture: anchors with a loss, regions that are proposed in training at most
_REGION_VIEW, _ANCHOR_VIEW = 15, 16  # of `sample_seed`


@dataclass(frozen=True)
class Target:
    """What one image shows, in pixels of the image; no tensor, so that nothing casts or scatters its boxes."""

    boxes: Tensor  # (n, 4) float32, of an area
    labels: Tensor  # (n,) int64, places of classes
    masks: Tensor | None  # (n, H, W) uint8, 0 or 1
    seed: int  # of what is drawn

    def to(self, device: torch.device) -> "Target":
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return Target(self.boxes.to(device), self.labels.to(device), masks, self.seed)


class Regions(nn.Module):
    """Proposals and heads. Parameters: ``proposals.head.…``, ``heads.box_head.…``, ``heads.box_predictor.…`` and
    ``heads.mask_head.…``, ``heads.mask_predictor.…``."""

    def __init__(
        self, width: int, classes: int, strides: Mapping[str, float], *, convolutions: int, hidden: int, anchor: float,
        proposals: int, masks: bool,
    ) -> None:  # fmt: skip
        """Make them with fresh weights.

        Args:
            width: channels of the levels.
            strides: pixels of an image a pixel of a level, by its name, finest first; the last level is for proposals
                alone.
            convolutions: of the head of boxes, and of that of masks.
            hidden: width of the linear layer.
            anchor: side of an anchor, in strides of its level.
            proposals: regions that are looked at where nothing is trained.
        """
        super().__init__()
        from timm.layers.norm import LayerNorm2d  # over channels, eps 1e-6

        anchors = _Anchors(tuple((anchor * stride,) for stride in strides.values()), (_RATIOS,) * len(strides))
        self.proposals = _Proposals(
            anchors,
            _Proposer(width, len(_RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=_ANCHORS,
            positive_fraction=0.5,
            pre_nms_top_n={},
            post_nms_top_n={},
            nms_thresh=0.7,
        )
        pooled = dict(list(strides.items())[:-1])
        pool = partial(_Pool, pooled, _CANONICAL * anchor / 8)
        drawn: dict[str, Any] = {}
        if masks:
            head = MaskRCNNHeads(width, [width] * max(1, convolutions), 1, norm_layer=LayerNorm2d)
            drawn = {
                "mask_roi_pool": pool(_MASK),
                "mask_head": head,
                "mask_predictor": _MaskPredictor(width, classes),
            }
        self.heads = RoIHeads(
            pool(_BOX),
            FastRCNNConvFCHead((width, _BOX, _BOX), [width] * convolutions, [hidden], norm_layer=LayerNorm2d),
            _BoxPredictor(hidden, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **drawn,
        )
        self.looked_at = proposals
        self.draw(512)
        for layer in self.heads.box_head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)

    def draw(self, regions: int) -> None:
        """Take so many regions of a picture for the loss of the heads, a quarter of them of objects at most, from at
        most twice as many proposals; 512 from 1,000 are published."""
        most = {"training": min(_PROPOSALS, 2 * regions), "testing": self.looked_at}
        self.proposals._post_nms_top_n = most
        self.proposals._pre_nms_top_n = most | {"training": 2 * most["training"]}
        self.proposals.fg_bg_sampler = _Sampler(_ANCHORS, 0.5, _ANCHOR_VIEW)
        self.heads.fg_bg_sampler = _Sampler(regions, 0.25, _REGION_VIEW)

    def losses(self, levels: OrderedDict[str, Tensor], size: tuple[int, int], targets: Sequence[Target]) -> Tensor:
        """Of levels (B, width, h, w) float32 of images of (H, W) the sum of all losses, () float32."""
        device = next(iter(levels.values())).device
        seeds = [target.seed for target in targets]
        self.proposals.fg_bg_sampler.seeds = self.heads.fg_bg_sampler.seeds = seeds
        truths = [{"boxes": one.boxes, "labels": one.labels + 1, "masks": one.masks} for one in targets]  # 0 is nothing
        found, proposed = self.proposals(_sized(len(targets), size), levels, truths)
        regions, matched, labels, wanted = self.heads.select_training_samples(found, truths)
        classes, boxes = self._boxes(levels, regions)
        truth, counts = torch.cat(labels), torch.tensor([len(one) for one in labels])
        weights = (1 / counts / len(targets)).repeat_interleave(counts).to(device)
        total = (F.cross_entropy(classes, truth, reduction="none") * weights).sum() + sum(proposed.values())
        objects = torch.where(truth > 0)[0]
        off = boxes.unflatten(1, (-1, 4))[objects, truth[objects]] - torch.cat(wanted)[objects]
        total = total + (off.abs().sum(dim=1) * weights[objects]).sum()
        if self.heads.has_mask():
            total = total + self._mask_loss(levels, targets, regions, matched, labels)
        return total

    def _mask_loss(
        self, levels: Any, targets: Sequence[Target], regions: list[Tensor], matched: list[Tensor], labels: list[Tensor]
    ) -> Tensor:
        some, classes, truths, weights = [], [], [], []
        for target, boxes, places, label in zip(targets, regions, matched, labels, strict=True):
            assert target.masks is not None
            objects = torch.where(label > 0)[0]
            count = len(objects)
            objects = objects if count else torch.zeros(1, dtype=torch.long, device=boxes.device)  # weighs nothing
            some.append(boxes[objects])
            classes.append(label[objects])
            weights.append(torch.full((len(objects),), 1 / count / len(targets) if count else 0.0))
            masks = target.masks if count else torch.zeros(1, 2, 2, device=boxes.device)
            where = torch.cat([places[objects, None] if count else objects[:, None] * 0, some[-1]], dim=1)
            side = 2 * _MASK
            truths.append(roi_align(masks[:, None].float(), where.float(), (side, side), 1.0, aligned=True)[:, 0])
        drawn = self._masks(levels, some)
        drawn = drawn[torch.arange(len(drawn), device=drawn.device), torch.cat(classes)]
        truth = (torch.cat(truths) >= 0.5).float()
        each = F.binary_cross_entropy_with_logits(drawn, truth, reduction="none").mean(dim=(1, 2))
        return (each * torch.cat(weights).to(each.device)).sum()

    def forward(self, levels: OrderedDict[str, Tensor], size: tuple[int, int]) -> list[tuple[Tensor, ...]]:
        """Of each image boxes (n, 4), scores (n,), places of classes (n,), and (n, 28, 28) 0 to 1 where there are
        masks."""
        count, device = next(iter(levels.values())).shape[0], next(iter(levels.values())).device
        sizes = [size] * count
        found, _ = self.proposals(_sized(count, size), levels)
        parts = self.heads.postprocess_detections(*self._boxes(levels, found), found, sizes)
        results: list[tuple[Tensor, ...]] = [(b, s, label - 1) for b, s, label in zip(*parts, strict=True)]
        if not self.heads.has_mask():
            return results
        masks = self._masks(levels, parts[0]).sigmoid()
        own = masks[torch.arange(len(masks), device=device), torch.cat(parts[2])]
        return [(*one, drawn) for one, drawn in zip(results, own.split([len(one[0]) for one in results]), strict=True)]

    def _boxes(self, levels: Any, regions: list[Tensor]) -> tuple[Tensor, Tensor]:
        heads = self.heads
        found: tuple[Tensor, Tensor] = heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, regions, [])))
        return found

    def _masks(self, levels: Any, regions: list[Tensor]) -> Tensor:
        heads = self.heads
        found: Tensor = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, regions, []))).float()
        return found


def _sized(count: int, size: tuple[int, int]) -> ImageList:
    """Images without channels: their sizes are all that is asked of them."""
    return ImageList(torch.empty(count, 0, *size), [size] * count)


class _Anchors(AnchorGenerator):
    """torchvision's, but for rounding to whole pixels, which the published network has not."""

    def generate_anchors(
        self, scales: Any, aspect_ratios: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        sizes, ratios = (torch.as_tensor(one, dtype=dtype, device=device) for one in (scales, aspect_ratios))
        height, width = ((part[:, None] * sizes[None]).flatten() / 2 for part in (ratios.sqrt(), 1 / ratios.sqrt()))
        return torch.stack([-width, -height, width, height], dim=1)


class _Pool(nn.Module):
    """Pixels of regions from the level that fits their size (Lin et al. 2017, arXiv 1612.03144, equation 1)."""

    def __init__(self, strides: Mapping[str, float], canonical: float, side: int) -> None:
        super().__init__()
        self.strides, self.canonical, self.side = dict(strides), canonical, side

    def forward(self, levels: Mapping[str, Tensor], regions: list[Tensor], _: Any) -> Tensor:
        numbered = torch.cat([F.pad(boxes, (1, 0), value=float(place)) for place, boxes in enumerate(regions)])
        sides = ((numbered[:, 3] - numbered[:, 1]) * (numbered[:, 4] - numbered[:, 2])).clamp(min=0).sqrt()
        wanted = (2 + torch.log2(sides / self.canonical + 1e-8)).floor().clamp(0, len(self.strides) - 1)
        side = (self.side, self.side)
        here = [torch.where(wanted == number)[0] for number in range(len(self.strides))]
        parts = [
            roi_align(levels[name], numbered[some], side, 1 / stride, aligned=True)
            for some, (name, stride) in zip(here, self.strides.items(), strict=True)
        ]
        return torch.cat(parts)[torch.cat(here).argsort()]


class _Sampler:
    """Some candidates of each picture, a share of them of objects at most: a pure function of the picture's seed."""

    def __init__(self, count: int, share: float, view: int) -> None:
        self.count, self.share, self.view = count, share, view
        self.seeds: list[int] = []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of candidates (n,), 1 and more for objects, 0 for nothing, −1 for neither: which are taken, uint8."""
        taken: tuple[list[Tensor], list[Tensor]] = ([], [])
        for seed, candidates in zip(self.seeds, labels, strict=True):
            generator = torch.Generator().manual_seed(sample_seed(seed, 0, 0, self.view) % 2**63)
            left = self.count
            for found, places, most in (
                (taken[0], candidates >= 1, int(self.count * self.share)),
                (taken[1], candidates == 0, self.count),
            ):
                where = torch.where(places)[0]
                order = torch.randperm(len(where), generator=generator)[: min(most, left)].to(where.device)
                chosen = torch.zeros_like(candidates, dtype=torch.uint8)
                chosen[where[order]] = 1
                found.append(chosen)
                left -= len(order)
        return taken


class _Proposer(RPNHead):
    """Objectness and boxes of anchors in float32, whatever the convolutions compute in."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, boxes = super().forward(x)
        return [one.float() for one in objectness], [one.float() for one in boxes]


class _Proposals(RegionProposalNetwork):
    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        objects, nothing = (torch.where(torch.cat(part))[0] for part in self.fg_bg_sampler(labels))
        some, count = torch.cat([objects, nothing]), _ANCHORS * len(labels)
        found = F.binary_cross_entropy_with_logits(objectness.flatten()[some], torch.cat(labels)[some], reduction="sum")
        boxes = (pred_bbox_deltas[objects] - torch.cat(regression_targets)[objects]).abs().sum()
        return found / count, boxes / count


class _BoxPredictor(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * (classes + 1))
        _begin(self.cls_score, 0.01)
        _begin(self.bbox_pred, 0.001)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(features).float(), self.bbox_pred(features).float()


class _MaskPredictor(nn.Sequential):
    def __init__(self, width: int, classes: int) -> None:
        deconvolve, classify = nn.ConvTranspose2d(width, width, 2, stride=2), nn.Conv2d(width, classes + 1, 1)
        nn.init.kaiming_normal_(deconvolve.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(deconvolve.bias)  # type: ignore[arg-type]
        _begin(classify, 0.001)
        super().__init__(OrderedDict(deconvolve=deconvolve, relu=nn.ReLU(), classify=classify))


def _begin(layer: nn.Linear | nn.Conv2d, spread: float) -> None:
    nn.init.normal_(layer.weight, std=spread)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
