"""FCOS as the proposal generator of a two-stage detector."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..config import fcos_settings
from .fcos import build_parts
from .head import FCOSHead
from .losses import FCOSLoss
from .postprocess import PostProcessor
from .structures import PointGrid, pack_ground_truth, to_instances


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCOSProposals(nn.Module):
    """Proposes FCOS's class-aware detections; ``objectness_logits`` are the logits of their scores.

    Args:
        head: feature maps -> Predictions.
        losses: Predictions and ground truth -> losses.
        grid: lays points over the feature maps.
        in_features: names of the feature maps the head reads.
        train_postprocess: selects the proposals for training; None trains only FCOS.
        test_postprocess: selects the proposals for evaluation.
    """

    @configurable
    def __init__(
        self,
        *,
        head: FCOSHead,
        losses: FCOSLoss,
        grid: PointGrid,
        in_features: list[str],
        train_postprocess: PostProcessor | None,
        test_postprocess: PostProcessor,
    ):
        super().__init__()
        self.head, self.losses, self.grid, self.in_features = head, losses, grid, in_features
        self.train_postprocess, self.test_postprocess = train_postprocess, test_postprocess

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Returns the arguments from ``cfg`` and the backbone's output shape.

        Raises:
            ValueError: ROI heads need proposals to train on, but YIELD_PROPOSAL is False.
        """
        fcos = fcos_settings(cfg)
        if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and not fcos.YIELD_PROPOSAL:
            raise ValueError(
                "FCOSProposals: the ROI heads of MODEL.META_ARCHITECTURE GeneralizedRCNN train on "
                "proposals; set MODEL.FCOS.YIELD_PROPOSAL True, or train FCOS alone with "
                "MODEL.META_ARCHITECTURE ProposalNetwork"
            )
        return {
            **build_parts(cfg, input_shape),
            "in_features": fcos.IN_FEATURES,
            "train_postprocess": PostProcessor(cfg, split="TRAIN") if fcos.YIELD_PROPOSAL else None,
            "test_postprocess": PostProcessor(cfg),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Returns proposals (``proposal_boxes``, ``objectness_logits``) per image, and losses.

        Evaluation returns no losses; training without ``train_postprocess`` returns no proposals.
        """
        maps = [features[name] for name in self.in_features]
        predictions = self.head(maps)
        levels = self.grid.levels(maps, images.tensor)
        losses = {}
        if self.training:
            losses = self.losses(predictions, pack_ground_truth(gt_instances), levels)
        postprocess = self.train_postprocess if self.training else self.test_postprocess
        if postprocess is None:
            return [], losses
        sizes = torch.tensor([tuple(size) for size in images.image_sizes])
        sizes = sizes.to(images.tensor.device, non_blocking=True)
        detections = postprocess(predictions, levels, sizes)
        found = to_instances(detections, images.image_sizes)
        return [_to_proposals(image) for image in found], losses


def _to_proposals(image: Instances) -> Instances:
    boxes = image.pred_boxes
    boxes.clip(image.image_size)
    return Instances(
        image.image_size, proposal_boxes=boxes, objectness_logits=torch.logit(image.scores)
    )
