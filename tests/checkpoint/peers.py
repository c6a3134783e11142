"""Tensor names and shapes of the models of every other FCOS implementation.

peer_tensors.json.gz maps names of models to the shapes in their ``model.state_dict()``, recorded by
running each implementation. ``VARIANTS`` derives other models from these.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import torch
from torch import Tensor

SHAPES = json.loads(gzip.decompress(Path(__file__).with_name("peer_tensors.json.gz").read_bytes()))
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
LEVELS = 5
DCN_HEAD = (
    (r"(.*_tower\.9)\.weight", r"\1.conv.weight", r"\1.offset.weight", r"\1.offset.bias"),
    (r"(.*_tower\.9)\.bias", r"\1.conv.bias"),
)
# Name -> model in SHAPES, and rules: a pattern of tensor names, and its replacements.
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
# One module of each kind, and its name here; @ is the backbone, <a|b> stands for two modules.
MODULES = """
    @stem.conv1<|.norm>                         @stem.conv1<|.norm>
    @res3.2.conv2<|.norm>                       @res3.2.conv2<|.norm>
    @res4.0.shortcut<|.norm>                    @res4.0.shortcut<|.norm>
    @res4.1.conv2_offset                        @res4.1.conv2_offset
    backbone.fpn_<lateral4|output3>             backbone.fpn_<lateral4|output3>
    backbone.top_block.p7                       backbone.top_block.p7
    proposal_generator.fcos_head.<cls|bbox>_tower.3         head.<cls|bbox>_tower.3
    proposal_generator.fcos_head.<cls|bbox>_tower.4         head.<cls|bbox>_tower.4
    proposal_generator.fcos_head.<cls|bbox>_tower.9.conv    head.<cls|bbox>_tower.9.conv
    proposal_generator.fcos_head.<cls|bbox>_tower.9.offset  head.<cls|bbox>_tower.9.offset
    proposal_generator.fcos_head.<cls|bbox>_tower.4.2       head.<cls|bbox>_tower.4.2
    proposal_generator.fcos_head.share_tower.<6|7.1>        head.share_tower.<6|7.1>
    proposal_generator.fcos_head.<cls_logits|bbox_pred>     head.<cls_logits|bbox_pred>
    proposal_generator.fcos_head.<ctrness|scales.2>         head.<ctrness|scales.2>

    @<base_layer.0|level1.1>                    @body.<base_layer.0|level1.1>
    @level2.project.<0|1>                       @body.level2.project.<0|1>
    @level2.<tree1.conv2|tree2.bn1>             @body.level2.<tree1.conv2|tree2.bn1>
    @level5.root.<conv|bn>                      @body.level5.root.<conv|bn>
    @level3.tree1.project.<0|1>                 @body.level3.tree1.project.<0|1>
    @level4.tree2.root.<conv|bn>                @body.level4.tree2.root.<conv|bn>
    @level4.tree2.tree1.<conv2|bn1>             @body.level4.tree2.tree1.<conv2|bn1>
    @stem.stem_2/<conv|norm>                    @body.stem_1.<conv|bn>
    @stage4.OSA4_2.layers.3.OSA4_2_3/<conv|norm>   @body.stages_2.blocks.1.conv_mid.3.<conv|bn>
    @stage5.OSA5_2.concat.OSA5_2_concat/<conv|norm>   @body.stages_3.blocks.1.conv_concat.<conv|bn>
    @stage3.OSA3_1.ese.fc                       @body.stages_1.blocks.0.attn.fc

    head.<cls|bbox>_subnet.6                    head.<cls|bbox>_tower.6
    head.<cls|bbox>_subnet.7                    head.<cls|bbox>_tower.7
    head.<cls|bbox>_subnet.4.2                  head.<cls|bbox>_tower.4.2
    head.<cls_score|bbox_pred>                  head.<cls_logits|bbox_pred>
    head.<ctrness|centerness>                   head.ctrness
    head.scales.3                               head.scales.3

    backbone.body.<stem.|>conv1                 @stem.conv1
    backbone.body.<stem.|>bn1                   @stem.conv1.norm
    backbone.body.layer3.4.<conv3|bn3>          @res4.4.conv3<|.norm>
    backbone.body.layer2.1.conv2.<conv|offset>  @res3.1.conv2<|_offset>
    backbone.body.layer4.0.downsample.<0|1>     @res5.0.shortcut<|.norm>
    backbone.fpn.fpn_<inner3|layer4>            backbone.fpn_<lateral4|output5>
    backbone.fpn.top_blocks.p6                  backbone.top_block.p6
    rpn.head.<cls|bbox>_tower.3                 head.<cls|bbox>_tower.3
    rpn.head.<cls|bbox>_tower.9.offset          head.<cls|bbox>_tower.9.offset
    rpn.head.<cls|bbox>_tower.9.conv            head.<cls|bbox>_tower.9.conv
    rpn.head.<cls_logits|bbox_pred>             head.<cls_logits|bbox_pred>
    rpn.head.<centerness|scales.1>              head.<ctrness|scales.1>
    backbone.body.features.0.<0|1>              @body.<conv_stem|bn1>
    backbone.body.features.1.conv.<0|3>         @body.blocks.0.0.<conv_dw|conv_pw>
    backbone.body.features.12.conv.<0|3>        @body.blocks.4.1.<conv_pw|conv_dw>
    backbone.body.features.12.conv.<4|6>        @body.blocks.4.1.<bn2|conv_pwl>

    backbone.fpn.inner_blocks.1<.0|>            backbone.fpn_lateral4
    backbone.fpn.layer_blocks.2<.0|>            backbone.fpn_output5
    backbone.fpn.extra_blocks.p7                backbone.top_block.p7
    head.<classification|regression>_head.conv.6   head.<cls|bbox>_tower.6
    head.classification_head.cls_logits         head.cls_logits
    head.regression_head.bbox_<reg|ctrness>     head.<bbox_pred|ctrness>

    backbone.<conv1|bn1>                        @stem.conv1<|.norm>
    backbone.layer2.3.<conv2|bn2>               @res3.3.conv2<|.norm>
    backbone.layer4.2.conv2.conv_offset         @res5.2.conv2_offset
    backbone.layer1.0.downsample.<0|1>          @res2.0.shortcut<|.norm>
    neck.<lateral_convs.2|fpn_convs.0>.conv     backbone.fpn_<lateral5|output3>
    neck.fpn_convs.4.conv                       backbone.top_block.p7
    bbox_head.<cls|reg>_convs.2.conv            head.<cls|bbox>_tower.6
    bbox_head.<cls|reg>_convs.1.gn              head.<cls|bbox>_tower.4
    bbox_head.<cls|reg>_convs.1.bn              head.<cls|bbox>_tower.4
    bbox_head.<cls|reg>_convs.3.conv.conv_offset   head.<cls|bbox>_tower.9.offset
    bbox_head.<conv|fcos>_cls                   head.cls_logits
    bbox_head.<conv|fcos>_reg                   head.bbox_pred
    bbox_head.<conv|fcos>_centerness            head.ctrness
    bbox_head.scales.2                          head.scales.2

    backbone.stem.stem_2/<conv|norm>            @body.stem_1.<conv|bn>
    backbone.stage5.OSA5_2.layers.4.OSA5_2_4/<conv|norm>
        @body.stages_3.blocks.1.conv_mid.4.<conv|bn>
    backbone.stage4.OSA4_2.concat.OSA4_2_concat/<conv|norm>
        @body.stages_2.blocks.1.conv_concat.<conv|bn>
    fpn.<inner_convs.2|out_convs.4>             backbone.fpn_<lateral3|output5>
    fpn.top_blocks.p7                           backbone.top_block.p7
    head.<cls|bbox>_tower.3                     head.<cls|bbox>_tower.3
    head.<cls|center>_pred                      head.<cls_logits|ctrness>

    backbone.conv1.conv1.<conv|norm>            @stem.conv1<|.norm>
    backbone.res4.res4f.branch2a.<conv|norm>    @res4.5.conv1<|.norm>
    backbone.res2.res2b.branch2b.<conv|norm>    @res2.1.conv2<|.norm>
    backbone.res3.res3d.branch2c.<conv|norm>    @res3.3.conv3<|.norm>
    backbone.res5.res5a.short.<conv|norm>       @res5.0.shortcut<|.norm>
    neck.fpn_inner_res<3_sum_lateral|5_sum>     backbone.fpn_lateral<3|5>
    neck.fpn_<res4_sum|6>                       backbone.<fpn_output4|top_block.p6>
    fcos_head.fcos_feat.fcos_head_<cls|reg>_tower_conv_2.conv   head.<cls|bbox>_tower.6
    fcos_head.fcos_feat.fcos_head_<cls|reg>_tower_conv_2.norm   head.<cls|bbox>_tower.7
    fcos_head.fcos_head_<cls|reg>               head.<cls_logits|bbox_pred>
    fcos_head.<fcos_head_centerness|p5_feat>    head.<ctrness|scales.2>
