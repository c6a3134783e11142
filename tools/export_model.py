#!/usr/bin/env python3
"""Writes a trained detector as one file that runs without fcos_d2 and without detectron2.

    python tools/export_model.py --config-file CONFIG --format onnx --output FILE MODEL.WEIGHTS PTH
    python tools/export_model.py ... --format torch_export --output FILE.pt2 --half --verify

Formats are onnx (onnxruntime, TensorRT), torch_export (torch.export.load, AOTInductor) and
torchscript (torch.jit.load, libtorch). --verify runs the file beside the model on images of the
first test set, at three sizes and in batches of one and of up to four; the exit status is 1 if they
differ. docs/deployment.md says what goes in and what comes out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from fcos_d2 import FCOS, InputError
from fcos_d2.config_file import choose_device, read_cfg
from fcos_d2.data import FCOSDatasetMapper, class_names, load_dataset
from fcos_d2.export.graph import (
    FORMATS,
    Agreement,
    compare,
    export_detector,
    join,
    load_exported,
    run_detector,
)
from fcos_d2.inference import load_detector

SIZES = (0.75, 1.0, 1.25)  # of INPUT.MIN_SIZE_TEST
BATCH_SIZES = (1, 4)


class Tolerance(NamedTuple):
    """How much may differ: box coordinates in pixels, scores, and the share of detections lost."""

    box: float
    score: float
    lost: float


FLOAT32 = Tolerance(0.05, 1e-4, 0.0)
FLOAT16 = Tolerance(0.5, 0.005, 0.05)  # rounding moves some over a threshold


def load_model(cfg: CfgNode) -> FCOS:
    """The trained detector of ``cfg``.

    Raises:
        InputError: it is no FCOS, or has no weights.
    """
    if cfg.MODEL.META_ARCHITECTURE != "FCOS":
        raise InputError(
            f"MODEL.META_ARCHITECTURE must be FCOS, got {cfg.MODEL.META_ARCHITECTURE}; pass the "
            "--config-file that the model was trained with"
        )
    if not cfg.MODEL.WEIGHTS:
        raise InputError(
            "MODEL.WEIGHTS is empty; end the command with MODEL.WEIGHTS and the file of the weights"
        )
    cfg.MODEL.COMPILE = False  # a graph is captured from the plain model
    return load_detector(cfg)


def describe(cfg: CfgNode) -> dict[str, object]:
    """What a runner must know beside the graph: how to make its input, what its classes are."""
    classes = None
    for name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        with contextlib.suppress(InputError):  # the data need not be there
            classes = classes or class_names(name)
    return {
        "channels": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "classes": classes,
    }


def verify(cfg: CfgNode, model: FCOS, path: Path, format: str, half: bool, num_images: int) -> bool:
    """Prints how well the file repeats the model's detections; whether it does.

    Raises:
        InputError: the first test set cannot be used.
    """
    if not cfg.DATASETS.TEST:
        raise InputError("--verify needs images; set DATASETS.TEST")
    records = load_dataset(cfg.DATASETS.TEST[0], filter_empty=False)[:num_images]
    tolerance = FLOAT16 if half else FLOAT32
    exported, good = load_exported(path, format), True
    print(f"{'size':>6} {'batch':>6} {Agreement.HEADER}")
    for scale in SIZES:
        images = list(_images(cfg, records, scale))
        for batch_size in BATCH_SIZES:
            batches = list(_batches(images, batch_size))
            result = join([
                compare(run_detector(model, batch), exported(batch), *tolerance[:2])
                for batch in batches
            ])  # fmt: skip
            lost = max(result.missed, result.extra)
            good &= lost <= tolerance.lost * result.detections and (half or not result.moved)
            size = round(scale * cfg.INPUT.MIN_SIZE_TEST)
            print(f"{size:6} {max(map(len, batches)):6} {result}")
    same = "the same detections" + (f", save up to {tolerance.lost:.0%}" if half else "")
    print(same if good else f"error: not {same}")
    return good


def _images(cfg: CfgNode, records: Sequence[Mapping], scale: float) -> Iterator[Tensor]:
    cfg = cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST = round(scale * cfg.INPUT.MIN_SIZE_TEST)
    cfg.INPUT.MAX_SIZE_TEST = round(scale * cfg.INPUT.MAX_SIZE_TEST)
    mapper = FCOSDatasetMapper(cfg, is_train=False)
    for record in records:
        yield mapper(dict(record))["image"]


def _batches(images: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """uint8 Tensor[up to size, 3, H, W] of images of the same size."""
    for _, group in groupby(sorted(images, key=_shape), key=_shape):
        alike = list(group)
        for first in range(0, len(alike), size):
            yield torch.stack(alike[first : first + size])


def _shape(image: Tensor) -> tuple[int, ...]:
    return tuple(image.shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--half", action="store_true", help="weights and feature maps in float16")
    parser.add_argument(
        "--verify", type=int, nargs="?", const=8, default=0, metavar="N",
        help="compare with the model on N images (default: 8)",
    )  # fmt: skip
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="override the config")
    options = parser.parse_args(arguments)
    try:
        cfg = read_cfg(options.config_file, options.opts)
        choose_device(cfg)
        model = load_model(cfg)
        export_detector(
            model, options.output, options.format, half=options.half, metadata=describe(cfg)
        )
        print(f"{options.output}: {options.output.stat().st_size / 2**20:.1f} MiB")
        if options.verify:
            return int(not verify(
                cfg, model, options.output, options.format, options.half, options.verify
            ))  # fmt: skip
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
