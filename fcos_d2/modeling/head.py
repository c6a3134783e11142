"""FCOSHead: the fully convolutional head shared by all levels (1904.01355 figure 2).

Parameter names are those of AdelaiDet's head (``cls_tower``, ``bbox_tower``, ``cls_logits``,
``bbox_pred``, ``ctrness``, ``scales``), so that its checkpoints differ only by a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..config import fcos_settings
from .structures import Predictions, check_choice

NORMS = ("GN", "BN", "SyncBN", "none", "")


class Scale(nn.Module):
    """Multiplies by a learnable scalar, ``s_i`` of 1904.01355 section 3.2."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Tensor of any shape -> same shape."""
        return x * self.scale


class DeformableConv(nn.Module):
    """3x3 modulated deformable convolution (DCNv2, 1811.11168) that predicts its own offsets.

    The 27 offset channels are 9 pairs (y, x) and 9 mask logits. They start at zero, so training
    starts from a plain convolution whose mask is 1/2.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.offset = nn.Conv2d(in_channels, 27, 3, padding=1)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, in_channels, H, W] -> Tensor[B, out_channels, H, W]."""
        # Not in autocast's dtype: unsupported by the kernels, and too coarse for positions.
        weight, bias = self.conv.weight, self.conv.bias
        offset, mask = self.offset(x).to(weight.dtype).split((18, 9), dim=1)
        return deform_conv2d(
            x.to(weight.dtype), offset, weight, bias, padding=1, mask=mask.sigmoid()
        )


class Tower(nn.Sequential):
    """3x3 convolutions, each followed by a norm and ReLU, applied to every level.

    Convolutions are shared between levels. Batch norms have separate statistics and weights for
    each level, because features of different levels differ in distribution.
    """

    def __init__(
        self, channels: int, num_convs: int, norm: str, num_levels: int, deformable: bool = False
    ):
        layers: list[nn.Module] = []
        for i in range(num_convs):
            if deformable and i == num_convs - 1:
                layers.append(DeformableConv(channels, channels))
            else:
                layers.append(nn.Conv2d(channels, channels, 3, padding=1))
            if norm in ("BN", "SyncBN"):
                layers.append(nn.ModuleList(get_norm(norm, channels) for _ in range(num_levels)))
            elif norm:
                layers.append(get_norm(norm, channels))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Tensor[B, C, H, W] of pyramid level ``level`` -> same shape."""
        for layer in self:
            x = layer[level](x) if isinstance(layer, nn.ModuleList) else layer(x)
        return x


class FCOSHead(nn.Module):
    """Predicts class logits, distances to the sides of the box and box quality at every point.

    Args:
        in_channels: channels of every input feature map.
        num_classes: K, without background.
        strides: stride of each level, in pixels.
        num_cls_convs: convolutions of the classification tower.
        num_box_convs: convolutions of the box tower.
        num_share_convs: convolutions before both towers.
        norm: "GN", "BN", "SyncBN", or "" or "none".
        use_deformable: end both towers with a deformable convolution.
        prior_prob: initial probability of every class, in (0, 1).
        use_scale: one learnable factor per level on the box prediction.
        use_relu: distances are relu(x) instead of exp(x).
        norm_reg_targets: distances are predicted in strides instead of pixels.
        quality_on_box_tower: predict box quality from the box tower instead of the class tower.
        yield_box_features: fill ``Predictions.box_features``.

    Raises:
        ValueError: the norm is unknown, or is GN and 32 does not divide the number of channels.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        strides: Sequence[int],
        num_cls_convs: int = 4,
        num_box_convs: int = 4,
        num_share_convs: int = 0,
        norm: str = "GN",
        use_deformable: bool = False,
        prior_prob: float = 0.01,
        use_scale: bool = True,
        use_relu: bool = True,
        norm_reg_targets: bool = True,
        quality_on_box_tower: bool = True,
        yield_box_features: bool = False,
    ):
        super().__init__()
        check_choice("NORM", norm, NORMS)
        if norm == "GN" and in_channels % 32:
            raise ValueError(
                f"FCOSHead: norm GN needs channels divisible by 32, got {in_channels}; "
                "set MODEL.FCOS.NORM BN or MODEL.FPN.OUT_CHANNELS to a multiple of 32"
            )
        self.strides = tuple(strides)
        self.use_relu, self.norm_reg_targets = use_relu, norm_reg_targets
        self.quality_on_box_tower = quality_on_box_tower
        self.yield_box_features = yield_box_features
        norm = "" if norm == "none" else norm
        num_levels = len(self.strides)
        self.share_tower = Tower(in_channels, num_share_convs, norm, num_levels)
        self.cls_tower = Tower(in_channels, num_cls_convs, norm, num_levels, use_deformable)
        self.bbox_tower = Tower(in_channels, num_box_convs, norm, num_levels, use_deformable)
        self.cls_logits = nn.Conv2d(in_channels, num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.ctrness = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in self.strides) if use_scale else None
        self._init_weights(prior_prob)

    @classmethod
    def from_config(cls, cfg, input_shape: Sequence[ShapeSpec]):
        """Returns the arguments from ``cfg`` and the shapes of the head's input feature maps."""
        fcos = fcos_settings(cfg)
        return {
            "in_channels": input_shape[0].channels,
            "num_classes": fcos.NUM_CLASSES,
            "strides": fcos.FPN_STRIDES,
            "num_cls_convs": fcos.NUM_CLS_CONVS,
            "num_box_convs": fcos.NUM_BOX_CONVS,
            "num_share_convs": fcos.NUM_SHARE_CONVS,
            "norm": fcos.NORM,
            "use_deformable": fcos.USE_DEFORMABLE,
            "prior_prob": fcos.PRIOR_PROB,
            "use_scale": fcos.USE_SCALE,
            "use_relu": fcos.USE_RELU,
            "norm_reg_targets": fcos.NORM_REG_TARGETS,
            "quality_on_box_tower": fcos.CENTERNESS_ON_REG,
            "yield_box_features": fcos.YIELD_BOX_FEATURES,
        }

    def forward(self, features: Sequence[Tensor]) -> Predictions:
        """One Tensor[B, C, H, W] per level -> Predictions."""
        if len(features) != len(self.strides):
            raise ValueError(
                f"FCOSHead: expected {len(self.strides)} feature maps, one per stride "
                f"{list(self.strides)}, got {len(features)}; make MODEL.FCOS.IN_FEATURES and "
                "FPN_STRIDES equally long"
            )
        predictions = Predictions([], [], [], [])
        for level, feature in enumerate(features):
            feature = self.share_tower(feature, level)
            cls_feature = self.cls_tower(feature, level)
            box_feature = self.bbox_tower(feature, level)
            quality_feature = box_feature if self.quality_on_box_tower else cls_feature
            ltrb = self._distances(self.bbox_pred(box_feature), level)
            predictions.logits.append(self.cls_logits(cls_feature))
            predictions.ltrb.append(ltrb)
            # Under autocast, scale and exp return float32, and box_loss expects equal dtypes.
            predictions.quality.append(self.ctrness(quality_feature).to(ltrb.dtype))
            if self.yield_box_features:
                predictions.box_features.append(box_feature)
        return predictions

    def _distances(self, x: Tensor, level: int) -> Tensor:
        if self.scales is not None:
            x = self.scales[level](x)
        x = x.relu() if self.use_relu else x.exp()
        return x if self.norm_reg_targets else x / self.strides[level]

    def _init_weights(self, prior_prob: float) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith(".offset"):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, math.log(prior_prob / (1 - prior_prob)))
