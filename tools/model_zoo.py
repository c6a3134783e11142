#!/usr/bin/env python3
"""Writes MODEL_ZOO.md: every published FCOS with its config, size, recipe and accuracy.

    python tools/model_zoo.py [--output FILE]

Sizes and recipes come from the configs, published and measured accuracies from the tables below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg

from fcos_d2 import add_fcos_config, resolve_convention
from fcos_d2.inference import build_detector
from fcos_d2.model_zoo import WEIGHTS

ROOT = Path(__file__).parents[1]

# Measured box AP of our own training runs: config -> "AP" or "AP (test-dev)".
MEASURED = {"digits/fcos_R_18_FPN_digits": "66.7"}


class Section(NamedTuple):
    """Models of one implementation.

    Attributes:
        title: heading.
        source: Markdown link to the published accuracies; may be empty.
        note: remarks about all models.
        models: config -> published box AP on COCO val2017 (test-dev), or an empty string.
    """

    title: str
    source: str
    note: str
    models: Mapping[str, str]


SECTIONS = (
    Section(
        "AdelaiDet: the improved FCOS",
        "[README](https://github.com/aim-uofa/AdelaiDet/tree/master/configs/FCOS-Detection)",
        "Convention `adelaidet`, the default here.",
        {
            "fcos_R_50_FPN_1x": "38.7 (38.8)",
            "fcos_R_50_FPN_2x": "41.0 (41.4)",
            "fcos_R_101_FPN_2x": "43.1 (43.2)",
            "fcos_X_101_32x8d_FPN_2x": "43.9 (44.1)",
            "fcos_X_101_64x4d_FPN_2x": "44.7 (44.8)",
            "fcos_X_101_32x8d_dcnv2_FPN_2x": "46.6 (46.6)",
            "fcos_R_50_FPN_1x_iou": "39.4",
            "fcos_R_50_FPN_2x_iou": "41.5",
            "fcos_R_101_FPN_2x_iou": "43.5",
            "fcos_X_101_32x8d_FPN_2x_iou": "44.5",
            "fcos_X_101_32x8d_dcnv2_FPN_2x_iou": "47.4",
        },
    ),
    Section(
        "AdelaiDet: VoVNet",
        "[README](https://github.com/aim-uofa/AdelaiDet/tree/master/configs/FCOS-Detection/vovnet)",
        "Attention (eSE) in all blocks; timm's own VoVNets have it in the last of each stage.",
        {
            "vovnet/fcos_V_39_FPN_3x": "43.5",
            "vovnet/fcos_V_57_FPN_3x": "44.4",
            "vovnet/fcos_V_99_FPN_3x": "45.2",
        },
    ),
    Section(
        "AdelaiDet: FCOS-RT",
        "[README](https://github.com/aim-uofa/AdelaiDet/tree/master/configs/FCOS-Detection)",
        "The published DLA-34 has 41,728 more parameters: the unused projections of two nested "
        "trees.",
        {
            "rt/fcos_RT_DLA_34_FPN_4x_shtw": "39.1 (39.2)",
            "rt/fcos_RT_DLA_34_FPN_4x": "40.3 (40.3)",
            "rt/fcos_RT_R_50_FPN_4x": "40.2 (40.2)",
            "rt/fcos_RT_DLA_34_FPN_4x_shtw_bn": "38.9 (39.1)",
            "rt/fcos_RT_DLA_34_FPN_4x_bn": "39.4 (39.9)",
            "rt/fcos_RT_R_50_FPN_4x_bn": "39.3 (39.7)",
        },
    ),
    Section(
        "The original",
        "[README](https://github.com/tianzhi0549/FCOS)",
        "Conventions `original` (the paper of 2019) and `original_imprv`; COCO's minival of 2014, "
        "which has the images of val2017.",
        {
            "original/fcos_R_50_FPN_1x": "37.1 (37.4)",
            "original/fcos_R_101_FPN_2x": "41.4 (41.5)",
            "original/fcos_X_101_32x8d_FPN_2x": "42.5 (42.7)",
            "original/fcos_X_101_64x4d_FPN_2x": "43.0 (43.2)",
            "original/fcos_imprv_R_50_FPN_1x": "38.7",
            "original/fcos_imprv_dcnv2_R_50_FPN_1x": "42.3",
            "original/fcos_imprv_R_101_FPN_2x": "43.0",
            "original/fcos_imprv_dcnv2_R_101_FPN_2x": "45.6",
            "original/fcos_imprv_X_101_32x8d_FPN_2x": "44.0",
            "original/fcos_imprv_dcnv2_X_101_32x8d_FPN_2x": "46.4",
            "original/fcos_imprv_X_101_64x4d_FPN_2x": "44.7",
            "original/fcos_imprv_dcnv2_X_101_64x4d_FPN_2x": "46.6 (49.0 at several scales)",
            "original/fcos_syncbn_bs32_c128_MNV2_FPN_1x": "30.9",
            "original/fcos_syncbn_bs32_MNV2_FPN_1x": "33.1",
            "original/fcos_bn_bs16_MNV2_FPN_1x": "31.0",
        },
    ),
    Section(
        "mmdetection",
        "[README](https://github.com/open-mmlab/mmdetection/tree/main/configs/fcos)",
        "Conventions `mmdet_base` and `mmdet_tricks`. The published counts of parameters include "
        "frozen batch norms.",
        {
            "mmdetection/fcos_R_50_FPN_1x": "36.6",
            "mmdetection/fcos_R_101_FPN_1x": "39.1",
            "mmdetection/fcos_R_50_FPN_2x": "38.5",
            "mmdetection/fcos_R_101_FPN_2x": "40.8",
            "mmdetection/fcos_X_101_64x4d_FPN_2x": "42.6",
            "mmdetection/fcos_tricks_R_50_FPN_1x": "38.7",
            "mmdetection/fcos_tricks_dcnv2_R_50_FPN_1x": "42.3",
        },
    ),
    Section(
        "torchvision",
        "[documentation](https://docs.pytorch.org/vision/stable/models/fcos.html)",
        "Convention `torchvision`. The published model has 25,355 more parameters, for the 11 "
        "category ids from 0 to 90 that COCO does not use.",
        {"torchvision/fcos_R_50_FPN": "39.2"},
    ),
    Section(
        "detectron2",
        "[config](https://github.com/facebookresearch/detectron2/blob/main/configs/COCO-Detection/"
        "fcos_R_50_FPN_1x.py)",
        "Convention `detectron2`. No accuracy is published.",
        {"detectron2/fcos_R_50_FPN_1x": ""},
    ),
    Section(
        "rosinality/fcos-pytorch",
        "[README](https://github.com/rosinality/fcos-pytorch)",
        "Convention `rosinality`, P6 computed from C5. No accuracy is published.",
        {"rosinality/fcos_V_57_FPN": "", "rosinality/fcos_V_39_FPN": ""},
    ),
    Section(
        "Other backbones and other data",
        "",
        "Recipes to start from. AP is measured on the respective dataset: the Pascal VOC 2007 test "
        "set, the LVIS v1 validation set, or the built-in digits.",
        {
            "timm/fcos_convnext_tiny_FPN_1x": "",
            "timm/fcos_swin_tiny_FPN_1x": "",
            "voc/fcos_R_50_FPN_voc": "",
            "lvis/fcos_R_50_FPN_lvis_1x": "",
            "digits/fcos_R_18_FPN_digits": "",
        },
    ),
)
HEADER = """\
# Model zoo

