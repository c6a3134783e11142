"""FCOS as a detectron2 meta-architecture (1904.01355 figure 2), connecting its parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ..config import fcos_settings
from ..ops import Candidates, Detections, Levels
from .acceleration import fold_frozen_norms
from .backbone import build_named_backbone
from .head import FCOSHead
from .losses import FCOSLoss
from .postprocess import PostProcessor
from .structures import PointGrid, Predictions, pack_ground_truth, to_instances

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class FCOS(DenseDetector):
    """Backbone -> head -> losses in training, detections in evaluation.

    Takes and returns what every detectron2 detector does: a list of dicts with ``image`` (and
    ``instances`` in training) in; a dict of losses, or a list of dicts with ``instances``
    (``pred_boxes``, ``scores``, ``pred_classes``) out.

    Args:
        backbone: returns the feature maps by name.
        head: feature maps -> Predictions.
        losses: Predictions and ground truth -> losses.
        postprocess: Predictions -> Detections.
        grid: lays points over the feature maps.
        head_in_features: names of the feature maps the head reads, by ascending stride.
        pixel_mean: mean of each channel, in the order of the input.
        pixel_std: standard deviation of each channel, in the order of the input.
        input_format: "BGR" or "RGB", channel order of the input.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: FCOSHead,
        losses: FCOSLoss,
        postprocess: PostProcessor,
        grid: PointGrid,
        head_in_features: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
    ):
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        fold_frozen_norms(backbone)
        self.losses, self.postprocess, self.grid = losses, postprocess, grid
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg):
        """Returns the arguments from ``cfg``."""
        backbone = build_named_backbone(cfg)
        _warn_about_unused_maps(backbone, fcos_settings(cfg).IN_FEATURES)
        return {
            "backbone": backbone,
            **build_parts(cfg, backbone.output_shape()),
            "postprocess": PostProcessor(cfg),
            "head_in_features": fcos_settings(cfg).IN_FEATURES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def dense_predictions(
        self, batched_inputs: Sequence[dict]
    ) -> tuple[ImageList, list[Tensor], Predictions]:
        """Returns the padded and normalized batch, its feature maps, and the predictions."""
        images = self.preprocess_image(batched_inputs)
        return images, *self.network(images.tensor)

    def preprocess_image(self, batched_inputs: Sequence[dict]) -> ImageList:
        """Returns the padded and normalized batch, in the dtype of the weights."""
        images = super().preprocess_image(batched_inputs)
        return ImageList(images.tensor.to(self.pixel_mean.dtype), images.image_sizes)

    def network(self, images: Tensor) -> tuple[list[Tensor], Predictions]:
        """Normalized Tensor[B, C, H, W] -> feature maps and predictions, by ascending stride."""
        maps = self.backbone(images)
        features = [maps[name] for name in self.head_in_features]
        return features, self.head(features)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: Predictions,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Returns the losses by name."""
        return self.losses(
            predictions, pack_ground_truth(gt_instances), self.levels(features, images)
        )

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: Predictions
    ) -> list[Instances]:
        """Returns the detections of each image, in pixels of the network input."""
        detections = self.detect(images, features, predictions)
        return to_instances(detections, images.image_sizes)

    def detect(
        self, images: ImageList, features: list[Tensor], predictions: Predictions
    ) -> Detections:
        """Returns detections of the whole batch in fixed shapes, without host synchronization."""
        return self.postprocess.suppress(self.select(images, features, predictions))

    def select(
        self, images: ImageList, features: list[Tensor], predictions: Predictions
    ) -> Candidates:
        """Returns the candidates for NMS."""
        sizes = torch.tensor([tuple(size) for size in images.image_sizes])
        sizes = sizes.to(self.device, non_blocking=True)
        return self.postprocess.select(predictions, self.levels(features, images), sizes)

    def levels(self, features: list[Tensor], images: ImageList) -> Levels:
        """Returns the geometry of the points of ``features`` in ``images``."""
        return self.grid.levels(features, images.tensor)


def _warn_about_unused_maps(backbone: Backbone, in_features: Sequence[str]) -> None:
    unused = [name for name in backbone.output_shape() if name not in in_features]
    if unused:
        logger.warning(
            f"the backbone computes {', '.join(unused)}, which MODEL.FCOS.IN_FEATURES does not "
            "use: this is wasteful, and fails on several GPUs, since its parameters get no "
            "gradient; lower MODEL.FCOS.TOP_LEVELS or shorten MODEL.FPN.IN_FEATURES"
        )


def build_parts(cfg, backbone_shape: dict) -> dict[str, object]:
    """Builds head, losses and point grid from ``cfg`` for a backbone with the given output shape.

    Raises:
        ValueError: IN_FEATURES or FPN_STRIDES do not match the backbone.
    """
    fcos = fcos_settings(cfg)
    missing = [name for name in fcos.IN_FEATURES if name not in backbone_shape]
    if missing:
        raise ValueError(
            f"FCOS: MODEL.FCOS.IN_FEATURES names {missing}, but the backbone returns "
            f"{list(backbone_shape)}; change IN_FEATURES, TOP_LEVELS or MODEL.FPN.IN_FEATURES"
        )
    shapes = [backbone_shape[name] for name in fcos.IN_FEATURES]
    strides = [shape.stride for shape in shapes]
    if strides != list(fcos.FPN_STRIDES):
        raise ValueError(
            f"FCOS: MODEL.FCOS.FPN_STRIDES is {list(fcos.FPN_STRIDES)}, but IN_FEATURES "
            f"{list(fcos.IN_FEATURES)} have strides {strides}; set it to these"
        )
    return {
        "head": FCOSHead(cfg, shapes),
        "losses": FCOSLoss(cfg),
        "grid": PointGrid(fcos.FPN_STRIDES, fcos.LOCATION_OFFSET, fcos.LOCATION_PITCH),
    }
