"""How every other FCOS names its weights, and what these expect: one ``Layout`` each.

To read another implementation, write its table of names, a function for what its weights need, and
append both to ``LAYOUTS``; ``fcos_d2.checkpoint.conversion`` does the rest.

In the tables ``{i}``, ``{k+1}`` and ``{3*i+1}`` stand for numbers and ``**`` for any path. Both
columns name modules, theirs and ours, so that ``.weight``, ``.bias`` and the like follow by
themselves. The first row that fits wins; writing reads the same rows from right to left.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import CONVENTIONS
from ..errors import InputError

Weights = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]

CLASS_LAYER = "head.cls_logits."
# COCO's category ids that no category has, and 0; torchvision's class layer has rows for them.
COCO_GAPS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
NEVER = -1e4  # logit of a class that is never found


class Needs(NamedTuple):
    """What weights expect of the config that uses them.

    Attributes:
        conventions: MODEL.FCOS.CONVENTION; several if the file does not tell, the likeliest first.
        settings: other config keys and their values.
    """

    conventions: tuple[str, ...]
    settings: dict[str, object]


class Layout(NamedTuple):
    """How an implementation names its weights.

    Attributes:
        name: for people and the command line.
        markers: alternatives of keys, all of one of which are there.
        modules: pairs of module names, theirs and ours.
        needs: our weights and the rest of the checkpoint -> Needs.
        reading: changes of the weights after they are renamed.
        writing: changes before they are renamed back; None if that is not offered.
        ignored: pattern of their keys that are no weights of a detector.
        class_rows: rows of their class layer, classes wanted or None -> rows to keep.
    """

    name: str
    markers: tuple[tuple[str, ...], ...]
    modules: Table
    needs: Callable[[Weights, Mapping], Needs]
    reading: tuple[Callable[[Weights], Weights], ...] = ()
    writing: tuple[Callable[[Weights], Weights], ...] | None = None
    ignored: str = r"$^"
    class_rows: Callable[[int, int | None], list[int]] | None = None


def is_scale(key: str) -> bool:
    """Whether ``key`` is the factor of a level."""
    return re.fullmatch(r"head\.scales\.\d+\.scale", key) is not None


def count_classes(weights: Weights) -> int:
    """K of weights that are named as ours."""
    return len(weights[f"{CLASS_LAYER}weight"])


def _under(theirs: str, ours: str, table: Table) -> Table:
    return tuple((theirs + left, ours + right) for left, right in table)


# Names: theirs, ours.

RESNET: Table = (
    ("conv1", "stem.conv1"),
    ("bn1", "stem.conv1.norm"),
    ("layer{k}.{b}.conv{c}", "res{k+1}.{b}.conv{c}"),
    ("layer{k}.{b}.bn{c}", "res{k+1}.{b}.conv{c}.norm"),
    ("layer{k}.{b}.downsample.0", "res{k+1}.{b}.shortcut"),
    ("layer{k}.{b}.downsample.1", "res{k+1}.{b}.shortcut.norm"),
)
# Backbones that are timm's here.
DLA: Table = (("base_layer.**", "base_layer.**"), ("level{k}.**", "level{k}.**"))
VOVNET: Table = tuple(  # names of youngwanLEE/vovnet-detectron2
    (f"{theirs}{there}", f"{ours}{here}")
    for theirs, ours in (
        ("stem.stem_{i+1}/", "stem_{i}."),
        (
            "stage{s+2}.OSA{s+2}_{b+1}.layers.{c}.OSA{s+2}_{b+1}_{c}/",
            "stages_{s}.blocks.{b}.conv_mid.{c}.",
        ),
        (
            "stage{s+2}.OSA{s+2}_{b+1}.concat.OSA{s+2}_{b+1}_concat/",
            "stages_{s}.blocks.{b}.conv_concat.",
        ),
    )
    for there, here in (("conv", "conv"), ("norm", "bn"))
) + (("stage{s+2}.OSA{s+2}_{b+1}.ese.fc", "stages_{s}.blocks.{b}.attn.fc"),)
# Blocks of a MobileNetV2: (stage, block), their features.1 being (0, 0).
_BLOCKS = [(s, b) for s, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(count)]
MOBILENET_V2: Table = (
    ("features.0.0", "conv_stem"),
    ("features.0.1", "bn1"),
    ("features.1.conv.0", "blocks.0.0.conv_dw"),
    ("features.1.conv.1", "blocks.0.0.bn1"),
    ("features.1.conv.3", "blocks.0.0.conv_pw"),
    ("features.1.conv.4", "blocks.0.0.bn2"),
    *(
        (f"features.{i}.conv.{there}", f"blocks.{stage}.{block}.{here}")
        for i, (stage, block) in enumerate(_BLOCKS[1:], start=2)
        for there, here in (
            *((0, "conv_pw"), (1, "bn1"), (3, "conv_dw")),
            *((4, "bn2"), (6, "conv_pwl"), (7, "bn3")),
        )
    ),
)
ADELAIDET: Table = (
    ("proposal_generator.fcos_head.**", "head.**"),
    *_under("backbone.bottom_up.", "backbone.bottom_up.body.", DLA + VOVNET),
    ("backbone.**", "backbone.**"),
)
ORIGINAL: Table = (
    ("backbone.body.stem.conv1", "backbone.bottom_up.stem.conv1"),
    ("backbone.body.stem.bn1", "backbone.bottom_up.stem.conv1.norm"),
    ("backbone.body.layer{k}.{b}.conv2.offset", "backbone.bottom_up.res{k+1}.{b}.conv2_offset"),
    ("backbone.body.layer{k}.{b}.conv2.conv", "backbone.bottom_up.res{k+1}.{b}.conv2"),
    *_under("backbone.body.", "backbone.bottom_up.", RESNET),
    *_under("backbone.body.", "backbone.bottom_up.body.", MOBILENET_V2),
    ("backbone.body.**", "backbone.bottom_up.**"),
    ("backbone.fpn.fpn_inner{k}", "backbone.fpn_lateral{k+1}"),
    ("backbone.fpn.fpn_layer{k}", "backbone.fpn_output{k+1}"),
    ("backbone.fpn.top_blocks.p{n}", "backbone.top_block.p{n}"),
    ("rpn.head.centerness", "head.ctrness"),
    ("rpn.head.**", "head.**"),
)
DETECTRON2: Table = (
    ("backbone.**", "backbone.**"),
    ("head.cls_subnet.{i}", "head.cls_tower.{i}"),
    ("head.bbox_subnet.{i}", "head.bbox_tower.{i}"),
    ("head.cls_subnet.{i}.{level}", "head.cls_tower.{i}.{level}"),
    ("head.bbox_subnet.{i}.{level}", "head.bbox_tower.{i}.{level}"),
    ("head.cls_score", "head.cls_logits"),
    ("head.bbox_pred", "head.bbox_pred"),
    ("head.ctrness", "head.ctrness"),
)
CVPODS: Table = (
    *DETECTRON2[:-1],
    ("head.centerness", "head.ctrness"),
    ("head.scales.{level}", "head.scales.{level}"),
)
TORCHVISION: Table = (
    *_under("backbone.body.", "backbone.bottom_up.", RESNET),
    ("backbone.fpn.inner_blocks.{k}.0", "backbone.fpn_lateral{k+3}"),
    ("backbone.fpn.layer_blocks.{k}.0", "backbone.fpn_output{k+3}"),
    # before torchvision 0.13
    ("backbone.fpn.inner_blocks.{k}", "backbone.fpn_lateral{k+3}"),
    ("backbone.fpn.layer_blocks.{k}", "backbone.fpn_output{k+3}"),
    ("backbone.fpn.extra_blocks.p{n}", "backbone.top_block.p{n}"),
    ("head.classification_head.conv.{i}", "head.cls_tower.{i}"),
    ("head.regression_head.conv.{i}", "head.bbox_tower.{i}"),
    ("head.classification_head.cls_logits", "head.cls_logits"),
    ("head.regression_head.bbox_reg", "head.bbox_pred"),
    ("head.regression_head.bbox_ctrness", "head.ctrness"),
)
MMDET: Table = (
    ("backbone.layer{k}.{b}.conv2.conv_offset", "backbone.bottom_up.res{k+1}.{b}.conv2_offset"),
    *_under("backbone.", "backbone.bottom_up.", RESNET),
    ("backbone.**", "backbone.bottom_up.**"),
    ("neck.lateral_convs.{k}.conv", "backbone.fpn_lateral{k+3}"),
    ("neck.fpn_convs.3.conv", "backbone.top_block.p6"),
    ("neck.fpn_convs.4.conv", "backbone.top_block.p7"),
    ("neck.fpn_convs.{k}.conv", "backbone.fpn_output{k+3}"),
    # The last convolution of a tower, if it is deformable; there are always four.
    ("bbox_head.cls_convs.3.conv.conv_offset", "head.cls_tower.9.offset"),
    ("bbox_head.reg_convs.3.conv.conv_offset", "head.bbox_tower.9.offset"),
    ("bbox_head.cls_convs.{i}.conv", "head.cls_tower.{3*i}"),
    ("bbox_head.reg_convs.{i}.conv", "head.bbox_tower.{3*i}"),
    ("bbox_head.cls_convs.{i}.gn", "head.cls_tower.{3*i+1}"),
    ("bbox_head.reg_convs.{i}.gn", "head.bbox_tower.{3*i+1}"),
    ("bbox_head.cls_convs.{i}.bn", "head.cls_tower.{3*i+1}"),
    ("bbox_head.reg_convs.{i}.bn", "head.bbox_tower.{3*i+1}"),
    ("bbox_head.conv_cls", "head.cls_logits"),
    ("bbox_head.conv_reg", "head.bbox_pred"),
    ("bbox_head.conv_centerness", "head.ctrness"),
    # mmdetection 2.0 and before
    ("bbox_head.fcos_cls", "head.cls_logits"),
    ("bbox_head.fcos_reg", "head.bbox_pred"),
    ("bbox_head.fcos_centerness", "head.ctrness"),
    ("bbox_head.scales.{level}", "head.scales.{level}"),
)


# Values: changes of weights that are named as ours.


def _frozen_norms_with_eps(weights: Weights) -> Weights:
    """tianzhi0549/FCOS divides by the root of the variance alone, all others add 1e-5 to it.

    Only in its FrozenBatchNorm2d, which unlike BatchNorm2d counts no batches.
    """
    changed = dict(weights)
    for key, value in weights.items():
        counter = key.replace("running_var", "num_batches_tracked")
        if key.endswith(".running_var") and counter not in weights:
            changed[key] = (value.double() - 1e-5).to(value.dtype)
    return changed


def _without_counters(weights: Weights) -> Weights:
    return {k: v for k, v in weights.items() if not k.endswith(".num_batches_tracked")}


def _deformable_towers(weights: Weights) -> Weights:
    """A deformable convolution of mmdetection is beside its offsets, here it is inside."""
    deformable = {key.rpartition(".offset.")[0] for key in weights if ".offset." in key}

    def name(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        return f"{module}.conv.{leaf}" if module in deformable else key

    return {name(key): value for key, value in weights.items()}


def _with_biases(weights: Weights) -> Weights:
    """The convolutions of our towers have a bias; where mmdetection's have none it is zero."""
    added = {}
    for key, value in weights.items():
        bias = key.removesuffix("weight") + "bias"
        if re.fullmatch(r"head\.\w+_tower\..*weight", key) and value.dim() == 4:
            added[bias] = weights.get(bias, value.new_zeros(len(value)))
    return {**weights, **added}


