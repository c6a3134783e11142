"""FCOSLoss: predictions and ground truth -> losses (1904.01355 eq. 2, 2006.09214 section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor, nn

from ..config import fcos_settings
from ..ops import Levels, Targets, assign_targets
from ..ops.box_loss import LOSS_TYPES
from ..ops.fcos_loss import fcos_loss
from .structures import GroundTruth, Predictions, check_choice

QUALITIES = {"ctrness": "centerness", "iou": "iou"}


class FCOSLoss(nn.Module):
    """Assigns targets and computes the three losses, each divided by its normalizer on the device.

    Targets do not depend on predictions, so the normalizers are known, and averaged over processes
    with one all-reduce, before the losses are computed.

    Args:
        num_classes: K.
        strides: stride of each level, in pixels.
        sizes_of_interest: bounds in pixels between the size ranges of the levels, one fewer than
            levels.
        range_inclusive: whether a largest distance equal to a bound belongs to the range.
        center_radius: radius of center sampling, in strides; 0 disables it.
        pixel_extent: 1 if x2 and y2 are the last pixels of a box, else 0.
        alpha: weight of positives in the focal loss.
        gamma: exponent of the focal loss.
        cls_weight: weight of the classification loss.
        loc_loss_type: "iou", "linear_iou", "giou", "diou" or "ciou".
        box_quality: "ctrness" or "iou".
        iou_smooth: added to intersection and union, in squared units of the regression targets.
        norm_reg_targets: regression targets are in strides instead of pixels.
        weight_by_centerness: weight the box loss by centerness; only with box_quality "ctrness".
        cls_normalizer: "fg", "fg_and_images", "moving_fg" or "all".
        box_normalizer: "fg", or "cls" for that of the classification loss.
        moving_fg_start: first value of the moving average.
        sync_normalizer: average the normalizers over all processes.

    Raises:
        ValueError: a choice is unknown, or the number of sizes does not match the strides.
    """

    MOMENTUM = 0.9  # of moving_fg, as in AdelaiDet and detectron2

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        strides: Sequence[int],
        sizes_of_interest: Sequence[float] = (64, 128, 256, 512),
        range_inclusive: bool = True,
        center_radius: float = 1.5,
        pixel_extent: int = 0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        cls_weight: float = 1.0,
        loc_loss_type: str = "giou",
        box_quality: str = "ctrness",
        iou_smooth: float = 1.0,
        norm_reg_targets: bool = True,
        weight_by_centerness: bool = True,
        cls_normalizer: str = "fg",
        box_normalizer: str = "fg",
        moving_fg_start: float = 100.0,
        sync_normalizer: bool = True,
    ):
        super().__init__()
        check_choice("LOC_LOSS_TYPE", loc_loss_type, LOSS_TYPES)
        check_choice("BOX_QUALITY", box_quality, QUALITIES)
        check_choice(
            "LOSS_NORMALIZER_CLS", cls_normalizer, ("fg", "fg_and_images", "moving_fg", "all")
        )
        check_choice("LOSS_NORMALIZER_BOX", box_normalizer, ("fg", "cls"))
        check_choice("PIXEL_EXTENT", pixel_extent, (0, 1))
        self.num_classes, self.box_quality = num_classes, box_quality
        self.strides = tuple(strides)
        self.size_ranges = _size_ranges(sizes_of_interest, self.strides)
        self.assignment = {
            "num_classes": num_classes,
            "center_radius": center_radius,
            "inclusive": range_inclusive,
            "pixel_extent": pixel_extent,
        }
        self.alpha, self.gamma, self.cls_weight = alpha, gamma, cls_weight
        unit = [1 if norm_reg_targets else stride for stride in self.strides]
        self.box_rule = {
            "loss_type": loc_loss_type,
            "quality_type": QUALITIES[box_quality],
            "weight_by_centerness": weight_by_centerness and box_quality == "ctrness",
            "smoothing": tuple(iou_smooth / u**2 for u in unit),
        }
        self.cls_normalizer, self.box_normalizer = cls_normalizer, box_normalizer
        self.sync_normalizer = sync_normalizer
        if cls_normalizer == "moving_fg":
            self.register_buffer("moving_fg", torch.tensor(float(moving_fg_start)))
        self._last: tuple[GroundTruth, Targets] | None = None

    @classmethod
    def from_config(cls, cfg):
        """Returns the arguments from ``cfg``."""
        fcos = fcos_settings(cfg)
        return {
            "num_classes": fcos.NUM_CLASSES,
            "strides": fcos.FPN_STRIDES,
            "sizes_of_interest": fcos.SIZES_OF_INTEREST,
            "range_inclusive": fcos.RANGE_INCLUSIVE,
            "center_radius": fcos.POS_RADIUS if fcos.CENTER_SAMPLE else 0.0,
            "pixel_extent": fcos.PIXEL_EXTENT,
            "alpha": fcos.LOSS_ALPHA,
            "gamma": fcos.LOSS_GAMMA,
            "cls_weight": fcos.LOSS_WEIGHT_CLS,
            "loc_loss_type": fcos.LOC_LOSS_TYPE,
            "box_quality": fcos.BOX_QUALITY,
            "iou_smooth": fcos.IOU_SMOOTH,
            "norm_reg_targets": fcos.NORM_REG_TARGETS,
            "weight_by_centerness": fcos.CTR_WEIGHTED_LOC,
            "cls_normalizer": fcos.LOSS_NORMALIZER_CLS,
            "box_normalizer": fcos.LOSS_NORMALIZER_BOX,
            "moving_fg_start": fcos.MOVING_FG_START,
            "sync_normalizer": fcos.SYNC_NORMALIZER,
        }

    def forward(
        self, predictions: Predictions, ground_truth: GroundTruth, levels: Levels
    ) -> dict[str, Tensor]:
        """Returns ``loss_fcos_cls``, ``loss_fcos_loc`` and ``loss_fcos_ctr`` (or ``_iou``)."""
        targets = self.assign(ground_truth, levels)
        self._last = ground_truth, targets
        cls, loc, quality = fcos_loss(
            predictions.logits,
            predictions.ltrb,
            predictions.quality,
            targets,
            self._normalizers(targets),
            cls_weight=self.cls_weight,
            alpha=self.alpha,
            gamma=self.gamma,
            # With float16, gradients are scaled, so a saved gradient would never be valid.
            save_gradient=predictions.logits[0].dtype != torch.float16,
            **self.box_rule,
        )
        name = "loss_fcos_iou" if self.box_quality == "iou" else "loss_fcos_ctr"
        return {"loss_fcos_cls": cls, "loss_fcos_loc": loc, name: quality}

    def assign(self, ground_truth: GroundTruth, levels: Levels) -> Targets:
        """Returns the targets of every point; see ``fcos_d2.ops.assign_targets``."""
        return assign_targets(*ground_truth, levels, self.size_ranges, **self.assignment)

    @property
    def stats(self) -> dict[str, Tensor]:
        """Statistics of the last assignment, as scalars on the device; empty before the first.

        Per image: positive points of each level, ambiguous points (which match several boxes), and
        boxes without a positive point.
        """
        if self._last is None:
            return {}
        (_, classes, _), targets = self._last
        images = targets.counts.shape[0]
        positives, ambiguous = targets.counts.sum(dim=0).unbind(dim=-1)
        has_point = torch.zeros(len(classes) + 1, dtype=torch.bool, device=classes.device)
        has_point[targets.matched.flatten().long() + 1] = True
        without_points = (classes >= 0) & ~has_point[1:]
        per_level = {
            f"fcos/positives_p{int(math.log2(stride))}": positives[level] / images
            for level, stride in enumerate(self.strides)
        }
        return {
            **per_level,
            "fcos/ambiguous_points": ambiguous.sum() / images,
            "fcos/boxes_without_points": without_points.sum() / images,
        }

    @torch.no_grad()
    def _normalizers(self, targets: Targets) -> list[tuple[Tensor, float]]:
        """Returns the divisors of classification, box and quality loss, with their lower bounds."""
        totals = targets.totals
        if self.cls_normalizer == "all":
            totals = torch.cat((totals, totals.new_full((1,), float(targets.labels.numel()))))
        if self.sync_normalizer and comm.get_world_size() > 1:
            # Every process takes part: one without objects must not leave the others waiting.
            totals = totals.clone()
            torch.distributed.all_reduce(totals)
            totals = totals / comm.get_world_size()
        cls = foreground = totals[0], 1.0
        if self.cls_normalizer == "all":
            cls = totals[2], 1.0
        elif self.cls_normalizer == "fg_and_images":
            cls = totals[0] + len(targets.labels), 0.0
        elif self.cls_normalizer == "moving_fg":
            self.moving_fg.lerp_(totals[0].clamp(min=1).to(self.moving_fg), 1 - self.MOMENTUM)
            cls = self.moving_fg.to(totals, copy=True), 0.0
        quality = cls if self.box_normalizer == "cls" else foreground
        loc = (totals[1], 1e-6) if self.box_rule["weight_by_centerness"] else quality
        return [cls, loc, quality]


def _size_ranges(bounds: Sequence[float], strides: Sequence[int]) -> list[tuple[float, float]]:
    """Bounds between levels -> (low, high) per level; the outermost bounds are open."""
    bounds = list(map(float, bounds))
    if len(bounds) != len(strides) - 1 or bounds != sorted(bounds):
        raise ValueError(
            "FCOSLoss: sizes_of_interest (MODEL.FCOS.SIZES_OF_INTEREST) must be "
            f"{len(strides) - 1} ascending bounds between {len(strides)} levels, got {bounds}"
        )
    return list(zip([-1.0, *bounds], [*bounds, math.inf], strict=True))
