"""Weight names in every other FCOS implementation, one ``CheckpointFormat`` each.

To support another implementation, write its table of names and a function that returns its
requirements (requirements.py), and append both to ``FORMATS``; conversion.py does the rest.

Each row of a table maps one of their modules to the same module here. ``{s}``, ``{s-1}`` and
``{3*n+1}`` stand for numbers: stages (s), blocks in a stage (b), convolutions in a block (c),
convolutions of a tower or levels (n); ``{b:a}`` stands for a letter, and ``<a|b>`` for the first
alternative on both sides, then the second. The row with the longest matching prefix applies, and
the rest of the name is kept: with ``head.cls_score head.cls_logits``, ``head.cls_score.bias``
becomes ``head.cls_logits.bias``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import adjustments, requirements
from .adjustments import Weights
from .requirements import Requirements

Names = dict[str, str]  # module names, theirs to ours
Adjustment = Callable[[Weights], Weights]


class CheckpointFormat(NamedTuple):
    """The names that an implementation gives its weights.

    Attributes:
        name: as shown in messages and given on the command line.
        modules: module names, theirs to ours.
        requirements: (renamed weights, rest of the checkpoint) -> Requirements.
        importing: adjustments after renaming, in addition to those of all formats.
        exporting: adjustments before renaming back; None if the format cannot be written.
        has_unused_classes: the class layer has rows that no class uses.
    """

    name: str
    modules: Names
    requirements: Callable[[Weights, Mapping], Requirements]
    importing: tuple[Adjustment, ...] = ()
    exporting: tuple[Adjustment, ...] | None = None
    has_unused_classes: bool = False


SLOT = re.compile(r"\{(?:(\d)\*)?(\w)([+-]\d)?(:a)?\}")
CHOICE = re.compile(r"<([^>]*)>")
# ResNet-152 has a stage with 36 blocks.
NUMBERS = {"s": range(2, 6), "b": range(36), "c": range(1, 4), "n": range(8)}


def _table(text: str) -> Names:
    """Expands every row to all its numbers; the first row for a module wins."""
    names: Names = {}
    words = text.split()
    for row in zip(words[::2], words[1::2], strict=True):
        letters = sorted({slot[2] for slot in SLOT.finditer(row[0])})
        choices = max((choice[1].count("|") + 1 for choice in CHOICE.finditer(row[0])), default=1)
        for i, *numbers in itertools.product(range(choices), *(NUMBERS[name] for name in letters)):
            values = dict(zip(letters, numbers, strict=True))
            theirs, ours = (_fill(template, values, i) for template in row)
            names.setdefault(theirs, ours)
    return names


def _fill(template: str, values: Mapping[str, int], choice: int) -> str:
    def number(slot: re.Match) -> str:
        factor, letter, shift, as_letter = slot.groups()
        value = int(factor or 1) * values[letter] + int(shift or 0)
        return chr(ord("a") + value) if as_letter else str(value)

    return SLOT.sub(number, CHOICE.sub(lambda found: found[1].split("|")[choice], template))


def _under(theirs: str, ours: str, names: Names) -> Names:
    return {theirs + left: ours + right for left, right in names.items()}


RESNET = _table("""
    conv1                            stem.conv1
    bn1                              stem.conv1.norm
    layer{s-1}.{b}.conv{c}           res{s}.{b}.conv{c}
    layer{s-1}.{b}.bn{c}             res{s}.{b}.conv{c}.norm
    layer{s-1}.{b}.downsample.<0|1>  res{s}.{b}.shortcut<|.norm>
""")
# Backbones that are timm's here; VoVNet has the names of youngwanLEE/vovnet-detectron2.
DLA = {name: name for name in ("base_layer", *(f"level{i}" for i in range(6)))}
VOVNET = _table("""
    stem.stem_{c}/<conv|norm>                                   stem_{c-1}.<conv|bn>
    stage{s}.OSA{s}_{b}.layers.{n}.OSA{s}_{b}_{n}/<conv|norm>
        stages_{s-2}.blocks.{b-1}.conv_mid.{n}.<conv|bn>
    stage{s}.OSA{s}_{b}.concat.OSA{s}_{b}_concat/<conv|norm>
        stages_{s-2}.blocks.{b-1}.conv_concat.<conv|bn>
    stage{s}.OSA{s}_{b}.ese.fc                                  stages_{s-2}.blocks.{b-1}.attn.fc
""")
# (stage, block) of each MobileNetV2 block; features.1 is (0, 0) and has no expansion convolution.
_BLOCKS = [(s, b) for s, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(count)]
_UNITS = "<conv_pw|bn1|conv_dw|bn2|conv_pwl|bn3>"
MOBILENET_V2 = _table("features.0.<0|1> <conv_stem|bn1>")
MOBILENET_V2 |= _table("features.1.conv.<0|3> blocks.0.0.<conv_dw|conv_pw>")
for _i, (_s, _b) in enumerate(_BLOCKS, start=1):
    _rows = _table(f"features.{_i}.conv.<0|1|3|4|6|7> blocks.{_s}.{_b}.{_UNITS}")
    MOBILENET_V2 = _rows | MOBILENET_V2

ADELAIDET = _table("""
    proposal_generator.fcos_head  head
    backbone                      backbone
