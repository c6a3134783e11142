"""The whole detector as a graph of standard operators, from uint8 images to detections.

The graph covers normalization, padding, network, decoding, NMS and clipping (1904.01355 section
3.1), for any batch and image size. It uses ``ops/reference`` instead of ``fcos_d2.ops``, because
torch.export, AOTInductor and ONNX all support its operators. Everything after the head is computed
in float32, whatever the dtype of the weights.
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
    """Detects objects in uint8 images of one size, with operators that every runtime has.

    Returns the same detections as ``model``, clipped to the image and without empty boxes.

    Args:
        model: the detector, in any mode; it is copied and not changed.
        top: function of Tensor[B, n] and k that returns the k largest values per row and their
            indices; of equal values, the one with the lowest index comes first.
        suppress: ``fcos_d2.ops.batched_nms_padded`` or an equivalent.
        half: whether weights and feature maps are float16.
    """

    def __init__(self, model: FCOS, top: Callable, suppress: Callable, half: bool = False):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Runtimes fuse batch norms, but would compute a frozen norm's scale and bias in every call.
        fold_batch_norms(self.model, (FrozenBatchNorm2d,))
        self.dtype = torch.float16 if half else torch.float32
        for part in (self.model.backbone, self.model.head):
            _use_float32_group_norms(part.to(self.dtype))
        self.top, self.suppress = top, suppress

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the fields of Detections for uint8 [B, C, H, W] in the model's channel order."""
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
        """Clips boxes to the image and removes empty ones."""
        boxes = _clip(boxes, images)
        extent = boxes[..., 2:] - boxes[..., :2]
        valid = (classes >= 0) & (extent > 0).all(dim=-1)
        score, index = self.top(torch.where(valid, scores, -1.0), scores.shape[1])
        return reference.nms_result(
            boxes, classes, torch.where(score >= 0, score, -torch.inf), index
        )


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in float32, whatever the dtype of its input.

    In float16, the sum of squares over a group overflows in some runtimes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the shape and dtype of ``x`` [B, C, ...]."""
        return super().forward(x.float()).to(x.dtype)


def _use_float32_group_norms(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer) is nn.GroupNorm:
            layer.__class__ = Float32GroupNorm
            layer.float()


def _clip(boxes: Tensor, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), dim=-1).flatten(-2)


def onnx_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Calls torch.topk, which exports to ONNX's TopK: of equal values, the lowest index is first.

    TensorRT requires a constant ``k``, so the input is padded in case it has fewer values.
    """
    values, index = torch.topk(F.pad(values, (0, k), value=-1.0), k, dim=1)
    return values, torch.where(values >= 0, index, 0)


def nms_as_while_loop(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, max_detections: int, **rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes ``batched_nms_padded`` in a torch.while_loop that ends when no box is left."""
    slots = torch.arange(max_detections, device=boxes.device)

    def has_more(step, alive, best, index):
        return (step < max_detections) & (alive > -torch.inf).any()

    def keep_best(step, alive, best, index):
        score, box, alive = reference.nms_step(alive, boxes, classes, **rule)
        current = slots == step
        return step + 1, alive, torch.where(current, score, best), torch.where(current, box, index)

    start = (
        torch.zeros((), dtype=torch.int64, device=boxes.device),
        reference.nms_start(scores, classes),
        scores.new_full((scores.shape[0], max_detections), -torch.inf),
        classes.new_zeros((classes.shape[0], max_detections)),
    )
    _, _, best, index = torch.while_loop(has_more, keep_best, start)
    return reference.nms_result(boxes, classes, best, index)
