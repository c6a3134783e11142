"""The tensors of every other FCOS, by their complete real names and shapes.

peer_tensors.json.gz was written by running the code of each: ``model.state_dict()`` of the models
that its keys name. What differs between two models by a rule is derived (``VARIANTS``).
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import torch
from torch import Tensor

LISTS = json.loads(gzip.decompress(Path(__file__).with_name("peer_tensors.json.gz").read_bytes()))
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
LEVELS = 5
DCN_HEAD = (
    (r"(.*_tower\.9)\.weight", r"\1.conv.weight", r"\1.offset.weight", r"\1.offset.bias"),
    (r"(.*_tower\.9)\.bias", r"\1.conv.bias"),
)
# Name -> (list that it is made from, rules: pattern of names, and the names that replace them).
VARIANTS = {
    "original_R_50_dcn": (
        "original_R_50",
        (r"(.*layer[234]\.\d\.conv2)\.weight", r"\1.conv.weight")
        + (r"\1.offset.weight", r"\1.offset.bias"),
        *DCN_HEAD,
    ),
    "adelaidet_R_50_dcn": (
        "adelaidet_R_50",
        (r"(.*res[345]\.\d\.conv2)\.weight", r"\1.weight")
        + (r"\1_offset.weight", r"\1_offset.bias"),
        *DCN_HEAD,
    ),
    "adelaidet_R_50_bn": (
        "adelaidet_R_50",
        (
            r"(.*_tower\.(?:1|4|7|10))\.weight",
            *(rf"\1.{level}.{leaf}" for level in range(LEVELS) for leaf in BATCH_NORM),
        ),
        (r"(.*_tower\.(?:1|4|7|10))\.bias",),
    ),
    "adelaidet_RT_DLA_34": (
        "adelaidet_RT_DLA_34_shtw",
        (r"(.*)share_tower(.*)", r"\1cls_tower\2", r"\1bbox_tower\2"),
    ),
    "adelaidet_RT_DLA_34_bn": (
        "adelaidet_RT_DLA_34_shtw_bn",
        (r"(.*)share_tower(.*)", r"\1cls_tower\2", r"\1bbox_tower\2"),
    ),
    "torchvision_0.12": (
        "torchvision_R_50",
        (r"(.*(?:inner|layer)_blocks\.\d)\.0(.*)", r"\1\2"),
        (r".*num_batches_tracked",),
    ),
    "mmdetection_2.0": (
        "mmdetection_R_50_base",
        (r"(.*)conv_(cls|reg|centerness)(.*)", r"\1fcos_\2\3"),
    ),
    "mmdetection_R_50_bn": (
        "mmdetection_R_50_tricks",
        (r"(.*)\.gn\.weight", *(rf"\1.bn.{leaf}" for leaf in BATCH_NORM)),
        (r".*\.gn\.bias",),
    ),
}
# A module of each kind, theirs and ours; @ is the backbone.
SAMPLES = dict(
    row.replace("@", "backbone.bottom_up.").split()
    for row in """
    @stem.conv1                                           @stem.conv1
    @stem.conv1.norm                                      @stem.conv1.norm
    @res3.2.conv2                                         @res3.2.conv2
    @res3.2.conv2.norm                                    @res3.2.conv2.norm
    @res4.1.conv2_offset                                  @res4.1.conv2_offset
    @res4.0.shortcut                                      @res4.0.shortcut
    @res4.0.shortcut.norm                                 @res4.0.shortcut.norm
    backbone.fpn_lateral4                                 backbone.fpn_lateral4
    backbone.fpn_output3                                  backbone.fpn_output3
    backbone.top_block.p7                                 backbone.top_block.p7
    proposal_generator.fcos_head.cls_tower.3              head.cls_tower.3
    proposal_generator.fcos_head.bbox_tower.6             head.bbox_tower.6
    proposal_generator.fcos_head.bbox_tower.4             head.bbox_tower.4
    proposal_generator.fcos_head.bbox_tower.9.conv        head.bbox_tower.9.conv
    proposal_generator.fcos_head.cls_tower.9.offset       head.cls_tower.9.offset
    proposal_generator.fcos_head.bbox_tower.9.offset      head.bbox_tower.9.offset
    proposal_generator.fcos_head.cls_tower.9.conv         head.cls_tower.9.conv
    proposal_generator.fcos_head.cls_tower.4.2            head.cls_tower.4.2
    proposal_generator.fcos_head.bbox_tower.4.2           head.bbox_tower.4.2
    proposal_generator.fcos_head.share_tower.6            head.share_tower.6
    proposal_generator.fcos_head.share_tower.7.1          head.share_tower.7.1
    proposal_generator.fcos_head.cls_logits               head.cls_logits
    proposal_generator.fcos_head.bbox_pred                head.bbox_pred
    proposal_generator.fcos_head.ctrness                  head.ctrness
    proposal_generator.fcos_head.scales.2                 head.scales.2
    @base_layer.0                                         @body.base_layer.0
    @level1.1                                             @body.level1.1
    @level2.project.1                                     @body.level2.project.1
    @level5.root.conv                                     @body.level5.root.conv
    @level5.root.bn                                       @body.level5.root.bn
    @level2.tree1.conv2                                   @body.level2.tree1.conv2
    @level2.tree2.bn1                                     @body.level2.tree2.bn1
    @level3.tree1.project.0                               @body.level3.tree1.project.0
    @level4.tree2.root.conv                               @body.level4.tree2.root.conv
    @level4.tree2.root.bn                                 @body.level4.tree2.root.bn
    @level4.tree2.tree1.conv2                             @body.level4.tree2.tree1.conv2
    @level3.tree1.tree2.bn2                               @body.level3.tree1.tree2.bn2
    @stem.stem_2/conv                                     @body.stem_1.conv
    @stem.stem_3/norm                                     @body.stem_2.bn
    @stage4.OSA4_2.layers.3.OSA4_2_3/conv                 @body.stages_2.blocks.1.conv_mid.3.conv
    @stage4.OSA4_1.layers.2.OSA4_1_2/norm                 @body.stages_2.blocks.0.conv_mid.2.bn
    @stage5.OSA5_2.concat.OSA5_2_concat/conv              @body.stages_3.blocks.1.conv_concat.conv
    @stage2.OSA2_1.concat.OSA2_1_concat/norm              @body.stages_0.blocks.0.conv_concat.bn
    @stage3.OSA3_1.ese.fc                                 @body.stages_1.blocks.0.attn.fc
    head.cls_subnet.6                                     head.cls_tower.6
    head.bbox_subnet.7                                    head.bbox_tower.7
    head.cls_score                                        head.cls_logits
    head.bbox_pred                                        head.bbox_pred
    head.ctrness                                          head.ctrness
    head.centerness                                       head.ctrness
    head.scales.3                                         head.scales.3
    backbone.body.stem.conv1                              @stem.conv1
    backbone.body.conv1                                   @stem.conv1
    backbone.body.bn1                                     @stem.conv1.norm
    backbone.body.stem.bn1                                @stem.conv1.norm
    backbone.body.layer3.4.bn3                            @res4.4.conv3.norm
    backbone.body.layer3.4.conv3                          @res4.4.conv3
    backbone.body.layer2.1.conv2.conv                     @res3.1.conv2
    backbone.body.layer2.1.conv2.offset                   @res3.1.conv2_offset
    backbone.body.layer4.0.downsample.0                   @res5.0.shortcut
    backbone.fpn.fpn_inner3                               backbone.fpn_lateral4
    backbone.fpn.fpn_layer4                               backbone.fpn_output5
    backbone.fpn.top_blocks.p6                            backbone.top_block.p6
    rpn.head.cls_tower.3                                  head.cls_tower.3
    rpn.head.bbox_tower.4                                 head.bbox_tower.4
    rpn.head.cls_tower.9.offset                           head.cls_tower.9.offset
    rpn.head.bbox_tower.9.offset                          head.bbox_tower.9.offset
    rpn.head.cls_tower.9.conv                             head.cls_tower.9.conv
    rpn.head.bbox_tower.9.conv                            head.bbox_tower.9.conv
    rpn.head.cls_logits                                   head.cls_logits
    rpn.head.bbox_pred                                    head.bbox_pred
    rpn.head.centerness                                   head.ctrness
    rpn.head.scales.1                                     head.scales.1
    backbone.body.features.0.0                            @body.conv_stem
    backbone.body.features.0.1                            @body.bn1
    backbone.body.features.1.conv.0                       @body.blocks.0.0.conv_dw
    backbone.body.features.1.conv.3                       @body.blocks.0.0.conv_pw
    backbone.body.features.1.conv.4                       @body.blocks.0.0.bn2
    backbone.body.features.6.conv.0                       @body.blocks.2.2.conv_pw
    backbone.body.features.12.conv.3                      @body.blocks.4.1.conv_dw
    backbone.body.features.12.conv.4                      @body.blocks.4.1.bn2
    backbone.body.features.17.conv.6                      @body.blocks.6.0.conv_pwl
    backbone.body.features.17.conv.7                      @body.blocks.6.0.bn3
    backbone.fpn.inner_blocks.1.0                         backbone.fpn_lateral4
    backbone.fpn.layer_blocks.2.0                         backbone.fpn_output5
    backbone.fpn.inner_blocks.1                           backbone.fpn_lateral4
    backbone.fpn.layer_blocks.2                           backbone.fpn_output5
    backbone.fpn.extra_blocks.p7                          backbone.top_block.p7
    head.classification_head.conv.6                       head.cls_tower.6
    head.regression_head.conv.1                           head.bbox_tower.1
    head.regression_head.bbox_reg                         head.bbox_pred
    head.regression_head.bbox_ctrness                     head.ctrness
    backbone.conv1                                        @stem.conv1
    backbone.bn1                                          @stem.conv1.norm
    backbone.layer2.3.conv2                               @res3.3.conv2
    backbone.layer2.3.bn2                                 @res3.3.conv2.norm
    backbone.layer4.2.conv2.conv_offset                   @res5.2.conv2_offset
    backbone.layer1.0.downsample.1                        @res2.0.shortcut.norm
    neck.lateral_convs.2.conv                             backbone.fpn_lateral5
    neck.fpn_convs.0.conv                                 backbone.fpn_output3
    neck.fpn_convs.4.conv                                 backbone.top_block.p7
    bbox_head.cls_convs.2.conv                            head.cls_tower.6
    bbox_head.reg_convs.1.gn                              head.bbox_tower.4
    bbox_head.cls_convs.2.gn                              head.cls_tower.7
    bbox_head.reg_convs.1.conv                            head.bbox_tower.3
    bbox_head.cls_convs.3.conv.conv_offset                head.cls_tower.9.offset
    bbox_head.reg_convs.3.conv.conv_offset                head.bbox_tower.9.offset
    bbox_head.conv_cls                                    head.cls_logits
    bbox_head.conv_reg                                    head.bbox_pred
    bbox_head.conv_centerness                             head.ctrness
    bbox_head.fcos_cls                                    head.cls_logits
    bbox_head.fcos_reg                                    head.bbox_pred
    bbox_head.fcos_centerness                             head.ctrness
    backbone.stem.stem_1/conv                             @body.stem_0.conv
    backbone.stem.stem_2/norm                             @body.stem_1.bn
    backbone.stage5.OSA5_2.layers.4.OSA5_2_4/conv         @body.stages_3.blocks.1.conv_mid.4.conv
    backbone.stage3.OSA3_1.layers.1.OSA3_1_1/norm         @body.stages_1.blocks.0.conv_mid.1.bn
    backbone.stage4.OSA4_2.concat.OSA4_2_concat/conv      @body.stages_2.blocks.1.conv_concat.conv
    backbone.stage4.OSA4_2.concat.OSA4_2_concat/norm      @body.stages_2.blocks.1.conv_concat.bn
    fpn.inner_convs.2                                     backbone.fpn_lateral3
    fpn.out_convs.4                                       backbone.fpn_output5
    fpn.top_blocks.p7                                     backbone.top_block.p7
    head.cls_tower.3                                      head.cls_tower.3
    head.bbox_tower.10                                    head.bbox_tower.10
    head.cls_pred                                         head.cls_logits
    head.center_pred                                      head.ctrness
    backbone.conv1.conv1.conv                             @stem.conv1
    backbone.conv1.conv1.norm                             @stem.conv1.norm
    backbone.res4.res4f.branch2a.conv                     @res4.5.conv1
    backbone.res4.res4f.branch2a.norm                     @res4.5.conv1.norm
    backbone.res2.res2b.branch2b.conv                     @res2.1.conv2
    backbone.res2.res2b.branch2b.norm                     @res2.1.conv2.norm
    backbone.res3.res3d.branch2c.conv                     @res3.3.conv3
    backbone.res5.res5c.branch2c.norm                     @res5.2.conv3.norm
    backbone.res5.res5a.short.conv                        @res5.0.shortcut
    backbone.res5.res5a.short.norm                        @res5.0.shortcut.norm
    neck.fpn_inner_res3_sum_lateral                       backbone.fpn_lateral3
    neck.fpn_inner_res5_sum                               backbone.fpn_lateral5
    neck.fpn_res4_sum                                     backbone.fpn_output4
    neck.fpn_6                                            backbone.top_block.p6
    fcos_head.fcos_feat.fcos_head_cls_tower_conv_2.conv   head.cls_tower.6
    fcos_head.fcos_feat.fcos_head_cls_tower_conv_2.norm   head.cls_tower.7
    fcos_head.fcos_feat.fcos_head_reg_tower_conv_3.conv   head.bbox_tower.9
    fcos_head.fcos_feat.fcos_head_reg_tower_conv_3.norm   head.bbox_tower.10
    fcos_head.fcos_head_cls                               head.cls_logits
    fcos_head.fcos_head_reg                               head.bbox_pred
    fcos_head.fcos_head_centerness                        head.ctrness
    bbox_head.cls_convs.2.bn                              head.cls_tower.7
    bbox_head.reg_convs.1.bn                              head.bbox_tower.4
    bbox_head.scales.2                                    head.scales.2
    fcos_head.p5_feat                                     head.scales.2
    head.cls_subnet.4.2                                   head.cls_tower.4.2
    head.bbox_subnet.4.2                                  head.bbox_tower.4.2
    head.classification_head.cls_logits                   head.cls_logits
""".strip().splitlines()
)


def shapes_of(name: str) -> dict[str, list[int]]:
    """All tensors of a model of ``LISTS`` or ``VARIANTS``."""
    if name in LISTS:
        return LISTS[name]
    source, *rules = VARIANTS[name]
    shapes = dict(LISTS[source])
    for pattern, *names in rules:
        for key in [key for key in shapes if re.fullmatch(pattern, key)]:
            shape = shapes.pop(key)
            for new in (re.sub(pattern, name, key) for name in names):
                offset = [27, *shape[1:]] if new.endswith("weight") else [27]
                counter = [] if new.endswith("num_batches_tracked") else shape
                shapes[new] = offset if "offset" in new else counter
    return shapes


def weights(name: str) -> dict[str, Tensor]:
    """Random weights, each a number that is expanded to the shape, so that they cost nothing."""
    tensors = {}
    for key, shape in shapes_of(name).items():
        number = torch.rand(1) + 0.1 if key.endswith(("var", "variance")) else torch.randn(1)
        tensors[key] = number.reshape(()).expand(shape)
    return tensors
