"""batched_nms: exact greedy non-maximum suppression among boxes of the same class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import (
    FLOATING,
    check_choice,
    check_count,
    check_flags,
    check_number,
    check_pixel_extent,
    check_positive,
    check_same_device,
    check_tensor,
)
from ._library import define_op

NMS_METHODS = ("hard", "linear", "gaussian")


class Detections(NamedTuple):
    """Final detections of a batch in fixed shapes, sorted by descending score.

    Attributes:
        boxes: float32 Tensor[B, D, 4], xyxy in pixels; zeros in empty slots.
        scores: float32 Tensor[B, D]; 0 in empty slots.
        classes: int64 Tensor[B, D]; -1 in empty slots.
        counts: int32 Tensor[B], how many of the D slots are filled.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    counts: Tensor


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Performs greedy NMS per value of ``idxs``; a drop-in for ``torchvision.ops.batched_nms``.

    Groups are compared by id, never by shifting coordinates, so results are exact for negative
    coordinates and any number of groups. A box is suppressed if ``intersection > iou_threshold *
    union``, computed in float32, with a box of its group that was kept before. Boxes without area
    and boxes with NaN coordinates suppress nothing and are never suppressed. Unlike torchvision's,
    this function cannot be scripted; ``torch.compile`` and ``torch.export`` support it.

    Args:
        boxes: floating-point Tensor[N, 4], xyxy with ``x1 <= x2`` and ``y1 <= y2``. An empty
            tensor of another rank, such as ``torch.tensor([])``, means no boxes.
        scores: floating-point Tensor[N]; equal scores keep their order, NaN sorts first.
        idxs: integer or floating-point Tensor[N], group (class, or class and image) of each box.
        iou_threshold: in [0, 1].

    Returns:
        int64 Tensor, indices of the kept boxes, sorted by descending score.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 7], [0, 0, 8, 8]])
        >>> batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1]), 0.5)
        tensor([0, 2])
    """
    name = "batched_nms"
    if _is_empty_placeholder(boxes, idxs):
        return boxes.new_empty(0, dtype=torch.int64)
    check_tensor(name, "boxes", boxes, ["N", 4], FLOATING)
    check_tensor(name, "scores", scores, [boxes.shape[0]], FLOATING)
    check_tensor(name, "idxs", idxs, [boxes.shape[0]], [torch.int64, torch.int32, *FLOATING])
    check_same_device(name, boxes=boxes, scores=scores, idxs=idxs)
    check_number(name, "iou_threshold", iou_threshold, 0, 1)
    # Equal floats have equal bits once -0 is 0.
    groups = (idxs.double() + 0.0).view(torch.int64) if idxs.is_floating_point() else idxs.long()
    return _op(boxes.detach(), scores.detach(), groups, float(iou_threshold))


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float = 0.6,
    max_detections: int = 100,
    *,
    class_agnostic: bool = False,
    method: str = "hard",
    sigma: float = 0.5,
    min_score: float = 0.001,
    pixel_extent: int = 0,
) -> Detections:
    """Performs greedy NMS on a whole batch in fixed shapes, without synchronizing with the device.

    Boxes of each image are visited by descending score (lower index first for equal scores), and
    the first ``max_detections`` that survive are returned: a prefix of the full greedy result.

    Args:
        boxes: float32 Tensor[B, N, 4], xyxy with ``x1 <= x2`` and ``y1 <= y2``.
        scores: float32 Tensor[B, N]; NaN is never selected.
        classes: int64 Tensor[B, N]; a slot of class < 0 is empty (see ``Candidates``).
        iou_threshold: in [0, 1]; a box of the same class with more overlap is suppressed.
        max_detections: D >= 1.
        class_agnostic: boxes of any class suppress each other.
        method: "hard" removes a suppressed box; "linear" multiplies its score by 1 - IoU;
            "gaussian" multiplies every overlapping box's score by exp(-IoU^2 / sigma), whatever the
            threshold (soft-NMS, 1704.04503).
        sigma: parameter of "gaussian", > 0.
        min_score: "linear" and "gaussian" drop boxes whose score falls to this value or below.
        pixel_extent: added to x2 and y2 for the IoU: 1 if they are the last pixels inside a box
            (the original FCOS), 0 if they are its edges.

    Returns:
        Detections. Not differentiable.

    Raises:
        ValueError: an argument has the wrong dtype, shape, device or value.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 7]]])
        >>> batched_nms_padded(boxes, torch.tensor([[0.9, 0.8]]), torch.tensor([[0, 0]])).counts
        tensor([1], dtype=torch.int32)
    """
    name = "batched_nms_padded"
    check_tensor(name, "boxes", boxes, ["B", "N", 4], [torch.float32], "cast with .float()")
    shape = list(boxes.shape[:2])
    check_tensor(name, "scores", scores, shape, [torch.float32], "cast with .float()")
    check_tensor(name, "classes", classes, shape, [torch.int64], "cast with .long()")
    check_same_device(name, boxes=boxes, scores=scores, classes=classes)
    check_number(name, "iou_threshold", iou_threshold, 0, 1)
    check_count(name, "max_detections", max_detections)
    check_flags(name, class_agnostic=class_agnostic)
    check_choice(name, "method", method, NMS_METHODS)
    check_positive(name, "sigma", sigma)
    check_number(name, "min_score", min_score, 0, 1)
    check_pixel_extent(name, pixel_extent)
    return Detections(
        *_op_padded(
            boxes.detach(),
            scores.detach(),
            classes,
            float(iou_threshold),
            max_detections,
            class_agnostic,
            method,
            float(sigma),
            float(min_score),
            pixel_extent,
        )
    )


def _is_empty_placeholder(boxes: object, idxs: object) -> bool:
    """Returns whether ``boxes`` is empty; False for well-formed calls, whose N may be unknown."""
    if not isinstance(boxes, Tensor) or (boxes.dim() == 2 and isinstance(idxs, Tensor)):
        return False
    return boxes.numel() == 0


def _fake(boxes, scores, idxs, iou_threshold):
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64)


def _fake_padded(boxes, scores, classes, iou_threshold, max_detections, *_):
    images = boxes.shape[0]
    return (
        boxes.new_empty(images, max_detections, 4),
        boxes.new_empty(images, max_detections),
        boxes.new_empty(images, max_detections, dtype=torch.int64),
        boxes.new_empty(images, dtype=torch.int32),
    )


_op = define_op(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    reference.batched_nms,
    _fake,
)
_op_padded = define_op(
    "batched_nms_padded(Tensor boxes, Tensor scores, Tensor classes, float iou_threshold, "
    "int max_detections, bool class_agnostic, str method, float sigma, float min_score, "
    "int pixel_extent=0) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.batched_nms_padded,
    _fake_padded,
)