def _scales_as_vectors(weights: Weights) -> Weights:
    return {k: v.reshape(-1) if is_scale(k) else v for k, v in weights.items()}


def _norm_per_level(weights: Weights) -> Weights:
    """Batch norms that levels share, in part or as a whole -> one for each level."""
    levels = range(_num_levels(weights))
    shared = re.compile(r"(head\.\w+_tower\.\d+)\.(\w+)")
    copied: Weights = {}
    for key, value in weights.items():
        match = shared.fullmatch(key)
        if match and (
            f"{match[1]}.running_var" in weights or f"{match[1]}.0.running_var" in weights
        ):
            copied |= {f"{match[1]}.{level}.{match[2]}": value for level in levels}
        else:
            copied[key] = value
    return copied


def _norm_of_all_levels(weights: Weights) -> Weights:
    """The reverse for weight and bias, which detectron2's levels share."""
    own = re.compile(r"(head\.\w+_tower\.\d+)\.\d+\.(weight|bias)")
    merged: Weights = {}
    for key, value in weights.items():
        match = own.fullmatch(key)
        name = f"{match[1]}.{match[2]}" if match else key
        if not torch.equal(merged.setdefault(name, value), value):
            raise InputError(
                f"detectron2's levels share the {match[2]} of a batch norm, but those of "
                f"{match[1]} differ: weights like these cannot be written exactly"
            )
    return merged


