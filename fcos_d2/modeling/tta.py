"""Test-time augmentation: several scales and horizontal flips of every image (TEST.AUG).

The published recipe for FCOS: the candidates of all views are merged in pixels of the original
image and go through a single NMS (1904.01355 section 4.1, "multi-scale testing"). It is the NMS
configured in MODEL.FCOS, so soft-NMS works here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from detectron2.config import configurable
from detectron2.modeling import DatasetMapperTTA, detector_postprocess
from detectron2.structures import Instances
from torch import nn

from ..ops import Candidates
from .fcos import FCOS
from .structures import to_instances


class FCOSWithTTA(nn.Module):
    """FCOS applied to several views of every image; same inputs and outputs as ``FCOS``.

    Pass images at their original size: enlarging a reduced image adds no detail.

    Args:
        model: the detector.
        views: input dict (``image`` uint8 Tensor[C, H, W], ``height``, ``width``) -> one dict per
            view, with the ``transforms`` that produced its ``image`` from the original one.
    """

    @configurable
    def __init__(self, *, model: FCOS, views: Callable[[dict], list[dict]]):
        super().__init__()
        self.model, self.views = model, views

    @classmethod
    def from_config(cls, cfg, model: FCOS):
        """Returns the arguments from TEST.AUG.MIN_SIZES, MAX_SIZE and FLIP."""
        return {"model": model, "views": DatasetMapperTTA(cfg)}

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict]) -> list[dict]:
        """Returns a dict with ``instances`` per image, in pixels of (``height``, ``width``)."""
        return [{"instances": self._detect(image)} for image in batched_inputs]

    def _detect(self, original: dict) -> Instances:
        image = original["image"]
        height = original.get("height", image.shape[1])
        width = original.get("width", image.shape[2])
        views = self.views({"image": image, "height": height, "width": width})
        found = [part for batch in _batches(views) for part in self._select(batch)]
        merged = Candidates(*(torch.cat(column)[None] for column in zip(*found, strict=True)))
        detections = self.model.postprocess.suppress(merged)
        instances = to_instances(detections, [(height, width)])[0]
        return detector_postprocess(instances, height, width)

    def _select(self, views: Sequence[dict]) -> Iterator[Candidates]:
        """Yields the candidates of every view, in pixels of the original image."""
        batch = self.model.select(*self.model.dense_predictions(views))
        for view, boxes, scores, classes in zip(views, *batch, strict=True):
            back = view["transforms"].inverse()
            original = torch.from_numpy(back.apply_box(boxes.cpu().numpy()))
            yield Candidates(original.to(boxes), scores, classes)


def _batches(views: Sequence[dict]) -> Iterator[list[dict]]:
    """Yields batches of consecutive views of equal size, which need no padding."""
    for _, batch in groupby(views, key=lambda view: view["image"].shape):
        yield list(batch)
