#!/usr/bin/env python3
"""Converts weights of any FCOS to this package's, or this package's to those of another.

    python tools/convert_weights.py fcos_R_50.pth ours.pth
    python tools/convert_weights.py output/model_final.pth theirs.pth --to torchvision

To use weights of others here no conversion is needed: MODEL.WEIGHTS takes them as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from fcos_d2 import InputError
from fcos_d2.checkpoint.conversion import OURS, WRITABLE, Recognised, is_ours, read, unwrap, write
from fcos_d2.checkpoint.formats import Needs, Weights
from fcos_d2.checkpoint.reading import load_safely, load_trusted
from fcos_d2.checkpoint.saving import atomic_write


def convert(source: str, target: str, layout: str, trust_pickle: bool) -> None:
    """Writes ``source`` to ``target`` in ``layout`` and says what it was.

    Raises:
        InputError: a file cannot be read or written, or the layout cannot hold the weights.
    """
    weights, needs, what = _read(source, trust_pickle)
    if layout != OURS:
        if what is None:
            raise InputError(f"{source} holds no FCOS that is known: it has {_names(weights)}")
        weights = write(weights, layout, needs)
    try:
        with atomic_write(target) as file:
            # torchvision's load_state_dict takes no wrapper, everybody else's takes one.
            torch.save(weights if layout == "torchvision" else {"model": weights}, file)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    print(f"{source}: {what or 'no FCOS that is known, copied as it is'}")
    print(f"{target}: {len(weights)} tensors" + (f" for {layout}" if what else ""))
    if needs and layout == OURS:
        print(f"use with: {_options(needs)}")
    elif what and layout != OURS:
        print(f"exact where everything else is as in MODEL.FCOS.CONVENTION {layout}")


def _read(source: str, trust_pickle: bool) -> tuple[Weights, Needs | None, str | None]:
    """The weights, named as ours if they are known; what they need; in words what they are."""
    try:
        checkpoint = (load_trusted if trust_pickle else load_safely)(source)
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error
    try:
        recognised: Recognised | None = read(checkpoint)
    except InputError as error:
        raise InputError(f"{source} cannot be used: {error}") from error
    if recognised:
        conventions = " or ".join(recognised.needs.conventions)
        what = f"recognised as {recognised.layout}, convention {conventions}"
        return recognised.weights, recognised.needs, what
    weights, _ = unwrap(checkpoint)
    return weights, None, f"recognised as {OURS}" if is_ours(weights) else None


def _names(weights: Weights) -> str:
    return ", ".join(list(weights)[:3])


def _options(needs: Needs) -> str:
    """What to append to a command line of train_net.py."""
    settings = {"MODEL.FCOS.CONVENTION": needs.conventions[0], **needs.settings}
    return " ".join(
        f'{key} "{value}"' if isinstance(value, list) else f"{key} {value}"
        for key, value in settings.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="weights of any known FCOS")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument(
        "--to", choices=(OURS, *WRITABLE), default=OURS, help="default: %(default)s"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="run whatever code is in IN to read it: only if you trust its author",
    )
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.target, options.to, options.trust_pickle)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
