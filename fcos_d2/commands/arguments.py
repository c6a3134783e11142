"""Arguments and checks that the commands share."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from torch import nn

from ..errors import InputError
from ..modeling import FCOS

DEFAULT = "(default: %(default)s)"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser that prints ``doc``, the docstring of the command's module, as its help."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_config_parser(doc: str, required: bool = True) -> argparse.ArgumentParser:
    """Returns a parser with ``--config-file FILE`` and the KEY VALUE pairs ``opts``.

    Call its ``parse_intermixed_args``, which allows flags after the pairs.
    """
    parser = make_parser(doc)
    add = parser.add_argument
    about = "config file, or its name in the model zoo"
    add("--config-file", required=required, default="", metavar="FILE", help=about)
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser


def check_fcos(cfg: CfgNode, model: nn.Module) -> None:
    """Checks that the model is an FCOS.

    Raises:
        InputError: it is another model.
    """
    if not isinstance(model, FCOS):
        raise InputError(
            f"MODEL.META_ARCHITECTURE must be FCOS, got {cfg.MODEL.META_ARCHITECTURE}; pass the "
            "--config-file of an FCOS"
        )