def _num_levels(weights: Weights) -> int:
    scales = sum(map(is_scale, weights))
    outputs = r"backbone\.(fpn_output|top_block\.p)\d+\.weight"
    return scales or sum(bool(re.fullmatch(outputs, key)) for key in weights)


def _with_scales(weights: Weights) -> Weights:
    if any(map(is_scale, weights)):
        return weights
    levels = range(_num_levels(weights))
    return {**weights, **{f"head.scales.{level}.scale": torch.ones(1) for level in levels}}


def _scale_in_prediction(weights: Weights) -> Weights:
    """A factor that all levels share goes into the box prediction."""
    scales = [float(value) for key, value in weights.items() if is_scale(key)]
    if len(set(scales)) > 1:
        raise InputError(
            "detectron2 and torchvision have one box prediction for all levels, but head.scales "
            f"are {', '.join(f'{scale:.4g}' for scale in scales)}: weights like these cannot be "
            "written exactly; write them as adelaidet, or train with MODEL.FCOS.USE_SCALE False"
        )
    folded = {key: value for key, value in weights.items() if not is_scale(key)}
    for key in ("head.bbox_pred.weight", "head.bbox_pred.bias"):
        if key in folded and scales:
            folded[key] = folded[key] * scales[0]
    return folded


def _group_norm_only(weights: Weights) -> Weights:
    if any(re.fullmatch(r"head\.\w+_tower\..*running_var", key) for key in weights):
        raise InputError(
            "torchvision's FCOS has group norms in its head, these weights have batch norms: they "
            "cannot be written exactly; write them as adelaidet or detectron2"
        )
    return weights


