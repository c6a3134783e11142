"""How every other FCOS names its weights: one ``CheckpointFormat`` each.

To read another implementation, write its table of names and a function for what its weights require
(requirements.py), and append both to ``FORMATS``; conversion.py does the rest.

A row of a table is a module of theirs and the same module here. ``{s}``, ``{s-1}`` and ``{3*n+1}``
stand for numbers: stages (s), blocks in a stage (b), convolutions in a block (c), convolutions of a
tower or levels (n); ``{b:a}`` for a letter. The row of the longest beginning of a tensor's name
applies, and what follows stays as it is: by ``head.cls_score head.cls_logits``,
``head.cls_score.bias`` becomes ``head.cls_logits.bias``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import adjustments, requirements
from .adjustments import Weights
from .requirements import Requirements

Names = dict[str, str]  # of modules: theirs, ours
Adjustment = Callable[[Weights], Weights]


class CheckpointFormat(NamedTuple):
    """How an implementation names its weights.

    Attributes:
        name: for people and the command line.
        modules: names of modules, theirs to ours.
        requirements: our weights and the rest of the checkpoint -> Requirements.
        importing: adjustments after the weights are renamed, beside those of all formats.
        exporting: adjustments before they are renamed back; None if that is not offered.
        class_rows: rows of their class layer, classes wanted or None -> rows to keep.
    """

    name: str
    modules: Names
    requirements: Callable[[Weights, Mapping], Requirements]
    importing: tuple[Adjustment, ...] = ()
    exporting: tuple[Adjustment, ...] | None = None
    class_rows: Callable[[int, int | None], list[int]] | None = None


SLOT = re.compile(r"\{(?:(\d)\*)?(\w)([+-]\d)?(:a)?\}")
# ResNet-152 has a stage of 36 blocks.
NUMBERS = {"s": range(2, 6), "b": range(36), "c": range(1, 4), "n": range(8)}


def _table(rows: str) -> Names:
    """Every row with all its numbers; of two for the same module the first counts."""
    names: Names = {}
    for row in filter(str.strip, rows.splitlines()):
        letters = sorted({slot[2] for slot in SLOT.finditer(row)})
        for numbers in itertools.product(*(NUMBERS[letter] for letter in letters)):
            theirs, ours = _fill(row, dict(zip(letters, numbers, strict=True))).split()
            names.setdefault(theirs, ours)
    return names


def _fill(template: str, values: Mapping[str, int]) -> str:
    def number(slot: re.Match) -> str:
        factor, letter, shift, as_letter = slot.groups()
        value = int(factor or 1) * values[letter] + int(shift or 0)
        return chr(ord("a") + value) if as_letter else str(value)

    return SLOT.sub(number, template)


def _under(theirs: str, ours: str, names: Names) -> Names:
    return {theirs + left: ours + right for left, right in names.items()}


RESNET = _table("""
    conv1                        stem.conv1
    bn1                          stem.conv1.norm
    layer{s-1}.{b}.conv{c}       res{s}.{b}.conv{c}
    layer{s-1}.{b}.bn{c}         res{s}.{b}.conv{c}.norm
    layer{s-1}.{b}.downsample.0  res{s}.{b}.shortcut
    layer{s-1}.{b}.downsample.1  res{s}.{b}.shortcut.norm
""")
# Backbones that are timm's here; VoVNet by the names of youngwanLEE/vovnet-detectron2.
DLA = {name: name for name in ("base_layer", *(f"level{i}" for i in range(6)))}
VOVNET = _table("""
    stem.stem_{c}/conv  stem_{c-1}.conv
    stem.stem_{c}/norm  stem_{c-1}.bn
    stage{s}.OSA{s}_{b}.layers.{n}.OSA{s}_{b}_{n}/conv  stages_{s-2}.blocks.{b-1}.conv_mid.{n}.conv
    stage{s}.OSA{s}_{b}.layers.{n}.OSA{s}_{b}_{n}/norm  stages_{s-2}.blocks.{b-1}.conv_mid.{n}.bn
    stage{s}.OSA{s}_{b}.concat.OSA{s}_{b}_concat/conv   stages_{s-2}.blocks.{b-1}.conv_concat.conv
    stage{s}.OSA{s}_{b}.concat.OSA{s}_{b}_concat/norm   stages_{s-2}.blocks.{b-1}.conv_concat.bn
    stage{s}.OSA{s}_{b}.ese.fc                          stages_{s-2}.blocks.{b-1}.attn.fc