"""
COUNTERPARTS = {}
for side in (1, 2):
    names = re.sub(r"<(.*?)\|(.*?)>", rf"\{side}", MODULES.replace("@", "backbone.bottom_up."))
    COUNTERPARTS |= dict(zip(names.split()[::2], names.split()[1::2], strict=True))


DCN = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
DCN += ("MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.FCOS.USE_DEFORMABLE", True)
BN = ("MODEL.FCOS.NORM", "BN")
RGB = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD")
RGB += ([58.395, 57.12, 57.375], "MODEL.RESNETS.STRIDE_IN_1X1", False)
PADDLE = (*RGB, "MODEL.FCOS.SCORE_RULE", "product", "MODEL.FCOS.THRESH_WITH_CTR", True)
PADDLE += ("MODEL.FCOS.INFERENCE_TH_TEST", 0.025)
# Model -> config and command-line overrides.
MODELS = {
    "original_R_50": ("original/fcos_R_50_FPN_1x",),
    "original_R_50_dcn": ("original/fcos_imprv_dcnv2_R_50_FPN_1x",),
    "original_MNV2_bn": ("original/fcos_bn_bs16_MNV2_FPN_1x",),
    "adelaidet_R_50": ("fcos_R_50_FPN_1x_iou",),
    "adelaidet_R_50_dcn": ("fcos_R_50_FPN_1x", *DCN),
    "adelaidet_R_50_bn": ("fcos_R_50_FPN_1x", *BN),
    "adelaidet_RT_DLA_34": ("rt/fcos_RT_DLA_34_FPN_4x",),
    "adelaidet_RT_DLA_34_bn": ("rt/fcos_RT_DLA_34_FPN_4x_bn",),
    "adelaidet_RT_DLA_34_shtw": ("rt/fcos_RT_DLA_34_FPN_4x_shtw",),
    "adelaidet_RT_DLA_34_shtw_bn": ("rt/fcos_RT_DLA_34_FPN_4x_shtw_bn",),
    "adelaidet_V_39": ("vovnet/fcos_V_39_FPN_3x",),
    "detectron2_R_50": ("detectron2/fcos_R_50_FPN_1x",),
    "detectron2_R_50_bn": ("detectron2/fcos_R_50_FPN_1x", *BN),
    "cvpods_R_50": ("fcos_R_50_FPN_1x", "MODEL.FCOS.CONVENTION", "cvpods"),
    "torchvision_R_50": ("torchvision/fcos_R_50_FPN",),
    "torchvision_0.12": ("torchvision/fcos_R_50_FPN",),
    "mmdetection_R_50_base": ("mmdetection/fcos_R_50_FPN_1x",),
    "mmdetection_2.0": ("mmdetection/fcos_R_50_FPN_1x",),
    "mmdetection_R_50_tricks": ("mmdetection/fcos_tricks_R_50_FPN_1x",),
    "mmdetection_R_50_bn": ("mmdetection/fcos_tricks_R_50_FPN_1x", *BN),
    "mmdetection_R_50_dcn": ("mmdetection/fcos_tricks_dcnv2_R_50_FPN_1x",),
    "rosinality_V_39": ("rosinality/fcos_V_39_FPN",),
    "rosinality_V_57": ("rosinality/fcos_V_57_FPN",),
    "paddledetection_R_50": ("fcos_R_50_FPN_1x", *PADDLE),
}


def tensor_shapes(name: str) -> dict[str, list[int]]:
    """Returns the tensor shapes of a model in ``SHAPES`` or ``VARIANTS``."""
    if name in SHAPES:
        return SHAPES[name]
    source, *rules = VARIANTS[name]
    shapes = dict(SHAPES[source])
    for pattern, *names in rules:
        for key in [key for key in shapes if re.fullmatch(pattern, key)]:
            shape = shapes.pop(key)
            for new in (re.sub(pattern, name, key) for name in names):
                offset = [27, *shape[1:]] if new.endswith("weight") else [27]
                counter = [] if new.endswith("num_batches_tracked") else shape
                shapes[new] = offset if "offset" in new else counter
    return shapes


def random_weights(name: str) -> dict[str, Tensor]:
    """Returns random weights; each tensor is one number, expanded to save memory."""
    tensors = {}
    for key, shape in tensor_shapes(name).items():
        number = torch.rand(1) + 0.1 if key.endswith(("var", "variance")) else torch.randn(1)
        tensors[key] = number.reshape(()).expand(shape)
    return tensors