def _with_coco_gaps(weights: Weights) -> Weights:
    """80 classes -> 91 by COCO's ids; any other K -> K + 1, of which 0 is background."""
    classes = count_classes(weights)
    gaps = COCO_GAPS if classes == 80 else (0,)
    rows = [row for row in range(classes + len(gaps)) if row not in gaps]
    padded = dict(weights)
    for key in (key for key in weights if key.startswith(CLASS_LAYER)):
        old = weights[key]
        filler = NEVER if key.endswith("bias") else 0.0
        padded[key] = old.new_full((classes + len(gaps), *old.shape[1:]), filler)
        padded[key][rows] = old
    return padded


def _without_coco_gaps(rows: int, wanted: int | None) -> list[int]:
    if rows == wanted:
        return list(range(rows))
    if rows == 91:
        return [row for row in range(rows) if row not in COCO_GAPS]
    return list(range(1 if wanted == rows - 1 else 0, rows))  # 0 is background


# Needs: of weights that are named as ours.

ONES, RGB_STD = (1.0, 1.0, 1.0), (58.395, 57.12, 57.375)
CAFFE_MEAN, MSRA_MEAN = (102.9801, 115.9465, 122.7717), (103.53, 116.28, 123.675)
RGB_MEAN = MSRA_MEAN[::-1]


def _input(order: str, mean: Sequence[float], std: Sequence[float]) -> dict[str, object]:
    return {
        "INPUT.FORMAT": order,
        "MODEL.PIXEL_MEAN": list(mean),
        "MODEL.PIXEL_STD": list(std),
    }


def _stride(weights: Weights, in_1x1: bool) -> dict[str, object]:
    """Which of a bottleneck's convolutions has the stride, if the backbone has bottlenecks."""
    bottlenecks = "backbone.bottom_up.res3.0.conv3.weight" in weights
    return {"MODEL.RESNETS.STRIDE_IN_1X1": in_1x1} if bottlenecks else {}


def _groups(weights: Weights) -> int:
    """Of a ResNeXt's 3x3 convolutions."""
    weight = weights.get("backbone.bottom_up.res2.0.conv2.weight")
    if weight is None or weight.dim() != 4 or not weight.numel():
        return 1
    return len(weight) // weight.shape[1]


def _original_needs(weights: Weights, rest: Mapping) -> Needs:
    settings = _input("BGR", CAFFE_MEAN, ONES) | _stride(weights, _groups(weights) == 1)
    return Needs(("original_imprv", "original"), settings)


def _adelaidet_needs(weights: Weights, rest: Mapping) -> Needs:
    groups = _groups(weights)
    std = (57.375, 57.12, 58.395) if groups == 32 else ONES
    return Needs(("adelaidet",), _input("BGR", MSRA_MEAN, std) | _stride(weights, groups == 1))


def _detectron2_needs(weights: Weights, rest: Mapping) -> Needs:
    return Needs(("detectron2",), _input("BGR", MSRA_MEAN, ONES) | _stride(weights, True))


def _cvpods_needs(weights: Weights, rest: Mapping) -> Needs:
    # Its points lie on the corners of their cells, and it ranks before it looks at centerness.
    other = {"MODEL.FCOS.LOCATION_OFFSET": 0.0, "MODEL.FCOS.RANK_WITH_CTR": False}
    return Needs(("adelaidet",), _input("BGR", MSRA_MEAN, ONES) | _stride(weights, True) | other)


def _torchvision_needs(weights: Weights, rest: Mapping) -> Needs:
    return Needs(("torchvision",), _input("RGB", RGB_MEAN, RGB_STD) | _stride(weights, False))