""")
# Blocks of a MobileNetV2: (stage, block), features.1 being (0, 0).
_BLOCKS = [(s, b) for s, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(count)]
_UNITS = ((0, "conv_pw"), (1, "bn1"), (3, "conv_dw"), (4, "bn2"), (6, "conv_pwl"), (7, "bn3"))
MOBILENET_V2 = {
    f"features.{i}.conv.{position}": f"blocks.{stage}.{block}.{unit}"
    for i, (stage, block) in enumerate(_BLOCKS, start=1)
    for position, unit in _UNITS
} | _table("""
    features.0.0       conv_stem
    features.0.1       bn1
    features.1.conv.0  blocks.0.0.conv_dw
    features.1.conv.3  blocks.0.0.conv_pw
""")

ADELAIDET = _table("""
    proposal_generator.fcos_head  head
    backbone                      backbone
""") | _under("backbone.bottom_up.", "backbone.bottom_up.body.", DLA | VOVNET)
ORIGINAL = (
    _under("backbone.body.", "backbone.bottom_up.", RESNET)
    | _under("backbone.body.", "backbone.bottom_up.body.", MOBILENET_V2)
    | _table("""
    backbone.body                                backbone.bottom_up
    backbone.body.stem.bn1                       backbone.bottom_up.stem.conv1.norm
    backbone.body.layer{s-1}.{b}.conv2.offset    backbone.bottom_up.res{s}.{b}.conv2_offset
    backbone.body.layer{s-1}.{b}.conv2.conv      backbone.bottom_up.res{s}.{b}.conv2
    backbone.fpn.fpn_inner{s-1}                  backbone.fpn_lateral{s}
    backbone.fpn.fpn_layer{s-1}                  backbone.fpn_output{s}
    backbone.fpn.top_blocks                      backbone.top_block
    rpn.head                                     head
    rpn.head.centerness                          head.ctrness
""")
)
DETECTRON2 = _table("""
    backbone          backbone
    head.cls_subnet   head.cls_tower
    head.bbox_subnet  head.bbox_tower
    head.cls_score    head.cls_logits
    head.bbox_pred    head.bbox_pred
    head.ctrness      head.ctrness
""")
CVPODS = DETECTRON2 | _table("""
    head.centerness  head.ctrness
    head.scales      head.scales
""")
TORCHVISION = _under("backbone.body.", "backbone.bottom_up.", RESNET) | _table("""
    backbone.fpn.inner_blocks.{n}.0            backbone.fpn_lateral{n+3}
    backbone.fpn.layer_blocks.{n}.0            backbone.fpn_output{n+3}
    backbone.fpn.inner_blocks.{n}              backbone.fpn_lateral{n+3}
    backbone.fpn.layer_blocks.{n}              backbone.fpn_output{n+3}
    backbone.fpn.extra_blocks                  backbone.top_block
    head.classification_head.conv              head.cls_tower
    head.regression_head.conv                  head.bbox_tower
    head.classification_head.cls_logits        head.cls_logits
    head.regression_head.bbox_reg              head.bbox_pred
    head.regression_head.bbox_ctrness          head.ctrness
""")  # without ".0" before torchvision 0.13
MMDET = _under("backbone.", "backbone.bottom_up.", RESNET) | _table("""
    backbone                                      backbone.bottom_up
    backbone.layer{s-1}.{b}.conv2.conv_offset     backbone.bottom_up.res{s}.{b}.conv2_offset
    neck.lateral_convs.{n}.conv                   backbone.fpn_lateral{n+3}
    neck.fpn_convs.3.conv                         backbone.top_block.p6
    neck.fpn_convs.4.conv                         backbone.top_block.p7
    neck.fpn_convs.{n}.conv                       backbone.fpn_output{n+3}
    bbox_head.cls_convs.{n}.conv.conv_offset      head.cls_tower.{3*n}.offset
    bbox_head.reg_convs.{n}.conv.conv_offset      head.bbox_tower.{3*n}.offset
    bbox_head.cls_convs.{n}.conv                  head.cls_tower.{3*n}
    bbox_head.reg_convs.{n}.conv                  head.bbox_tower.{3*n}
    bbox_head.cls_convs.{n}.gn                    head.cls_tower.{3*n+1}
    bbox_head.reg_convs.{n}.gn                    head.bbox_tower.{3*n+1}
    bbox_head.cls_convs.{n}.bn                    head.cls_tower.{3*n+1}
    bbox_head.reg_convs.{n}.bn                    head.bbox_tower.{3*n+1}
    bbox_head.conv_cls                            head.cls_logits
    bbox_head.conv_reg                            head.bbox_pred
    bbox_head.conv_centerness                     head.ctrness
    bbox_head.fcos_cls                            head.cls_logits
    bbox_head.fcos_reg                            head.bbox_pred
    bbox_head.fcos_centerness                     head.ctrness
    bbox_head.scales                              head.scales
