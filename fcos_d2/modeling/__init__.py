"""The detector. Importing it registers its parts with detectron2.

Shapes used in all modules: B images, L pyramid levels, P points of all levels together
(level-major, row-major inside a level), M ground-truth boxes of the whole batch, K classes, D
detections per image. Boxes are xyxy in pixels of the network input; ltrb are distances from a point
to the four sides of a box, in strides. Background label = K, ignored label = -1.
"""

from .backbone import build_fcos_d2_resnet_fpn_backbone, build_fpn, use_torchvision_deform_conv
from .fcos import FCOS
from .head import FCOSHead
from .losses import FCOSLoss
from .postprocess import PostProcessor
from .proposals import FCOSProposals
from .structures import GroundTruth, PointGrid, Predictions, pack_ground_truth, to_instances
from .timm_backbone import (
    TimmBackbone,
    build_fcos_d2_vovnet_fpn_backbone,
    build_fcos_timm_fpn_backbone,
)
from .timm_weights import TimmWeights

__all__ = [
    "FCOS",
    "FCOSHead",
    "FCOSLoss",
    "FCOSProposals",
    "GroundTruth",
    "PointGrid",
    "PostProcessor",
    "Predictions",
    "TimmBackbone",
    "TimmWeights",
    "build_fcos_d2_resnet_fpn_backbone",
    "build_fcos_timm_fpn_backbone",
    "build_fcos_d2_vovnet_fpn_backbone",
    "build_fpn",
    "pack_ground_truth",
    "to_instances",
    "use_torchvision_deform_conv",
]
