"""Derives the config settings that weights of each format require from the weights themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..config import CONVENTIONS
from .adjustments import Weights


class Requirements(NamedTuple):
    """Config settings that weights require.

    Attributes:
        conventions: MODEL.FCOS.CONVENTION; several, most likely first, if the file is ambiguous.
        settings: other config keys and their values.
    """

    conventions: tuple[str, ...]
    settings: dict[str, object]


def _pixels(order: str, mean: Sequence[float], std: Sequence[float]) -> dict[str, object]:
    means, stds = list(mean), list(std)
    return {"INPUT.FORMAT": order, "MODEL.PIXEL_MEAN": means, "MODEL.PIXEL_STD": stds}


ONES = (1.0, 1.0, 1.0)
CAFFE = _pixels("BGR", (102.9801, 115.9465, 122.7717), ONES)
MSRA = _pixels("BGR", (103.53, 116.28, 123.675), ONES)
MSRA_32X8D = _pixels("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
RGB = _pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
ROSINALITY = _pixels("RGB", (104.0136, 114.0342, 119.9166), (73.6028, 69.8908, 70.9151))


def _require(
    conventions: tuple[str, ...],
    pixels: Mapping,
    in_1x1: bool,
    settings: Mapping,
    weights: Weights,
    rest: Mapping,
) -> Requirements:
    """``in_1x1``: whether the stride of a bottleneck is in its first 1x1 convolution."""
    bottlenecks = "backbone.bottom_up.res3.0.conv3.weight" in weights
    stride = {"MODEL.RESNETS.STRIDE_IN_1X1": in_1x1} if bottlenecks else {}
    return Requirements(conventions, {**pixels, **stride, **settings})


_RESIDUAL = {"MODEL.TIMM.OPTIONS": ["residual=True"]}
_PRODUCT = {"SCORE_RULE": "product", "THRESH_WITH_CTR": True, "INFERENCE_TH_TEST": 0.025}
_PRODUCT = {f"MODEL.FCOS.{key}": value for key, value in _PRODUCT.items()}
detectron2 = partial(_require, ("detectron2",), MSRA, True, {})
cvpods = partial(_require, ("cvpods",), MSRA, True, {})
torchvision = partial(_require, ("torchvision",), RGB, False, {})
rosinality = partial(_require, ("rosinality",), ROSINALITY, False, _RESIDUAL)
paddledetection = partial(_require, ("adelaidet",), RGB, False, _PRODUCT)


def original(weights: Weights, rest: Mapping) -> Requirements:
    """Returns both conventions: the weights do not show which one they follow."""
    is_resnet = _groups(weights) == 1
    return _require(("original_imprv", "original"), CAFFE, is_resnet, {}, weights, rest)


def adelaidet(weights: Weights, rest: Mapping) -> Requirements:
    """Distinguishes ResNeXts with 32 groups, whose pixel statistics differ."""
    groups = _groups(weights)
    pixels = MSRA_32X8D if groups == 32 else MSRA
    return _require(("adelaidet",), pixels, groups == 1, {}, weights, rest)


def mmdetection(weights: Weights, rest: Mapping) -> Requirements:
    """Reads the config that mmdetection saves with the weights, or assumes a published one."""
    meta = rest.get("meta") if isinstance(rest.get("meta"), Mapping) else {}
    sources = (meta.get("cfg"), meta.get("config"))
    source = next((text for text in sources if isinstance(text, str)), "")
    biases = weights.get("head.cls_tower.0.bias", torch.zeros(1)).any()
    tricks = _flag(source, "norm_on_bbox", bool(biases))
    style = _find(source, "style", r"['\"](\w+)") or ("caffe" if _groups(weights) == 1 else "")
    pixels = RGB if style != "caffe" else MSRA if tricks else CAFFE
    mean, std = _numbers(source, "mean"), _numbers(source, "std")
    if mean and std:
        is_rgb = _flag(source, "to_rgb", _flag(source, "bgr_to_rgb", True))
        pixels = _pixels("RGB" if is_rgb else "BGR", mean, std)
    convention = "mmdet_tricks" if tricks else "mmdet_base"
    on_box_tower = _flag(source, "centerness_on_reg", tricks)
    other = on_box_tower != CONVENTIONS[convention]["CENTERNESS_ON_REG"]
    settings = {"MODEL.FCOS.CENTERNESS_ON_REG": on_box_tower} if other else {}
    return _require((convention,), pixels, style == "caffe", settings, weights, rest)


def _find(source: str, name: str, pattern: str) -> str | None:
    """Finds the first value matching ``pattern`` that Python source assigns to ``name``."""
    match = re.search(rf"\b{name}['\"]?\s*[=:]\s*{pattern}", source)
    return match and match[1]


def _flag(source: str, name: str, default: bool) -> bool:
    return {"True": True, "False": False, None: default}[_find(source, name, "(True|False)")]


def _numbers(source: str, name: str) -> list[float] | None:
    numbers = re.findall(r"-?\d+\.?\d*", _find(source, name, r"\[([^\]]*)\]") or "")
    return [float(number) for number in numbers] if len(numbers) == 3 else None


def _groups(weights: Weights) -> int:
    """Returns the number of groups in a ResNeXt's 3x3 convolutions."""
    weight = weights.get("backbone.bottom_up.res2.0.conv2.weight")
    if weight is None or weight.dim() != 4 or not weight.numel():
        return 1
    return len(weight) // weight.shape[1]
