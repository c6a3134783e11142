"""The part of the command line that the commands share."""

from __future__ import annotations

import argparse


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
