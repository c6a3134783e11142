"""Backbones of FCOS: an FPN with extra levels computed from P5 or C5 (1904.01355 section 3.2).

The bottom-up network is detectron2's ResNet, with deformable convolutions on torchvision's kernel.
"""

from __future__ import annotations

import math

import fvcore.nn.weight_init as weight_init
from detectron2.layers import DeformConv, ModulatedDeformConv, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..config import fcos_settings


class DeformConv2d(nn.Module):
    """A deformable convolution of a detectron2 ResNet (DCN or DCNv2) on torchvision's kernel.

    detectron2's own layer needs its compiled extension and, for DCNv2, a GPU. Parameter names are
    the same.

    Args:
        conv: layer whose weight, norm and geometry are reused.
    """

    def __init__(self, conv: DeformConv | ModulatedDeformConv):
        super().__init__()
        self.weight, self.norm = conv.weight, conv.norm
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolves at shifted positions.

        Args:
            x: Tensor[B, C, H, W].
            offset: Tensor[B, 18 G, H', W'], shifts (y, x) of 9 taps for each of G channel groups.
            mask: Tensor[B, 9 G, H', W'], weight of each tap; None for all ones.

        Returns:
            Tensor[B, C', H', W'].
        """
        # Not in autocast's dtype, which is too coarse for positions.
        x, offset = x.to(self.weight.dtype), offset.to(self.weight.dtype)
        mask = None if mask is None else mask.to(self.weight.dtype)
        geometry = self.stride, self.padding, self.dilation
        x = deform_conv2d(x, offset, self.weight, None, *geometry, mask)
        return x if self.norm is None else self.norm(x)


def use_torchvision_deform_conv(module: nn.Module) -> nn.Module:
    """Replaces detectron2's deformable convolutions inside ``module`` by DeformConv2d, in place."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (DeformConv, ModulatedDeformConv)):
                parent.add_module(name, DeformConv2d(child))
    return module


class LastLevelP6(nn.Module):
    """Adds only P6: a 3x3 convolution with stride 2 on P5 or C5."""

    num_levels = 1

    def __init__(self, in_channels: int, out_channels: int, in_feature: str):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        weight_init.c2_xavier_fill(self.p6)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Tensor[B, in_channels, H, W] -> [Tensor[B, out_channels, H/2, W/2]]."""
        return [self.p6(x)]


def build_fpn(cfg, bottom_up: Backbone) -> FPN:
    """Builds an FPN on ``bottom_up`` with ``MODEL.FCOS.TOP_LEVELS`` extra levels.

    Raises:
        ValueError: MODEL.FPN.IN_FEATURES, TOP_LEVELS or TOP_LEVELS_FROM is invalid.
    """
    fcos = fcos_settings(cfg)
    top_levels, source, channels = fcos.TOP_LEVELS, fcos.TOP_LEVELS_FROM, cfg.MODEL.FPN.OUT_CHANNELS
    shapes, in_features = bottom_up.output_shape(), list(cfg.MODEL.FPN.IN_FEATURES)
    if not in_features or not set(in_features) <= set(shapes):
        raise ValueError(
            f"FCOS: MODEL.FPN.IN_FEATURES must name feature maps of the backbone, {list(shapes)}, "
            f"got {in_features}; change it or MODEL.RESNETS.OUT_FEATURES"
        )
    if top_levels not in (0, 1, 2):
        raise ValueError(f"FCOS: MODEL.FCOS.TOP_LEVELS must be 0, 1 or 2, got {top_levels!r}")
    last = shapes[in_features[-1]]
    sources = {f"p{int(math.log2(last.stride))}": channels, in_features[-1]: last.channels}
    if top_levels and source not in sources:
        raise ValueError(
            f"FCOS: MODEL.FCOS.TOP_LEVELS_FROM must be one of {', '.join(sources)}, the last level "
            f"of MODEL.FPN.IN_FEATURES {in_features}, got {source!r}"
        )
    blocks = {1: LastLevelP6, 2: LastLevelP6P7}
    return FPN(
        bottom_up=bottom_up,
        in_features=in_features,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=blocks[top_levels](sources[source], channels, source) if top_levels else None,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_fcos_d2_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Builds detectron2's ResNet or ResNeXt (``MODEL.RESNETS``, including DCN) with an FPN."""
    return build_fpn(cfg, use_torchvision_deform_conv(build_resnet_backbone(cfg, input_shape)))


# AdelaiDet's backbone names; they refer to our backbones unless AdelaiDet has registered its own.
ADELAIDET_NAMES = {
    "build_fcos_resnet_fpn_backbone": "build_fcos_d2_resnet_fpn_backbone",
    "build_fcos_vovnet_fpn_backbone": "build_fcos_d2_vovnet_fpn_backbone",
}


def build_named_backbone(cfg) -> Backbone:
    """Builds MODEL.BACKBONE.NAME, which may be a name from AdelaiDet's YAML files."""
    name = cfg.MODEL.BACKBONE.NAME
    if name in ADELAIDET_NAMES and name not in BACKBONE_REGISTRY:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.BACKBONE.NAME = ADELAIDET_NAMES[name]
    return build_backbone(cfg)
