"""All ops in plain PyTorch: the specification that every kernel must match.

Written to be read alongside the papers, not to be fast, and used where no compiled kernel is
registered. Except ``batched_nms``, whose result has a data-dependent length, no function
synchronizes with the device (no ``item``, no ``nonzero``).

Shapes: B images, L levels, P points of all levels (level-major, row-major inside a level), M
ground-truth boxes of the whole batch, K classes, N candidates per image, D detections per image.
Boxes are xyxy in pixels of the network input; ltrb are the distances from a point to the four sides
of a box, in strides of the point's level. Background label = K, ignored label = -1.
"""

from ._common import accumulate_dtype
from .assign_targets import assign_targets, centerness
from .batched_nms import batched_nms, batched_nms_padded, nms_result, nms_start, nms_step
from .box_loss import box_loss, box_loss_backward, iou_loss
from .fcos_loss import fcos_loss, fcos_loss_gradient
from .select_candidates import select_candidates, top_lowest_index_first
from .sigmoid_focal_loss import (
    sigmoid_focal_loss,
    sigmoid_focal_loss_backward,
)

__all__ = [
    "accumulate_dtype",
    "assign_targets",
    "batched_nms",
    "batched_nms_padded",
    "box_loss",
    "box_loss_backward",
    "centerness",
    "fcos_loss",
    "fcos_loss_gradient",
    "iou_loss",
    "nms_result",
    "nms_start",
    "nms_step",
    "select_candidates",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_backward",
    "top_lowest_index_first",
]
