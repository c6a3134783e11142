#!/usr/bin/env python3
"""Counts the parameters and the multiply-adds of the network of a config, by part.

    python tools/analyze_model.py --config-file FILE [--size HEIGHT WIDTH] [--depth N]

No weights and no data are needed. What is counted is what runs for one image: backbone and head,
without decoding and NMS. One multiply-add counts as one flop, as fvcore and most papers do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from fvcore.nn import FlopCountAnalysis, flop_count_table, parameter_count
from torch import Tensor, nn

from fcos_d2 import FCOS, InputError
from fcos_d2.config_file import read_cfg
from fcos_d2.engine import Trainer
from fcos_d2.ops import make_levels

# fvcore does not know these, and their work is little beside the convolutions'.
CHEAP = (
    "add", "add_", "clamp", "div", "exp", "max_pool2d", "mul", "mul_", "neg", "pad", "relu",
    "relu_", "rsqrt", "rsub", "sigmoid", "silu", "silu_", "sub", "sum", "upsample_nearest2d",
)  # fmt: skip


class Network(nn.Module):
    """The part of the detector that is made of layers."""

    def __init__(self, model: FCOS):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.in_features = model.head_in_features

    def forward(self, images: Tensor) -> list[Tensor]:
        """float32 Tensor[B, 3, H, W] -> all predictions of all levels."""
        features = self.backbone(images)
        predictions = self.head([features[name] for name in self.in_features])
        return [level for kind in predictions for level in kind]


def analyze(cfg: CfgNode, size: Sequence[int], depth: int) -> None:
    """Prints the counts for one image of ``size`` (height, width), padded as the model pads it."""
    model = Trainer.build_model(cfg).eval()
    if not isinstance(model, FCOS):
        raise InputError(
            f"MODEL.META_ARCHITECTURE must be FCOS, got {cfg.MODEL.META_ARCHITECTURE}; use "
            "detectron2's own tools/analyze_model.py for other detectors"
        )
    unit = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // unit) * unit for side in size)
    network = Network(model)
    flops = FlopCountAnalysis(network, torch.zeros(1, 3, height, width))
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    print(flop_count_table(flops, max_depth=depth, show_param_shapes=False))
    print(f"\nparameters        {parameter_count(network)['']:,}, trainable {trainable:,}")
    print(f"network input     {height} x {width}, one image")
    shapes = [(-(-height // s), -(-width // s)) for s in model.grid.strides]
    print(f"points            {make_levels(shapes, model.grid.strides).num_points:,}")
    print(f"multiply-adds     {flops.total() / 1e9:.2f} G")
    uncounted = {name: n for name, n in flops.unsupported_ops().items() if not _is_cheap(name)}
    if uncounted:
        print(f"not counted       {', '.join(f'{name} ({n})' for name, n in uncounted.items())}")


def _is_cheap(operator: str) -> bool:
    return operator.removeprefix("aten::") in CHEAP


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="default: INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST",
    )  # fmt: skip
    parser.add_argument("--depth", type=int, default=2, help="of the table (default: %(default)s)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="override the config")
    options = parser.parse_args(arguments)
    try:
        cfg = read_cfg(options.config_file, options.opts)
        cfg.MODEL.DEVICE, cfg.MODEL.COMPILE = "cpu", False
        size = options.size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        if min(size) < 1:
            raise InputError(f"--size must be positive, got {size[0]} {size[1]}")
        analyze(cfg, size, options.depth)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