""")  # "fcos_" before mmdetection 2.1
ROSINALITY = _under("backbone.", "backbone.bottom_up.body.", VOVNET) | _table("""
    fpn.inner_convs.{s-1}  backbone.fpn_lateral{s}
    fpn.out_convs.{s-1}    backbone.fpn_output{s}
    fpn.top_blocks         backbone.top_block
    head.cls_tower         head.cls_tower
    head.bbox_tower        head.bbox_tower
    head.cls_pred          head.cls_logits
    head.bbox_pred         head.bbox_pred
    head.center_pred       head.ctrness
    head.scales            head.scales
""")
PADDLE = _table("""
    backbone.conv1.conv1.conv                              backbone.bottom_up.stem.conv1
    backbone.conv1.conv1.norm                              backbone.bottom_up.stem.conv1.norm
backbone.res{s}.res{s}{b:a}.branch2a.conv  backbone.bottom_up.res{s}.{b}.conv1
    backbone.res{s}.res{s}{b:a}.branch2a.norm  backbone.bottom_up.res{s}.{b}.conv1.norm
    backbone.res{s}.res{s}{b:a}.branch2b.conv  backbone.bottom_up.res{s}.{b}.conv2
    backbone.res{s}.res{s}{b:a}.branch2b.norm  backbone.bottom_up.res{s}.{b}.conv2.norm
    backbone.res{s}.res{s}{b:a}.branch2c.conv  backbone.bottom_up.res{s}.{b}.conv3
    backbone.res{s}.res{s}{b:a}.branch2c.norm  backbone.bottom_up.res{s}.{b}.conv3.norm
    backbone.res{s}.res{s}{b:a}.short.conv  backbone.bottom_up.res{s}.{b}.shortcut
    backbone.res{s}.res{s}{b:a}.short.norm  backbone.bottom_up.res{s}.{b}.shortcut.norm
    neck.fpn_inner_res{s}_sum_lateral                      backbone.fpn_lateral{s}
    neck.fpn_inner_res{s}_sum                              backbone.fpn_lateral{s}
    neck.fpn_res{s}_sum                                    backbone.fpn_output{s}
    neck.fpn_{n}                                           backbone.top_block.p{n}
    fcos_head.fcos_feat.fcos_head_cls_tower_conv_{n}.conv  head.cls_tower.{3*n}
    fcos_head.fcos_feat.fcos_head_cls_tower_conv_{n}.norm  head.cls_tower.{3*n+1}
    fcos_head.fcos_feat.fcos_head_reg_tower_conv_{n}.conv  head.bbox_tower.{3*n}
    fcos_head.fcos_feat.fcos_head_reg_tower_conv_{n}.norm  head.bbox_tower.{3*n+1}
    fcos_head.fcos_head_cls                                head.cls_logits
    fcos_head.fcos_head_reg                                head.bbox_pred
    fcos_head.fcos_head_centerness                         head.ctrness
    fcos_head.p{n}_feat                                    head.scales.{n-3}
""")

FORMATS = (
    CheckpointFormat(  # tianzhi0549/FCOS
        "original", ORIGINAL, requirements.original, importing=(adjustments.subtract_epsilon,)
    ),
    CheckpointFormat(  # aim-uofa/AdelaiDet
        "adelaidet", ADELAIDET, requirements.adelaidet, exporting=(adjustments.add_scales,)
    ),
    CheckpointFormat(
        "detectron2",  # detectron2.modeling.meta_arch.fcos
        DETECTRON2,
        requirements.detectron2,
        exporting=(adjustments.fold_scales, adjustments.merge_norms_of_levels),
    ),
    CheckpointFormat(
        "torchvision",  # torchvision.models.detection.fcos
        TORCHVISION,
        requirements.torchvision,
        exporting=(
            adjustments.check_group_norms,
            adjustments.fold_scales,
            adjustments.add_unused_classes,
        ),
        class_rows=adjustments.used_class_rows,
    ),
    CheckpointFormat("mmdetection", MMDET, requirements.mmdetection),
    CheckpointFormat("cvpods", CVPODS, requirements.cvpods),  # Megvii-BaseDetection/cvpods
    CheckpointFormat("rosinality", ROSINALITY, requirements.rosinality),  # rosinality/fcos-pytorch
    CheckpointFormat("paddledetection", PADDLE, requirements.paddledetection),
)
