"""Exports a trained detector to a file that runs without fcos_d2 and detectron2.

    fcos-d2 export --config-file CONFIG --format onnx --output FILE MODEL.WEIGHTS PTH
    fcos-d2 export ... --format torch_export --output FILE.pt2 --half --verify
    fcos-d2 export ... --format onnx --output FILE --int8 --verify

Formats: onnx (ONNX Runtime, TensorRT), openvino (.xml and .bin), torch_export (torch.export.load)
and aoti (compiled by AOTInductor for this type of machine; C++ loads it without Python). --verify
compares the detections of the file and the model on images of the first test set, at three sizes
and in batches of 1 and up to 4; the exit status is 1 if they differ. docs/deployment.md describes
inputs and outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor
from tqdm import tqdm

from ..config_file import choose_device, read_cfg
from ..data import FCOSDatasetMapper, find_classes, load_dataset
from ..data.records import evenly_spaced
from ..errors import InputError, exit_status
from ..export import (
    FORMATS,
    Agreement,
    compare,
    export_detector,
    join,
    load_exported,
    run_detector,
)
from ..export.quantization import export_int8
from ..inference import load_detector
from ..modeling import FCOS
from .arguments import DEFAULT, check_fcos, make_config_parser

SCALES = (0.75, 1.0, 1.25)  # of the images, relative to evaluation
BATCH_SIZES = (1, 4)


class Tolerance(NamedTuple):
    """Tolerated errors of coordinates in pixels and of scores, and fraction of lost detections."""

    box: float
    score: float
    lost: float


FLOAT32 = Tolerance(0.05, 1e-4, 0.0)
FLOAT16 = Tolerance(0.5, 0.005, 0.05)  # rounding moves some scores across a threshold
INT8 = Tolerance(3.0, 0.1, 0.2)
CALIBRATION_IMAGES = 100


def make_metadata(cfg: CfgNode) -> dict[str, object]:
    """Returns what a runtime needs besides the graph: how to prepare its input, and the classes."""
    datasets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return {
        "channels": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "classes": find_classes(datasets, cfg.MODEL.FCOS.NUM_CLASSES)[1],
    }


def read_images(cfg: CfgNode, records: Sequence[dict]) -> list[Tensor]:
    """Reads and resizes images as in evaluation."""
    mapper = FCOSDatasetMapper(cfg, is_train=False)
    return [mapper(dict(record))["image"] for record in tqdm(records, "reading", disable=None)]


def verify(cfg: CfgNode, model: FCOS, options: argparse.Namespace) -> bool:
    """Compares the detections of file and model, prints a table, returns whether they agree.

    Raises:
        InputError: the first test set cannot be read, or the model detects nothing in it.
    """
    if not cfg.DATASETS.TEST:
        raise InputError("--verify needs images; set DATASETS.TEST")
    records = load_dataset(cfg.DATASETS.TEST[0], filter_empty=False)[: options.images]
    images = read_images(cfg, records)
    tolerance = INT8 if options.int8 else FLOAT16 if options.half else FLOAT32
    exported, good, compared = load_exported(options.output, options.format), True, 0
    print(f"{'scale':>6} {'batch':>6} {Agreement.HEADER}")
    for scale in SCALES:
        for batch_size in BATCH_SIZES:
            batches = list(_batches([_scaled(image, scale) for image in images], batch_size))
            result = join([
                compare(run_detector(model, batch), exported(batch), *tolerance[:2])
                for batch in tqdm(batches, "comparing", leave=False, disable=None)
            ])  # fmt: skip
            lost = max(result.missed, result.extra)
            good &= lost <= tolerance.lost * result.detections
            good &= tolerance != FLOAT32 or not result.moved
            compared += result.detections
            print(f"{scale:6} {max(map(len, batches)):6} {result}")
    if not compared:
        raise InputError(
            "--verify needs detections, but the model detects nothing; check MODEL.WEIGHTS, or "
            "lower MODEL.FCOS.INFERENCE_TH_TEST"
        )
    tolerated = f" (tolerated: {tolerance.lost:.0%} lost)" if tolerance.lost else ""
    print(f"{'the detections agree' if good else 'error: the detections differ'}{tolerated}")
    return good


def _scaled(image: Tensor, scale: float) -> Tensor:
    """Resizes a uint8 Tensor[C, H, W]."""
    size = [max(1, round(scale * side)) for side in image.shape[1:]]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _batches(images: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Yields uint8 Tensor[up to size, C, H, W] of images of the same shape."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    for group in groups.values():
        yield from torch.stack(group).split(size)


def export(options: argparse.Namespace) -> int:
    """Exports and, with --verify, verifies a detector; returns the exit status.

    Raises:
        InputError: the config, the weights, the data or the format cannot be used.
    """
    cfg = read_cfg(options.config_file, options.opts)
    choose_device(cfg)
    if not cfg.MODEL.WEIGHTS:
        raise InputError("MODEL.WEIGHTS is empty; append MODEL.WEIGHTS FILE to the command")
    cfg.MODEL.COMPILE = False  # export needs the uncompiled model
    model = load_detector(cfg)
    check_fcos(cfg, model)
    if options.int8:
        if options.format != "onnx" or options.half or not cfg.DATASETS.TRAIN:
            raise InputError("--int8 needs --format onnx, DATASETS.TRAIN, and no --half")
        records = load_dataset(cfg.DATASETS.TRAIN[0], filter_empty=False)
        images = read_images(cfg, evenly_spaced(records, CALIBRATION_IMAGES))
        export_int8(model, options.output, images, make_metadata(cfg))
    else:
        export_detector(
            model, options.output, options.format, half=options.half, metadata=make_metadata(cfg)
        )
    print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB")
    return int(options.verify and not verify(cfg, model, options))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_config_parser(__doc__)
    add = parser.add_argument
    add("--format", required=True, choices=FORMATS, help="format of the file")
    add("--output", required=True, type=Path, metavar="FILE", help="file to write")
    add("--half", action="store_true", help="use float16 weights and feature maps")
    add("--int8", action="store_true", help="quantize convolutions to int8 (only onnx)")
    add("--verify", action="store_true", help="compare the detections with the model's")
    add("--images", type=int, default=8, metavar="N", help=f"number of images to verify {DEFAULT}")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(export, parse(arguments))
