"""The whole detector as one graph of standard operators: uint8 images -> detections.

The graph covers normalization, padding, network, decoding, NMS and clipping (1904.01355 section
3.1), for any batch and image size. ``ops/reference`` replaces ``fcos_d2.ops``: torch.export,
AOTInductor and ONNX all support its operators. Everything after the head is float32, whatever the
dtype of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from ..modeling import FCOS, Predictions
from ..modeling.acceleration import fold_batch_norms
from ..ops import Candidates, reference


class DetectionGraph(nn.Module):
    """uint8 images of one size -> detections, in operators that every runtime has.

    It returns the same detections as ``model``: boxes are clipped to the image, and those without
    area are dropped.

    Args:
        model: the detector, in any mode; it is copied and stays unchanged.
        top: (values Tensor[B, n], k) -> values and indices of the k largest per row, ties by
            ascending index.
        suppress: ``batched_nms_padded`` of ``fcos_d2.ops``, or an equivalent.
        half: whether weights and feature maps are float16.
    """

    def __init__(self, model: FCOS, top: Callable, suppress: Callable, half: bool = False):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Else the file computes weights; trained norms are operators that runtimes fuse.
        fold_batch_norms(self.model, (FrozenBatchNorm2d,))
        self.dtype = torch.float16 if half else torch.float32
        for part in (self.model.backbone, self.model.head):
            _with_float32_group_norms(part.to(self.dtype))
        self.top, self.suppress = top, suppress

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Uint8 Tensor[B, C, H, W], in the config's channel order -> fields of Detections."""
        padded = self._preprocess(images)
        candidates = self._select(*self.model.network(padded), padded, images)
        rule = self.model.postprocess.suppression
        return self._finish(*self.suppress(*candidates, **rule), images)

    def _preprocess(self, images: Tensor) -> Tensor:
        x = (images.float() - self.model.pixel_mean) / self.model.pixel_std
        unit = max(self.model.backbone.size_divisibility, 1)
        bottom, right = ((n + unit - 1) // unit * unit - n for n in images.shape[-2:])
        return F.pad(x, (0, right, 0, bottom)).to(self.dtype)

    def _select(
        self, features: list[Tensor], predictions: Predictions, padded: Tensor, images: Tensor
    ) -> Candidates:
        levels = self.model.grid.levels(features, padded)
        pitches = list(chain.from_iterable(levels.pitches))
        rule = self.model.postprocess.selection
        sizes = [
            images.new_full((images.shape[0], 1), n, dtype=torch.int64) for n in images.shape[2:]
        ]
        return Candidates(*reference.select_candidates(
            *predictions[:3], torch.cat(sizes, dim=1), list(levels.strides), pitches, levels.offset,
            **rule, top=self.top,
        ))  # fmt: skip

    def _finish(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, _, images: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips boxes to the image and removes those that then have no area."""
        boxes = _clip(boxes, images)
        extent = boxes[..., 2:] - boxes[..., :2]
        valid = (classes >= 0) & (extent > 0).all(dim=-1)
        score, index = self.top(torch.where(valid, scores, -1.0), scores.shape[1])
        return reference.nms_result(
            boxes, classes, torch.where(score >= 0, score, -torch.inf), index
        )


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm of float16 feature maps that computes in float32 in every runtime.

    The sum of squares over a group overflows float16, which runtimes handle differently.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, C, ...] -> same shape and dtype."""
        return super().forward(x.float()).to(x.dtype)


def _with_float32_group_norms(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer) is nn.GroupNorm:
            layer.__class__ = Float32GroupNorm
            layer.float()


def _clip(boxes: Tensor, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), dim=-1).flatten(-2)


def top_of_onnx(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk, which becomes ONNX's TopK, with ties by ascending index.

    Padding keeps ``k`` constant, as TensorRT requires, even if a small level has fewer values.
    """
    values, index = torch.topk(F.pad(values, (0, k), value=-1.0), k, dim=1)
    return values, torch.where(values >= 0, index, 0)


def nms_as_while_loop(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, max_detections: int, **rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``batched_nms_padded`` as a torch.while_loop that ends as soon as no box is left."""
    slots = torch.arange(max_detections, device=boxes.device)

    def has_more(step, alive, best, index):
        return (step < max_detections) & (alive > -torch.inf).any()

    def keep_best(step, alive, best, index):
        one, where, alive = reference.nms_step(alive, boxes, classes, **rule)
        now = slots == step
        return step + 1, alive, torch.where(now, one, best), torch.where(now, where, index)

    start = (
        torch.zeros((), dtype=torch.int64, device=boxes.device),
        reference.nms_start(scores, classes),
        scores.new_full((scores.shape[0], max_detections), -torch.inf),
        classes.new_zeros((classes.shape[0], max_detections)),
    )
    _, _, best, index = torch.while_loop(has_more, keep_best, start)
    return reference.nms_result(boxes, classes, best, index)
