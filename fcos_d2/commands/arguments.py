"""What the commands share."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from torch import nn

from ..errors import InputError
from ..modeling import FCOS


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the command's module."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def config_parser(doc: str, required: bool = True) -> argparse.ArgumentParser:
    """The same with ``--config-file FILE``, and KEY VALUE pairs that override it, in ``opts``.

    Parse with ``parse_intermixed_args``: flags may then follow the pairs.
    """
    parser = parser_of(doc)
    parser.add_argument("--config-file", required=required, default="", metavar="FILE")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="override the config")
    return parser


def check_fcos(cfg: CfgNode, model: nn.Module) -> None:
    """Makes sure that a command for FCOS got one.

    Raises:
        InputError: the model of the config is another.
    """
    if not isinstance(model, FCOS):
        raise InputError(
            f"MODEL.META_ARCHITECTURE must be FCOS, got {cfg.MODEL.META_ARCHITECTURE}; pass the "
            "--config-file of an FCOS"
        )