def _mmdet_needs(weights: Weights, rest: Mapping) -> Needs:
    """From the config that mmdetection saves with the weights, else by the published configs."""
    meta = rest.get("meta") if isinstance(rest.get("meta"), Mapping) else {}
    sources = (meta.get("cfg"), meta.get("config"))
    options = _keywords(next((text for text in sources if isinstance(text, str)), ""))
    bias = weights.get("head.cls_tower.0.bias", torch.zeros(1))
    tricks = bool(options.get("norm_on_bbox", bias.any()))
    caffe = options.get("style", "caffe" if _groups(weights) == 1 else "pytorch") == "caffe"
    settings = _input("BGR", MSRA_MEAN if tricks else CAFFE_MEAN, ONES)
    if not caffe:
        settings = _input("RGB", RGB_MEAN, RGB_STD)
    if "mean" in options and "std" in options:
        order = "RGB" if options.get("to_rgb", options.get("bgr_to_rgb", True)) else "BGR"
        settings = _input(order, options["mean"], options["std"])
    convention = "mmdet_tricks" if tricks else "mmdet_base"
    on_box_tower = options.get("centerness_on_reg", tricks)
    if on_box_tower != CONVENTIONS[convention]["CENTERNESS_ON_REG"]:
        settings["MODEL.FCOS.CENTERNESS_ON_REG"] = on_box_tower
    return Needs((convention,), settings | _stride(weights, caffe))


def _keywords(source: str) -> dict[str, object]:
    """Literal keyword arguments and dict entries of Python text; of each name the first."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return {}
    pairs = [(node.arg, node.value) for node in nodes if isinstance(node, ast.keyword)]
    for node in nodes:
        if isinstance(node, ast.Dict):
            pairs += [
                (getattr(key, "value", None), value)
                for key, value in zip(node.keys, node.values, strict=True)
            ]
    found: dict[str, object] = {}
    for name, value in pairs:
        try:
            literal = ast.literal_eval(value)
        except (TypeError, ValueError):
            continue
        # "std" is also the name of an initialiser's standard deviation.
        if name not in ("mean", "std") or _is_pixel(literal):
            found.setdefault(name, literal)
    return found


def _is_pixel(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(number, (int, float)) for number in value)
    )


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="original",  # tianzhi0549/FCOS
        markers=(("rpn.head.cls_logits.weight", "rpn.head.centerness.weight"),),
        modules=ORIGINAL,
        needs=_original_needs,
        reading=(_frozen_norms_with_eps,),
        ignored=r"^rpn\.anchor_generator\.",
    ),
    Layout(
        name="adelaidet",  # aim-uofa/AdelaiDet
        markers=(
            (
                "proposal_generator.fcos_head.cls_logits.weight",
                "proposal_generator.fcos_head.ctrness.weight",
            ),
        ),
        modules=ADELAIDET,
        needs=_adelaidet_needs,
        writing=(_with_scales,),
        ignored=r"^pixel_(mean|std)$",
    ),
    Layout(
        name="detectron2",  # detectron2.modeling.meta_arch.fcos
        markers=(("head.cls_score.weight", "head.ctrness.weight"),),
        modules=DETECTRON2,
        needs=_detectron2_needs,
        reading=(_norm_per_level,),
        writing=(_scale_in_prediction, _norm_of_all_levels),
        ignored=r"^anchor_generator\.|^pixel_(mean|std)$",
    ),
    Layout(
        name="torchvision",  # torchvision.models.detection.fcos
        markers=(
            (
                "head.classification_head.cls_logits.weight",
                "head.regression_head.bbox_ctrness.weight",
            ),
        ),
        modules=TORCHVISION,
        needs=_torchvision_needs,
        reading=(_without_counters,),
        writing=(_group_norm_only, _scale_in_prediction, _with_coco_gaps),
        class_rows=_without_coco_gaps,
    ),
    Layout(
        name="mmdetection",  # mmdet.models.dense_heads.fcos_head
        markers=(
            ("bbox_head.conv_cls.weight", "bbox_head.conv_centerness.weight"),
            ("bbox_head.fcos_cls.weight", "bbox_head.fcos_centerness.weight"),
        ),
        modules=MMDET,
        needs=_mmdet_needs,
        reading=(
            _without_counters,
            _deformable_towers,
            _with_biases,
            _scales_as_vectors,
            _norm_per_level,
        ),
        ignored=r"^data_preprocessor\.",
    ),
    Layout(
        name="cvpods",  # Megvii-BaseDetection/cvpods
        markers=(("head.cls_score.weight", "head.centerness.weight"),),
        modules=CVPODS,
        needs=_cvpods_needs,
        reading=(_norm_per_level,),
        ignored=r"^pixel_(mean|std)$",
    ),
)