Written by `python tools/model_zoo.py`; do not edit.

AP is box AP on COCO val2017, with test-dev in parentheses. *Published* is the AP that the authors
report for their code; *ours* is measured with these configs, and empty if not measured. Every
config follows the conventions of its implementation (`MODEL.FCOS.CONVENTION`), so that published
weights are evaluated as they were trained. Parameters include those of frozen layers, but not of
frozen batch norms.

*weights* lists weights that their authors publish under a permissive license. `MODEL.WEIGHTS
zoo://torchvision/fcos_R_50_FPN`, `fcos-d2 photo.jpg --model NAME` and
`Predictor.from_pretrained(NAME)` download them once; NAME is the path of the config without
`configs/` and `.yaml`. Checkpoints of other authors can be loaded as well, but their licenses are
non-commercial.
"""
COLUMNS = ("config", "parameters", "images x iterations", "short side", "published", "ours")
COLUMNS += ("weights", "license")


def read_config(name: str) -> CfgNode:
    """Reads ``configs/<name>.yaml`` and fills in its conventions."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    return resolve_convention(cfg)


def count_parameters(cfg: CfgNode) -> int:
    """Counts the parameters of the detector, including frozen ones."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_detector(cfg)
    return sum(parameter.numel() for parameter in model.parameters())


def _row(name: str, published: str) -> list[str]:
    cfg = read_config(name)
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    two = len(sizes) == 2 and cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice"
    side = f"{sizes[0]} {'or' if two else 'to'} {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    return [
        f"[{name.rpartition('/')[2]}](configs/{name}.yaml)",
        f"{count_parameters(cfg):,}",
        f"{cfg.SOLVER.IMS_PER_BATCH} x {cfg.SOLVER.MAX_ITER:,}",
        side,
        published,
        MEASURED.get(name, ""),
        *_weights(name),
    ]


def _weights(name: str) -> tuple[str, str]:
    if name not in WEIGHTS:
        return "", ""
    return f"[download]({WEIGHTS[name].url})", WEIGHTS[name].license


def _section(section: Section) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [_row(name, published) for name, published in section.models.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    source = f" Source: {section.source}." if section.source else ""
    return f"## {section.title}\n\n{section.note}{source}\n\n{table}\n"


def write_zoo() -> str:
    """Returns the text of MODEL_ZOO.md."""
    return "\n".join([HEADER, *map(_section, SECTIONS)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "MODEL_ZOO.md", metavar="FILE", help="%(default)s"
    )
    options = parser.parse_args(arguments)
    options.output.write_text(write_zoo())
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