""") | _under("backbone.bottom_up.", "backbone.bottom_up.body.", DLA | VOVNET)
ORIGINAL = {
    **_under("backbone.body.", "backbone.bottom_up.", RESNET),
    **_under("backbone.body.", "backbone.bottom_up.body.", MOBILENET_V2),
    **_table("""
    backbone.body                                   backbone.bottom_up
    backbone.body.stem.bn1                          backbone.bottom_up.stem.conv1.norm
    backbone.body.layer{s-1}.{b}.conv2.<offset|conv>  backbone.bottom_up.res{s}.{b}.conv2<_offset|>
    backbone.fpn.fpn_<inner|layer>{s-1}             backbone.fpn_<lateral|output>{s}
    backbone.fpn.top_blocks                         backbone.top_block
    rpn.head                                        head
    rpn.head.centerness                             head.ctrness
    """),
}
DETECTRON2 = _table("""
    backbone                backbone
    head.<cls|bbox>_subnet  head.<cls|bbox>_tower
    head.cls_score          head.cls_logits
    head.bbox_pred          head.bbox_pred
    head.ctrness            head.ctrness
""")
CVPODS = DETECTRON2 | {"head.centerness": "head.ctrness"}
# Without ".0" before torchvision 0.13.
TORCHVISION = _under("backbone.body.", "backbone.bottom_up.", RESNET) | _table("""
    backbone.fpn.<inner|layer>_blocks.{n}.0     backbone.fpn_<lateral|output>{n+3}
    backbone.fpn.<inner|layer>_blocks.{n}       backbone.fpn_<lateral|output>{n+3}
    backbone.fpn.extra_blocks                   backbone.top_block
    head.<classification|regression>_head.conv  head.<cls|bbox>_tower
    head.classification_head.cls_logits         head.cls_logits
    head.regression_head.bbox_<reg|ctrness>     head.<bbox_pred|ctrness>
""")
# "fcos_" before mmdetection 2.1.
MMDET = _under("backbone.", "backbone.bottom_up.", RESNET) | _table("""
    backbone.layer{s-1}.{b}.conv2.conv_offset       backbone.bottom_up.res{s}.{b}.conv2_offset
    neck.lateral_convs.{n}.conv                     backbone.fpn_lateral{n+3}
    neck.fpn_convs.<3|4>.conv                       backbone.top_block.p<6|7>
    neck.fpn_convs.{n}.conv                         backbone.fpn_output{n+3}
    bbox_head.<cls|reg>_convs.{n}.conv.conv_offset  head.<cls|bbox>_tower.{3*n}.offset
    bbox_head.<cls|reg>_convs.{n}.conv              head.<cls|bbox>_tower.{3*n}
    bbox_head.<cls|reg>_convs.{n}.gn                head.<cls|bbox>_tower.{3*n+1}
    bbox_head.<cls|reg>_convs.{n}.bn                head.<cls|bbox>_tower.{3*n+1}
    bbox_head.conv_<cls|reg|centerness>             head.<cls_logits|bbox_pred|ctrness>
    bbox_head.fcos_<cls|reg|centerness>             head.<cls_logits|bbox_pred|ctrness>
    bbox_head.scales                                head.scales
""")
ROSINALITY = _under("backbone.", "backbone.bottom_up.body.", VOVNET) | _table("""
    fpn.<inner|out>_convs.{s-1}  backbone.fpn_<lateral|output>{s}
    fpn.top_blocks               backbone.top_block
    head.<cls|bbox|center>_pred  head.<cls_logits|bbox_pred|ctrness>
""")
PADDLE = _table("""
    backbone.conv1.conv1.<conv|norm>                    backbone.bottom_up.stem.conv1<|.norm>
    backbone.res{s}.res{s}{b:a}.branch2<a|b|c>.conv  backbone.bottom_up.res{s}.{b}.conv<1|2|3>
    backbone.res{s}.res{s}{b:a}.branch2<a|b|c>.norm  backbone.bottom_up.res{s}.{b}.conv<1|2|3>.norm
    backbone.res{s}.res{s}{b:a}.short.<conv|norm>    backbone.bottom_up.res{s}.{b}.shortcut<|.norm>
    neck.fpn_inner_res{s}_sum<|_lateral>                backbone.fpn_lateral{s}
    neck.fpn_res{s}_sum                                 backbone.fpn_output{s}
    neck.fpn_{n}                                        backbone.top_block.p{n}
    fcos_head.fcos_feat.fcos_head_<cls|reg>_tower_conv_{n}.conv  head.<cls|bbox>_tower.{3*n}
    fcos_head.fcos_feat.fcos_head_<cls|reg>_tower_conv_{n}.norm  head.<cls|bbox>_tower.{3*n+1}
    fcos_head.fcos_head_<cls|reg|centerness>            head.<cls_logits|bbox_pred|ctrness>
    fcos_head.p{n}_feat                                 head.scales.{n-3}
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
        has_unused_classes=True,
    ),
    CheckpointFormat("mmdetection", MMDET, requirements.mmdetection),
    CheckpointFormat("cvpods", CVPODS, requirements.cvpods),  # Megvii-BaseDetection/cvpods
    CheckpointFormat("rosinality", ROSINALITY, requirements.rosinality),  # rosinality/fcos-pytorch
    CheckpointFormat("paddledetection", PADDLE, requirements.paddledetection),
)
