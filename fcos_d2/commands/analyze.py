"""Counts the parameters and multiply-adds of a model by module.

    fcos-d2 analyze --config-file FILE [--size HEIGHT WIDTH] [--depth N]

Needs neither weights nor data. Counts the backbone and the head on one image, without decoding and
NMS. One multiply-add counts as one flop, as in fvcore and most papers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from fvcore.nn import FlopCountAnalysis, flop_count_table, parameter_count
from torch import Tensor, nn

from ..config_file import read_cfg
from ..errors import InputError, exit_status
from ..inference import build_detector
from ..modeling import FCOS
from ..ops import make_levels
from .arguments import DEFAULT, check_fcos, make_config_parser

# fvcore does not count these operators, whose cost is negligible next to the convolutions.
NEGLIGIBLE = (
    "add", "add_", "clamp", "div", "exp", "max_pool2d", "mul", "mul_", "neg", "pad", "relu",
    "relu_", "rsqrt", "rsub", "sigmoid", "silu", "silu_", "sub", "sum", "upsample_nearest2d",
)  # fmt: skip


class Network(nn.Module):
    """The backbone and head of a detector."""

    def __init__(self, model: FCOS):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.network = model.network

    def forward(self, images: Tensor) -> list[Tensor]:
        """float32 Tensor[B, C, H, W] -> predictions of all levels."""
        _, predictions = self.network(images)
        return [level for kind in predictions for level in kind]


def analyze(options: argparse.Namespace) -> None:
    """Prints the counts for one image of ``--size``, padded as the model requires.

    Raises:
        InputError: the config or the size is invalid.
    """
    cfg = read_cfg(options.config_file, options.opts)
    cfg.MODEL.DEVICE, cfg.MODEL.COMPILE = "cpu", False
    size = options.size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    if min(size) < 1:
        raise InputError(
            f"the input size must be positive, got {size[0]} x {size[1]}; pass --size HEIGHT WIDTH"
        )
    model = build_detector(cfg).eval()
    check_fcos(cfg, model)
    unit = max(model.backbone.size_divisibility, 1)
    height, width = (-(-side // unit) * unit for side in size)
    network = Network(model)
    flops = FlopCountAnalysis(network, torch.zeros(1, len(model.pixel_mean), height, width))
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    print(flop_count_table(flops, max_depth=options.depth, show_param_shapes=False))
    print(f"\nparameters        {parameter_count(network)['']:,}, trainable {trainable:,}")
    print(f"network input     {height} x {width}, one image")
    shapes = [(-(-height // s), -(-width // s)) for s in model.grid.strides]
    print(f"points            {make_levels(shapes, model.grid.strides).num_points:,}")
    print(f"multiply-adds     {flops.total() / 1e9:.2f} G")
    others = flops.unsupported_ops().items()
    uncounted = {name: n for name, n in others if name.removeprefix("aten::") not in NEGLIGIBLE}
    if uncounted:
        print(f"not counted       {', '.join(f'{name} ({n})' for name, n in uncounted.items())}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_config_parser(__doc__)
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="size of the image (default: INPUT.MIN_SIZE_TEST INPUT.MAX_SIZE_TEST)",
    )  # fmt: skip
    parser.add_argument("--depth", type=int, default=2, help=f"depth of the table {DEFAULT}")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(analyze, parse(arguments))
