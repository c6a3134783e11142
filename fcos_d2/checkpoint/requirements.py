"""What weights of each format require of the config, found from the weights themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch

from ..config import CONVENTIONS
from .adjustments import Weights

ONES, RGB_STD = (1.0, 1.0, 1.0), (58.395, 57.12, 57.375)
CAFFE_MEAN, MSRA_MEAN = (102.9801, 115.9465, 122.7717), (103.53, 116.28, 123.675)
RGB_MEAN = MSRA_MEAN[::-1]


class Requirements(NamedTuple):
    """What weights require of the config that uses them.

    Attributes:
        conventions: MODEL.FCOS.CONVENTION; several if the file does not tell, the likeliest first.
        settings: other config keys and their values.
    """

    conventions: tuple[str, ...]
    settings: dict[str, object]


def _input(order: str, mean: Sequence[float], std: Sequence[float]) -> dict[str, object]:
    return {
        "INPUT.FORMAT": order,
        "MODEL.PIXEL_MEAN": list(mean),
        "MODEL.PIXEL_STD": list(std),
    }


def original(weights: Weights, rest: Mapping) -> Requirements:
    """tianzhi0549/FCOS: which of its two sets of rules does not show in the weights."""
    settings = _input("BGR", CAFFE_MEAN, ONES) | _stride(weights, _groups(weights) == 1)
    return Requirements(("original_imprv", "original"), settings)


def adelaidet(weights: Weights, rest: Mapping) -> Requirements:
    """AdelaiDet: pixels of a ResNeXt with 32 groups have their own scale."""
    groups = _groups(weights)
    std = (57.375, 57.12, 58.395) if groups == 32 else ONES
    settings = _input("BGR", MSRA_MEAN, std) | _stride(weights, groups == 1)
    return Requirements(("adelaidet",), settings)


def mmdetection(weights: Weights, rest: Mapping) -> Requirements:
    """From the config that mmdetection saves with the weights, else by its published configs."""
    meta = rest.get("meta") if isinstance(rest.get("meta"), Mapping) else {}
    sources = (meta.get("cfg"), meta.get("config"))
    source = next((text for text in sources if isinstance(text, str)), "")
    biases = weights.get("head.cls_tower.0.bias", torch.zeros(1)).any()
    tricks = _flag(source, "norm_on_bbox", bool(biases))
    caffe = _find(source, "style", r"['\"](\w+)") or ("caffe" if _groups(weights) == 1 else "")
    settings = _input("BGR", MSRA_MEAN if tricks else CAFFE_MEAN, ONES)
    if caffe != "caffe":
        settings = _input("RGB", RGB_MEAN, RGB_STD)
    mean, std = _pixel(source, "mean"), _pixel(source, "std")
    if mean and std:
        is_rgb = _flag(source, "to_rgb", _flag(source, "bgr_to_rgb", True))
        settings = _input("RGB" if is_rgb else "BGR", mean, std)
    convention = "mmdet_tricks" if tricks else "mmdet_base"
    on_box_tower = _flag(source, "centerness_on_reg", tricks)
    if on_box_tower != CONVENTIONS[convention]["CENTERNESS_ON_REG"]:
        settings["MODEL.FCOS.CENTERNESS_ON_REG"] = on_box_tower
    return Requirements((convention,), settings | _stride(weights, caffe == "caffe"))


def _fixed(
    convention: str, pixels: dict, in_1x1: bool, settings: Mapping = MappingProxyType({})
) -> Callable[[Weights, Mapping], Requirements]:
    """The same for all weights of an implementation."""

    def requirements(weights: Weights, rest: Mapping) -> Requirements:
        return Requirements((convention,), {**pixels, **_stride(weights, in_1x1), **settings})

    return requirements


def _find(source: str, name: str, pattern: str) -> str | None:
    """The first value of this pattern that Python source gives ``name``, as argument or key."""
    match = re.search(rf"\b{name}['\"]?\s*[=:]\s*{pattern}", source)
    return match and match[1]


def _flag(source: str, name: str, default: bool) -> bool:
    return {"True": True, "False": False, None: default}[_find(source, name, "(True|False)")]


def _pixel(source: str, name: str) -> list[float] | None:
    numbers = re.findall(r"-?\d+\.?\d*", _find(source, name, r"\[([^\]]*)\]") or "")
    return [float(number) for number in numbers] if len(numbers) == 3 else None


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


detectron2 = _fixed("detectron2", _input("BGR", MSRA_MEAN, ONES), in_1x1=True)
cvpods = _fixed("cvpods", _input("BGR", MSRA_MEAN, ONES), in_1x1=True)
torchvision = _fixed("torchvision", _input("RGB", RGB_MEAN, RGB_STD), in_1x1=False)
rosinality = _fixed(
    "rosinality",
    _input("RGB", (104.0136, 114.0342, 119.9166), (73.6028, 69.8908, 70.9151)),
    in_1x1=False,
    settings={"MODEL.TIMM.OPTIONS": ["residual=True"]},
)
paddledetection = _fixed(
    "adelaidet",
    _input("RGB", RGB_MEAN, RGB_STD),
    in_1x1=False,
    settings={
        "MODEL.FCOS.SCORE_RULE": "product",
        "MODEL.FCOS.THRESH_WITH_CTR": True,
        "MODEL.FCOS.INFERENCE_TH_TEST": 0.025,
    },
)
